"""Read and write files of rows: rows with their locations, atomic writes.

JSON, JSON Lines, CSV, Parquet and Arrow are read; JSON and JSON Lines are written. Files compressed with gzip, xz or
Zstandard are recognized by their first bytes when read, and by their suffix (`.gz`, `.xz`, `.zst`) when written.
"""

import errno
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from cutlm.data.formats import describe_file_format, has_beginning
from cutlm.data.sources import as_sources, check_lists, find_files, find_local_files, strip_compression
from cutlm.data.tables import ARROW_MAGIC, ARROW_STREAM_MAGIC, PARQUET_MAGIC, Table, parse_arrow, parse_csv
from cutlm.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_XZ_MAGIC = b"\xfd7zXZ\x00"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF32_MARKS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
# The first line of a table whose columns are those of a record, or of similar data.
_TABLE_HEADER = re.compile(
    r"[^\n{]*\b(?:instruction|prompt|question|output|response|completion|answer|judgment)\"?[,;\t|][^\n]*\n"
)
# How file systems say that they cannot sync a file or a directory.
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# Formats that are read and not written.
_READ_ONLY = (".csv", ".tsv", ".parquet", ".arrow")
# Libraries that write the values again traverse them by recursion.
MAX_DEPTH = 100


@dataclass(frozen=True)
class SourceRow:
    """A JSON value and its location: `data.jsonl:17` (line) or `data.json[16]` (array index)."""

    location: str
    value: Any


@dataclass(frozen=True)
class Data:
    """The rows of one or several files, a sentence for each row that cannot be used, and a hash of the content."""

    rows: list[SourceRow]
    problems: list[str]
    sha256: str


def read_bytes(path: str | Path) -> bytes:
    """Read and decompress a file; raise a DataError if it cannot be read."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw.startswith(_GZIP_MAGIC):
            return gzip.decompress(raw)
        if raw.startswith(_XZ_MAGIC):
            return lzma.decompress(raw)
        return _decompress_zstd(path, raw) if raw.startswith(_ZSTD_MAGIC) else raw
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a file, got a directory; name the file inside it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}); download or compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decompress_zstd(path: Path, raw: bytes) -> bytes:
    import pyarrow

    try:
        return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}); download or compress it again") from None


def read_rows(
    sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> tuple[list[SourceRow], list[str]]:
    """Read the rows of files; see `read_data`."""
    data = read_data(sources, columns)
    return data.rows, data.problems


def read_data(sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None) -> Data:
    """Read the rows of one or several sources, one after the other.

    Args:
        sources: Files of JSON, JSON Lines, CSV, Parquet or Arrow, compressed or not; globs; folders; data sets of the
            hub, see `cutlm.data.sources`.
        columns: The field of a record for each column that has another name in the files.

    Returns:
        The rows, and a sentence for each row that cannot be read or has an infinite number or too deeply nested values.

    Raises:
        DataError: A file as a whole cannot be read: missing, not UTF-8, of another format; all of them are named.

    Example:

        >>> read_data(["a.jsonl", "more/*.parquet"], columns={"prompt": "instruction"}).rows
        [SourceRow(location='a.jsonl:1', value={'instruction': 'Hi.', ...}), ...]
    """
    columns = columns or {}
    rows: list[SourceRow] = []
    problems: list[str] = []
    unreadable: list[str] = []
    hashes: list[str] = []
    names: set[str] = set()
    check_lists(as_sources(sources))
    for source in as_sources(sources):
        try:
            for file in find_files(source):
                content = read_bytes(file.path)
                table = _parse_file(file.name, content, columns)
                hashes.append(hashlib.sha256(content).hexdigest())
                names.update(table.names)
                unusable = {place: problem for place, value in table.rows if (problem := _find_problem(value))}
                rows += [SourceRow(f"{file.name}{place}", v) for place, v in table.rows if place not in unusable]
                problems += table.problems
                problems += [f"{file.name}{place}: {problem}" for place, problem in unusable.items()]
        except DataError as error:
            unreadable += error.problems
    missing = [name for name in columns if name not in names]
    if missing and rows and not unreadable:
        unreadable = [
            f"columns: no row of {' '.join(as_sources(sources))} has {', '.join(map(repr, missing))}; the name in the"
            """ file comes first, then cutlm's: {"prompt": "instruction"}"""
        ]
    if unreadable:
        raise DataError(unreadable)
    return Data(rows, problems, join_hashes(hashes, columns))


class Line(NamedTuple):
    """A line of a file of JSON Lines: where it is, and its row, or a sentence that says why it cannot be used."""

    offset: int  # in bytes
    num_bytes: int
    row: SourceRow
    problem: str | None


