"""Answers that were paid for and the budget of requests and tokens, both in one SQLite file.

An answer is on disk before it counts, so a killed run requests none twice. A request is counted on disk before it is
sent, so it counts whatever becomes of it. Failures are not cached.
"""

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from cutlm.errors import UserError

_APPLICATION_ID = 0x6375746A  # "cutj" in SQLite's header marks our files
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS usage (row INTEGER PRIMARY KEY CHECK (row = 1), requests INTEGER, tokens INTEGER)",
    "INSERT OR IGNORE INTO usage VALUES (1, 0, 0)",
)
_NUM_KEYS_PER_QUERY = 500
BYTES_PER_TOKEN = 4


class Cache:
    """A thread-safe cache of answers by key, which also stores the number of requests and tokens used.

    Args:
        path: The file, created if it is missing. SQLite keeps two more next to it while it is open.

    Raises:
        UserError: The file is of another kind or cannot be opened.

    Example:

        >>> with Cache("judgments.sqlite") as cache:
        ...     cache.put("a key", "The capital is wrong.")
        ...     cache.get_many(["a key", "another"])
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
                f"{self.path}: cannot be used as a cache ({error}); pass another file by --cache, or fix this one"
            ) from None

    def _prepare(self) -> None:
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id != _APPLICATION_ID and (application_id or num_tables):
            raise UserError(f"{self.path}: a database, but not a cache of answers; pass another file by --cache")
        # Readers do not block the writer, and a commit survives a power failure.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        for statement in _SCHEMA:
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # after Ctrl-C a thread may be in the middle of a write
            self._connection.close()

    def get_many(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Return the cached answers by key; raise `UserError` if the file is damaged."""
        wanted, found = list(keys), dict[str, str | None]()
        for start in range(0, len(wanted), _NUM_KEYS_PER_QUERY):
            part = wanted[start : start + _NUM_KEYS_PER_QUERY]
            marks = ", ".join("?" * len(part))
            found.update(self._execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part))
        return found

    def put(self, key: str, answer: str | None) -> None:
        """Store an answer durably; raise `UserError` if the disk is full."""
        # SQLite holds no halves of surrogate pairs, which the thoughts of an answer may have.
        stored = answer and answer.encode("utf-8", "replace").decode()
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, stored))

    def read_usage(self) -> tuple[int, int]:
        """Return the number of requests and of tokens of all runs with this file."""
        ((num_requests, num_tokens),) = self._execute("SELECT requests, tokens FROM usage")
        return num_requests, num_tokens

    def add_usage(self, num_requests: int, num_tokens: int) -> None:
        """Add to the usage durably."""
        self._execute("UPDATE usage SET requests = requests + ?, tokens = tokens + ?", (num_requests, num_tokens))

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with self._lock, closing(self._connection.execute(statement, values)) as rows:
                return rows.fetchall()
        except sqlite3.DatabaseError as error:
            remedy = "fix it, or pass another file by --cache to start over"
            if isinstance(error, sqlite3.OperationalError):  # for example a full disk
                remedy = "free disk space and start again; earlier answers are kept"
            raise UserError(f"{self.path}: cannot use the cache ({error}); {remedy}") from None


class BudgetExceeded(Exception):
    """No further request may be sent; the message names the cap."""


class Budget:
    """The requests and tokens that a run used and may use; thread-safe.

    Args:
        cache: Stores the usage: the caps hold for all runs that share it.
        max_requests: Most requests, retries included; None for no cap.
        max_tokens: Number of tokens after which no further request is sent; None for no cap.
    """

    def __init__(self, cache: Cache, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.num_requests, self.num_tokens = 0, 0  # of this run: retries included, of prompts and answers
        self.is_estimated = False  # whether some tokens are estimated because the server did not report them
        self._cache, self._max_requests, self._max_tokens = cache, max_requests, max_tokens
        self._lock = threading.Lock()
        self._num_unwritten = 0

    def count_request(self) -> None:
        """Count a request before it is sent; raise `BudgetExceeded` if it must not be sent."""
        with self._lock:
            num_requests, num_tokens = self.read_total()
            caps = {
                "max_requests": (num_requests, self._max_requests),
                "max_tokens_total": (num_tokens, self._max_tokens),
            }
            for name, (used, cap) in caps.items():
                if cap is not None and used >= cap:
                    raise BudgetExceeded(
                        f"{name} {cap} is reached by all runs that share the cache {self._cache.path}; raise it to"
                        " continue"
                    )
            self._write(1)
            self.num_requests += 1

    def count_tokens(self, num_tokens: int | None, num_bytes: int) -> None:
        """Count the tokens of a prompt and its answer, estimated from their bytes if the server reported None."""
        with self._lock:
            self.is_estimated |= num_tokens is None
            num_added = -(-num_bytes // BYTES_PER_TOKEN) if num_tokens is None else num_tokens
            self.num_tokens += num_added
            self._num_unwritten += num_added
            # A full disk must not lose the answer: the next request writes this count, or is not sent.
            with suppress(UserError):
                self._write(0)

    def read_total(self) -> tuple[int, int]:
        """Return the requests and tokens of all runs, which count against the caps."""
        num_requests, num_tokens = self._cache.read_usage()
        return num_requests, num_tokens + self._num_unwritten

    def _write(self, num_requests: int) -> None:
        self._cache.add_usage(num_requests, self._num_unwritten)
        self._num_unwritten = 0
