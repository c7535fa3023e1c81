"""Tests of commands with a real instruct model."""

import json
from pathlib import Path

from commands import write_lines

from cutlm.cli import main


def test_generate_answers_a_question(smollm2: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "What is the capital of France?"}])
    out = tmp_path / "answers.json"
    arguments = ["generate", "--model", str(smollm2), "--prompts", str(prompts), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--max_new_tokens", "20"]) == 0
    assert [row["output"] for row in json.loads(out.read_text("utf-8"))] == ["The capital of France is Paris."]