def is_plain_lines(path: str | Path) -> bool:
    """Whether a file is JSON Lines that are neither compressed nor in another encoding than UTF-8."""
    try:
        with open(path, "rb") as file:
            return file.read(1000).lstrip().startswith(b"{")
    except OSError:
        return False


def stream_lines(path: str | Path, name: str) -> Iterator[Line]:
    """Read a file of JSON Lines line by line, as `read_data` does; see `is_plain_lines`.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    offset = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.decode("utf-8", "replace").strip():  # as in `_parse_lines`, also of a no-break space
                    yield Line(offset, len(raw), *_read_line(name, number, raw))
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def read_line(file: BinaryIO, offset: int, num_bytes: int) -> Any:
    """Read the value of a line that `stream_lines` has found."""
    file.seek(offset)
    return json.loads(file.read(num_bytes))


def _read_line(name: str, number: int, raw: bytes) -> tuple[SourceRow, str | None]:
    location = f"{name}:{number}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: expected UTF-8 text, got the byte 0x{raw[error.start]:02x}") from None
    rows, problems = _parse_lines(name, text, number)
    if problems:
        return SourceRow(location, None), problems[0]
    ((_, value),) = rows
    problem = _find_problem(value)
    return SourceRow(location, value), problem and f"{location}: {problem}"


def hash_file(path: str | Path) -> str:
    """Hash the bytes of a file, which need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_sources(sources: str | Path | Sequence[str | Path]) -> str:
    """Hash the content of the files that `read_data` would read; raise a DataError if one cannot be read."""
    files = [file for source in as_sources(sources) for file in find_files(source)]
    return join_hashes([hashlib.sha256(read_bytes(file.path)).hexdigest() for file in files], {})


def join_hashes(hashes: Sequence[str], columns: Mapping[str, str]) -> str:
    if len(hashes) == 1 and not columns:
        return hashes[0]
    return hashlib.sha256(json.dumps([hashes, columns], sort_keys=True).encode()).hexdigest()


def _parse_file(path: str, content: bytes, columns: Mapping[str, str]) -> Table:
    """Parse the decompressed content of a file of rows and rename its columns."""
    if has_beginning(content, PARQUET_MAGIC, ARROW_MAGIC, ARROW_STREAM_MAGIC):
        return parse_arrow(path, content, columns)
    text = decode(path, content)
    suffix = Path(strip_compression(path.lower())).suffix
    if suffix in (".csv", ".tsv") and text.strip() and not _is_json(text):
        return parse_csv(path, text, columns)
    is_array = text.lstrip().startswith("[")
    rows, problems = (_parse_array(path, text), []) if is_array else _parse_lines(path, text)
    if problems and not rows:
        _refuse_format(path, text, problems)
    names = {name for _, value in rows if isinstance(value, dict) for name in value}
    return Table(_rename(path, rows, columns, problems) if columns else rows, list(names), problems)


