"""The partial file of a long run: finished results are in `OUT.partial` at once, so that a stopped run can resume.

The first line is a header of the settings that the results depend on; a run with different ones is refused. The caller
defines the lines after it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cutlm.data.files import open_atomic, read_bytes, sync_directory, sync_file
from cutlm.errors import UserError


class Journal:
    """Resumes from the partial file of a stopped run, or starts a new one.

    Args:
        out: The output file of the run.
        header: The settings that the results depend on, by name.
        overwrite: Whether to replace a partial file that cannot be resumed from, instead of raising a UserError.

    Example:

        >>> with Journal("out.jsonl", {"seed": 1}) as journal:
        ...     journal.append([{"index": 0, "output": "Yes."}])
        >>> journal.remove()  # once out.jsonl is complete
    """

    def __init__(self, out: str | Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(f"{out}.partial")  # the partial file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = _read_lines(self.path, header) if self.path.exists() else None
        except UserError:
            if not overwrite:
                raise
            lines = None
        if lines is None:
            with open_atomic(self.path) as file:
                file.write(f"{json.dumps(header)}\n".encode())
        self.lines = lines or []  # the results of a stopped run, in the order in which they were appended
        self._is_empty = not lines
        self._file: TextIO | None = None

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None and self._is_empty:
            self.remove()  # nothing to resume from

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines and sync them to disk."""
        assert self._file is not None, "a journal is written to inside `with`"
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        self._is_empty = self._is_empty and not text
        self._file.write(text)
        self._file.flush()
        sync_file(self._file.fileno())

    def remove(self) -> None:
        """Remove the partial file, once the output file is complete and synced."""
        self.path.unlink()
        sync_directory(self.path.parent)


def read_header(out: str | Path) -> dict[str, Any]:
    """Read the settings of a stopped run that wrote `out`; empty if there is none that can be resumed."""
    try:
        with open(f"{out}.partial", "rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):  # `Journal` reports a file that it cannot read
        return {}
    return header if isinstance(header, dict) else {}


def refuse_foreign(path: Path) -> NoReturn:
    """Raises a UserError: the file is not a partial file."""
    raise UserError(f"{path}: not the partial file of a stopped run; remove it to start over")


def _read_lines(path: Path, header: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Read the lines after the header; None without any, whatever the settings were."""
    # A kill can leave an incomplete last line. It is truncated, and its results are computed again.
    data = read_bytes(path)
    num_bytes = data.rfind(b"\n") + 1
    complete = data[:num_bytes].decode("utf-8", "replace")
    try:
        lines = [json.loads(line) for line in complete.split("\n") if line]
    except (ValueError, RecursionError):
        refuse_foreign(path)
    if not all(isinstance(line, dict) for line in lines) or not all("index" in line for line in lines[1:]):
        refuse_foreign(path)
    if not lines or (len(lines) == 1 and set(lines[0]) & set(header)):
        return None
    if differing := [name for name in header if lines[0].get(name) != header[name]]:
        advice = "use the same ones to resume, or remove it to start over"
        raise UserError(f"{path}: started with other settings ({', '.join(differing)} differ); {advice}")
    if num_bytes < len(data):
        with open(path, "r+b") as file:
            file.truncate(num_bytes)
            sync_file(file.fileno())
    return lines[1:]
