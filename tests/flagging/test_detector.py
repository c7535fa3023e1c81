"""The frozen detector: the flags of the paper by a local model, and runs that are killed, resumed or refused."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import KillPoint, list_options, start_command, write_lines
from peft import LoraConfig, get_peft_model
from reference import score_response
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cutlm.flagging.detector as detector
import cutlm.flagging.scoring as scoring
from cutlm.cli import main
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import ConfigError, UserError
from cutlm.flagging.detector import FlagSettings, blame_file, describe_run, encode_for_scoring
from cutlm.flagging.report import read_sensitivity
from cutlm.flagging.scoring import Scored, score_rows
from cutlm.flagging.sensitivity import pair_foreign
from cutlm.flagging.token_scores import read_token_scores
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "data.jsonl", RECORDS)


def blame(model: Path, data: Path, out: Path, *options: str, **settings: Any) -> int:
    return main(list_blame_options(model, data, out, *options, **settings))


def list_blame_options(model: Path, data: Path, out: Path, *options: str, **settings: Any) -> list[str]:
    values = {"model": model, "data": data, "out": out, "device": "cpu", "max_tokens_per_batch": 300} | settings
    return ["blame", *list_options(**values), *options]


# ---- Results ----


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_flags_and_weights_follow_the_equations(model: Path, data: Path, tmp_path: Path, template: Any) -> None:
    settings = {"threshold": 1.3, "unlikelihood_weight": 0.5, "gamma": 2, "template": template}
    assert blame(model, data, tmp_path / "out.jsonl", **settings) == 0
    all_scores = read_token_scores(tmp_path / "out.jsonl")
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), template)
    assert [scores.record for scores in all_scores] == load_records(data), "in the order of the records"
    num_flagged = 0
    for scores in all_scores:
        record = scores.record
        assert scores.token_ids == encoder.encode_response(record.output)
        assert scores.spans == encoder.locate_tokens(record.output, scores.token_ids)
        without = score_response(reference, encoder.encode_prompt(record.full_instruction), scores.token_ids)
        assert scores.logps_without == pytest.approx(without, abs=1e-5)
        if record.is_satisfactory:
            assert scores.logps_with is None
            assert not any(scores.is_flagged)
            continue
        judged_ids = encoder.encode_prompt(record.full_instruction, record.judgment)
        judged = score_response(reference, judged_ids, scores.token_ids)
        assert scores.logps_with == pytest.approx(judged, abs=1e-5)
        for index, flag in enumerate(scores.is_flagged):
            assert flag == (math.exp(judged[index]) > 1.3 * math.exp(without[index]))
            assert scores.weights[index] == pytest.approx(0.5 * math.exp(judged[index]) ** 2 if flag else 0, rel=1e-4)
        num_flagged += sum(scores.is_flagged)
    assert num_flagged > 5


def test_a_row_contains_the_record_and_explains_its_flags(model: Path, data: Path, tmp_path: Path) -> None:
    assert blame(model, data, tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, record in zip(rows, RECORDS, strict=True):
        assert record.items() <= row.items()
        # The flags follow from the log-probabilities of the file, which are rounded.
        for index, flag in enumerate(row["is_flagged"]):
            judged = row["logps_with"] or row["logps_without"]
            assert flag == (judged[index] - row["logps_without"][index] > math.log(row["threshold"]))
    assert rows[0]["detector"].startswith(str(model))
    assert rows[0]["template"].startswith("alpaca ")
    assert rows[0]["tokens"][-1] == "<|im_end|>"


def test_praise_is_scored_on_request_and_never_flagged(model: Path, data: Path, tmp_path: Path) -> None:
    assert blame(model, data, tmp_path / "out.jsonl", "--with_praise") == 0
    all_scores = read_token_scores(tmp_path / "out.jsonl")
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    for index, praise in ((1, "Perfect."), (3, "Perfect. A city.")):
        scores = all_scores[index]
        prompt_ids = encoder.encode_prompt(scores.record.full_instruction, praise)
        judged = score_response(reference, prompt_ids, scores.token_ids)
        assert scores.logps_with == pytest.approx(judged, abs=1e-5)
        assert not any(scores.is_flagged)
        assert not any(scores.weights)
        assert scores.record.judgment == RECORDS[index]["judgment"], "the record itself is not changed"


def test_a_satisfactory_response_is_scored_with_praise_even_if_its_judgment_objects() -> None:
    encoder = Encoder(make_tokenizer(), "alpaca")
    record = JudgedRecord(instruction="Name a city.", output="Paris.", judgment="It is short.", score=9)
    encoded = encode_for_scoring([record], ["a:1"], encoder, FlagSettings(with_praise=True))
    assert encoded.rows[0]["judged_prompt_ids"] == encoder.encode_prompt("Name a city.", "Perfect.")


def test_counts_and_the_next_command_are_printed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    # The third response is left out, and the prompt of the second record is truncated.
    lengths = [len(encoder.encode_response(record["output"])) for record in RECORDS]
    assert max(lengths) == lengths[2]
    settings = {"max_length": lengths[2], "template": "chat"}
    assert blame(model, data, out, **settings) == 0
    printed = capsys.readouterr().out
    assert "data.jsonl:3: " in printed
    scores = [scores for scores in read_token_scores(out) if not scores.record.is_satisfactory]
    num_flagged, num_tokens = sum(sum(one.is_flagged) for one in scores), sum(len(one.tokens) for one in scores)
    num_without = sum(not any(one.is_flagged) for one in scores)
    counts = r"6 records scored \(2 satisfactory, 4 unsatisfactory\); [1-6] .* truncated prompt; 1 left out\n"
    counts += rf"{num_flagged} of {num_tokens} tokens .*; {num_without} of these records without any flag"
    assert re.search(counts, printed)
    next_command = ["cutlm train", *list_options(data=out, model_name_or_path=model, template="chat")]
    assert f"{' '.join(next_command)} --max_length {lengths[2]} --output_dir runs/NAME\n" in printed


def test_the_next_command_after_an_adapter_merges_it_first(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out.jsonl"
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(target_modules=["up_proj"])).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model).save_pretrained(adapter)
    assert blame(adapter, data, out, base=model) == 0
    printed = capsys.readouterr().out
    assert f"cutlm merge --adapter {adapter} --out {adapter}-merged --base {model}" in printed
    assert f"cutlm train --data {out} --model_name_or_path {adapter}-merged" in printed


def test_token_scores_can_be_scored_again(model: Path, data: Path, tmp_path: Path) -> None:
    assert blame(model, data, tmp_path / "a.jsonl", threshold=2) == 0
    assert blame(model, tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 0
    assert blame(model, data, tmp_path / "c.jsonl") == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_extreme_log_probs_can_be_written_and_read(tmp_path: Path) -> None:
    def score(rows: Any, done: Any) -> Any:
        logps = torch.full((len(rows[0]["response_ids"]),), -9999.0, dtype=torch.float64)
        certain = torch.full_like(logps, 1e-9)  # a probability above 1, by rounding
        yield [Scored(0, logps, logps / 2), Scored(1, certain, None)]

    records = [JudgedRecord(**RECORDS[0]), JudgedRecord(**(RECORDS[0] | {"judgment": None}))]
    encoder = Encoder(make_tokenizer("bpe"), "alpaca")
    out = tmp_path / "out.jsonl"
    report = blame_file(records, ["a:1", "a:2"], out, encoder, score, FlagSettings(), detector="m", backend={})
    assert report.num_flagged == report.num_tokens > 0
    flagged, certain = read_token_scores(out)
    assert (report.num_records, report.num_judged, report.num_without_flag) == (2, 1, 0)
    assert all(flagged.is_flagged)
    assert all(weight > 0 for weight in flagged.weights), "an underflow becomes the smallest number above 0"
    assert certain.logps_without == [0.0] * len(certain.token_ids)


# ---- The report ----


def test_the_report_has_the_sensitivity_of_the_model(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert blame(model, data, out, template="chat") == 0
    report = json.loads(Path(f"{out}.report.json").read_text())
    all_scores = read_token_scores(out)
    judged = [scores for scores in all_scores if not scores.record.is_satisfactory]
    num_tokens = sum(len(scores.token_ids) for scores in judged)
    own_share = sum(sum(scores.is_flagged) for scores in judged) / num_tokens
    assert report["num_records"] == len(RECORDS)
    assert report["flagged_share"] == pytest.approx(own_share)
    found = report["sensitivity"]
    assert found["num_records"] == len(judged)
    assert found["flagged_share_own"] == pytest.approx(own_share), "all records are in the sample"
    # The same by an independent model in float64.
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "chat")
    foreign = pair_foreign([str(scores.record.judgment) for scores in judged])
    num_flagged = num_larger = 0
    for scores, source in zip(judged, foreign, strict=True):
        assert scores.logps_with is not None
        assert scores.logps_without is not None
        prompt_ids = encoder.encode_prompt(scores.record.full_instruction, judged[source].record.judgment)
        logps = score_response(reference, prompt_ids, scores.token_ids)
        rises = [logp - without for logp, without in zip(logps, scores.logps_without, strict=True)]
        own = [logp - without for logp, without in zip(scores.logps_with, scores.logps_without, strict=True)]
        num_flagged += sum(rise > math.log(1.1) for rise in rises)
        num_larger += max(own) > max(rises)
    assert found["flagged_share_foreign"] == pytest.approx(num_flagged / num_tokens)
    assert found["flag_signal"] == pytest.approx(1 - num_flagged / num_tokens / own_share)
    assert found["pairwise"] == num_larger / len(judged)


def test_the_sample_can_be_smaller_or_off(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, expected in ((0, None), (2, 2)):
        out = tmp_path / f"{number}.jsonl"
        assert blame(model, data, out, sensitivity_records=number) == 0
        found = json.loads(Path(f"{out}.report.json").read_text())["sensitivity"]
        assert (found and found["num_records"]) == expected
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    capsys.readouterr()
    assert blame(model, data, tmp_path / "bad.jsonl", sensitivity_records=-1) == 2
    assert "sensitivity_records: " in capsys.readouterr().err


def test_judgments_of_one_text_have_no_sensitivity(model: Path, tmp_path: Path) -> None:
    rows = [row | {"judgment": "It is wrong.", "score": None} for row in RECORDS]
    out = tmp_path / "out.jsonl"
    assert blame(model, write_lines(tmp_path / "data.jsonl", rows), out) == 0
    assert json.loads(Path(f"{out}.report.json").read_text())["sensitivity"] is None


def test_flags_of_a_model_that_does_not_read_judgments_are_called_noise_once(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blame(model, data, tmp_path / "out.jsonl", threshold=1) == 0
    sensitivity = read_sensitivity(tmp_path / "out.jsonl")
    assert sensitivity is not None
    noise = sensitivity.describe_noise()
    assert noise is not None, "a random model flags half of the tokens, whatever the judgment says"
    assert capsys.readouterr().out.count(noise) == 1


# ---- Stopped runs ----


@pytest.fixture(scope="module")
def partial_file(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The partial file of a run that was killed in its third batch."""
    folder = tmp_path_factory.mktemp("killed")
    data = write_lines(folder / "data.jsonl", RECORDS)
    options = list_blame_options(model, data, folder / "out.jsonl")
    result = start_command(options, KillPoint("cutlm.flagging.scoring", "score_batch", 3)).wait()
    assert result.exit_code == -signal.SIGKILL, result.stderr
    assert {path.name for path in folder.iterdir()} == {"data.jsonl", "out.jsonl.partial"}
    return folder / "out.jsonl.partial"


