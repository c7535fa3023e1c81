"""A person as a judge: lists are written, filled and read back; no text is lost or evaluated as a formula."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.cli import main
from cutlm.judges.human import guard_cell

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add, please.", "output": "=1+1", "generator": "m"},
    {"instruction": "@all: say \"hello\";\nand bye", "input": "-x", "output": "Hello,\r\nbye 🙂"},
    {"instruction": "Nothing.", "output": ""},
    {"instruction": "Count.", "output": "+1\t2"},
]  # fmt: skip
JUDGMENTS = ["Perfect.", "No comma; \"so\".\nAnd no smile.", "'+1' is no count."]  # fmt: skip


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["judge", "--responses", str(path), "--judge", "human", "--out", str(tmp_path / "out.jsonl")]


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def write_table(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode("utf-8-sig"))


def fill(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"judgment": judgment} for row, judgment in zip(rows, JUDGMENTS, strict=True)]


def check_records(out: Path) -> None:
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["output"] for row in records] == ["=1+1", "Hello,\r\nbye 🙂", "+1\t2"]
    assert [row["judgment"] for row in records] == [None, *JUDGMENTS[1:]]
    assert records[0]["generator"] == "m"
    assert records[1]["input"] == "-x"


def test_a_table_survives_a_round_trip(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "1 responses are empty and are left out" in printed
    assert "--labels" in printed
    table = tmp_path / "out.jsonl.todo.csv"
    rows = read_table(table)
    assert [row["number"] for row in rows] == ["1", "2", "4"]
    for row in rows:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in row.values()), "no cell is a formula"
    for delimiter in ",;\t":
        # Sorted by a person, and saved by a spreadsheet with another delimiter.
        write_table(table, fill(rows)[::-1], delimiter)
        assert main([*options, "--labels", str(table), "--overwrite"]) == 1, "one response is empty"
        check_records(tmp_path / "out.jsonl")


def test_a_spreadsheet_may_drop_the_guards_and_change_line_ends(options: list[str], tmp_path: Path) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    rows = read_table(table)
    for row in rows:
        for name in ("instruction", "input", "output"):
            row[name] = row[name].removeprefix("'").replace("\r\n", "\n")
    write_table(table, fill(rows))
    assert main([*options, "--labels", str(table)]) == 1
    check_records(tmp_path / "out.jsonl")


def test_json_lines_survive_a_round_trip(options: list[str], tmp_path: Path) -> None:
    assert main(options) == 0
    path = tmp_path / "out.jsonl.todo.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows[0]["output"] == "=1+1", "JSON Lines need no guard"
    path.write_text("".join(json.dumps(row) + "\n" for row in fill(rows)))
    assert main([*options, "--labels", str(path)]) == 1
    check_records(tmp_path / "out.jsonl")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_all_problems_of_a_list_are_reported_together(
    options: list[str], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    rows = fill(read_table(table))
    rows[0]["judgment"] = " "
    rows[1]["output"] += "!"
    rows[2]["number"] = "3"
    rows.append(rows[1] | {"judgment": "Wrong."})
    path = tmp_path / f"filled.{kind}"
    if kind == "csv":
        write_table(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*options, "--labels", str(path)]) == 2
    printed = capsys.readouterr().err
    # In a table a row has as many lines as its cells.
    first, second, third, fourth = (2, 3, 7, 8) if kind == "csv" else (1, 2, 3, 4)
    for part in (
        f"{path}:{first}: field 'judgment': ",
        f"{path}:{second}: field 'output' differs from {tmp_path / 'in.jsonl'}:2",
        f"{path}:{third}: field 'number': expected the number of a response, got '3'",
        f"{path}:{fourth}: number 2 again, after {path}:{second}",
        f"{path}: number 4 is missing ({tmp_path / 'in.jsonl'}:4)",
    ):
        assert part in printed
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "list"])
def test_quotes_of_a_person_become_spans(options: list[str], tmp_path: Path, kind: str) -> None:
    assert main(options) == 0
    quotes = ["", "Hello,\n\n  bye", "+1"]
    rows = [
        row | {"quotes": quote.split("\n") if kind == "list" else quote}
        for row, quote in zip(fill(read_table(tmp_path / "out.jsonl.todo.csv")), quotes, strict=True)
    ]
    path = tmp_path / f"filled.{'csv' if kind == 'csv' else 'jsonl'}"
    if kind == "csv":
        write_table(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*options, "--labels", str(path)]) == 1, "one response is empty"
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row.get("wrong_spans") for row in records] == [None, [[0, 6], [8, 11]], [[0, 2]]]


def test_lists_without_the_column_of_quotes_are_read(options: list[str], tmp_path: Path) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    rows = [{name: cell for name, cell in row.items() if name != "quotes"} for row in fill(read_table(table))]
    write_table(table, rows)
    assert main([*options, "--labels", str(table)]) == 1, "one response is empty"
    check_records(tmp_path / "out.jsonl")


def test_quotes_that_do_not_occur_once_are_problems(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    rows = fill(read_table(table))
    for row, quotes in zip(rows, ["1", "Goodbye\nbye", "el"], strict=True):
        row["quotes"] = quotes
    write_table(table, rows)
    assert main([*options, "--labels", str(table)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("field 'quotes'") == 3
    assert "'Goodbye'" in printed
    assert "'bye'" not in printed
    assert not (tmp_path / "out.jsonl").exists()


def test_an_existing_list_is_not_overwritten(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    table.write_text("hours of work")
    assert main([*options, "--overwrite"]) == 2
    assert "exists already and may be filled" in capsys.readouterr().err
    assert table.read_text() == "hours of work"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"number,output\n1,x\n", ":1: expected the columns"),
        (b"", ":1: expected the columns"),
        ("number,ü".encode("latin-1"), ":1: expected UTF-8 text"),
    ],
)
def test_a_file_that_is_not_such_a_table_is_refused(
    options: list[str], tmp_path: Path, content: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "filled.csv"
    path.write_bytes(content)
    assert main([*options, "--labels", str(path)]) == 2
    assert f"{path}{expected}" in capsys.readouterr().err


def test_cells_may_be_long_and_the_csv_limit_is_restored(options: list[str], tmp_path: Path) -> None:
    assert main(options) == 0
    table = tmp_path / "out.jsonl.todo.csv"
    limit = csv.field_size_limit()
    write_table(table, [row | {"judgment": "x" * (limit + 1)} for row in read_table(table)])
    assert main([*options, "--labels", str(table)]) == 1
    assert csv.field_size_limit() == limit
    path = tmp_path / "in.jsonl"
    path.write_text(path.read_text().replace('"Count."', '"Count it."'))
    assert main([*options, "--labels", str(table), "--overwrite"]) == 2
    assert csv.field_size_limit() == limit


@given(st.text())
def test_no_guarded_cell_is_a_formula(text: str) -> None:
    cell = guard_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell in (text, f"'{text}")
