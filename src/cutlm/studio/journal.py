"""Verdicts, and the journal that holds those of one reviewer.

A journal is a file of JSON Lines in the folder `OUT.studio`, named after the reviewer. Each change appends one line,
which is synced to the disk before the change counts as saved, so a killed server loses nothing. The last line of a
response is its verdict. Only one server at a time may append to a journal; others read it.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from filelock import FileLock, Timeout

from cutlm.data.files import open_atomic, read_bytes, sync_directory, sync_file
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.prompting.spans import Span

State = Literal["open", "satisfactory", "unsatisfactory", "skipped"]
STATES: tuple[State, ...] = ("open", "satisfactory", "unsatisfactory", "skipped")
_REVIEWER = re.compile(r"\w[\w.@+-]{0,63}")
# A journal that is larger than this and at least twice as large as needed is rewritten when it is opened.
_MIN_COMPACTED = 2**20


@dataclass(frozen=True)
class Verdict:
    """A reviewer's verdict on a response.

    Attributes:
        state: "open" until the reviewer has decided.
        judgment: What is wrong, also while it is being written.
        wrong_spans: Passages that the reviewer marked as wrong, in characters of the response.
        unflagged_spans: Passages whose flags the reviewer removed.
        i_ans: An improved response.
        revision: Counts the changes, from 1; 0 before the first.
        time: When it was saved, in seconds since 1970.
    """

    state: State = "open"
    judgment: str = ""
    wrong_spans: tuple[Span, ...] = ()
    unflagged_spans: tuple[Span, ...] = ()
    i_ans: str | None = None
    revision: int = 0
    time: float = 0.0

    @property
    def is_decided(self) -> bool:
        """Whether a record follows from it."""
        return self.state in ("satisfactory", "unsatisfactory")


NO_VERDICT = Verdict()
_FIELDS = set(asdict(NO_VERDICT))


def name_journal(out: str | Path, reviewer: str) -> Path:
    """Name the journal of a reviewer.

    Raises:
        ConfigError: The name cannot be the name of a file.
    """
    if not _REVIEWER.fullmatch(reviewer):
        raise ConfigError(
            f"--reviewer: expected a name of at most 64 letters, digits and the characters _ . @ + -, got {reviewer!r}"
        )
    return find_folder(out) / f"{reviewer}.jsonl"


def find_folder(out: str | Path) -> Path:
    """Name the folder of the journals."""
    return Path(f"{out}.studio")


class Journal:
    """Opens the journal of a reviewer for appending, or starts it.

    A last line that a kill left incomplete was never reported as saved and is removed.

    Raises:
        UserError: Another server has it open.
        DataError: It is damaged.

    Example:

        >>> with Journal(path) as journal:
        ...     journal.append("0a1b", Verdict("satisfactory"))
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: dict[str, Verdict] = {}  # by the keys of the items
        self._lock = FileLock(path.with_suffix(".lock"))
        self._file: TextIO | None = None

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.path}: another cutlm studio is running for reviewer {self.path.stem}; open its address, or"
                " start this one with another --reviewer"
            ) from None
        try:
            self.verdicts, num_bytes = _read(self.path) if self.path.exists() else ({}, 0)
            lines = "".join(_format(key, verdict) for key, verdict in self.verdicts.items())
            if not self.path.exists() or num_bytes > max(_MIN_COMPACTED, 2 * len(lines.encode())):
                with open_atomic(self.path) as file:
                    file.write(lines.encode())
            elif num_bytes < self.path.stat().st_size:
                os.truncate(self.path, num_bytes)
            self._file = self._open()
            sync_directory(self.path.parent)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def _open(self) -> TextIO:
        return open(self.path, "a", encoding="utf-8")

    def append(self, key: str, verdict: Verdict) -> Verdict:
        """Save a verdict and return it with its revision and time.

        Raises:
            OSError: It cannot be written; the journal is as before.
        """
        assert self._file is not None, "a journal is written to inside `with`"
        revision = self.verdicts.get(key, NO_VERDICT).revision + 1
        verdict = replace(verdict, revision=revision, time=round(time.time(), 3))
        size = self.path.stat().st_size
        try:
            self._file.write(_format(key, verdict))
            self._file.flush()
            sync_file(self._file.fileno())
        except OSError:
            # The rest of a line that does not fit on the disk would spoil the next one.
            self._file.close()
            os.truncate(self.path, size)
            self._file = self._open()
            raise
        self.verdicts[key] = verdict
        return verdict


def read_journals(out: str | Path) -> dict[str, dict[str, Verdict]]:
    """Read the verdicts of all reviewers, by their names and the keys of the items.

    Raises:
        DataError: A journal is damaged.
    """
    return {path.stem: _read(path)[0] for path in sorted(find_folder(out).glob("*.jsonl"))}


@contextmanager
def lock_output(out: str | Path) -> Iterator[None]:
    """Let one server at a time read the journals and write the records, so that the last writer has read them all."""
    folder = find_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".output.lock"):
        yield


def _format(key: str, verdict: Verdict) -> str:
    return json.dumps({"key": key, **asdict(verdict)}, ensure_ascii=False) + "\n"


def _read(path: Path) -> tuple[dict[str, Verdict], int]:
    """Read the verdicts of a journal, and the number of bytes of its complete lines."""
    content = read_bytes(path)
    num_bytes = content.rfind(b"\n") + 1
    verdicts: dict[str, Verdict] = {}
    for number, line in enumerate(content[:num_bytes].split(b"\n")[:-1], start=1):
        try:
            key, verdict = _parse(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: not a line of the studio's journal ({error}); restore it from a backup, or remove"
                " this line"
            ) from None
        verdicts[key] = verdict
    return verdicts, num_bytes


def _parse(line: dict[str, Any]) -> tuple[str, Verdict]:
    values = {name: value for name, value in line.items() if name in _FIELDS}
    for name in ("wrong_spans", "unflagged_spans"):
        values[name] = tuple((int(start), int(end)) for start, end in values.get(name, ()))
    if values.get("state", "open") not in STATES:
        raise ValueError(f"state {values['state']!r}")
    return str(line["key"]), Verdict(**values)
