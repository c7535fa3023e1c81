"""The commands that take rows read them from tables, several files and columns with other names."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import cutlm
from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.flagging.token_scores import read_token_scores

BASE_MODEL = str(Path(cutlm.__file__).parent / "world" / "base_model")
COLUMNS = ["--columns", '{"question": "instruction", "reply": "output", "critique": "judgment"}']


@pytest.fixture
def files(tmp_path):
    """The same kind of rows in a table of a spreadsheet and in Parquet, with names of columns of their own."""
    (tmp_path / "a.csv").write_text("\ufeffquestion;reply;critique\r\nName a colour.;Blue.;\r\n", "utf-8")
    rows = [{"question": "Name a colour.", "reply": "Red.", "critique": "It is not blue."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    return [str(tmp_path / "a.csv"), str(tmp_path / "b.parquet")]


def test_judge_reads_responses(files, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "def judge(instruction, output):\n    return None if 'B' in output else 'No.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"question": "Name a colour.", "reply": reply, "critique": None} for reply in ("Blue.", "Red.")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    out = str(tmp_path / "out.jsonl")
    command = ["judge", "--responses", str(tmp_path / "c.parquet"), "--judge", "rules", "--rules", "own_rules:judge"]
    assert main([*command, "--out", out, *COLUMNS]) == 0
    assert [row.value["judgment"] for row in read_rows(out)[0]] == [None, "No."]


def test_blame_reads_records_and_its_scores_may_become_parquet(files, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert main(["blame", "--model", BASE_MODEL, "--data", *files, "--out", str(out), *COLUMNS]) == 0
    scores = read_token_scores(out)
    assert [score.record.output for score in scores] == ["Blue.", "Red."]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "scores.parquet")
    again = read_token_scores(tmp_path / "scores.parquet")
    assert [(score.token_ids, score.logps_with, score.is_flagged) for score in again] == [
        (score.token_ids, score.logps_with, score.is_flagged) for score in scores
    ]


def test_generate_reads_prompts(files, tmp_path):
    out = str(tmp_path / "out.jsonl")
    command = ["generate", "--model", BASE_MODEL, "--prompts", files[0], "--max_new_tokens", "2", "--out", out]
    assert main([*command, *COLUMNS]) == 0
    assert [row.value["instruction"] for row in read_rows(out)[0]] == ["Name a colour."]


def test_tables_are_not_written(files, tmp_path, capsys):
    command = ["convert", "alpaca", *files, *COLUMNS]
    assert main([*command, "--out", str(tmp_path / "out.csv")]) == 2
    assert "name it .jsonl" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out.jsonl.zst")]) == 0
    assert len(read_rows(tmp_path / "out.jsonl.zst")[0]) == 2
