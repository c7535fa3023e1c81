"""Many questions to a server, several at a time, and answers as they come.

How one question is asked is left to the caller (`cutlm.posting`, `cutlm.judges.chat`), and so is what its answer means.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cutlm.errors import ConfigError, UserError
from cutlm.posting import KEY_VARIABLE, Refused, Stopped, Unreachable, describe_bad_address


@dataclass(frozen=True)
class Server:
    """Where to ask, and how.

    Attributes:
        url: Such as http://localhost:8000, with or without /v1.
        model: The model's name on the server.
        concurrency: Requests at a time.
        timeout: Seconds without a byte after which a request is given up and made again.
        max_retries: Further attempts after one that failed for a reason that may pass.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5

    def __post_init__(self) -> None:
        problems = []
        if (problem := describe_bad_address(self.url, "server")) is not None:
            problems.append(problem)
        if self.concurrency < 1:
            problems.append(f"concurrency: expected a whole number of at least 1, got {self.concurrency}")
        if not self.timeout > 0:
            problems.append(f"timeout: expected a number of seconds above 0, got {self.timeout}")
        if self.max_retries < 0:
            problems.append(f"max_retries: expected a whole number of at least 0, got {self.max_retries}")
        if problems:
            raise ConfigError(problems)

    @property
    def root(self) -> str:
        """The address that requests go below."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1"

    @property
    def endpoint(self) -> str:
        """Where prompts of token ids go."""
        return f"{self.root}/completions"


class GivenUp(Exception):
    """A question that was not asked, as the server gave no answer to many before it."""


def ask_all(num: int, ask: Callable[[int, threading.Event], Any], concurrency: int) -> Iterator[tuple[int, Any]]:
    """Asks questions, several at a time.

    Args:
        num: How many there are.
        ask: Asks one, by its place; it gives up when the event is set.
        concurrency: How many at a time.

    Yields:
        The place of each, and its answer or an exception, as they come. After `Refused` or `UserError` nothing more is
        asked, and the caller leaves the loop; `GivenUp` stands for what was not asked.
    """
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    for place in range(num):
        places.put(place)

    def work() -> None:
        while not stop.is_set():
            try:
                place = places.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((place, ask(place, stop)))
            except Stopped:
                return
            except (Refused, UserError) as error:  # as will be what comes next
                stop.set()
                results.put((place, error))
            except Exception as error:  # judged, or raised again, by whoever waits for the result
                results.put((place, error))

    # No pool of the standard library: those wait for their threads at the end, and so would Ctrl-C for each request.
    for _ in range(min(concurrency, num)):
        threading.Thread(target=work, daemon=True).start()
    most_in_a_row = max(8, 2 * concurrency)
    num_in_a_row, missing = 0, set(range(num))
    try:
        while missing:
            place, result = results.get()
            missing.remove(place)
            num_in_a_row = num_in_a_row + 1 if isinstance(result, Unreachable) else 0
            yield place, result
            # A server that is gone for good is not waited for once more with every question.
            if num_in_a_row >= most_in_a_row:
                reason = GivenUp(f"the server gave no answer to {num_in_a_row} questions in a row")
                yield from ((place, reason) for place in sorted(missing))
                return
    finally:
        stop.set()


def explain_refusal(server: Server, endpoint: str, error: Refused, place: str, advice: str) -> str:
    """One sentence for the user, with what to do.

    Args:
        server: Who was asked.
        endpoint: The address.
        error: The refusal.
        place: What the request was for.
        advice: What may help where it is about the request.
    """
    if not error.status:
        return f"{endpoint}: {error.said}; give another address by --server"
    said = f"{error.status}: {error.said}" if error.said else str(error.status)
    if error.status in (401, 403):
        return f"{endpoint}: the server wants another key ({said}); set {KEY_VARIABLE} to one that it takes"
    if error.status == 404:
        return (
            f"{endpoint}: no such address, or no model {server.model!r} there ({said}); give the server's address by"
            " --server and its name of the model by --model"
        )
    if 300 <= error.status < 400:
        return f"{endpoint}: the server names another address ({said}); give that one by --server"
    return f"{place}: {endpoint} refuses the request ({said}); {advice}"
