"""Limits of requests and tokens per minute, shared by the threads of a run."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW = 60.0
_LONGEST_SLEEP = 1.0  # an answer may take fewer tokens than expected and so let the next request start earlier


@dataclass
class Started:
    """A request of the last minute."""

    time: float
    num_tokens: int


class RateLimiter:
    """Delays requests so that no minute, whenever it begins, has more requests or tokens than allowed.

    Args:
        requests_per_minute: Most requests; None for no limit.
        tokens_per_minute: Most tokens; None for no limit. A request that alone takes more is sent after a minute
            without others.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests, self._max_tokens, self._clock = requests_per_minute, tokens_per_minute, clock
        self._lock = threading.Lock()
        self._started: deque[Started] = deque()  # oldest first

    def start(self, num_tokens: int, sleep: Callable[[float], object]) -> Started:
        """Wait until a request of at most `num_tokens` may start, and count it."""
        while True:
            with self._lock:
                now = self._clock()
                while self._started and self._started[0].time + _WINDOW <= now:
                    self._started.popleft()
                if (end := self._find_obstacle(num_tokens)) is None:
                    started = Started(now, num_tokens)
                    self._started.append(started)
                    return started
            sleep(min(end - now, _LONGEST_SLEEP))

    def correct(self, started: Started, num_tokens: int) -> None:
        """Replace the expected number of tokens of a request by the true one."""
        with self._lock:
            started.num_tokens = num_tokens

    def _find_obstacle(self, num_tokens: int) -> float | None:
        """Return when the last request is forgotten that another one must wait for; None if it may start now."""
        requests, end = list(self._started), None
        if self._max_requests is not None and len(requests) >= self._max_requests:
            end = requests[len(requests) - self._max_requests].time + _WINDOW
        if self._max_tokens is not None:
            num_left = self._max_tokens - num_tokens - sum(request.num_tokens for request in requests)
            for request in requests:
                if num_left >= 0:
                    break
                num_left += request.num_tokens
                end = max(end or 0.0, request.time + _WINDOW)
        return end
