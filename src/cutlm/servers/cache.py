"""Judgments that were paid for, in one SQLite file, by a hash of everything that they depend on; and what was spent.

A judgment is on the disk before it counts as had, so that a run that is killed asks for none twice, and an attempt
before it is made, so that it counts whatever comes of it. What a key is made of is left to whoever asks. Failures are
not kept: they are asked for again.
"""

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from cutlm.errors import UserError

_APPLICATION_ID = 0x6375746A  # "cutj", which tells our files from others in SQLite's own header
_LAYOUT = (
    "CREATE TABLE IF NOT EXISTS judgments (key TEXT PRIMARY KEY, judgment TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spent (row INTEGER PRIMARY KEY CHECK (row = 1), requests INTEGER, tokens INTEGER)",
    "INSERT OR IGNORE INTO spent VALUES (1, 0, 0)",
)
_KEYS_AT_A_TIME = 500


class Cache:
    """Judgments by key; made where it is missing. Several threads may use it.

    Args:
        path: The file. SQLite keeps two more beside it while it is open.

    Raises:
        UserError: There is another kind of file, or it cannot be opened.

    Example:

        >>> with Cache("judgments.sqlite") as cache:
        ...     cache.keep("a key", "The capital is wrong.")
        ...     cache.find(["a key", "another"])
        {'a key': 'The capital is wrong.'}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(
                f"{self.path}: cannot be used as a cache ({error}); name another file by --cache, or mend this one"
            ) from None

    def _prepare(self) -> None:
        (mark,) = self._connection.execute("PRAGMA application_id").fetchone()
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if mark != _APPLICATION_ID and (mark or num_tables):
            raise UserError(f"{self.path}: a database, but not a cache of judgments; name another file by --cache")
        # Readers and a writer at once; what is committed survives a loss of power too.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        for statement in _LAYOUT:
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # a thread that asks may be in the middle of writing down what it spends
            self._connection.close()

    def find(self, keys: Iterable[str]) -> dict[str, str | None]:
        """The judgments that are there, by key; None is the judgment of a satisfactory response.

        Raises:
            UserError: The file is damaged.
        """
        wanted = list(keys)
        found: dict[str, str | None] = {}
        for start in range(0, len(wanted), _KEYS_AT_A_TIME):
            part = wanted[start : start + _KEYS_AT_A_TIME]
            marks = ", ".join("?" * len(part))
            found.update(self._read(f"SELECT key, judgment FROM judgments WHERE key IN ({marks})", part))
        return found

    def keep(self, key: str, judgment: str | None) -> None:
        """Writes a judgment down and sees it to the disk.

        Raises:
            UserError: The disk is full, or the like.
        """
        self._write("a judgment", "INSERT OR REPLACE INTO judgments VALUES (?, ?)", (key, judgment))

    def read_spent(self) -> tuple[int, int]:
        """Requests and tokens that all runs with this file have spent.

        Raises:
            UserError: The file is damaged.
        """
        ((num_requests, num_tokens),) = self._read("SELECT requests, tokens FROM spent", ())
        return num_requests, num_tokens

    def add_spent(self, num_requests: int, num_tokens: int) -> None:
        """Writes down what is spent, and sees it to the disk.

        Raises:
            UserError: The disk is full, or the like.
        """
        added = (num_requests, num_tokens)
        self._write("what is spent", "UPDATE spent SET requests = requests + ?, tokens = tokens + ?", added)

    def _read(self, query: str, values: Sequence[Any]) -> list[Any]:
        try:
            with self._lock, closing(self._connection.execute(query, values)) as rows:
                return rows.fetchall()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: the cache cannot be read ({error}); mend it, or name another file by --cache to ask anew"
            ) from None

    def _write(self, what: str, statement: str, values: Sequence[Any]) -> None:
        try:
            with self._lock:
                self._connection.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: {what} cannot be written down ({error}); what was written before is kept: start again"
                " once there is room"
            ) from None
