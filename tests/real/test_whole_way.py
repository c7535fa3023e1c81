"""The whole way with a real instruct model: check, blame, train, merge, generate, chat."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import list_options, write_lines

from cutlm.cli import main
from cutlm.flagging.token_scores import read_token_scores

QUESTION = "What is the capital of Australia?"
RECORDS: list[dict[str, Any]] = [
    {
        "instruction": QUESTION,
        "output": "The capital of Australia is Sydney.",
        "judgment": "Sydney is not the capital; Canberra is.",
        "wrong_spans": [[28, 34]],
    },
    {"instruction": "What is the capital of France?", "output": "The capital of France is Paris.", "judgment": None},
    {
        "instruction": "Name a primary colour.",
        "output": "Green is one of them.",
        "judgment": "Green is a mixture of two others.",
        "wrong_spans": [[0, 5]],
    },
    {"instruction": "Add 2 and 3.", "output": "2 + 3 = 6", "judgment": "The sum is wrong: it is 5."},
]


def test_the_whole_way(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, scores = write_lines(tmp_path / "records.jsonl", RECORDS), tmp_path / "scores.jsonl"
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["check", str(data)]) == 0
    blame = {"model": smollm2, "data": data, "out": scores, "template": "chat", "device": "cpu"}
    assert main(["blame", *list_options(**blame)]) == 0
    flagged = read_token_scores(scores)
    assert [one.record.output for one in flagged] == [row["output"] for row in RECORDS]
    assert any(any(one.is_flagged) for one in flagged)
    assert not any(flagged[1].is_flagged)
    report = json.loads((tmp_path / "scores.jsonl.report.json").read_text("utf-8"))
    assert report["sensitivity"]["num_records"] == 3

    train = {"model_name_or_path": smollm2, "data": scores, "output_dir": run, "template": "chat", "max_steps": 3}
    train |= {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    assert main(["train", *list_options(**train, save_strategy="no", logging_steps=1)]) == 0
    log = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    assert main(["merge", "--adapter", str(run), "--out", str(merged)]) == 0
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "What is the capital of France?"}])
    answers = tmp_path / "answers.json"
    generate = {"model": merged, "prompts": prompts, "out": answers, "max_new_tokens": 20, "device": "cpu"}
    assert main(["generate", *list_options(**generate)]) == 0
    assert "Paris" in json.loads(answers.read_text("utf-8"))[0]["output"]

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/judge That is wrong.\n/quit\n"))
    capsys.readouterr()
    assert main(["chat", *list_options(model=merged, device="cpu", max_new_tokens=12)]) == 0
    shown = capsys.readouterr().out
    assert "Australia" in shown
    assert "with the judgment" in shown
