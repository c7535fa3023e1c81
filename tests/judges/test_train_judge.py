"""Training a judge: the loss, resuming after a stop, and evaluation."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, save_tiny_model

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.judges import Failure, Outcome
from cutlm.judges.evaluation import compare_judgments, compute_metrics, format_metrics
from cutlm.judges.local import make_training_records
from cutlm.training.checkpoints import CheckpointingTrainer
from cutlm.training.config import JudgeConfig
from cutlm.training.trainer import CUTTrainer

ROWS = [
    {
        "instruction": f"Name city {index}.",
        "output": f"City {index}.",
        "judgment": f"City {index} is no city." if index % 3 else None,
    }
    for index in range(8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


def make_options(folder: Path, base: Path, name: str, **settings: Any) -> list[str]:
    (folder / "records.json").write_text(json.dumps(ROWS))
    values = {
        "model_name_or_path": base,
        "data": folder / "records.json",
        "output_dir": folder / name,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "lora_dropout": 0.2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | settings
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


# ---- The loss ----


def test_the_loss_is_that_of_the_answer_alone(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    model = make_model(len(tokenizer))
    records = [
        JudgedRecord(instruction="Name a city.", input="In Italy.", output="Paris.", judgment="It is in France. "),
        JudgedRecord(instruction="Name a city.", output="Rome.", judgment=None),
        JudgedRecord(instruction="Name a river.", output="Rome.", judgment="Perfectly fine?", score=8),
        JudgedRecord(instruction="Name a river.", output="The Po.", judgment="Perfect: short.", score=2),
    ]
    answers = [
        "It is in France.\nSatisfactory: No",
        "Perfect.\nSatisfactory: Yes",
        "Perfect.\nSatisfactory: Yes",  # satisfactory by its score
        "Perfect: short.\nSatisfactory: Yes",
    ]
    config = JudgeConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = CUTTrainer(model, config, make_training_records(records), processing_class=tokenizer)
    rows = list(trainer.train_dataset)
    assert [tokenizer.decode(row["response_ids"]) for row in rows] == [f"{answer}<eos>" for answer in answers]
    question = tokenizer.decode(rows[0]["prompt_ids"])
    assert "]\nName a city.\nIn Italy.\n[end of instruction" in question
    assert "]\nParis.\n[end of response" in question
    assert "France" not in question
    assert all(row["judged_prompt_ids"] is None for row in rows)

    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    total, num = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        logps = model(ids).logits[0].log_softmax(-1)
        for position in range(len(row["prompt_ids"]), ids.shape[1]):
            total -= logps[position - 1, ids[0, position]].item()
            num += 1
    assert num == sum(len(row["response_ids"]) for row in rows)
    assert loss == pytest.approx(total / num, rel=1e-5)


# ---- The command ----


def test_a_run_prints_counts_and_the_next_command(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = make_options(tmp_path, base, "out", max_steps=1, downsample=0.4, eval_split=0.25)
    assert main(["train-judge", *options]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "train_dataset: 6 records encoded (" in output
    assert "eval_dataset: 2 records encoded (" in output
    assert "train_dataset: downsample 0.4 keeps " in output
    assert f"cutlm judge --responses FILE --judge local --judge_model {tmp_path / 'out'} --out FILE" in output
    saved = yaml.safe_load((tmp_path / "out" / "cutlm_train.yaml").read_text())
    assert not {"objective", "detector", "threshold", "gamma"} & set(saved)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_settings_of_other_objectives_are_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("objective: cut\ndetector: frozen\nlearning_rat: 1\nxyzzy: 1\n")
    options = make_options(tmp_path, base, "out", threshold=1.2)
    assert main(["train-judge", "--config", str(tmp_path / "config.yaml"), *options]) == 2
    message = capsys.readouterr().err
    for part in (
        "key 'objective' is not a setting of cutlm train-judge",
        "key 'detector' is not a setting of cutlm train-judge",
        "option --threshold is not a setting of cutlm train-judge",
        "key 'learning_rat' is unknown; did you mean 'learning_rate'?",
        "key 'xyzzy' is unknown; see cutlm train-judge --help",
    ):
        assert part in message
    assert "cutlm train --help" not in message
    assert not (tmp_path / "out").exists()


def test_invalid_rows_are_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = make_options(tmp_path, base, "out")
    (tmp_path / "records.json").write_text(json.dumps([*ROWS, {"instruction": "x", "output": " "}]))
    assert main(["train-judge", *options]) == 2
    assert "records.json[8]: field 'output'" in capsys.readouterr().err


def test_token_scores_are_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = make_options(tmp_path, base, "out")
    scores = tmp_path / "scores.jsonl"
    blame = ["blame", "--model", str(base), "--data", str(tmp_path / "records.json"), "--out", str(scores)]
    assert main([*blame, "--device", "cpu"]) == 0
    assert main(["train-judge", *options, "--data", str(scores)]) == 2
    assert "expected plain records to train a judge on, got token scores" in capsys.readouterr().err


def test_a_stopped_and_a_killed_run_resume_bit_for_bit(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train-judge", *make_options(tmp_path, base, "whole")]) == 0
    check, calls = CheckpointingTrainer._get_grad_norm, []

    def interrupt(number: signal.Signals, when: int) -> None:
        calls.clear()

        def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == when:
                os.kill(os.getpid(), number)
            return check(self, *args, **kwargs)

        monkeypatch.setattr(CheckpointingTrainer, "_get_grad_norm", stop)

    stopped = make_options(tmp_path, base, "stopped", save_strategy="no")
    interrupt(signal.SIGINT, 1)
    capsys.readouterr()
    assert main(["train-judge", *stopped]) == 128 + signal.SIGINT
    assert f"  cutlm train-judge {' '.join(stopped)} --resume_from_checkpoint last" in capsys.readouterr().out

    killed = make_options(tmp_path, base, "killed")
    interrupt(signal.SIGKILL, 3)
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as this process lives)
        main(["train-judge", *killed])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()

    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for name, value in expected.items() if "lora_B" in name), "the adapter was trained"
    for name, options in (("stopped", stopped), ("killed", killed)):
        assert main(["train-judge", *options, "--resume_from_checkpoint", "last"]) == 0
        assert "resuming from" in capsys.readouterr().out
        got = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(expected[key].equal(got[key]) for key in expected), f"{name}: differs from the uninterrupted run"


# ---- Evaluation ----


def make_rows() -> list[dict[str, Any]]:
    pytest.importorskip("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    # Two satisfactory records (one by its score), five unsatisfactory.
    judgments = [None, "Too short.", "a b c d", "a b c d", "a b c d", "a b c d", "a b c d"]
    records = [
        JudgedRecord(
            instruction=f"{index}", output=f"answer {index}", judgment=judgment, score=9 if index == 1 else None
        )
        for index, judgment in enumerate(judgments)
    ]
    said = {0: None, 1: "Wrong.", 2: None, 3: "a b c d", 4: "a b", 5: "x y"}
    outcome = Outcome(judgments=said, failures={6: Failure("no decision", "...", "a b c d")})
    return compare_judgments(records, outcome, RougeScorer(["rougeL"]))


def test_metrics_equal_those_computed_by_hand() -> None:
    metrics = compute_metrics(make_rows())
    assert metrics["cases"] == {
        "satisfactory_truly_satisfactory": 1,
        "satisfactory_truly_unsatisfactory": 1,
        "unsatisfactory_truly_satisfactory": 1,
        "unsatisfactory_truly_unsatisfactory": 3,
    }
    assert (metrics["num_records"], metrics["num_satisfactory"], metrics["num_unsatisfactory"]) == (7, 2, 5)
    assert metrics["accuracy"] == pytest.approx(4 / 7)  # 1 + 3 correct; a failure counts as wrong
    assert metrics["accuracy_where_decided"] == pytest.approx(4 / 6)
    assert metrics["majority_share"] == pytest.approx(5 / 7)
    assert (metrics["num_failures"], metrics["failures"]) == (1, {"no decision": 1})
    # Three of five are objected to: "a b c d" gives 1, "a b" 2 * 1 * 0.5 / 1.5 = 2/3, "x y" 0.
    assert metrics["num_objected"] == 3
    assert metrics["rouge_l_where_objected"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["rouge_l"] == pytest.approx((1 + 2 / 3 + 0) / 5)


def test_the_table_shows_the_metrics() -> None:
    table = format_metrics(compute_metrics(make_rows()))
    assert "| satisfactory | 1 | 1 |\n| unsatisfactory | 1 | 3 |" in table
    values = [line.split("|")[2].strip() for line in table.partition("| metric |")[2].splitlines()[2:]]
    assert values == ["0.571", "0.667", "0.714", "1 (1 no decision)", "0.333", "0.556"]


def test_undefined_metrics_are_none() -> None:
    records = [JudgedRecord(instruction="x", output="y", judgment=None)]
    metrics = compute_metrics(compare_judgments(records, Outcome(failures={0: Failure("cut off", "...")}), None))
    assert (metrics["accuracy"], metrics["majority_share"]) == (0, 1)
    assert metrics["accuracy_where_decided"] is metrics["rouge_l"] is metrics["rouge_l_where_objected"] is None
    assert "| – |" in format_metrics(metrics)


def test_a_judge_is_evaluated_on_held_out_records(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rouge_score")
    assert main(["train-judge", *make_options(tmp_path, base, "judge", max_steps=1)]) == 0
    out = tmp_path / "evaluated"
    command = ["train-judge", "--evaluate", str(tmp_path / "judge"), "--data", str(tmp_path / "records.json")]
    command += ["--out", str(out), "--max_new_tokens", "4", "--device", "cpu"]
    capsys.readouterr()
    assert main(command) == 0, capsys.readouterr().err
    # After one step, every answer is truncated.
    metrics = json.loads((out / "evaluation.json").read_text())
    assert (metrics["num_records"], metrics["failures"], metrics["accuracy"]) == (8, {"cut off": 8}, 0)
    assert metrics["majority_share"] == 5 / 8
    assert capsys.readouterr().out == (out / "evaluation.md").read_text()
    rows = [json.loads(line) for line in (out / "judged.jsonl").read_text().splitlines()]
    assert [row["judgment"] for row in rows] == [row["judgment"] for row in ROWS]
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md", "judged.jsonl"]
    assert main(command) == 2
    assert "contains an evaluation" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_evaluation_checks_its_requirements_before_loading_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train-judge", "--evaluate", "nowhere", "--data", "nowhere.jsonl", "--out", str(tmp_path / "out")]
    assert main([*command, "--dry_run"]) == 2
    assert "--config, --dry_run: not used with --evaluate" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert main(command) == 2
    assert "rouge-score is not installed" in capsys.readouterr().err
