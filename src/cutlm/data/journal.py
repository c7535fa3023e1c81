"""The partial file of a long run: finished results are in `OUT.partial` at once, so that a stopped run can resume.

The first line is a header of the settings that the results depend on; a run with different ones is refused. The caller
defines the lines after it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, overload

from cutlm.data.files import open_atomic, sync_directory, sync_file
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
            offsets = _find_lines(self.path, header) if self.path.exists() else None
        except UserError:
            if not overwrite:
                raise
            offsets = None
        if offsets is None:
            with open_atomic(self.path) as file:
                file.write(f"{json.dumps(header)}\n".encode())
        # The results of a stopped run and those appended since, in their order. They stay in the file.
        self.lines = JournalLines(self.path, offsets or [])
        self._is_empty = not offsets
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "ab")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None and self._is_empty:
            self.remove()  # nothing to resume from

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines and sync them to disk."""
        assert self._file is not None, "a journal is written to inside `with`"
        texts = [f"{json.dumps(line)}\n".encode() for line in lines]
        self._is_empty = self._is_empty and not texts
        end = self._file.tell()
        for text in texts:
            self.lines.offsets.append(end)
            end += len(text)
        self._file.write(b"".join(texts))
        self._file.flush()
        sync_file(self._file.fileno())

    def remove(self) -> None:
        """Remove the partial file, once the output file is complete and synced."""
        self.path.unlink()
        sync_directory(self.path.parent)


class JournalLines(Sequence[dict[str, Any]]):
    """The lines of a partial file after its header, read when they are needed: those of a long run fill the memory."""

    def __init__(self, path: Path, offsets: list[int]) -> None:
        self.path = path
        self.offsets = offsets  # where each line starts, in bytes

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        lines = []
        with open(self.path, "rb") as file:
            for offset in self.offsets[index] if isinstance(index, slice) else [self.offsets[index]]:
                file.seek(offset)
                lines.append(json.loads(file.readline()))
        return lines if isinstance(index, slice) else lines[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            for offset in self.offsets:
                file.seek(offset)
                yield json.loads(file.readline())


def read_header(out: str | Path) -> dict[str, Any]:
    """Read the settings of a stopped run that wrote `out`; empty if no run can be resumed."""
    try:
        with open(f"{out}.partial", "rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):  # `Journal` reports a file that it cannot read
        return {}
    return header if isinstance(header, dict) else {}


def refuse_foreign(path: Path) -> NoReturn:
    """Raises a UserError: the file is not a partial file."""
    raise UserError(f"{path}: not the partial file of a stopped run; remove it to start over")


def _find_lines(path: Path, header: dict[str, Any]) -> list[int] | None:
    """Find where each line after the header starts; None without any, whatever the settings were."""
    first: dict[str, Any] | None = None
    offsets: list[int] = []
    num_bytes = 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break  # a kill can leave an incomplete last line
            if raw != b"\n":
                try:
                    line = json.loads(raw.decode("utf-8", "replace"))
                except (ValueError, RecursionError):
                    refuse_foreign(path)
                if not isinstance(line, dict) or (first is not None and "index" not in line):
                    refuse_foreign(path)
                if first is None:
                    first = line
                else:
                    offsets.append(num_bytes)
            num_bytes += len(raw)
        size = file.seek(0, 2)
    if first is None or (not offsets and set(first) & set(header)):
        return None
    if differing := [name for name in header if first.get(name) != header[name]]:
        advice = "use the same ones to resume, or remove it to start over"
        raise UserError(f"{path}: started with other settings ({', '.join(differing)} differ); {advice}")
    if num_bytes < size:
        # Its results are computed again.
        with open(path, "r+b") as file:
            file.truncate(num_bytes)
            sync_file(file.fileno())
    return offsets
