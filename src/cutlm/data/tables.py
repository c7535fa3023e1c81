"""Parse tables: CSV as spreadsheets and programs write it, Parquet and Arrow.

The rows of a table are pairs of a place in the file, such as `:17` (line) or `[16]` (index), and an object.
"""

import csv
import datetime
import decimal
import io
import json
import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.errors import DataError

if TYPE_CHECKING:
    import pyarrow

PARQUET_MAGIC, ARROW_MAGIC, ARROW_STREAM_MAGIC = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_DELIMITERS = ",;\t|"
# The largest value that the csv module accepts on every platform; its default is smaller than some responses.
_LARGEST_CELL = 2**31 - 1
# Columns that a spreadsheet can only hold as text: numbers, and lists and objects as JSON.
_NUMBERS = ("score", "preference")
_STRUCTURED = (
    *("messages", "conversations", "conversation", "turns", "prompt", "completion", "chosen", "rejected", "context"),
    *("completions", "tools", "history", "wrong_spans", "individual_preference"),
)
# An empty cell in one of these is an empty text, which is a separate error; elsewhere it is a missing value.
_TEXTS = ("instruction", "output")


@dataclass(frozen=True)
class Table:
    """The rows of a file, the names of its columns, and a sentence for each row or column that cannot be used."""

    rows: list[tuple[str, Any]]
    names: Sequence[str]
    problems: list[str]


def split_csv(path: str | Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Split CSV or TSV into its header and its records with the lines on which they start; skip empty records.

    The delimiter is the one that splits the header into the most names: a comma, semicolon, tab or vertical bar.
    """
    skipped = 0
    first, _, rest = text.partition("\n")
    if first.rstrip("\r").lower().startswith("sep=") and len(first.rstrip("\r")) == 5:  # written by Excel
        delimiters, text, skipped = first[4], rest, 1
    else:
        delimiters = _DELIMITERS
    limit = csv.field_size_limit(_LARGEST_CELL)  # there is only a global one
    reader = None
    try:
        reader = _read_csv(text, max(delimiters, key=lambda mark: _count_names(text, mark)))
        names = [name.strip() for name in next(reader, [])]
        records = []
        start = reader.line_num + 1
        for cells in reader:
            if any(cells):
                records.append((start + skipped, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        line = (reader.line_num if reader is not None else 1) + skipped
        raise DataError(
            f"{path}:{line}: not CSV ({error}); check the quotes of the record that ends there, or save the table as"
            " CSV again"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return names, records


def _count_names(text: str, delimiter: str) -> int:
    try:
        return len(next(_read_csv(text, delimiter), []))
    except csv.Error:  # the quotes are not those of this delimiter
        return 0


def _read_csv(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def parse_csv(path: str | Path, text: str, columns: Mapping[str, str]) -> Table:
    """Parse CSV or TSV with a header; `columns` are the new names of some columns.

    Empty cells are left out. Scores are read as numbers, and columns of lists and objects, such as messages, as JSON.
    """
    header, records = split_csv(path, text)
    names = [columns.get(name, name) for name in header]
    _refuse_repeated(path, names)
    rows, problems = [], []
    for line, cells in records:
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        if len(cells) != len(names):
            problems.append(
                f"{path}:{line}: expected {len(names)} cells, one for each column of the header, got {len(cells)};"
                " quote cells with delimiters or line breaks"
            )
            continue
        # A first column without a name is the index that pandas writes.
        unnamed = [cell for name, cell in list(zip(names, cells, strict=True))[1:] if not name and cell]
        if unnamed:
            problems.append(f"{path}:{line}: a cell is in a column without a name; name the column in the header")
            continue
        pairs = zip(names, cells, strict=True)
        rows.append(
            (f":{line}", {name: _read_cell(name, cell) for name, cell in pairs if name and _is_filled(name, cell)})
        )
    return Table(rows, header, problems)


def _is_filled(name: str, cell: str) -> bool:
    return bool(cell) or name in _TEXTS


def _read_cell(name: str, cell: str) -> Any:
    if name in _NUMBERS:
        try:
            number = float(cell.strip().replace(",", "."))
        except ValueError:
            return cell
        return number if math.isfinite(number) else cell
    if name in _STRUCTURED and cell.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        # A prompt may be text that happens to be JSON.
        is_text = name in ("prompt", "completion", "chosen", "rejected", "context")
        is_messages = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
        return cell if is_text and not is_messages else value
    return cell


def parse_arrow(path: str | Path, content: bytes, columns: Mapping[str, str]) -> Table:
    """Parse a Parquet file, an Arrow file or an Arrow stream; `columns` are the new names of some columns.

    NaN is read as null, dates and UUIDs as text, and nulls inside objects are left out, because a column cannot
    distinguish them from missing fields. Binary columns are refused.
    """
    import pyarrow
    import pyarrow.parquet

    buffer = pyarrow.BufferReader(content)
    try:
        if content.startswith(PARQUET_MAGIC):
            table = pyarrow.parquet.ParquetFile(buffer).read()
        elif content.startswith(ARROW_MAGIC):
            table = pyarrow.ipc.open_file(buffer).read_all()
        else:
            table = pyarrow.ipc.open_stream(buffer).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: the Parquet or Arrow file is damaged ({reason}); download or write it again"
        ) from None
    names = [columns.get(name, name) for name in table.column_names]
    _refuse_repeated(path, names)
    values, problems = {}, []
    for name, column in zip(names, table.columns, strict=True):
        if binary := _find_binary(column.type):
            problems.append(
                f"{path}: column {name!r}: expected text, numbers or lists, got {binary}; remove the column"
            )
            continue
        try:
            read = column.to_pylist()
        except (ValueError, OverflowError) as error:  # text in another encoding, or a time such as the year 30000
            problems.append(
                f"{path}: column {name!r}: a value of type {column.type} cannot be read ({error}); remove the column"
            )
            continue
        values[name] = [_to_json(value, column.type) for value in read]
    num_rows = 0 if problems else table.num_rows
    rows = [(f"[{index}]", {name: column[index] for name, column in values.items()}) for index in range(num_rows)]
    return Table(rows, table.column_names, problems)


def _find_binary(kind: "pyarrow.DataType") -> str | None:
    """Return the type of binary data in a column, or None."""
    from pyarrow import types

    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(is_binary(kind) for is_binary in binary):
        return str(kind)
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return next(filter(None, map(_find_binary, inner)), None)


def _to_json(value: Any, kind: "pyarrow.DataType") -> Any:
    from pyarrow import types

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if hasattr(kind, "storage_type"):  # an extension type, such as the matrices of `datasets`
        kind = kind.storage_type
    if types.is_map(kind):
        return {str(key): _to_json(item, kind.item_type) for key, item in value}
    if types.is_struct(kind):
        fields = {field.name: _to_json(value[field.name], field.type) for field in kind}
        return {name: item for name, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [_to_json(item, kind.value_type) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID):
        return str(value)
    return float(value) if isinstance(value, decimal.Decimal) else value


def _refuse_repeated(path: str | Path, names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise DataError(f"{path}: the column {repeated[0]!r} occurs twice; rename or remove one of them")
