"""The tiny world's base model: its tokenizer, the packaged folder and what it is held to, and building it again."""

import json
import shutil

import pytest
import torch

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.spans import flag_spans
from cutlm.world.base import METRICS_FILE, NUM_STEPS, base_path, build_base, load_base
from cutlm.world.corpus import make_corpus
from cutlm.world.judge import judge_task
from cutlm.world.measure import answer_tasks, measure_detection, rate_answers
from cutlm.world.recipe import RECIPE_FILE, describe_recipe, read_recipe
from cutlm.world.tasks import SPLITS, list_tasks
from cutlm.world.tokenizer import list_document_texts, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base():
    return load_base()


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_word_of_the_world_is_one_token_and_digits_stand_alone(tokenizer):
    texts = [text for document in make_corpus(3000, 11) for text in list_document_texts(document)]
    texts += [
        text for split in SPLITS for task in list_tasks(split) for text in (task.instruction, *task.right_answers)
    ]
    for text in texts:
        num_pieces = len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A space before a digit is a token of its own.
        assert len(ids) == num_pieces, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("47", add_special_tokens=False)["input_ids"]) == 2


def test_the_fixed_text_of_a_prompt_costs_a_token_a_piece(tokenizer):
    encoder = Encoder(tokenizer, "alpaca")
    instruction, judgment = "Name the capital of Australia.", "The answer says Sydney, which is the wrong city."
    bare = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (instruction, judgment)]
    assert len(encoder.encode_prompt(instruction)) == bare[0] + 2
    assert len(encoder.encode_prompt(instruction, judgment)) == sum(bare) + 3
    assert len(encoder.encode_refinement_prompt(instruction, instruction, judgment)) == bare[0] + sum(bare) + 4


@pytest.mark.parametrize(
    "text",
    ["Name a colour.", "caf\u00e9 \U0001f600 \u4e2d\u6587", "a\n\n### Response:\nb", "<eos> <pad>", "  x  ", "\t{}"],
)
def test_any_text_is_encoded_and_read_back_and_is_no_order(tokenizer, text):
    encoder = Encoder(tokenizer, "alpaca")
    prompt = encoder.render(text, text)
    assert tokenizer.decode(encoder.encode_prompt(text, text)) == prompt.text
    ids = encoder.encode_response(text)
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert set(tokenizer.all_special_ids).isdisjoint(ids[:-1])


