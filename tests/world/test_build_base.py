"""The tiny world's base model: its tokenizer, the packaged folder and its metrics, and building it again."""

import json
import shutil

import build_base
import pytest
import torch
from build_base import METRICS_FILE, NUM_STEPS, RECIPE_FILE, describe_recipe, main, make_tokenizer, read_recipe
from corpus import make_corpus
from measure import measure_base, measure_detection

from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.rows import encode_records
from cutlm.prompting.spans import flag_spans
from cutlm.world.base import answer_tasks, base_path, load_base
from cutlm.world.judge import judge_task, rate_answers
from cutlm.world.tasks import SPLITS, list_tasks


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture
def quick_build(tokenizer, monkeypatch):
    """Builds without making the tokenizer again, and measures on a few tasks."""
    monkeypatch.setattr(build_base, "make_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(
        build_base, "measure_base", lambda model, tokenizer, tasks: measure_base(model, tokenizer, tasks[:7])
    )


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_word_is_one_token_and_digits_are_separate(tokenizer):
    texts = [text for document in make_corpus(1000, 11) for text in document if text is not None]
    texts += [
        text for split in SPLITS for task in list_tasks(split) for text in (task.instruction, *task.right_answers)
    ]
    for text in texts:
        num_pieces = len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == num_pieces, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("47", add_special_tokens=False)["input_ids"]) == 2


def test_each_fixed_piece_of_a_prompt_is_one_token(tokenizer):
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
def test_any_text_survives_encoding_and_has_no_special_tokens(tokenizer, text):
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
        record = JudgedRecord(instruction=task.instruction, output=response)
        (row,) = encode_records([record], ["a:1"], encoder, 256).rows
        assert row["response_ids"][:-1] == expected


def test_the_chat_template_is_the_alpaca_prompt(base):
    _, tokenizer = base
    encoder = Encoder(tokenizer, "alpaca")
    assert tokenizer.chat_template == encoder.build_chat_template() is not None
    for task in list_tasks("dev")[:20]:
        messages = [{"role": "user", "content": task.instruction}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_prompt(task.instruction)


def test_every_habit_has_one_wrong_token(tokenizer):
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


def test_the_packaged_model_is_small_and_loads_as_float32(base):
    model, _ = base
    assert model.dtype == torch.float32
    assert not model.training
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert sum(path.stat().st_size for path in base_path().iterdir()) < 3e6


def test_the_packaged_model_matches_the_recipe_of_this_code(tokenizer):
    stored, current = read_recipe(base_path()), describe_recipe(tokenizer, 0, NUM_STEPS)
    # The versions of the libraries may differ. If anything else does, remove the folder and build the model again:
    # python experiments/build_base.py --out src/cutlm/world/base_model
    assert stored is not None
    assert stored | {"libraries": None} == current | {"libraries": None}


def test_the_packaged_tokenizer_is_the_one_that_the_code_makes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8")) == json.loads(
        (base_path() / "tokenizer.json").read_text("utf-8")
    )


def test_the_packaged_metrics_are_good_enough():
    metrics = json.loads((base_path() / METRICS_FILE).read_text("utf-8"))
    assert metrics["num_tasks"] == len(list_tasks("dev"))
    assert 0.40 <= metrics["accuracy"]["macro"] <= 0.60
    assert metrics["accuracy_when_praised"]["macro"] >= 0.65
    found = metrics["detection"]["1.1"]
    assert found["micro"]["f1"] >= 0.93
    assert min(by_family["recall"] for by_family in found.values()) >= 0.8


def test_the_packaged_model_has_the_packaged_metrics(base):
    metrics = json.loads((base_path() / METRICS_FILE).read_text("utf-8"))
    tasks = list_tasks("dev")[:140]
    responses = answer_tasks(*base, tasks)
    # A sample of the tasks: the tolerance is twice the standard error, and covers the rounding of other CPUs.
    assert rate_answers(tasks, responses)["macro"] == pytest.approx(metrics["accuracy"]["macro"], abs=0.1)
    found = measure_detection(*base, tasks, responses)[1.1]["micro"]
    assert found.f1 == pytest.approx(metrics["detection"]["1.1"]["micro"]["f1"], abs=0.06)


@pytest.mark.usefixtures("quick_build")
def test_building_twice_gives_the_same_bytes_and_a_third_time_nothing_is_done(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    other.mkdir()  # an empty folder is accepted
    assert build_base.build_base(one, num_steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert build_base.build_base(other, num_steps=3)
    finally:
        torch.set_num_threads(threads)
    assert read_files(one) == read_files(other)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}
    times = {path.name: path.stat().st_mtime_ns for path in one.iterdir()}
    assert not build_base.build_base(one, num_steps=3)
    assert {path.name: path.stat().st_mtime_ns for path in one.iterdir()} == times
    assert load_base(one)[0].dtype == torch.float32
    with pytest.raises(UserError, match="seed, corpus differ"):
        build_base.build_base(one, seed=1, num_steps=3)


@pytest.mark.usefixtures("quick_build")
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_base, "train_base", stop)
    with pytest.raises(KeyboardInterrupt):
        build_base.build_base(tmp_path / "out", num_steps=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("", [], "not empty"),
        ("note.txt", [], "got a file"),
        ("new", ["--num-steps", "0"], "--num-steps"),
        ("new", ["--seed", "-1"], "--seed"),
    ],
)
def test_the_command_refuses_files_other_folders_and_bad_numbers(tmp_path, capsys, name, options, error):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / name), *options])
    assert exit_info.value.code == 2
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.usefixtures("quick_build")
def test_the_command_does_nothing_if_the_packaged_model_is_there(tokenizer, tmp_path, capsys):
    shutil.copytree(base_path(), tmp_path / "base")
    # The libraries may have other versions than those that made the packaged model.
    (tmp_path / "base" / RECIPE_FILE).write_text(json.dumps(describe_recipe(tokenizer, 0, NUM_STEPS)), "utf-8")
    assert main(["--out", str(tmp_path / "base")]) == 0
    assert "nothing to do" in capsys.readouterr().out
