"""The frozen detector: the paper's flags by a model at hand, whatever happens on the way."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlm.blame.detector import FlagSettings, blame_file, describe_run
from cutlm.blame.scoring import score_rows
from cutlm.blame.token_scores import read_token_scores
from cutlm.cli import main
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import ConfigError, UserError
from cutlm.prompting.encoding import Encoder

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name the capital.", "input": "Australia", "output": "Sydney.", "judgment": "It is wrong."},
    {"instruction": "Say hello." + " Please." * 9, "output": "Hello world!", "judgment": None, "source": "mine"},
    {"instruction": "Count.", "output": "12 + 34 = 46." * 3, "judgment": "Too long, and off the point.", "score": 2.0},
    {"instruction": "Name a city.", "output": "Canberra is 🙂.", "judgment": "Perfect. A city."},
    {"instruction": "Ask.", "output": "yes", "judgment": "No question.", "wrong_spans": [[0, 3]]},
    {"instruction": "Which one?", "output": "Sydney is a large city, not the capital.", "judgment": "Say which."},
    {"instruction": "Write.", "output": "A new line\nand one more", "judgment": "Only one line was asked for."},
]
KILLED = """
import os, signal, sys
import cutlm.blame.scoring as scoring
original, num_calls = scoring.score_batch, 0
def killing(*args, **kwargs):
    global num_calls
    num_calls += 1
    if num_calls == 3:
        SIGNAL
    return original(*args, **kwargs)