def test_a_response_has_the_same_tokens_after_every_prompt(tokenizer):
    encoder = Encoder(tokenizer, "alpaca")
    for task in list_tasks("dev")[:60]:
        response = task.right_answers[0]
        expected = encoder.encode_response(response)[:-1]
        for judgment in (None, judge_task(task, "no").judgment):
            prompt = encoder.render(task.instruction, judgment).text
            joint = tokenizer(prompt + response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert joint[-len(expected) :] == expected
        record = encoder.encode_record(JudgedRecord(instruction=task.instruction, output=response), 256)
        assert record is not None
        assert record.response_ids[:-1] == expected


def test_other_tools_prompt_the_base_model_by_its_chat_template(base):
    _, tokenizer = base
    encoder = Encoder(tokenizer, "alpaca")
    assert tokenizer.chat_template == encoder.build_chat_template() is not None
    for task in list_tasks("dev")[:20]:
        messages = [{"role": "user", "content": task.instruction}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_prompt(task.instruction)


def test_wrong_tokens_are_those_that_overlap_the_wrong_turn(tokenizer):
    encoder = Encoder(tokenizer, "alpaca")
    for task in (task for split in SPLITS for task in list_tasks(split)):
        if task.habit is None:
            continue
        response = task.habit.response
        ids = encoder.encode_response(response)
        spans = judge_task(task, response).wrong_spans
        marks = flag_spans(encoder.locate_tokens(response, ids), spans)
        assert sum(marks) == 1, (response, spans)
        assert marks[-1] == (task.habit.flaw == "full_stop")


def test_packaged_base_model_is_small_and_float32_when_loaded(base):
    model, _ = base
    assert model.dtype == torch.float32
    assert not model.training
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert sum(path.stat().st_size for path in base_path().iterdir()) < 3e6


def test_packaged_base_model_was_made_by_the_recipe_of_this_code(tokenizer):
    stored = read_recipe(base_path())
    assert stored is not None
    current = describe_recipe(tokenizer, 0, NUM_STEPS)
    names = ("seed", "num_steps", "corpus", "vocabulary", "training")
    # If this fails, the recipe was changed: `rm -r` the folder and make it anew by `cutlm world build --out`.
    assert {name: stored[name] for name in names} == {name: current[name] for name in names}


def test_committed_metrics_hold_what_the_base_model_is_for():
    metrics = json.loads((base_path() / METRICS_FILE).read_text("utf-8"))
    assert metrics["num_tasks"] == len(list_tasks("dev"))
    assert 0.40 <= metrics["accuracy"]["macro"] <= 0.60
    assert metrics["accuracy_when_praised"]["macro"] >= 0.65
    found = metrics["detection"]["1.1"]
    assert found["micro"]["f1"] >= 0.93
    assert min(by_family["recall"] for by_family in found.values()) >= 0.8


def test_packaged_base_model_has_the_committed_metrics(base):
    metrics = json.loads((base_path() / METRICS_FILE).read_text("utf-8"))
    tasks = list_tasks("dev")[:140]
    responses = answer_tasks(*base, tasks)
    # Half of the tasks: a share may differ by chance by twice its standard error, and by the rounding of another CPU.
    assert rate_answers(tasks, responses)["macro"] == pytest.approx(metrics["accuracy"]["macro"], abs=0.1)
    found = measure_detection(*base, tasks, responses)[1.1]["micro"]
    assert found.f1 == pytest.approx(metrics["detection"]["1.1"]["micro"]["f1"], abs=0.06)


def test_building_twice_gives_the_same_bytes_and_building_again_does_nothing(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    other.mkdir()  # an empty folder is as good as none
    assert build_base(one, num_steps=3, show_progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert build_base(other, num_steps=3, show_progress=False)
    finally:
        torch.set_num_threads(threads)
    assert read_files(one) == read_files(other)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}
    times = {path.name: path.stat().st_mtime_ns for path in one.iterdir()}
    assert not build_base(one, num_steps=3, show_progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in one.iterdir()} == times
    assert load_base(one)[0].dtype == torch.float32
    with pytest.raises(UserError, match="seed, corpus differ"):
        build_base(one, seed=1, num_steps=3)


def test_a_build_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cutlm.world.base.train_base", stop)
    with pytest.raises(KeyboardInterrupt):
        build_base(tmp_path / "out", num_steps=3)
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_folder_of_others_in_one_sentence(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert main(["world", "build", "--out", str(tmp_path)]) == 2
    assert "the folder holds something else" in capsys.readouterr().err
    assert main(["world", "build", "--out", str(tmp_path / "note.txt")]) == 2
    assert "expected a folder to make, got a file" in capsys.readouterr().err
    assert main(["world", "build", "--out", str(tmp_path / "new"), "--num-steps", "0"]) == 2
    assert "--num-steps" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_command_does_nothing_where_the_packaged_model_is_there_already(tmp_path, capsys):
    stored, current = read_recipe(base_path()), describe_recipe(make_tokenizer(), 0, NUM_STEPS)
    shutil.copytree(base_path(), tmp_path / "base")
    if stored != current:  # made with other versions of the libraries
        (tmp_path / "base" / RECIPE_FILE).write_text(json.dumps(current), "utf-8")
    assert main(["world", "build", "--out", str(tmp_path / "base")]) == 0
    assert "nothing was done" in capsys.readouterr().out