@pytest.fixture
def killed(partial_file: Path, tmp_path: Path) -> Path:
    """The output file of a killed run, next to which its partial file is."""
    shutil.copy(partial_file, tmp_path / "killed.jsonl.partial")
    return tmp_path / "killed.jsonl"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("complete")
    assert blame(model, write_lines(folder / "data.jsonl", RECORDS), folder / "out.jsonl") == 0
    return folder / "out.jsonl"


def count_resumed(capsys: pytest.CaptureFixture[str]) -> int:
    """The number of records that a run took from an interrupted one."""
    found = re.search(r"^(\d+) records were ", capsys.readouterr().out, re.MULTILINE)
    return int(found[1]) if found else 0


def test_a_killed_run_resumes_and_writes_what_an_uninterrupted_one_writes(
    model: Path, data: Path, killed: Path, complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = Path(f"{killed}.partial")
    lines = partial.read_text().splitlines()
    assert 2 < len(lines) < 1 + len(RECORDS)
    # After a power loss: a part of a batch, and then half a line.
    partial.write_text("\n".join(lines[:-1]) + '\n{"index": 5, "logps')
    assert blame(model, data, killed) == 0
    assert count_resumed(capsys) == len(lines) - 2
    assert killed.read_bytes() == complete.read_bytes()
    assert not partial.exists()


def test_finished_batches_are_not_scored_again(
    model: Path, data: Path, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_finished = len(Path(f"{killed}.partial").read_text().splitlines()) - 1
    num_scored: list[int] = []
    original = scoring.score_batch

    def count(model: Any, batch: Any, **options: Any) -> Any:
        num_scored.append(len(batch["locations"]))
        return original(model, batch, **options)

    monkeypatch.setattr(scoring, "score_batch", count)
    assert blame(model, data, killed) == 0
    num_foreign = sum(not record.is_satisfactory for record in load_records(data))
    assert sum(num_scored) == len(RECORDS) - num_finished + num_foreign


def test_foreign_judgments_are_not_scored_again(
    model: Path, data: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(detector, "write_report", stop)
        assert blame(model, data, out) == 130
    assert not Path(f"{out}.report.json").exists()
    lines = Path(f"{out}.partial").read_text().splitlines()
    num_foreign = sum("logps_foreign" in line for line in lines)
    assert num_foreign == sum(not record.is_satisfactory for record in load_records(data))
    # Only the last foreign judgment is missing.
    Path(f"{out}.partial").write_text("\n".join(lines[:-1]) + "\n")
    num_scored: list[int] = []
    original = scoring.score_batch

    def count(model: Any, batch: Any, **options: Any) -> Any:
        num_scored.append(1)
        return original(model, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_batch", count)
        assert blame(model, data, out) == 0
    assert sum(num_scored) == 1
    for suffix in ("", ".report.json"):
        assert Path(f"{out}{suffix}").read_bytes() == Path(f"{complete}{suffix}").read_bytes()


def test_ctrl_c_keeps_finished_batches_and_exits_with_130(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0
    original = scoring.score_batch

    def interrupt(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_batch", interrupt)
        assert blame(model, data, tmp_path / "out.jsonl") == 130
    message = capsys.readouterr().err
    assert f"{tmp_path}/out.jsonl.partial" in message
    assert "Traceback" not in message
    assert blame(model, data, tmp_path / "out.jsonl") == 0
    assert count_resumed(capsys) > 0


def test_a_run_with_other_settings_does_not_resume(
    model: Path, data: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(f"{killed}.partial").read_bytes()
    changes: dict[str, tuple[list[str], dict[str, Any]]] = {
        "with_praise": (["--with_praise"], {}),
        "template": ([], {"template": "chat"}),
        "bf16": (["--bf16"], {}),
        "max_tokens_per_batch": ([], {"max_tokens_per_batch": 999}),
    }
    for name, (options, settings) in changes.items():
        assert blame(model, data, killed, *options, **settings) == 2
        assert f"({name} differ)" in capsys.readouterr().err
    write_lines(data, RECORDS[:-1])
    assert blame(model, data, killed) == 2
    assert "(data differ)" in capsys.readouterr().err
    write_lines(data, RECORDS)
    weights = model / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights, (time.time() + 5, time.time() + 5))
    try:
        assert blame(model, data, killed) == 2
    finally:
        os.utime(weights, ns=times)
    assert "(model differ)" in capsys.readouterr().err
    assert Path(f"{killed}.partial").read_bytes() == before


def test_overwriting_replaces_a_partial_file_of_other_settings_and_resumes_one_of_the_same(
    model: Path, data: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(f"{killed}.partial", tmp_path / "same.jsonl.partial")
    assert blame(model, data, killed, "--overwrite", template="chat") == 0
    assert count_resumed(capsys) == 0
    assert blame(model, data, tmp_path / "same.jsonl", "--overwrite") == 0
    assert count_resumed(capsys) > 0


def test_a_resumed_run_makes_flags_with_its_own_settings(model: Path, data: Path, killed: Path, tmp_path: Path) -> None:
    settings = {"threshold": 1.5, "unlikelihood_weight": 0.5, "gamma": 0}
    assert blame(model, data, killed, **settings) == 0
    assert blame(model, data, tmp_path / "complete.jsonl", **settings) == 0
    assert killed.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()


DAMAGED_LINES = {
    "no index": '{"logps_without": [-1.0], "logps_with": null}',
    "no log-probs": '{"index": 0}',
    "wrong length": '{"index": 0, "logps_without": [-1.0], "logps_with": [-1.0]}',
    "no numbers": '{"index": 0, "logps_without": null, "logps_with": null}',
    "index out of range": '{"index": 99, "logps_without": [-1.0], "logps_with": [-1.0]}',
    "nested": "[" * 200_000,
    "foreign without an index": '{"index": [0], "source": 2, "logps_foreign": [-1.0]}',
}


@pytest.mark.parametrize("name", DAMAGED_LINES)
def test_a_damaged_partial_file_is_refused(model: Path, data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.jsonl"
    records, encoder = load_records(data), Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    header = describe_run(records, encoder, FlagSettings(), "m", {})
    Path(f"{out}.partial").write_text(f"{json.dumps(header)}\n{DAMAGED_LINES[name]}\n")
    score: Any = lambda *_: iter(())  # noqa: E731
    with pytest.raises(UserError, match=f"^{out}.partial: "):
        blame_file(records, ["a"] * 7, out, encoder, score, FlagSettings(), detector="m", backend={})


# ---- The journal of a run ----


def test_a_journal_without_finished_lines_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    path.write_text('{"seed": 1}\n{"index": ')
    assert list(Journal(tmp_path / "out", {"seed": 2}).lines) == []
    assert path.read_text() == '{"seed": 2}\n'
    path.write_text('{"of": "another program"}\n')
    with pytest.raises(UserError, match=f"^{path}: "):
        Journal(tmp_path / "out", {"seed": 2})


def test_opening_a_journal_only_truncates_an_incomplete_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.partial"
    with Journal(tmp_path / "out", {"seed": 1}) as journal:
        journal.append({"index": index} for index in range(3))
    before = path.stat()
    assert [line["index"] for line in Journal(tmp_path / "out", {"seed": 1}).lines] == [0, 1, 2]
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # A kill may leave half a line, and half a character; the complete lines are not written again.
    complete = path.read_bytes()
    path.write_bytes(complete + '{"index": 3, "text": "é'.encode()[:-1])
    monkeypatch.setattr(Path, "write_text", None)
    monkeypatch.setattr(Path, "write_bytes", None)
    assert len(Journal(tmp_path / "out", {"seed": 1}).lines) == 3
    assert path.read_bytes() == complete
    assert path.stat().st_ino == before.st_ino


def test_a_journal_is_continued_after_an_incomplete_line(tmp_path: Path) -> None:
    for number in range(3):
        with Journal(tmp_path / "out", {"seed": 1}) as journal:
            assert list(journal.lines) == [{"index": index} for index in range(number)]
            journal.append([{"index": number}])
        with open(journal.path, "a") as file:
            file.write('{"index": ')


def test_a_run_that_fails_before_its_first_batch_leaves_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no"), Journal(tmp_path / "out", {"seed": 1}):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


# ---- Bad input ----


def test_settings_have_the_papers_defaults() -> None:
    settings = FlagSettings()
    assert (settings.threshold, settings.unlikelihood_weight, settings.gamma) == (1.1, 1.0, 1.0)


@pytest.mark.parametrize(
    "values", [(math.inf, math.inf, math.inf, 2), (math.nan, math.nan, math.nan, 2), (0.5, 0.0, -1.0, 1)]
)
def test_settings_out_of_range_are_all_named(values: tuple[float, float, float, int]) -> None:
    with pytest.raises(ConfigError) as error:
        FlagSettings(*values)
    names = ["threshold", "unlikelihood_weight", "gamma", "max_length"][: 4 if values[3] < 2 else 3]
    assert [problem.partition(":")[0] for problem in error.value.problems] == names


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"threshold": 0.5, "max_length": 1}, ["threshold: ", "max_length: "]),
        ({"max_tokens_per_batch": 0}, ["max_tokens_per_batch: "]),
        ({"timeout": 3, "tokenizer": "x"}, ["--tokenizer, --timeout: "]),
        ({"base_url": "http://localhost:1"}, ["--device, --max_tokens_per_batch: "]),
    ],
)
def test_bad_options_are_named(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    names: list[str],
) -> None:
    assert blame(model, data, tmp_path / "out.jsonl", **settings) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names)


def test_only_an_adapter_takes_a_base(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blame(model, data, tmp_path / "out.jsonl", base=model) == 2
    assert capsys.readouterr().err.startswith("cutlm blame: --base: ")


def test_no_file_is_overwritten_unasked(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert blame(model, data, out) == 2
    assert capsys.readouterr().err.startswith(f"cutlm blame: {out}: ")
    before = data.read_bytes()
    assert blame(model, data, data, "--overwrite") == 2
    assert str(data) in capsys.readouterr().err
    assert data.read_bytes() == before
    assert out.read_text() == "precious"
    assert blame(model, data, out, "--overwrite") == 0
    assert len(read_token_scores(out)) == len(RECORDS)


def test_fields_that_token_scores_would_overwrite_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [RECORDS[0] | {"model": "gpt"}, RECORDS[1] | {"tokenizer": "x", "tokens": 3}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    assert blame(model, path, tmp_path / "out.jsonl") == 2
    message = capsys.readouterr().err
    assert "data.jsonl:2: field 'tokenizer'" in message
    assert "data.jsonl:2: field 'tokens'" in message
    assert "data.jsonl:1" not in message
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_records_that_are_all_too_long_are_named(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blame(model, data, tmp_path / "out.jsonl", max_length=2) == 2
    message = capsys.readouterr().err
    assert all(f"data.jsonl:{number}: " in message for number in range(1, 8))
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_tokens_without_an_embedding_are_refused_before_scoring(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    size = len(tokenizer) - 200
    make_model(size).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    assert blame(tmp_path / "small", data, tmp_path / "out.jsonl") == 2
    assert f"tokenizer: expected token ids below {size}" in capsys.readouterr().err


def test_records_longer_than_the_models_context_are_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    assert blame(tmp_path / "short", data, tmp_path / "out.jsonl") == 2
    assert re.search(r"max_length: .* 64 tokens, got 2048 .*--max_length 64", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert blame(tmp_path / "short", data, tmp_path / "out.jsonl", max_length=64) == 0, "the advice can be followed"


# ---- score_rows ----

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7], "judged_prompt_ids": [5, 6, 7, 8, 9], "response_ids": [10, 11, 2], "location": "a:1"},
    {"prompt_ids": [5, 9], "judged_prompt_ids": None, "response_ids": [12, 2], "location": "a:2"},
    {"prompt_ids": list(range(3, 40)), "judged_prompt_ids": [5], "response_ids": [13, 14, 15, 2], "location": "a:3"},
    {"prompt_ids": [7], "judged_prompt_ids": [7, 8], "response_ids": [16, 2], "location": "a:4"},
]


@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
def test_the_longest_rows_are_scored_first_and_batches_keep_to_the_limit(max_tokens: int) -> None:
    model = make_model(64)
    batches = list(score_rows(model, ROWS, max_tokens_per_batch=max_tokens, show_progress=False))
    assert sorted(one.row for batch in batches for one in batch) == [0, 1, 2, 3]
    assert 2 in [one.row for one in batches[0]]
    assert len(batches) == {1: 4, 20: 3, 10_000: 1}[max_tokens]
    reference = make_model(64).double()
    for index, without, judged, _ in (item for batch in batches for item in batch):
        row = ROWS[index]
        assert without.dtype == torch.float32
        expected = score_response(reference, row["prompt_ids"], row["response_ids"])
        assert without.tolist() == pytest.approx(expected, abs=1e-5)
        if row["judged_prompt_ids"] is None:
            assert judged is None
        else:
            assert judged is not None
            expected = score_response(reference, row["judged_prompt_ids"], row["response_ids"])
            assert judged.tolist() == pytest.approx(expected, abs=1e-5)


def test_finished_rows_are_skipped_without_changing_the_others() -> None:
    model = make_model(64)
    whole = {index: scores for batch in score_rows(model, ROWS, show_progress=False) for index, *scores in batch}
    (batch,) = score_rows(model, ROWS, done={0, 1}, show_progress=False)
    assert [one.row for one in batch] == [2, 3]
    for index, without, judged, _ in batch:
        assert torch.equal(without, whole[index][0])
        assert torch.equal(judged, whole[index][1])
    assert list(score_rows(model, ROWS, done={0, 1, 2, 3}, show_progress=False)) == []


def test_dropout_is_off_and_the_mode_of_each_module_is_restored() -> None:
    model = make_model(64, attention_dropout=0.9).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, again = (
        {
            index: without.tolist()
            for batch in score_rows(model, ROWS, show_progress=False)
            for index, without, *_ in batch
        }
        for _ in range(2)
    )
    assert first == again
    assert [module.training for module in model.modules()] == modes


def test_scores_can_take_part_in_autograd() -> None:
    model = make_model(64)
    ((*_, (_, without, *_)),) = score_rows(model, ROWS, show_progress=False)
    weight = torch.ones(1, requires_grad=True)
    assert torch.is_grad_enabled()
    (weight * without).sum().backward()
    assert weight.grad is not None


def test_autocast_is_used_on_request() -> None:
    model = make_model(64)
    exact, rough = (
        next(score_rows(model, ROWS, is_bf16=is_bf16, show_progress=False))[0][1] for is_bf16 in (False, True)
    )
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.3)
    assert rough.dtype == torch.float32


def test_non_finite_log_probs_name_their_rows() -> None:
    model = make_model(64)
    model.model.embed_tokens.weight.data[16] = float("nan")
    with pytest.raises(UserError, match=r"^a:3, a:4: .* 2 records"):
        list(score_rows(model, ROWS, show_progress=False))