scoring.score_batch = killing
from cutlm.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILL = KILLED.replace("SIGNAL", "os.kill(os.getpid(), signal.SIGKILL)")
INTERRUPT = KILLED.replace("SIGNAL", "os.kill(os.getpid(), signal.SIGINT)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", RECORDS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def list_options(model: Path, data: Path, out: Path, *options: str) -> list[str]:
    return [
        *("blame", "--model", str(model), "--data", str(data), "--out", str(out)),
        *("--device", "cpu", "--max_tokens_per_batch", "300", *options),
    ]


def score_alone(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    """In float64, the whole sequence by itself, all logits at once."""
    with torch.no_grad():
        logps = model.double()(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [float(logps[len(prompt) + place - 1, index]) for place, index in enumerate(response)]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_blame_is_equation_5_spelled_out_in_float64(model: Path, data: Path, tmp_path: Path, template: str) -> None:
    options = ["--threshold", "1.3", "--unlikelihood_weight", "0.5", "--gamma", "2", "--template", template]
    assert main(list_options(model, data, tmp_path / "out.jsonl", *options)) == 0
    all_scores = read_token_scores(tmp_path / "out.jsonl")
    twin = AutoModelForCausalLM.from_pretrained(model).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), template)  # type: ignore[arg-type]
    assert [scores.record for scores in all_scores] == load_records(data), "in the order of the records"
    num_flagged = 0
    for scores in all_scores:
        record = scores.record
        assert scores.token_ids == encoder.encode_response(record.output)
        assert scores.spans == encoder.locate_tokens(record.output, scores.token_ids)
        without = score_alone(twin, encoder.encode_prompt(record.full_instruction), scores.token_ids)
        assert scores.logps_without == pytest.approx(without, abs=1e-5)
        if record.is_satisfactory:
            assert scores.logps_with is None
            assert not any(scores.is_flagged)
            continue
        judged = score_alone(twin, encoder.encode_prompt(record.full_instruction, record.judgment), scores.token_ids)
        assert scores.logps_with == pytest.approx(judged, abs=1e-5)
        for place, flag in enumerate(scores.is_flagged):
            assert flag == (math.exp(judged[place]) > 1.3 * math.exp(without[place]))
            assert scores.weights[place] == pytest.approx(0.5 * math.exp(judged[place]) ** 2 if flag else 0, rel=1e-4)
        num_flagged += sum(scores.is_flagged)
    assert num_flagged > 5


def test_a_row_is_the_record_and_all_that_made_its_flags(model: Path, data: Path, tmp_path: Path) -> None:
    assert main(list_options(model, data, tmp_path / "out.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, record in zip(rows, RECORDS, strict=True):
        assert record.items() <= row.items()
        # The file bears out its own flags.
        for place, flag in enumerate(row["is_flagged"]):
            judged = row["logps_with"] or row["logps_without"]
            assert flag == (judged[place] - row["logps_without"][place] > math.log(row["threshold"]))
    assert rows[0]["detector"].startswith(str(model))
    assert rows[0]["template"].startswith("alpaca ")
    assert rows[0]["tokens"][-1] == "<|im_end|>"


def test_praise_is_scored_on_request_and_flags_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--with_praise")) == 0
    all_scores = read_token_scores(tmp_path / "out.jsonl")
    twin = AutoModelForCausalLM.from_pretrained(model).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    for place, praise in ((1, "Perfect."), (3, "Perfect. A city.")):
        scores = all_scores[place]
        judged = score_alone(twin, encoder.encode_prompt(scores.record.full_instruction, praise), scores.token_ids)
        assert scores.logps_with == pytest.approx(judged, abs=1e-5)
        assert not any(scores.is_flagged)
        assert not any(scores.weights)
        assert scores.record.judgment == RECORDS[place]["judgment"], "the record is what it was"


def test_counts_and_the_next_command_are_printed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    # The third response is left out, and the second record's prompt is cut.
    lengths = [len(encoder.encode_response(record["output"])) for record in RECORDS]
    assert max(lengths) == lengths[2]
    assert main(list_options(model, data, out, "--max_length", str(lengths[2]), "--template", "chat")) == 0
    printed = capsys.readouterr().out
    assert f"data.jsonl:3: the response alone fills max_length {lengths[2]}; left out" in printed
    assert re.search(
        r"6 records scored \(2 satisfactory, 4 unsatisfactory\); \d with a prompt cut .*; 1 left out", printed
    )
    scores = [scores for scores in read_token_scores(out) if not scores.record.is_satisfactory]
    num_flagged, num_tokens = sum(sum(one.is_flagged) for one in scores), sum(len(one.tokens) for one in scores)
    num_none = sum(not any(one.is_flagged) for one in scores)
    assert f"{num_flagged} of {num_tokens} tokens of unsatisfactory responses flagged (" in printed
    assert f"; {num_none} of these records without any flag" in printed
    assert (
        f"next: cutlm train --data {out} --model_name_or_path {model} --template chat --max_length {lengths[2]}"
        in printed
    )


def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_gives(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list_options(model, data, tmp_path / "whole.jsonl")) == 0
    options = list_options(model, data, tmp_path / "killed.jsonl")
    result = subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    partial = tmp_path / "killed.jsonl.partial"
    lines = partial.read_text().splitlines()
    assert 1 < len(lines) < 1 + len(RECORDS)
    assert not (tmp_path / "killed.jsonl").exists()
    # As after a power loss: a batch of which a part was written down, and the middle of a line.
    partial.write_text("\n".join(lines[:-1]) + '\n{"index": 5, "logps')
    assert main(options) == 0
    assert f"{len(lines) - 2} records were there from a run that was stopped" in capsys.readouterr().out
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_an_interrupted_run_says_how_to_go_on(model: Path, data: Path, tmp_path: Path) -> None:
    options = list_options(model, data, tmp_path / "out.jsonl")
    result = subprocess.run([sys.executable, "-c", INTERRUPT, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert f"what is finished is in {tmp_path}/out.jsonl.partial; start again with the same options" in result.stderr
    assert "Traceback" not in result.stderr
    assert main(options) == 0


def test_a_finished_batch_is_not_scored_again(model: Path, data: Path, tmp_path: Path) -> None:
    options = list_options(model, data, tmp_path / "out.jsonl")
    subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    partial = tmp_path / "out.jsonl.partial"
    num_before = len(partial.read_text().splitlines())
    subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    lines = partial.read_text().splitlines() if partial.exists() else []
    indices = [json.loads(line)["index"] for line in lines[1:]]
    assert len(indices) == len(set(indices))
    assert not lines or len(lines) > num_before


def test_other_settings_do_not_mix_with_a_stopped_run(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = list_options(model, data, tmp_path / "out.jsonl")
    subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    for further, names in (
        (["--with_praise"], "with_praise"),
        (["--template", "chat"], "template"),
        (["--bf16"], "bf16"),
        (["--max_tokens_per_batch", "999"], "max_tokens_per_batch"),
    ):
        assert main([*options, *further]) == 2
        assert f"started with other settings ({names} differ)" in capsys.readouterr().err
    write(data, RECORDS[:-1])
    assert main(options) == 2
    assert "started with other settings (data differ)" in capsys.readouterr().err
    write(data, RECORDS)
    changed = time.time() + 5
    os.utime(model / "model.safetensors", (changed, changed))
    assert main(options) == 2
    assert "started with other settings (model differ)" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_overwriting_replaces_a_partial_file_of_other_settings_and_goes_on_with_one_of_the_same(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = list_options(model, data, tmp_path / "out.jsonl")
    subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    partial = (tmp_path / "out.jsonl.partial").read_text()
    assert main([*options, "--template", "chat"]) == 2
    assert main([*options, "--template", "chat", "--overwrite"]) == 0
    assert "were there from a run that was stopped" not in capsys.readouterr().out
    (tmp_path / "out.jsonl.partial").write_text(partial)
    assert main([*options, "--overwrite"]) == 0
    assert "were there from a run that was stopped" in capsys.readouterr().out


def test_flags_are_made_anew_of_the_log_probs_of_a_stopped_run(model: Path, data: Path, tmp_path: Path) -> None:
    options = list_options(model, data, tmp_path / "out.jsonl")
    subprocess.run([sys.executable, "-c", KILL, *options], capture_output=True, check=False)
    further = ["--threshold", "1.5", "--unlikelihood_weight", "0.5", "--gamma", "0"]
    assert main([*options, *further]) == 0
    assert main([*list_options(model, data, tmp_path / "whole.jsonl"), *further]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


BROKEN_LINES = {
    "no index": '{"logps_without": [-1.0], "logps_with": null}',
    "no log-probs": '{"index": 0}',
    "another length": '{"index": 0, "logps_without": [-1.0], "logps_with": [-1.0]}',
    "no numbers": '{"index": 0, "logps_without": null, "logps_with": null}',
    "an index beyond": '{"index": 99, "logps_without": [-1.0], "logps_with": [-1.0]}',
    "nested": "[" * 200_000,
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_partial_file_with_a_line_of_something_else_is_refused_in_a_sentence(
    model: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    records, encoder = load_records(data), Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    header = describe_run(records, encoder, FlagSettings(), "m", {})
    (tmp_path / "out.jsonl.partial").write_text(f"{json.dumps(header)}\n{BROKEN_LINES[name]}\n")
    with pytest.raises(UserError, match=r"out.jsonl.partial: not the partial file of a stopped run"):
        blame_file(records, ["a"] * 7, out, encoder, lambda *_: iter(()), FlagSettings(), detector="m", backend={})  # type: ignore[arg-type, return-value]


def test_a_journal_without_finished_lines_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    path.write_text('{"seed": 1}\n{"index": ')
    assert Journal(tmp_path / "out", {"seed": 2}).lines == []
    assert path.read_text() == '{"seed": 2}\n'
    path.write_text('{"of": "somebody else"}\n')
    with pytest.raises(UserError, match="started with other settings"):
        Journal(tmp_path / "out", {"seed": 2})


def test_what_a_journal_holds_is_on_the_disk_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.partial"
    with Journal(tmp_path / "out", {"seed": 1}) as journal:
        journal.append({"index": index} for index in range(3))
    before = path.stat()
    assert [line["index"] for line in Journal(tmp_path / "out", {"seed": 1}).lines] == [0, 1, 2]
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # Half a line, and half a letter, as a kill leaves them, are cut off where they begin; the rest is not written anew.
    whole = path.read_bytes()
    path.write_bytes(whole + '{"index": 3, "text": "é'.encode()[:-1])
    monkeypatch.setattr(Path, "write_text", None)
    monkeypatch.setattr(Path, "write_bytes", None)
    assert len(Journal(tmp_path / "out", {"seed": 1}).lines) == 3
    assert path.read_bytes() == whole
    assert path.stat().st_ino == before.st_ino


def test_a_run_that_fails_before_its_first_batch_leaves_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no"), Journal(tmp_path / "out", {"seed": 1}):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_settings_of_blame_are_finite_numbers(number: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlagSettings(float(number), float(number), float(number))
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "threshold",
        "unlikelihood_weight",
        "gamma",
    ]


def test_tokens_that_the_model_has_no_embedding_for_are_refused_before_scoring(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer) - 200).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    assert main(list_options(tmp_path / "small", data, tmp_path / "out.jsonl")) == 2
    message = capsys.readouterr().err
    assert f"tokenizer: expected token ids below {len(tokenizer) - 200}, the size of the model's vocab" in message


def test_a_base_of_a_whole_model_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--base", str(model))) == 2
    assert f"--base: of use with an adapter alone, and {model} is none; leave it out" in capsys.readouterr().err


def test_after_an_adapter_the_next_command_merges_it_first(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out.jsonl"
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(target_modules=["up_proj"])).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model).save_pretrained(adapter)
    assert main(list_options(adapter, data, out, "--base", str(model))) == 0
    assert (
        f"next: cutlm merge --adapter {adapter} --out {adapter}-merged --base {model}, then: cutlm train"
        f" --data {out} --model_name_or_path {adapter}-merged" in capsys.readouterr().out
    )


def test_what_is_wrong_with_the_settings_is_said_at_once(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = ["--threshold", "0.5", "--unlikelihood_weight", "0", "--gamma", "-1", "--max_length", "1"]
    assert main(list_options(model, data, tmp_path / "out.jsonl", *further)) == 2
    message = capsys.readouterr().err
    assert "threshold: expected a number of at least 1, got 0.5" in message
    assert "unlikelihood_weight: expected a number above 0, got 0.0" in message
    assert "gamma: expected a number of at least 0, got -1.0" in message
    assert "max_length: expected a whole number of at least 2, got 1" in message
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--max_tokens_per_batch", "0")) == 2
    assert "max_tokens_per_batch: expected a whole number of at least 1, got 0" in capsys.readouterr().err
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--timeout", "3", "--tokenizer", "x")) == 2
    assert "--tokenizer, --timeout: expected only with --base_url" in capsys.readouterr().err
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--base_url", "http://localhost:1")) == 2
    assert "--device, --max_tokens_per_batch: expected only with a local model" in capsys.readouterr().err


def test_nothing_is_written_over(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert main(list_options(model, data, out)) == 2
    assert "exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert main(list_options(model, data, data, "--overwrite")) == 2
    assert "got one of the inputs" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main(list_options(model, data, out, "--overwrite")) == 0
    assert len(read_token_scores(out)) == len(RECORDS)


def test_token_scores_can_be_blamed_again(model: Path, data: Path, tmp_path: Path) -> None:
    assert main(list_options(model, data, tmp_path / "a.jsonl", "--threshold", "2")) == 0
    assert main(list_options(model, tmp_path / "a.jsonl", tmp_path / "b.jsonl")) == 0
    assert main(list_options(model, data, tmp_path / "c.jsonl")) == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_fields_that_would_be_lost_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "data.jsonl", [RECORDS[0] | {"model": "gpt"}, RECORDS[1] | {"tokenizer": "x", "tokens": 3}])
    assert main(list_options(model, path, tmp_path / "out.jsonl")) == 2
    message = capsys.readouterr().err
    assert "data.jsonl:2: field 'tokenizer': a name that token scores need for their own; rename it" in message
    assert "data.jsonl:2: field 'tokens'" in message
    assert "data.jsonl:1" not in message
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_nothing_to_score_is_an_error(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list_options(model, data, tmp_path / "out.jsonl", "--max_length", "2")) == 2
    message = capsys.readouterr().err
    assert "data.jsonl:7: the response alone fills max_length 2; left out" in message
    assert "no record is left to be scored; give a larger max_length" in message
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_records_longer_than_the_models_context_are_said(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    assert main(list_options(tmp_path / "short", data, tmp_path / "out.jsonl")) == 2
    message = capsys.readouterr().err
    assert re.search(r"max_length: expected at most the model's context of 64 tokens, got 2048, and .*64", message)
    # The advice can be followed.
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert main(list_options(tmp_path / "short", data, tmp_path / "out.jsonl", "--max_length", "64")) == 0


def test_what_is_written_can_be_read_however_small_or_near_to_certain(tmp_path: Path) -> None:
    def score(rows: Any, done: Any) -> Any:
        logps = torch.full((len(rows[0]["response_ids"]),), -9999.0, dtype=torch.float64)
        certain = torch.full_like(logps, 1e-9)  # a probability above 1, by rounding
        yield [(0, logps, logps / 2), (1, certain, None)]

    records = [JudgedRecord(**RECORDS[0]), JudgedRecord(**(RECORDS[0] | {"judgment": None}))]
    encoder = Encoder(make_tokenizer("bpe"), "alpaca")
    out = tmp_path / "out.jsonl"
    counts = blame_file(records, ["a:1", "a:2"], out, encoder, score, FlagSettings(), detector="m", backend={})
    assert counts.num_flagged == counts.num_tokens > 0
    flagged, certain = read_token_scores(out)
    assert all(flagged.is_flagged)
    assert all(weight > 0 for weight in flagged.weights), "the smallest number there is, and not 0"
    assert certain.logps_without == [0.0] * len(certain.token_ids)


# ---- score_rows ----

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7], "judged_prompt_ids": [5, 6, 7, 8, 9], "response_ids": [10, 11, 2], "location": "a:1"},
    {"prompt_ids": [5, 9], "judged_prompt_ids": None, "response_ids": [12, 2], "location": "a:2"},
    {"prompt_ids": list(range(3, 40)), "judged_prompt_ids": [5], "response_ids": [13, 14, 15, 2], "location": "a:3"},
    {"prompt_ids": [7], "judged_prompt_ids": [7, 8], "response_ids": [16, 2], "location": "a:4"},
]


@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
def test_rows_are_scored_the_longest_first_within_the_budget(max_tokens: int) -> None:
    model = make_model(64)
    batches = list(score_rows(model, ROWS, max_tokens_per_batch=max_tokens, show_progress=False))
    assert sorted(index for batch in batches for index, _, _ in batch) == [0, 1, 2, 3]
    assert 2 in [index for index, _, _ in batches[0]]
    assert len(batches) == {1: 4, 20: 3, 10_000: 1}[max_tokens]
    twin = make_model(64)
    for index, without, judged in (item for batch in batches for item in batch):
        row = ROWS[index]
        assert without.dtype == torch.float32
        assert without.tolist() == pytest.approx(score_alone(twin, row["prompt_ids"], row["response_ids"]), abs=1e-5)
        if row["judged_prompt_ids"] is None:
            assert judged is None
        else:
            assert judged is not None
            expected = score_alone(twin, row["judged_prompt_ids"], row["response_ids"])
            assert judged.tolist() == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_done_are_left_out_and_the_others_are_what_they_would_be() -> None:
    model = make_model(64)
    whole = {index: scores for batch in score_rows(model, ROWS, show_progress=False) for index, *scores in batch}
    (batch,) = score_rows(model, ROWS, done={0, 1}, show_progress=False)
    assert [index for index, _, _ in batch] == [2, 3]
    for index, without, judged in batch:
        assert torch.equal(without, whole[index][0])
        assert torch.equal(judged, whole[index][1])
    assert list(score_rows(model, ROWS, done={0, 1, 2, 3}, show_progress=False)) == []


def test_half_a_line_of_a_journal_is_cut_off(tmp_path: Path) -> None:
    for number in range(3):
        with Journal(tmp_path / "out", {"seed": 1}) as journal:
            assert journal.lines == [{"index": index} for index in range(number)]
            journal.append([{"index": number}])
        with open(journal.path, "a") as file:
            file.write('{"index": ')


def test_dropout_is_off_and_each_module_is_left_as_it_was() -> None:
    model = make_model(64, attention_dropout=0.9).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, again = (
        {
            index: without.tolist()
            for batch in score_rows(model, ROWS, show_progress=False)
            for index, without, _ in batch
        }
        for _ in range(2)
    )
    assert first == again
    assert [module.training for module in model.modules()] == modes


def test_scores_can_be_used_in_training() -> None:
    model = make_model(64)
    ((*_, (_, without, _)),) = score_rows(model, ROWS, show_progress=False)
    weight = torch.ones(1, requires_grad=True)
    assert torch.is_grad_enabled()
    (weight * without).sum().backward()
    assert weight.grad is not None


def test_autocast_is_on_request() -> None:
    model = make_model(64)
    exact, rough = (
        next(score_rows(model, ROWS, is_bf16=is_bf16, show_progress=False))[0][1] for is_bf16 in (False, True)
    )
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.3)
    assert rough.dtype == torch.float32


def test_log_probs_that_are_no_numbers_name_their_rows() -> None:
    model = make_model(64)
    model.model.embed_tokens.weight.data[16] = float("nan")
    with pytest.raises(
        UserError, match=r"a:3.*a:4: log-probs that are no numbers, 2 records in all; .* --dtype float32"
    ):
        list(score_rows(model, ROWS, show_progress=False))


def test_settings_have_the_papers_defaults() -> None:
    settings = FlagSettings()
    assert (settings.threshold, settings.unlikelihood_weight, settings.gamma) == (1.1, 1.0, 1.0)
