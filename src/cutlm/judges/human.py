"""A person as a judge: write lists to be filled in a spreadsheet or a text editor, and read one back.

Each row has a `number`, so that rows may be sorted. In the CSV list, texts that a spreadsheet would take for a formula
get a leading apostrophe, which a spreadsheet may keep or drop; records get the original texts.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cutlm.data.files import SourceRow, decode, open_atomic, read_bytes, read_rows, write_rows
from cutlm.data.records import PRAISE, JudgedRecord, is_praise, validate_row
from cutlm.data.tables import split_csv
from cutlm.errors import DataError, UserError
from cutlm.judges.answers import locate_quotes
from cutlm.judges.responses import Outcome, Response, set_aside_empty

COLUMNS = ("number", "instruction", "input", "output", "judgment")
# The wrong passages, a line each (or, in JSON, a list); lists of earlier versions lack it.
QUOTES = "quotes"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def name_todo_files(out: str | Path) -> tuple[Path, Path]:
    """Return the paths of the lists to be filled: JSON Lines, and CSV."""
    return Path(f"{out}.todo.jsonl"), Path(f"{out}.todo.csv")


def write_todo(responses: Sequence[Response], out: str | Path) -> int:
    """Write the two lists to be filled and return the number of responses in them; empty ones are left out.

    Raises:
        UserError: A list exists already, and may contain a person's work.
    """
    lines, table = name_todo_files(out)
    if existing := [str(path) for path in (lines, table) if path.exists()]:
        advice = "pass one with --labels FILE, or remove it to start over"
        raise UserError(f"{' and '.join(existing)}: exists already and may be filled; {advice}")
    kept, _ = set_aside_empty(responses)
    rows: list[dict[str, Any]] = [
        {"number": index + 1, **_show(responses[index]), "judgment": "", QUOTES: ""} for index in kept
    ]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, QUOTES])
    writer.writerows([guard_cell(str(row[name])) for name in (*COLUMNS, QUOTES)] for row in rows)
    with open_atomic(table) as file:
        file.write(text.getvalue().encode("utf-8-sig"))  # spreadsheets recognize UTF-8 by its byte order mark
    return write_rows(lines, rows)


def _show(response: Response) -> dict[str, str]:
    """Return the texts that a person sees: of a conversation, all turns as one text."""
    shown = {"instruction": response.full_instruction, "input": ""} if response.row.get("messages") else {}
    return response.fields | shown


def guard_cell(text: str) -> str:
    """Keep a spreadsheet from evaluating a text as a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def read_todo(responses: Sequence[Response], path: str | Path) -> Outcome:
    """Read a list that a person has filled: CSV if it ends in `.csv`, otherwise JSON Lines or a JSON array.

    Raises:
        DataError: Judgments or rows are missing, texts differ from those of the responses, or a quote does not occur
            exactly once in its response; all of them are named.
    """
    kept, outcome = set_aside_empty(responses)
    indices = {str(index + 1): index for index in kept}
    problems: list[str] = []
    locations: dict[int, str] = {}
    is_csv = Path(path).suffix.lower() == ".csv"
    for row in _read_csv(path) if is_csv else _read_json(path, problems):
        location, cells = row.location, row.value
        number = (cells.get("number") or "").strip()
        index = indices.get(number)
        if index is None:
            problems.append(f"{location}: field 'number': expected the number of a response, got {number!r}; fix it")
            continue
        if index in locations:
            problems.append(f"{location}: number {number} again, after {locations[index]}; keep one of the two")
            continue
        locations[index] = location
        response = responses[index]
        problems += [
            f"{location}: field {name!r} differs from {response.location}; restore the original text"
            for name, text in _show(response).items()
            if not _is_same(cells.get(name) or "", text)
        ]
        # An apostrophe at the start of a judgment stays: it may open a quotation.
        judgment = (cells.get("judgment") or "").strip()
        if not judgment:
            problems.append(f"{location}: field 'judgment': expected a judgment, or \"{PRAISE}\", got nothing")
        validate_row(SourceRow(location, response.fields | {"judgment": judgment or None}), JudgedRecord, problems)
        outcome.judgments[index] = None if is_praise(judgment) else judgment
        if quotes := _split_quotes(cells.get(QUOTES) or ""):
            problems += _find_quote_problems(quotes, response.output, judgment, location)
            outcome.wrong_spans[index] = locate_quotes(quotes, response.output)[0]
    problems += [
        f"{path}: number {index + 1} is missing ({responses[index].location}); restore its row"
        for index in kept
        if index not in locations
    ]
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; fix them and try again")
    return outcome


def _split_quotes(cell: str) -> list[str]:
    """Return the quotes of a cell: one in each line that is not empty."""
    return [line.strip() for line in cell.splitlines() if line.strip()]


def _find_quote_problems(quotes: Sequence[str], output: str, judgment: str, location: str) -> list[str]:
    """The problems of the quotes in one row."""
    if is_praise(judgment):
        return [f'{location}: field {QUOTES!r}: expected none with the judgment "{PRAISE}", got {len(quotes)}']
    return [
        f"{location}: field {QUOTES!r}: expected passages that occur exactly once in output, got {quote!r}; copy it"
        " from there, with more of the text around it if it occurs again"
        for quote in quotes
        if locate_quotes([quote], output)[1]
    ]


def _is_same(cell: str, text: str) -> bool:
    """Whether a cell holds a text, with or without the guard and whatever its line breaks."""
    given, *accepted = (form.replace("\r\n", "\n").replace("\r", "\n") for form in (cell, text, guard_cell(text)))
    return given in accepted


def _read_csv(path: str | Path) -> list[SourceRow]:
    """Read a row per response: its cells by column."""
    names, records = split_csv(path, decode(path, read_bytes(path)))
    if missing := [name for name in COLUMNS if name not in names]:
        expected = f"expected the columns {', '.join(COLUMNS)}"
        raise DataError(f"{path}:1: {expected}, got none named {', '.join(missing)}; restore them")
    return [SourceRow(f"{path}:{line}", dict(zip(names, cells, strict=False))) for line, cells in records]


def _read_json(path: str | Path, problems: list[str]) -> Iterator[SourceRow]:
    """Read the same as `_read_csv`; a field that is missing is None."""
    rows, invalid = read_rows(path)
    problems += invalid
    for row in rows:
        if not isinstance(row.value, dict):
            problems.append(f"{row.location}: expected an object with the fields {', '.join(COLUMNS)}")
            continue
        values = {name: row.value.get(name) for name in (*COLUMNS, QUOTES)}
        if isinstance(quotes := values[QUOTES], list) and all(isinstance(quote, str) for quote in quotes):
            values[QUOTES] = "\n".join(" ".join(quote.split()) for quote in quotes)
        others = {name: json.dumps(value) for name, value in values.items() if not isinstance(value, str | None)}
        yield SourceRow(row.location, values | others)
