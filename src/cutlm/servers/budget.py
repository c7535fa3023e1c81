"""What asking a server costs: attempts and tokens, counted as they are spent, and the caps on both.

The counts of all runs that share a cache stand in it; how it keeps them is left to `cutlm.servers.cache`.
"""

import threading
from contextlib import suppress

from cutlm.errors import UserError
from cutlm.servers.cache import Cache

_BYTES_PER_TOKEN = 4


class CapReached(Exception):
    """Nothing more may be spent; says on what."""


class Spending:
    """What a run has spent, and may spend; several threads count in it.

    Args:
        max_requests: Attempts, and
        max_tokens_total: tokens after which nothing more is asked.
        cache: Keeps what is spent: the caps hold over all runs that share it.
        prefix: Of the options that set the caps.

    Attributes:
        num_requests: Attempts of this run so far.
        num_tokens: Tokens of this run so far, of questions and answers.
        is_estimated: Whether the server did not say of some how many they were.
    """

    def __init__(
        self,
        max_requests: int | None,
        max_tokens_total: int | None,
        cache: Cache,
        *,
        prefix: str = "--",
    ) -> None:
        self.num_requests, self.num_tokens, self.is_estimated = 0, 0, False
        self._max_requests, self._max_tokens_total, self._cache = max_requests, max_tokens_total, cache
        self._prefix = prefix
        self._lock = threading.Lock()
        self._num_unwritten = 0

    def take_request(self) -> None:
        """Counts an attempt before it is made.

        Raises:
            CapReached: It may not be made.
            UserError: It cannot be written down.
        """
        with self._lock:
            num_requests, num_tokens = self.read_total()
            if self._max_requests is not None and num_requests >= self._max_requests:
                raise CapReached(self._explain(f"max_requests {self._max_requests}"))
            if self._max_tokens_total is not None and num_tokens >= self._max_tokens_total:
                raise CapReached(self._explain(f"max_tokens_total {self._max_tokens_total}"))
            self._write_down(1)
            self.num_requests += 1

    def add_tokens(self, num_tokens: int | None, num_bytes: int) -> None:
        """Counts the tokens of a question and its answer, or what their length makes likely."""
        with self._lock:
            self.is_estimated |= num_tokens is None
            num_added = -(-num_bytes // _BYTES_PER_TOKEN) if num_tokens is None else num_tokens
            self.num_tokens += num_added
            self._num_unwritten += num_added
            # No answer is lost for lack of room: the next attempt writes this down, or is not made.
            with suppress(UserError):
                self._write_down(0)

    def read_total(self) -> tuple[int, int]:
        """Requests and tokens that count against the caps."""
        num_requests, num_tokens = self._cache.read_spent()
        return num_requests, num_tokens + self._num_unwritten

    def _write_down(self, num_requests: int) -> None:
        self._cache.add_spent(num_requests, self._num_unwritten)
        self._num_unwritten = 0

    def _explain(self, cap: str) -> str:
        return (
            f"{self._prefix}{cap} is reached by all runs that share the cache {self._cache.path}; give a larger one to"
            " go on"
        )
