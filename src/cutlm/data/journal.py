"""The journal of a long run: what is finished stands in `OUT.partial` at once, so that a stopped run can go on.

The first line is a header of the settings that the results depend on; a run with other ones is refused. What the lines
after it mean, and the file that is made of them in the end, are left to the caller.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from cutlm.data.files import open_atomic, read_bytes, sync_directory
from cutlm.errors import UserError


class Journal:
    """Goes on with the partial file of a stopped run, or begins a new one.

    Args:
        out: The file that the run will have made in the end.
        header: The settings that the results depend on, by name.
        overwrite: Whether a partial file that cannot be gone on with gives way.

    Attributes:
        path: The partial file.
        lines: What a stopped run had finished, in the order in which it was appended.

    Raises:
        UserError: A partial file of a run with other settings, or no such file at all, is in the way.

    Example:

        >>> with Journal("out.jsonl", {"seed": 1}) as journal:
        ...     journal.append([{"index": 0, "output": "Yes."}])
        >>> journal.remove()  # once out.jsonl is whole
    """

    def __init__(self, out: str | Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(f"{out}.partial")
        self.lines = _read_or_begin(self.path, header, overwrite)
        self._is_empty = not self.lines
        self._file: TextIO | None = None

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None and self._is_empty:
            self.remove()  # there is nothing in it to go on with

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes lines down and sees them to the disk."""
        assert self._file is not None, "a journal is written to inside `with`"
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        self._is_empty = self._is_empty and not text
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Removes the partial file, when what it was kept for is whole and on the disk."""
        self.path.unlink()
        sync_directory(self.path.parent)


def refuse_foreign(path: Path) -> NoReturn:
    """Says that a partial file cannot be read as one.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{path}: not what a stopped run leaves; remove it to start anew")


def _read_or_begin(path: Path, header: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lines = _read_finished(path, header) if path.exists() else None
    except UserError:
        if not overwrite:
            raise
        lines = None
    if lines is None:
        with open_atomic(path) as file:
            file.write(f"{json.dumps(header)}\n".encode())
    return lines or []


def _read_finished(path: Path, header: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What a stopped run had finished; None where it finished nothing, with whatever settings."""
    # A kill can leave half a line at the end; it is cut off, and its batch is made again. What is whole is not touched.
    data = read_bytes(path)
    num_bytes = data.rfind(b"\n") + 1
    whole = data[:num_bytes].decode("utf-8", "replace")
    try:
        lines = [json.loads(line) for line in whole.split("\n") if line]
    except (ValueError, RecursionError):
        lines = [None]
    if not all(isinstance(line, dict) for line in lines) or not all("index" in line for line in lines[1:]):
        refuse_foreign(path)
    if not lines or (len(lines) == 1 and set(lines[0]) & set(header)):
        return None
    differing = [name for name in header if lines[0].get(name) != header[name]]
    if differing:
        raise UserError(
            f"{path}: begun with other settings ({', '.join(differing)} differ); give the same ones to go on,"
            " or remove it to start anew"
        )
    if num_bytes < len(data):
        with open(path, "r+b") as file:
            file.truncate(num_bytes)
            os.fsync(file.fileno())
    return lines[1:]
