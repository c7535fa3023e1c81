"""Records whose judgment has no larger effect on the response than those of other records are left out."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, KillPoint, list_options, start_command, write_lines
from reference import score_response
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlm import CUTConfig, CUTTrainer, blame
from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.flagging.contrast import plan_contexts
from cutlm.flagging.detector import FlagSettings, encode_for_scoring
from cutlm.flagging.sensitivity import rank_judgment
from cutlm.flagging.token_scores import read_token_scores
from cutlm.model.collator import split_batch
from cutlm.prompting.encoding import Encoder

OUTPUTS = ("Sydney is.", "12 + 34 = 46.", "A new line\nand one more", "Canberra is 🙂.")
RECORDS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {index}.",
        "output": OUTPUTS[index % 4],
        "judgment": None if index in (1, 6) else f"Mistake {index}: {OUTPUTS[-1 - index % 4]}",
    }
    for index in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def ranks(model: Path) -> dict[int, float]:
    """The rank of each judgment by a naive computation in float64."""
    records = [JudgedRecord(**row) for row in RECORDS]
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")
    rows = encode_for_scoring(records, [""] * len(records), encoder, FlagSettings()).rows
    options: Any = {"contrast": "judgment", "num_foreign": 4, "num_records": 0, "has_rivals": True}
    plan = plan_contexts(rows, records, encoder, 2048, **options)
    reference = AutoModelForCausalLM.from_pretrained(model).double()
    found = {}
    for index, contexts in plan.rivals.items():
        judgments = {records[context.source].judgment for context in contexts if context.source is not None}
        assert len(judgments) == 4
        assert records[index].judgment not in judgments
        row = rows[index]
        prompts = [row["prompt_ids"], row["judged_prompt_ids"], *(context.prompt_ids for context in contexts)]
        plain, own, *others = (score_response(reference, ids, row["response_ids"]) for ids in prompts)
        effects = [max(a - b for a, b in zip(logps, plain, strict=True)) for logps in (own, *others)]
        found[index] = sum(effect < effects[0] for effect in effects[1:]) / 4
    return found


def list_kept(ranks: dict[int, float]) -> list[int]:
    return [index for index in range(len(RECORDS)) if ranks.get(index, 1.0) >= 0.75]


def blame_options(model: Path, folder: Path) -> list[str]:
    data = write_lines(folder / "data.jsonl", RECORDS)
    options = list_options(model=model, data=data, out=folder / "scores.jsonl", device="cpu", max_tokens_per_batch=300)
    return ["blame", *options, "--drop_ineffective"]


def read_kept(path: Path) -> list[str]:
    return [scores.record.instruction for scores in read_token_scores(path)]


def test_rank_compares_largest_log_ratios() -> None:
    # Effects: own 1, others 0, 1.5, 1 (a tie is not smaller), 0.5; the first token, of the template, does not count.
    without, own = [-9.0, -2.0, -2.0], [-1.0, -1.0, -3.0]
    others = [[-9.0, -2.0, -2.0], [-9.0, -2.0, -0.5], [-9.0, -3.0, -1.0], [-2.0, -1.5, -4.0]]
    assert rank_judgment(without, own, others, num_template_tokens=1) == 0.5


def test_blame_leaves_out_counts_and_lists_ineffective_judgments(
    model: Path, ranks: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(blame_options(model, tmp_path)) == 0
    kept = list_kept(ranks)
    assert 2 < len(kept) < len(RECORDS) - 2
    scores = read_token_scores(tmp_path / "scores.jsonl")
    assert [one.record.instruction for one in scores] == [RECORDS[index]["instruction"] for index in kept]
    assert [one.judgment_rank for one in scores] == [ranks.get(index) for index in kept]
    report = json.loads((tmp_path / "scores.jsonl.report.json").read_text())
    num_dropped = len(RECORDS) - len(kept)
    assert (report["num_records"], report["num_ineffective"]) == (len(kept), num_dropped)
    listed = {row["location"].rpartition(":")[2]: row["judgment_rank"] for row in report["ineffective"]}
    assert listed == {str(index + 1): rank for index, rank in ranks.items() if rank < 0.75}
    assert f"drop_ineffective: {num_dropped} of 10 unsatisfactory records left out" in capsys.readouterr().out


def test_killed_run_resumes_to_the_same_file(model: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert main(blame_options(model, whole)) == 0
    point = KillPoint("cutlm.data.journal:Journal", "append", 6)
    assert start_command(blame_options(model, killed), point).wait().exit_code < 0
    assert (killed / "scores.jsonl.partial").exists()
    assert main(blame_options(model, killed)) == 0
    assert (killed / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()


def test_python_function_leaves_them_out_too(
    model: Path, ranks: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    scores = blame(model, RECORDS, drop_ineffective=True, device="cpu")
    assert [one.record.instruction for one in scores] == [RECORDS[index]["instruction"] for index in list_kept(ranks)]
    assert "drop_ineffective" in caplog.text


def test_one_judgment_for_all_is_an_error(model: Path) -> None:
    rows = [row | {"judgment": "It is wrong."} for row in RECORDS]
    with pytest.raises(ConfigError, match="drop_ineffective"):
        blame(model, rows, drop_ineffective=True, device="cpu")


# ---- Training ----

TRAINING = ON_CPU | {"save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 12, "detector": "frozen"}


def train(model: Path, data: Path, out: Path, **settings: Any) -> int:
    options = TRAINING | {"model_name_or_path": model, "data": data, "output_dir": out} | settings
    return main(["train", *list_options(**options)])


def test_training_leaves_them_out_and_reuses_what_it_has_stored(
    model: Path, ranks: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "data.jsonl", RECORDS), tmp_path / "run"
    assert train(model, data, out, drop_ineffective=True) == 0
    printed = capsys.readouterr().out
    num_dropped = len(RECORDS) - len(list_kept(ranks))
    assert f"drop_ineffective: {num_dropped} of 10 unsatisfactory records left out" in printed
    expected = [RECORDS[index]["instruction"] for index in list_kept(ranks)]
    assert read_kept(out / "token_scores.jsonl") == expected
    loss = json.loads((out / "trainer_state.json").read_text())["log_history"][-1]["train_loss"]
    # Again, from the stored scores.
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    assert train(model, data, out, drop_ineffective=True, overwrite_output_dir=True) == 0
    printed = capsys.readouterr().out
    assert "reusing the token scores" in printed
    assert f"{num_dropped} of 10 unsatisfactory" in printed
    assert json.loads((out / "trainer_state.json").read_text())["log_history"][-1]["train_loss"] == loss
    # On the stored scores as data, with and without the setting, which other scores do not fit.
    for name, further in (("with", {"drop_ineffective": True}), ("without", {})):
        assert train(model, out / "token_scores.jsonl", tmp_path / name, **further) == 0
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["log_history"][-1]["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert train(model, data, tmp_path / "all") == 0
    capsys.readouterr()
    assert train(model, tmp_path / "all" / "token_scores.jsonl", tmp_path / "other", drop_ineffective=True) == 2
    assert "made without it" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["self_distillation", "redirect"])
def test_training_in_memory_leaves_them_out(model: Path, ranks: dict[int, float], objective: str) -> None:
    args = CUTConfig(objective=objective, drop_ineffective=True, **ON_CPU)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    trainer: Any = CUTTrainer(
        model=loaded, args=args, train_dataset=RECORDS, eval_dataset=RECORDS, processing_class=tokenizer
    )
    kept = list_kept(ranks)
    assert trainer.train_dataset["location"] == [f"train_dataset[{index}]" for index in kept]
    assert trainer.num_left_out == len(RECORDS) - len(kept)
    assert any("drop_ineffective" in notice for notice in trainer.notices)
    assert len(trainer.eval_dataset) == len(RECORDS)


@pytest.mark.parametrize("name", ["drop_ineffective", "weigh_by_effect"])
@pytest.mark.parametrize("settings", [{}, {"detector": "spans"}, {"objective": "likelihood"}])
def test_setting_needs_the_model_before_training(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        CUTConfig(**settings, **{name: True})


# ---- Weights ----


def make_trainer(model: Path, data: Any = RECORDS, **settings: Any) -> Any:
    args = CUTConfig(**ON_CPU | {"detector": "frozen"} | settings)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return CUTTrainer(model=loaded, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_weights_are_the_ranks_of_judgments(
    model: Path, ranks: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [ranks.get(index, 1.0) for index in range(len(RECORDS))]
    assert len(set(expected)) > 2
    trainer = make_trainer(model, weigh_by_effect=True)
    assert trainer.train_dataset["record_weight"] == expected
    assert "record_weight" not in trainer.eval_dataset.column_names
    assert len(trainer.data_collator(list(trainer.train_dataset))["record_weights"]) == len(RECORDS)
    scores = blame(model, RECORDS, weigh_by_effect=True, device="cpu")
    assert make_trainer(model, scores, weigh_by_effect=True).train_dataset["record_weight"] == expected
    assert "record_weight" not in make_trainer(model, scores).train_dataset.column_names
    with pytest.raises(ConfigError, match="weigh_by_effect: the token scores were made without it"):
        make_trainer(model, blame(model, RECORDS, device="cpu"), weigh_by_effect=True)
    # The command, which stores the scores in its folder.
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    assert train(model, data, tmp_path / "run", weigh_by_effect=True) == 0
    mean = sum(ranks.values()) / len(ranks)
    assert f"unsatisfactory records weigh {mean:.2f} on average" in capsys.readouterr().out


def test_the_next_command_after_blame_weighs_the_records(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "data.jsonl", RECORDS), tmp_path / "scores.jsonl"
    options = [*list_options(model=model, data=data, out=out, device="cpu"), "--weigh_by_effect"]
    assert main(["blame", *options]) == 0
    words = shlex.split(capsys.readouterr().out.partition("Next: cutlm ")[2])
    words[words.index("runs/NAME")] = str(tmp_path / "run")
    assert main([*words, "--use_cpu", "--max_steps", "1"]) == 0
    assert "unsatisfactory records weigh" in capsys.readouterr().out


@pytest.mark.parametrize("normalization", ["token", "record"])
@pytest.mark.parametrize(
    "settings",
    [{"use_judged_loss": True}, {"critique_weight": 0.3}, {"objective": "self_distillation", "detector": None}],
    ids=lambda settings: next(iter(settings)),
)
def test_weights_of_0_and_1_keep_a_part_and_weights_of_2_count_twice(
    model: Path, settings: dict[str, Any], normalization: str
) -> None:
    trainer = make_trainer(model, normalization=normalization, **settings)
    rows = list(trainer.train_dataset)

    def compute_loss(rows: list[dict[str, Any]]) -> float:
        batch = trainer.data_collator(rows)
        with torch.no_grad():
            whole = trainer.compute_loss(trainer.model, batch).item()
            counts = trainer._count(batch)
            parts = [
                trainer.compute_loss(trainer.model, part, num_items_in_batch=counts).item()
                for part in split_batch(batch, 150)
            ]
        assert len(parts) > 1
        assert sum(parts) == pytest.approx(whole, rel=1e-5)
        return whole

    weights = [float(index % 3) for index in range(len(rows))]
    got = compute_loss([row | {"record_weight": weight} for row, weight in zip(rows, weights, strict=True)])
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(int(weight))]
    assert got == pytest.approx(compute_loss(repeated), rel=1e-5)
    assert got != pytest.approx(compute_loss(rows), rel=1e-3)
