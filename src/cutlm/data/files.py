"""JSON and JSON Lines files: rows in with their place in the file, rows out atomically.

What the rows mean is left to `cutlm.data.records`. Files that are compressed with gzip or xz are recognised by
their first bytes when read, and by their ending (`.gz`, `.xz`) when written.
"""

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cutlm.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_XZ_MAGIC = b"\xfd7zXZ\x00"
# What is read is written again by libraries that follow a value into its depth by recursion.
MAX_DEPTH = 100
_INFINITE = float("inf")


@dataclass(frozen=True)
class SourceRow:
    """A JSON value and where it stands: `data.jsonl:17` (line) or `data.json[16]` (array index)."""

    location: str
    value: Any


def read_bytes(path: str | Path) -> bytes:
    """Reads a whole file, decompressed.

    Raises:
        DataError: The file is missing, is a directory, cannot be opened, or its compression is broken.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw.startswith(_GZIP_MAGIC):
            return gzip.decompress(raw)
        if raw.startswith(_XZ_MAGIC):
            return lzma.decompress(raw)
        return raw
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a file, got a directory; name the file inside it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice in one object"
        )
    return value


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)


def _find_unusable(value: Any) -> str | None:
    """Says which field holds a number too large for one, or is nested too deep; None where all can be written again."""
    for name, inner in value.items() if isinstance(value, dict) else [(None, value)]:
        place = "" if name is None else f"field {name!r}: "
        level = [inner]
        for _ in range(MAX_DEPTH):
            if _INFINITE in level or -_INFINITE in level:
                return f"{place}expected finite numbers, got one beyond 1.8e308; write a smaller one, or null"
            level = [
                item
                for outer in level
                if isinstance(outer, dict | list)
                for item in (outer.values() if isinstance(outer, dict) else outer)
            ]
            if not level:
                break
        else:
            return f"{place}expected values nested at most {MAX_DEPTH} deep, got deeper ones; flatten or leave them out"
    return None


def read_rows(path: str | Path) -> tuple[list[SourceRow], list[str]]:
    """Reads the rows of a JSON array or of a JSON Lines file, whichever it is.

    Args:
        path: The file; gzip and xz are unpacked.

    Returns:
        The rows that are JSON, and a sentence for each line that is not, or that holds what JSON cannot say again: a
        number that is infinite, or values nested too deep.

    Raises:
        DataError: The file as a whole cannot be read: missing, a directory, not UTF-8, not JSON at all.
    """
    return parse_rows(path, read_bytes(path))


def parse_rows(path: str | Path, content: bytes) -> tuple[list[SourceRow], list[str]]:
    """Parses the decompressed content of a file of rows; see `read_rows`."""
    path = Path(path)
    data = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{number}: expected UTF-8 text, got the byte 0x{data[error.start]:02x}") from None
    start = text.lstrip()[:1]
    if start == "[":
        return _set_unusable_aside(_read_array(path, text))
    # JSON Lines end at "\n" alone: other Unicode line ends may stand inside a string.
    lines = text.split("\n")
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(SourceRow(f"{path}:{number}", _parse(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON ({_reason(error)}); each line must be one JSON object")
    if problems and not rows:
        raise DataError(_describe_foreign_file(path, text, problems))
    rows, unusable = _set_unusable_aside(rows)
    return rows, problems + unusable


def _set_unusable_aside(rows: list[SourceRow]) -> tuple[list[SourceRow], list[str]]:
    kept, problems = [], []
    for row in rows:
        problem = _find_unusable(row.value)
        if problem is None:
            kept.append(row)
        else:
            problems.append(f"{row.location}: {problem}")
    return kept, problems


def _read_array(path: Path, text: str) -> list[SourceRow]:
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({_reason(error)}, column {error.colno}); expected one JSON array of"
            " objects, or one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({_reason(error)})") from None
    return [SourceRow(f"{path}[{index}]", value) for index, value in enumerate(values)]


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _describe_foreign_file(path: Path, text: str, problems: list[str]) -> str:
    """Says what a file is in which no line is JSON."""
    try:
        value = _parse(text)
    except (ValueError, RecursionError):
        if all(line.lstrip().startswith("{") for line in text.split("\n") if line.strip()):
            return "\n".join(problems)
        return f"{path}: not JSON ({len(problems)} lines, none of them JSON); expected a JSON array or JSON Lines"
    kind = f"one JSON object with the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else "one value"
    return f"{path}: JSON of another shape; expected an array of records or one record a line, got {kind}"


def refuse_overwriting(inputs: Iterable[str | Path], out: str | Path) -> None:
    """Refuses an output file that is one of the inputs.

    Raises:
        DataError: It is.
    """
    for path in inputs:
        if Path(path).exists() and Path(out).exists() and Path(path).samefile(out):
            raise DataError(f"--out {out}: expected a file of its own, got one of the inputs; choose another name")


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name only when it is whole and on the disk.

    The bytes go to a file beside it, which is synced and renamed at the end; after an error or a kill, the file
    of that name is what it was before. Compressed by the ending of the name.

    Raises:
        DataError: The folder cannot be made or written to, or the path is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file to write, got a directory; name a file inside it")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = open(beside, "wb")  # noqa: SIM115 (closed below, by `with raw`)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with raw:
            if path.suffix == ".gz":
                # No time stamp: the same rows give the same bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            elif path.suffix == ".xz":
                with lzma.LZMAFile(raw, "wb") as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: str | Path) -> None:
    """Makes a rename inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | Path) -> None:
    """Makes every file below a folder, and its directory entries, durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(parent)


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows atomically: JSON Lines, or one JSON array where the name ends in `.json` (or `.json.gz`).

    Returns:
        The number of rows written.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz").removesuffix(".xz")
    num_rows = 0
    with open_atomic(path) as out:
        is_array = name.endswith(".json")
        if is_array:
            out.write(b"[")
        for row in rows:
            if is_array:
                out.write(b"\n  " if num_rows == 0 else b",\n  ")
            out.write(_encode_row(row))
            if not is_array:
                out.write(b"\n")
            num_rows += 1
        if is_array:
            out.write(b"\n]\n" if num_rows else b"]\n")
    return num_rows


def _encode_row(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is not UTF-8, but can stand as an escape
        return json.dumps(row, allow_nan=False).encode("ascii")
