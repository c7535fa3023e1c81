"""Tests of commands with a real instruct model."""

import json
from pathlib import Path

from commands import write_lines

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.flagging.report import read_sensitivity


def test_generate_answers_a_question(smollm2: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "What is the capital of France?"}])
    out = tmp_path / "answers.json"
    arguments = ["generate", "--model", str(smollm2), "--prompts", str(prompts), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--max_new_tokens", "20"]) == 0
    assert [row["output"] for row in json.loads(out.read_text("utf-8"))] == ["The capital of France is Paris."]


def test_the_model_hardly_reads_judgments_of_format_rules(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "smollm2-ifeval-records.jsonl").read_text("utf-8").splitlines()]
    judged = [row for row in rows if not JudgedRecord.model_validate(row).is_satisfactory]
    data = write_lines(tmp_path / "records.jsonl", sorted(judged, key=lambda row: len(row["output"]))[:24])
    out = tmp_path / "scores.jsonl"
    arguments = ["blame", "--model", str(smollm2), "--template", "chat", "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    sensitivity = read_sensitivity(out)
    assert sensitivity is not None
    assert sensitivity.num_records == 24
    assert sensitivity.flag_signal is not None
    assert sensitivity.flag_signal < 0.2
    assert sensitivity.describe_noise()
