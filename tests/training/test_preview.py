"""`cutlm preview` and `--dry_run`: what a run would train on, without its model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from tiny import make_tokenizer

import cutlm
from cutlm.cli import main
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.training.preview import choose_examples, tabulate_lengths

BASE_MODEL = Path(cutlm.__file__).parent / "world" / "base_model"
BAD = {"instruction": "Name a colour.", "output": "A horse.", "judgment": "A horse is no colour."}
GOOD = {"instruction": "Name a colour.", "output": "Red.", "judgment": None}


def run(tmp_path: Path, rows: list[dict[str, Any]], *options: str, command: str = "preview") -> int:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {"data": path, "model_name_or_path": BASE_MODEL, "output_dir": tmp_path / "out", "use_cpu": "true"}
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return main([*command.split(), *given, "--report_to", "none", *options])


def read_table(out: str) -> dict[str, list[str]]:
    rows = re.findall(r"^\| ([^|]+) \|(.*)\|$", out, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_counts_lengths_and_steps_are_shown(tmp_path, capsys):
    rows = [BAD, GOOD, GOOD | {"output": "Red, blue and green."}]
    assert run(tmp_path, rows, "--per_device_train_batch_size", "2", "--num_train_epochs", "3") == 0
    out = capsys.readouterr().out
    assert "3 records encoded (2 satisfactory, 1 unsatisfactory)" in out
    assert "2 steps per epoch, 6 in all" in out
    encoder = Encoder(load_tokenizer(BASE_MODEL), "alpaca")
    table = read_table(out)
    lengths = sorted(len(encoder.encode_response(row["output"])) for row in rows)
    num, smallest, median, *_, largest, total = table["response"]
    assert [num, smallest, median, largest, total] == [str(n) for n in (3, *lengths, sum(lengths))]
    assert table["prompt with the judgment"][0] == "1"


def test_steps_are_those_of_full_batches_if_others_are_dropped(tmp_path, capsys):
    options = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "-1"]
    assert run(tmp_path, [BAD, GOOD] * 4 + [BAD], *options) == 0
    assert "3 steps per epoch, 9 in all" in capsys.readouterr().out
    assert run(tmp_path, [BAD, GOOD] * 4 + [BAD], *options, "--dataloader_drop_last", "true") == 0
    assert "2 steps per epoch, 6 in all" in capsys.readouterr().out


def test_a_chat_template_that_is_not_used_is_named(tmp_path, capsys):
    make_tokenizer(chat=True).save_pretrained(tmp_path / "tokenizer")
    for template, is_named in (("alpaca", True), ("chat", False)):
        options = ("--model_name_or_path", str(tmp_path / "tokenizer"), "--template", template)
        assert run(tmp_path, [BAD, GOOD], *options) == 0
        assert ("warning: this model has a chat template" in capsys.readouterr().out) == is_named
    assert run(tmp_path, [BAD, GOOD]) == 0  # a model that was trained with the alpaca prompt
    assert "has a chat template" not in capsys.readouterr().out


def test_a_record_longer_than_the_models_context_is_named(tmp_path, capsys):
    rows = [GOOD | {"instruction": "Name a colour. " * 100}, BAD]
    for options, is_named in ((("--max_length", "257"), True), (("--max_length", "256"), False)):
        assert run(tmp_path, rows, *options) == 0
        message = "warning: max_length: expected at most the model's context of 256 tokens, got 257 and a record of 257"
        assert (message in capsys.readouterr().out) == is_named


def test_trained_tokens_are_marked_with_the_end_of_the_turn(tmp_path, capsys):
    assert run(tmp_path, [BAD, GOOD]) == 0
    out = capsys.readouterr().out
    end = load_tokenizer(BASE_MODEL).eos_token
    assert out.count(f"[[A horse.{end}]]") == 2  # without and with the judgment
    assert out.count(f"[[Red.{end}]]") == 1
    assert re.findall(r"Example \d of 2: .*:(\d), (\w+)", out) == [("1", "unsatisfactory"), ("2", "satisfactory")]


def test_tokens_to_unlearn_are_marked_and_the_judged_prompt_is_not_trained(tmp_path, capsys):
    assert run(tmp_path, [BAD | {"wrong_spans": [[2, 7]]}, GOOD], "--detector", "spans") == 0
    out = capsys.readouterr().out
    assert "{{" in out
    assert "horse" in re.search(r"\{\{(.*?)\}\}", out, re.DOTALL)[1].replace("}}{{", "")
    assert len(re.findall(r"with the judgment, .* not trained", out)) == 1


@pytest.mark.parametrize("objective", ["dual_cut", "self_distillation", "redirect"])
def test_the_judged_prompts_of_other_objectives_are_not_trained(tmp_path, capsys, objective):
    assert run(tmp_path, [BAD, GOOD], "--objective", objective) == 0
    out = capsys.readouterr().out
    end = load_tokenizer(BASE_MODEL).eos_token
    assert (out.count(f"[[A horse.{end}]]"), out.count(f"[[Red.{end}]]")) == (1, 1)
    num_judged = 2 if objective == "dual_cut" else 1
    assert len(re.findall(r"with the judgment, .* not trained", out)) == num_judged


def test_records_of_an_excluded_part_of_the_loss_are_left_out(tmp_path, capsys):
    rows = [BAD, GOOD, GOOD | {"output": "Blue."}]
    options = ["--detector", "frozen", "--use_satisfactory_loss", "false", "--per_device_train_batch_size", "1"]
    assert run(tmp_path, rows, *options) == 0
    out = capsys.readouterr().out
    assert "2 records of an excluded part of the loss are left out" in out
    assert "1 rows, 1 per optimizer step: 1 steps per epoch" in out


def test_what_does_not_fit_is_counted(tmp_path, capsys):
    rows = [GOOD, GOOD | {"instruction": "Name a colour. " * 60}, GOOD | {"output": "Red. " * 60}]
    assert run(tmp_path, rows, "--max_length", "60") == 0
    out = capsys.readouterr().out
    assert re.search(r"2 records encoded .* ([12]) prompts truncated .* 1 records left out", out)
    assert f"{tmp_path}/records.jsonl:3: the response alone fills max_length 60; left out" in out
    assert int(read_table(out)["longest sequence (max_length 60)"][-2]) <= 60


def test_long_prompts_are_shown_by_their_ends(tmp_path, capsys):
    assert run(tmp_path, [GOOD | {"instruction": "Name a colour. " * 200}], "--max_length", "4000") == 0
    assert re.search(r"\[\.\.\. [\d,]+ characters \.\.\.\]", capsys.readouterr().out)


def test_doubts_and_records_to_evaluate_on_are_named(tmp_path, capsys):
    rows = [BAD, GOOD, GOOD | {"output": "Blue."}, BAD | {"judgment": "n/a"}]
    assert run(tmp_path, rows, "--eval_split", "0.25", "--eval_strategy", "epoch") == 0
    out = capsys.readouterr().out
    assert "warning: 1 record with a judgment that says nothing" in out
    assert "1 records are to evaluate on" in out
    assert "3 rows, " in out


def test_pairs_are_shown_with_both_responses(tmp_path, capsys):
    assert run(tmp_path, [BAD, GOOD], "--objective", "dpo") == 0
    out = capsys.readouterr().out
    assert "1 pairs of 2 records" in out
    assert (out.count("[[Red."), out.count("[[A horse.")) == (1, 1)


@pytest.mark.parametrize("command", ["train --dry_run", "train-judge --dry_run"])
def test_a_dry_run_prints_settings_that_read_back_with_the_preview_as_comments(command, tmp_path, capsys):
    odd = "A horse.\nlearning_rate: 5\u2028gamma: 1\x85seed: 9\x1b[31m"
    assert run(tmp_path, [BAD | {"output": odd}, GOOD], "--learning_rate", "0.125", command=command) == 0
    out = capsys.readouterr().out
    settings = yaml.safe_load(out)
    assert (settings["learning_rate"], settings["data"]) == (0.125, f"{tmp_path}/records.jsonl")
    assert "seed" not in settings
    assert "# train_dataset: 2 records encoded" in out
    assert "\x1b" not in out
    assert not (tmp_path / "out").exists()


def test_bad_rows_fail_and_data_that_are_not_there_are_named(tmp_path, capsys):
    for command in ("preview", "train --dry_run"):
        assert run(tmp_path, [GOOD, {"instruction": "x"}], command=command) == 2
        assert "records.jsonl:2: field 'output' is missing" in capsys.readouterr().err
    missing = f"{tmp_path}/none.jsonl"
    assert run(tmp_path, [GOOD], "--data", missing) == 2
    assert run(tmp_path, [GOOD], "--data", missing, command="train --dry_run") == 0
    assert f"# {missing}: no such file" in capsys.readouterr().out


def test_settings_files_name_several_files_and_columns(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "output": "x", "judgment": None}) + "\n")
    values = {"data": [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], "columns": {"prompt": "instruction"}}
    values |= {"model_name_or_path": str(BASE_MODEL), "use_cpu": True}
    for _ in range(2):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
        assert main(["train", "--config", str(tmp_path / "settings.yaml"), "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert "2 records encoded" in out
        values = yaml.safe_load(out)
    assert values["columns"] == {"prompt": "instruction"}
    assert main(["preview", "--config", str(tmp_path / "settings.yaml"), "--columns", '{"a": 1}']) == 2
    assert "columns: expected" in capsys.readouterr().err


def test_examples_are_of_both_kinds_and_the_longest():
    rows = [{"prompt_ids": [0] * n, "response_ids": [0], "is_satisfactory": n != 3} for n in (1, 2, 3, 9, 4)]
    chosen = choose_examples(Dataset.from_list(rows))
    assert [len(rows[index]["prompt_ids"]) for index in chosen] == [3, 1, 9]
    assert choose_examples(Dataset.from_list(rows[:1])) == [0]


def test_percentiles_are_those_of_the_lengths():
    rows = [{"prompt_ids": [0] * n, "response_ids": [0]} for n in range(1, 102)]
    table = read_table(tabulate_lengths(Dataset.from_list(rows), 200))
    assert table["prompt"] == [
        "101",
        "1",
        "51",
        "91",
        "100",
        "101",
        "5,151",
    ]
