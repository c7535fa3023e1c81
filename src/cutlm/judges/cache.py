"""Judgments that were paid for, in one SQLite file, by a hash of everything that they depend on.

A judgment is on the disk before it counts as had, so that a run that is killed asks for none twice. What a key is made
of is left to whoever asks. Failures are not kept: they are asked for again.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import TracebackType

from cutlm.errors import UserError

_APPLICATION_ID = 0x6375746A  # "cutj", which tells our files from others in SQLite's own header
_LAYOUT = "CREATE TABLE IF NOT EXISTS judgments (key TEXT PRIMARY KEY, judgment TEXT) WITHOUT ROWID"
_KEYS_AT_A_TIME = 500


class Cache:
    """Judgments by key; made where it is missing.

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
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
        self._connection.execute(_LAYOUT)
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find(self, keys: Iterable[str]) -> dict[str, str | None]:
        """The judgments that are there, by key; None is the judgment of a satisfactory response."""
        wanted = list(keys)
        found: dict[str, str | None] = {}
        for start in range(0, len(wanted), _KEYS_AT_A_TIME):
            part = wanted[start : start + _KEYS_AT_A_TIME]
            marks = ", ".join("?" * len(part))
            with closing(
                self._connection.execute(f"SELECT key, judgment FROM judgments WHERE key IN ({marks})", part)
            ) as rows:
                found.update(rows)
        return found

    def keep(self, key: str, judgment: str | None) -> None:
        """Writes a judgment down and sees it to the disk.

        Raises:
            UserError: The disk is full, or the like.
        """
        try:
            self._connection.execute("INSERT OR REPLACE INTO judgments VALUES (?, ?)", (key, judgment))
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: a judgment cannot be written down ({error}); what was written before is kept: start"
                " again once there is room"
            ) from None
