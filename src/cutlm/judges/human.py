"""The judge is a person: two lists to fill, one for a spreadsheet and one for a text editor, and reading one back.

Each row has a `number`, so that rows may be sorted. Texts that a spreadsheet would take for a formula get a ' before
them, which a spreadsheet may keep or drop; records get the responses' own texts.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cutlm.data.files import open_atomic, read_bytes, read_rows, write_rows
from cutlm.data.records import is_praise
from cutlm.errors import DataError, UserError
from cutlm.judges import PRAISE, Outcome, Response
from cutlm.judges.responses import set_aside_empty

COLUMNS = ("number", "instruction", "input", "output", "judgment")
_TEXTS = ("instruction", "input", "output")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
# The largest that the csv module takes everywhere; its own limit is shorter than some responses.
_LARGEST_CELL = 2**31 - 1


class _Filled(NamedTuple):
    """A row that a person has filled, every cell as text; None where the row has no such cell."""

    location: str
    cells: dict[str, str | None]


def name_todo_files(out: str | Path) -> tuple[Path, Path]:
    """Where the lists to fill stand: JSON Lines, and CSV."""
    return Path(f"{out}.todo.jsonl"), Path(f"{out}.todo.csv")


def write_todo(responses: Sequence[Response], out: str | Path) -> int:
    """Writes the two lists to fill.

    Returns:
        The number of responses in them; empty ones are left out.

    Raises:
        UserError: Such a list is there already, and a person's work may be in it.
    """
    lines, table = name_todo_files(out)
    there = [str(path) for path in (lines, table) if path.exists()]
    if there:
        raise UserError(
            f"{' and '.join(there)}: there already, and may be filled; give one by --labels FILE, or remove"
            f" {'them' if len(there) > 1 else 'it'} to begin anew"
        )
    kept, _ = set_aside_empty(responses)
    rows = [
        {
            "number": index + 1,
            "instruction": responses[index].instruction,
            "input": responses[index].input,
            "output": responses[index].output,
            "judgment": "",
        }
        for index in kept
    ]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([row["number"], *(guard_cell(str(row[name])) for name in _TEXTS), ""] for row in rows)
    with open_atomic(table) as file:
        file.write(text.getvalue().encode("utf-8-sig"))  # the mark by which spreadsheets know UTF-8
    return write_rows(lines, rows)


def guard_cell(text: str) -> str:
    """Keeps a spreadsheet from running a text as a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def read_todo(responses: Sequence[Response], path: str | Path) -> Outcome:
    """Reads a list back that a person has filled.

    Args:
        responses: What the list was made from.
        path: CSV where it ends in `.csv`, else JSON Lines or a JSON array.

    Raises:
        DataError: Judgments or rows are missing, or texts are not those of the responses; all of it is named.
    """
    kept, outcome = set_aside_empty(responses)
    numbers = {str(index + 1): index for index in kept}
    problems: list[str] = []
    locations: dict[int, str] = {}
    for filled in _read_csv(Path(path)) if Path(path).suffix.lower() == ".csv" else _read_json(path, problems):
        number = (filled.cells.get("number") or "").strip()
        index = numbers.get(number)
        if index is None:
            problems.append(
                f"{filled.location}: field 'number': expected the number of a response, got {number!r}; restore it"
            )
        elif index in locations:
            problems.append(f"{filled.location}: number {number} again, after {locations[index]}; keep one of the two")
        else:
            locations[index] = filled.location
            problems += _compare(filled, responses[index])
            # As it was written: a ' at its start may well open a quotation.
            judgment = (filled.cells.get("judgment") or "").strip()
            if not judgment:
                problems.append(
                    f"{filled.location}: field 'judgment': expected a judgment, or \"{PRAISE}\", got nothing"
                )
            elif "\0" in judgment:
                problems.append(f"{filled.location}: field 'judgment': expected text without null bytes; write it anew")
            outcome.judgments[index] = None if is_praise(judgment) else judgment
    problems += [
        f"{path}: number {index + 1} is missing ({responses[index].location}); put its row back"
        for index in kept
        if index not in locations
    ]
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; mend them, nothing was written")
    return outcome


def _compare(filled: _Filled, response: Response) -> list[str]:
    """A sentence for each text that is not the response's."""
    expected = {"instruction": response.instruction, "input": response.input, "output": response.output}
    return [
        f"{filled.location}: field {name!r} differs from {response.location}; restore the original text"
        for name, text in expected.items()
        if not _is_same(filled.cells.get(name) or "", text)
    ]


def _is_same(cell: str, text: str) -> bool:
    # Spreadsheets write line ends in their own way.
    return any(_join_lines(cell) == _join_lines(form) for form in (text, guard_cell(text)))


def _join_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_csv(path: Path) -> Iterator[_Filled]:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes; save it as CSV in UTF-8") from None
    # Where a comma is the decimal mark, spreadsheets separate cells by something else.
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        names = [name.strip() for name in next(reader, [])]
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise DataError(
                f"{path}:1: expected the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}; put them"
                " back"
            )
        start = reader.line_num + 1
        for row in reader:
            if any(row):
                yield _Filled(f"{path}:{start}", dict(zip(names, row, strict=False)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: no CSV ({error}); save it as CSV again") from None
    finally:
        csv.field_size_limit(limit)


def _read_json(path: str | Path, problems: list[str]) -> Iterator[_Filled]:
    rows, broken = read_rows(path)
    problems += broken
    for row in rows:
        if not isinstance(row.value, dict):
            problems.append(f"{row.location}: expected an object with the fields {', '.join(COLUMNS)}")
            continue
        yield _Filled(row.location, {name: _as_text(row.value.get(name)) for name in COLUMNS})


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
