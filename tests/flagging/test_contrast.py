"""Flags against foreign judgments or praise, and a threshold that foreign judgments calibrate."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import KillPoint, list_options, start_command, write_lines
from hypothesis import given
from hypothesis import strategies as st
from reference import score_response
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlm import CUTConfig, blame
from cutlm.cli import main
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.flagging import detector
from cutlm.flagging.contrast import average_logps, find_threshold, plan_contexts
from cutlm.flagging.detector import FlagSettings, References, encode_for_scoring, flag_response, score_contexts
from cutlm.flagging.scoring import Scored
from cutlm.flagging.token_scores import TokenScores, read_token_scores
from cutlm.prompting.encoding import Encoder

OUTPUTS = ("Sydney is.", "12 + 34 = 46.", "A new line\nand one more", "Canberra is 🙂.")
RECORDS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {index}.",
        "output": OUTPUTS[index % 4],
        "judgment": None if index in (1, 6) else f"Mistake {index}: {OUTPUTS[-1 - index % 4]}",
    }
    for index in range(10)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "data.jsonl", RECORDS)


def list_blame_options(model: Path, data: Path, out: Path, *options: str, **settings: Any) -> list[str]:
    values = {"model": model, "data": data, "out": out, "device": "cpu", "max_tokens_per_batch": 300} | settings
    return ["blame", *list_options(**values), *options]


def blame_scores(model: Path, data: Path, out: Path, *options: str, **settings: Any) -> list[TokenScores]:
    assert main(list_blame_options(model, data, out, *options, **settings)) == 0
    return read_token_scores(out)


# ---- Contrasts ----


def test_foreign_judgments_are_averaged(model: Path, data: Path, tmp_path: Path) -> None:
    scores = blame_scores(model, data, tmp_path / "out.jsonl", contrast="foreign", num_foreign=3, threshold=1.05)
    plain = blame_scores(model, data, tmp_path / "plain.jsonl", threshold=1.05)
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    records = [one.record for one in scores]
    rows = encode_for_scoring(records, [""] * len(records), encoder, FlagSettings()).rows
    plan = plan_contexts(rows, records, encoder, 2048, contrast="foreign", num_foreign=3, num_records=64)
    num_flagged = 0
    for index, (one, without_contrast) in enumerate(zip(scores, plain, strict=True)):
        assert one.logps_without == pytest.approx(without_contrast.logps_without, abs=1e-5)
        assert (one.contrast, without_contrast.contrast) == ("foreign", "judgment")
        if one.record.is_satisfactory:
            assert one.logps_reference is None
            continue
        contexts = plan.references[index]
        texts = {records[context.source].judgment for context in contexts if context.source is not None}
        (held_out,) = (context for context in plan.foreign if context.target == index)
        assert held_out.source is not None
        assert len(texts) == 3
        assert not texts & {one.record.judgment, records[held_out.source].judgment}
        probabilities = [
            torch.tensor(score_response(reference, context.prompt_ids, one.token_ids)).exp() for context in contexts
        ]
        expected = torch.stack(probabilities).mean(0).log().tolist()
        assert one.logps_reference == pytest.approx(expected, abs=1e-5)
        assert one.logps_with is not None
        for place, flag in enumerate(one.is_flagged):
            assert flag == (one.logps_with[place] - one.logps_reference[place] > math.log(1.05))
            assert one.weights[place] == pytest.approx(math.exp(one.logps_with[place]) if flag else 0, rel=1e-4)
        num_flagged += sum(one.is_flagged)
    assert num_flagged > 0
    assert [one.is_flagged for one in scores] != [one.is_flagged for one in plain]


def test_contexts_in_a_journal_are_those_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    records = [JudgedRecord(**row) for row in RECORDS]
    locations = [f"data:{number}" for number in range(len(records))]
    rows = encode_for_scoring(records, locations, encoder, FlagSettings()).rows
    plan = plan_contexts(rows, records, encoder, 2048, contrast="foreign", num_foreign=2, num_records=2)
    assert len(plan.pairs) == 8 * 2 + 2
    num_scored: list[int] = []

    def score(contexts: Any, done: Any) -> Any:
        for number, row in enumerate(contexts):
            if number in done:
                continue
            num_scored.append(number)
            index, source = plan.pairs[number]
            assert row["prompt_ids"] == encoder.encode_prompt(records[index].conversation, records[source].judgment)
            assert row["location"] == f"data:{index} with the judgment of data:{source}"
            yield [Scored(number, -torch.tensor([len(row["prompt_ids"]), *row["response_ids"]]) / 7, None)]

    monkeypatch.setattr(detector, "_NUM_ENCODED", 5)
    known = dict(score_contexts(rows, plan.pairs, plan.encode, score, None))
    assert list(known) == plan.pairs
    journal = Journal(tmp_path / "out.jsonl", {})
    with journal:
        journal.append([{"index": 0, "logps_without": [-1.0], "logps_with": [-1.0]}])
    assert dict(score_contexts(rows, plan.pairs, plan.encode, score, journal)) == known
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join([*lines[:4], *lines[5:]]) + "\n")  # one of them is missing
    num_scored.clear()
    assert dict(score_contexts(rows, plan.pairs, plan.encode, score, Journal(tmp_path / "out.jsonl", {}))) == known
    assert num_scored == [2]
    averages = References(plan.references.sources, known)
    for index, contexts in plan.references.items():
        probabilities = [[math.exp(logp) for logp in known[index, one.source]] for one in contexts]
        expected = [math.log(sum(column) / 2) for column in zip(*probabilities, strict=True)]
        assert averages[index] == pytest.approx(expected, abs=1e-6)


def test_praise_can_be_the_reference(model: Path, data: Path, tmp_path: Path) -> None:
    scores = blame_scores(model, data, tmp_path / "out.jsonl", contrast="perfect")
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    for one in scores:
        prompt_ids = encoder.encode_prompt(one.record.full_instruction, "Perfect.")
        if one.record.is_satisfactory:
            assert one.logps_reference is None
        else:
            expected = score_response(reference, prompt_ids, one.token_ids)
            assert one.logps_reference == pytest.approx(expected, abs=1e-5)
            assert one.log_ratios is not None
            assert one.is_flagged == [ratio > math.log(1.1) for ratio in one.log_ratios]


def test_surprise_counts_besides_the_log_ratio() -> None:
    # Log ratios .5, 0, -.05 and .05; with a quarter of the surprise .5, .025, .75 and .05 more. log 1.1 = .0953.
    reference, judged = [-2.0, -0.1, -3.0, -0.2], [-1.5, -0.1, -3.05, -0.15]
    flags, _ = flag_response(reference, judged, FlagSettings())
    assert flags == [True, False, False, False]
    flags, weights = flag_response(reference, judged, FlagSettings(surprise_weight=0.25))
    assert flags == [True, False, True, True]
    assert weights == pytest.approx([math.exp(-1.5), 0, math.exp(-3.05), math.exp(-0.15)], rel=1e-5)


@pytest.mark.parametrize("contrast", ["judgment", "perfect"])
def test_token_scores_keep_the_weight_of_surprise(model: Path, data: Path, tmp_path: Path, contrast: str) -> None:
    settings = {"contrast": contrast, "surprise_weight": 0.5, "threshold": "auto"}
    scores = blame_scores(model, data, tmp_path / "out.jsonl", **settings)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text("utf-8"))
    assert report["surprise_weight"] == 0.5
    for one in scores:
        assert one.surprise_weight == 0.5
        if not one.record.is_satisfactory:
            reference = one.logps_without if contrast == "judgment" else one.logps_reference
            assert one.logps_with is not None
            assert reference is not None
            ratios = [judged - 1.5 * other for judged, other in zip(one.logps_with, reference, strict=True)]
            assert one.log_ratios == pytest.approx(ratios)
            assert one.is_flagged == [ratio > math.log(one.threshold) for ratio in ratios]


def test_the_report_names_contrast_and_threshold(model: Path, data: Path, tmp_path: Path) -> None:
    scores = blame_scores(model, data, tmp_path / "out.jsonl", contrast="foreign", num_foreign=2, threshold="auto")
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text("utf-8"))
    assert (report["contrast"], report["num_foreign"]) == ("foreign", 2)
    assert {one.threshold for one in scores} == {report["threshold"]}
    assert report["threshold"] >= 1


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_killed_run_with_a_contrast_resumes(model: Path, data: Path, tmp_path: Path, call: int) -> None:
    settings = {"contrast": "foreign", "num_foreign": 2, "threshold": "auto", "max_tokens_per_batch": 1500}
    scores = blame_scores(model, data, tmp_path / "whole.jsonl", **settings)
    options = list_blame_options(model, data, tmp_path / "out.jsonl", **settings)
    killed = start_command(options, KillPoint("cutlm.data.journal:Journal", "append", call)).wait()
    assert killed.exit_code == -9
    assert blame_scores(model, data, tmp_path / "out.jsonl", **settings) == scores


def test_too_few_different_judgments_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "few.jsonl", [row | {"judgment": "No."} for row in RECORDS[:3]])
    for settings in ({"contrast": "foreign"}, {"threshold": "auto"}):
        assert main(list_blame_options(model, data, tmp_path / "out.jsonl", **settings)) == 2
        assert "different judgments" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(list_blame_options(model, data, tmp_path / "out.jsonl", contrast="perfect")) == 0


def test_bad_settings_are_refused() -> None:
    for settings in (
        {"contrast": "none"},
        {"num_foreign": 0},
        {"surprise_weight": -1},
        {"threshold": "1.2"},
        {"threshold": 0.5},
    ):
        with pytest.raises(ConfigError):
            FlagSettings(**settings)  # type: ignore[arg-type]


# ---- The threshold "auto" ----


@given(
    st.lists(st.lists(st.floats(-5, 5), max_size=300), min_size=1, max_size=2), st.sampled_from([0.01, 0.1, 0.0, 0.5])
)
def test_the_smallest_threshold_that_flags_few_is_found(groups: list[list[float]], share: float) -> None:
    threshold = find_threshold(dict(enumerate(groups)), share)  # type: ignore[arg-type]

    def is_enough(bound: float) -> bool:
        return all(sum(ratio > math.log(bound) for ratio in group) <= share * len(group) for group in groups)

    assert threshold >= 1
    assert is_enough(threshold)
    assert threshold == 1 or not is_enough(threshold - 3e-6)


def test_ratios_beyond_floating_point_have_a_threshold() -> None:
    assert math.isfinite(find_threshold({"foreign": [1e4]}))


@pytest.mark.parametrize("contrast", ["judgment", "foreign", "perfect"])
def test_at_most_one_percent_is_flagged_under_foreign_judgments(
    model: Path, data: Path, tmp_path: Path, contrast: str
) -> None:
    settings = {"contrast": contrast, "num_foreign": 3, "threshold": "auto"}
    (threshold,) = {one.threshold for one in blame_scores(model, data, tmp_path / "out.jsonl", **settings)}
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text("utf-8"))
    assert threshold > 1
    assert report["sensitivity"]["num_records"] == 8
    assert report["sensitivity"]["flagged_share_foreign"] <= 0.01
    lower = blame_scores(model, data, tmp_path / "lower.jsonl", **settings | {"threshold": 1 + 0.9 * (threshold - 1)})
    report = json.loads((tmp_path / "lower.jsonl.report.json").read_text("utf-8"))
    assert report["sensitivity"]["flagged_share_foreign"] > 0
    assert lower[0].threshold < threshold


def test_a_sample_of_the_records_calibrates_the_threshold(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "_NUM_CALIBRATED", 3)
    blame_scores(model, data, tmp_path / "out.jsonl", threshold="auto", sensitivity_records=2)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text("utf-8"))
    assert report["sensitivity"]["num_records"] == 3
    assert report["num_records"] == len(data.read_text("utf-8").splitlines())


def test_praise_of_satisfactory_records_counts_for_the_threshold(model: Path, data: Path, tmp_path: Path) -> None:
    scores = blame_scores(model, data, tmp_path / "out.jsonl", "--with_praise", threshold="auto", contrast="foreign")
    threshold = scores[0].threshold
    for one in scores:
        assert one.log_ratios is not None, "satisfactory records have a reference, too"
        if one.record.is_satisfactory:
            assert sum(ratio > math.log(threshold) for ratio in one.log_ratios) == 0
            assert not any(one.is_flagged)


def test_mean_probability() -> None:
    mean = average_logps([[math.log(0.1), -900.0], [math.log(0.3), -900.0]])
    assert mean.tolist() == pytest.approx([math.log(0.2), -900.0])


# ---- Python and training ----


def test_python_and_the_command_flag_alike(model: Path, data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"contrast": "foreign", "num_foreign": 2, "threshold": "auto"}
    scores = blame(model, RECORDS, **settings, device="cpu")
    expected = blame_scores(model, data, tmp_path / "out.jsonl", **settings)
    assert [one.is_flagged for one in scores] == [one.is_flagged for one in expected]


def test_a_contrast_needs_a_frozen_detector(tmp_path: Path) -> None:
    for settings in ({"contrast": "foreign"}, {"threshold": "auto"}, {"num_foreign": 2}, {"surprise_weight": 0.5}):
        for others in ({}, {"detector": "current"}, {"detector": "spans"}, {"objective": "hindsight"}):
            with pytest.raises(ConfigError) as error:
                CUTConfig(output_dir=str(tmp_path), use_cpu=True, **others | settings)  # type: ignore[arg-type]
            assert "detector frozen" in str(error.value)
        CUTConfig(output_dir=str(tmp_path), use_cpu=True, detector="frozen", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [1.05, "auto"])
@pytest.mark.parametrize("is_in_memory", [True, False])
def test_training_flags_as_blame_does(
    model: Path, data: Path, tmp_path: Path, is_in_memory: bool, threshold: Any
) -> None:
    from cutlm.model.loading import load_model, load_tokenizer
    from cutlm.training.dataset import ScoresFile, prepare_data

    settings: dict[str, Any] = {"contrast": "foreign", "num_foreign": 2, "threshold": threshold}
    settings["surprise_weight"] = 0.1
    expected = blame_scores(model, data, tmp_path / "out.jsonl", **settings)
    assert any(any(one.is_flagged) for one in expected)
    args = CUTConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, detector="frozen", **settings)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    records = [JudgedRecord(**row) for row in RECORDS]
    file = None if is_in_memory else ScoresFile(tmp_path / "scores.jsonl")
    for _ in range(2):  # the second time from the file, if there is one
        prepared = prepare_data(records, "train_dataset", args, loaded, tokenizer, None, file)
        assert prepared.threshold == pytest.approx(expected[0].threshold, rel=1e-4)
        for row, one in zip(prepared.rows, expected, strict=True):
            assert (row["is_flagged"] or [False] * len(one.is_flagged)) == one.is_flagged


def test_the_command_trains_with_a_contrast_from_a_file(model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("contrast: foreign\nnum_foreign: 2\nthreshold: auto\ndetector: frozen\n")
    values = {"model_name_or_path": model, "data": data, "output_dir": tmp_path / "run", "max_steps": 1}
    values |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "eval_data": data, "eval_strategy": "epoch"}
    options = ["train", "--config", str(config), *list_options(**values)]
    assert main([*options, "--num_foreign", "20"]) == 2, "there are too few judgments"
    # eval_data has its own references, but the threshold of the training data.
    assert main(options) == 0
    (scores,) = (tmp_path / "run").glob("*scores.jsonl")
    assert {one.contrast for one in read_token_scores(scores)} == {"foreign"}
    assert main([*options, "--overwrite_output_dir", "--contrast", "perfect"]) == 0
    values |= {"data": scores, "output_dir": tmp_path / "again"}
    assert main(["train", *list_options(**values, detector="frozen", contrast="foreign")]) == 2, "made with perfect"
    assert main(["train", *list_options(**values)]) == 0