def decode(path: str | Path, content: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark, as spreadsheets write it; raise a DataError for other bytes."""
    if content.startswith(_UTF16_MARKS) and not content.startswith(_UTF32_MARKS):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-16, as its first bytes say ({error.reason}); save it in UTF-8") from None
    if found := describe_file_format(content):
        raise DataError(f"{path}: expected JSON, JSON Lines, CSV, Parquet or Arrow, got {found}")
    data = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number}: expected UTF-8 text, got the byte 0x{data[error.start]:02x}; convert the file, such as"
            " by iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from None


def _is_json(text: str) -> bool:
    """Whether the text is JSON or JSON Lines, whatever the file is called."""
    return re.match(r"\s*(?:\[\s*)?\{\s*(?:\"(?:[^\"\\]|\\.)*\"\s*:|\})", text) is not None


def _rename(
    path: str, rows: list[tuple[str, Any]], columns: Mapping[str, str], problems: list[str]
) -> list[tuple[str, Any]]:
    renamed = []
    for place, value in rows:
        if isinstance(value, dict):
            names = [columns.get(name, name) for name in value]
            if len({*names}) < len(names):
                name = next(name for name in names if names.count(name) > 1)
                problems.append(f"{path}{place}: columns: the row has a field {name!r} already; rename that one too")
                continue
            value = dict(zip(names, value.values(), strict=True))
        renamed.append((place, value))
    return renamed


def _parse_array(path: str, text: str) -> list[tuple[str, Any]]:
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        expected = "expected one JSON array of objects, or one JSON object per line"
        location = f"{path}:{error.lineno}"
        raise DataError(f"{location}: not JSON ({error.msg}, column {error.colno}); {expected}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    return [(f"[{index}]", value) for index, value in enumerate(values)]


def _parse_lines(path: str, text: str, start: int = 1) -> tuple[list[tuple[str, Any]], list[str]]:
    rows, problems = [], []
    # Only "\n" ends a line: strings may contain other Unicode line breaks.
    for number, line in enumerate(text.split("\n"), start=start):
        if line.strip():
            try:
                rows.append((f":{number}", _parse(line)))
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                problems.append(f"{path}:{number}: not JSON ({reason}); each line must be one JSON object")
    return rows, problems


def _refuse_format(path: str, text: str, problems: list[str]) -> NoReturn:
    """Raises for a file without a single line of valid JSON."""
    try:
        value = _parse(text)
    except (ValueError, RecursionError):
        if all(line.lstrip().startswith("{") for line in text.split("\n") if line.strip()):
            raise DataError(problems) from None
        expected = "expected a JSON array or JSON Lines"
        if _TABLE_HEADER.match(text):
            raise DataError(f"{path}: not JSON; {expected}, got a table; rename it to .csv or .tsv") from None
        raise DataError(f"{path}: not JSON; {expected}, got a file that begins with {text.strip()[:60]!r}") from None
    got = f"one JSON object with the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else "one value"
    raise DataError(f"{path}: expected an array of records, or one record per line, got {got}")


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return value


def _find_problem(row: Any) -> str | None:
    """Return why a row cannot be written again, or None."""
    if not isinstance(row, dict):
        return _find_unwritable(row)
    problems = ((name, _find_unwritable(value)) for name, value in row.items())
    return next((f"field {name!r}: {problem}" for name, problem in problems if problem), None)


def _find_unwritable(value: Any, depth: int = 0) -> str | None:
    if depth == MAX_DEPTH:
        return f"expected values nested at most {MAX_DEPTH} deep, got deeper ones; flatten or remove them"
    if isinstance(value, float) and math.isinf(value):
        return "expected finite numbers, got one beyond 1.8e308; write a smaller one, or null"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, (_find_unwritable(item, depth + 1) for item in items)), None)


def check_out_file(inputs: Iterable[str | Path], out: str | Path) -> None:
    """Raises a DataError if an output file is one of the inputs' files, or of a format that is only read."""
    if (suffix := Path(strip_compression(Path(out).name)).suffix) in _READ_ONLY:
        raise DataError(f"--out {out}: expected a file of JSON Lines or JSON, got {suffix}; name it .jsonl or .json")
    if Path(out).exists() and any(path.samefile(out) for source in inputs for path in find_local_files(str(source))):
        raise DataError(f"--out {out}: expected a new file, got one of the inputs; choose another name")


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` only once it is complete and synced to disk.

    The data is written to a temporary file next to it, compressed according to the suffix; after an error or a kill,
    `path` is unchanged. Raise a DataError if it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file to write, got a directory; name a file inside it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = open(temporary, "wb")  # noqa: SIM115 (closed by `with raw` below)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with raw:
            # Without name and time, so that the same rows give the same bytes.
            compressors: dict[str, Any] = {
                ".gz": partial(gzip.GzipFile, filename="", mode="wb", fileobj=raw, mtime=0),
                ".xz": partial(lzma.LZMAFile, raw, "wb"),
                ".zst": partial(_compress_zstd, raw),
            }
            with compressors.get(path.suffix, partial(nullcontext, raw))() as file:
                yield file
            raw.flush()
            sync_file(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _compress_zstd(raw: BinaryIO) -> Any:
    import pyarrow

    # The stream closes its file, so it gets a duplicate.
    return pyarrow.CompressedOutputStream(open(os.dup(raw.fileno()), "wb"), "zstd")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with open_atomic(path) as file:
        file.write(text.encode())


def sync_file(handle: int) -> None:
    """Write an open file or directory through to the disk, where its file system can do so."""
    try:
        os.fsync(handle)
    except OSError as error:
        # Network and FUSE mounts, where a power failure may then lose the latest writes.
        if error.errno not in _NOT_SYNCED:
            raise


def sync_directory(path: str | Path) -> None:
    """Make a rename or removal inside a directory durable."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # it may be writable without being readable, and Windows opens no directory
        return
    try:
        sync_file(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | Path) -> None:
    """Make every file below a folder, and its directory entries, durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                sync_file(file.fileno())
        sync_directory(parent)


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows atomically and return their number.

    The file is one JSON array if the name ends in `.json` (or `.json.gz`), otherwise JSON Lines.
    """
    is_array = strip_compression(Path(path).name).endswith(".json")
    first, separator, last = (b"[\n  ", b",\n  ", b"\n]\n") if is_array else (b"", b"\n", b"\n")
    num_rows = 0
    with open_atomic(path) as out:
        for row in rows:
            out.write((separator if num_rows else first) + _encode_row(row))
            num_rows += 1
        out.write(last if num_rows else b"[]\n" if is_array else b"")
    return num_rows


def _encode_row(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is not valid UTF-8, but can be escaped
        return json.dumps(row, allow_nan=False).encode("ascii")
