"""Many questions to a server, several at a time, and answers as they come.

How one question is asked is left to the caller (`cutlm.servers.http`, `cutlm.servers.chat`), and so is what its answer
means.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cutlm.errors import ConfigError, UserError
from cutlm.servers.http import KEY_VARIABLE, Refused, Stopped, Unreachable, describe_bad_address


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


# Statuses that may be about one question alone: it is malformed, too large or cannot be handled.
_ABOUT_ONE = (400, 413, 422)


class GivenUp(Exception):
    """A question that was not asked, as the server gave no answer to many before it."""


class RefusedAlone(Exception):
    """A question that a server refuses which answers others; says why."""


def ask_all(
    num: int,
    ask: Callable[[int, threading.Event], Any],
    concurrency: int,
    *,
    stop: threading.Event | None = None,
    is_answering: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Asks questions, several at a time.

    What was sent is paid for. So whatever ends the asking, what is on its way then is waited for and yielded; only who
    leaves the loop, as Ctrl-C does, waits for nothing.

    Args:
        num: How many there are.
        ask: Asks one, by its place; it gives up when the event is set.
        concurrency: How many at a time.
        stop: For the caller to set when nothing more shall be asked.
        is_answering: Whether the server is known to answer such questions.

    Yields:
        The place of each, and its answer or an exception, as they come. `Refused` and `UserError` end the asking, come
        last, and are raised by the caller. `GivenUp` stands for what was not asked of a server that is gone, and
        `RefusedAlone` for what a server refuses that answers others. One that refuses all, or so many at first that it
        would refuse all, ends the asking.
    """
    locations: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    stop = stop or threading.Event()
    for place in range(num):
        locations.put(place)
    num_threads = min(concurrency, num)
    # No pool of the standard library: those wait for their threads at the end, and so would Ctrl-C for each request.
    for _ in range(num_threads):
        threading.Thread(target=_work, args=(locations, results, ask, stop), daemon=True).start()
    most_in_a_row = max(8, 2 * concurrency)
    num_in_a_row, missing = 0, set(range(num))
    refused: list[tuple[int, Refused]] = []
    last: tuple[int, Any] | None = None
    is_gone = False
    try:
        while num_threads:
            got = results.get()
            if got is None:
                num_threads -= 1
                continue
            place, result = got
            if is_gone and isinstance(result, Unreachable):
                continue
            missing.remove(place)
            if _is_about_one(result):
                refused.append((place, result))
                if not is_answering and len(refused) >= most_in_a_row:
                    last = last or refused[0]
                    stop.set()
            elif isinstance(result, Refused | UserError):
                last = last or got
            else:
                is_answering = is_answering or not isinstance(result, Exception)
                num_in_a_row = num_in_a_row + 1 if isinstance(result, Unreachable) else 0
                yield got
                # A server that is gone for good is not waited for once more with every question.
                if num_in_a_row >= most_in_a_row:
                    is_gone = True
                    stop.set()
            if is_answering:
                yield from ((place, RefusedAlone(f"the server refuses it ({error})")) for place, error in refused)
                refused.clear()
        if last or refused:
            yield last or refused[0]
        elif is_gone:
            reason = GivenUp(f"the server gave no answer to {most_in_a_row} questions in a row")
            yield from ((place, reason) for place in sorted(missing))
    finally:
        stop.set()


def _work(
    locations: "queue.SimpleQueue[int]",
    results: "queue.SimpleQueue[tuple[int, Any] | None]",
    ask: Callable[[int, threading.Event], Any],
    stop: threading.Event,
) -> None:
    """Asks one question after another, up to the last or a stop; then puts None."""
    try:
        while not stop.is_set():
            place = locations.get_nowait()
            try:
                results.put((place, ask(place, stop)))
            except Stopped:
                return
            except Exception as error:  # judged, or raised again, by whoever waits for the result
                if isinstance(error, Refused | UserError) and not _is_about_one(error):  # as will be what comes next
                    stop.set()
                results.put((place, error))
    except queue.Empty:
        pass
    finally:
        results.put(None)


def _is_about_one(result: Any) -> bool:
    return isinstance(result, Refused) and result.status in _ABOUT_ONE


def explain_refusal(server: Server, endpoint: str, error: Refused, location: str, advice: str) -> str:
    """One sentence for the user, with what to do.

    Args:
        server: Who was asked.
        endpoint: The address.
        error: The refusal.
        place: What the request was for.
        advice: What may help where it is about the request.
    """
    if not error.status:
        return f"{endpoint}: {error.said}; give another address by --base_url"
    if error.status in (401, 403):
        return f"{endpoint}: the server wants another key ({error}); set {KEY_VARIABLE} to one that it takes"
    if error.status == 404:
        return (
            f"{endpoint}: no such address, or no model {server.model!r} there ({error}); give the server's address by"
            " --base_url and its name of the model by --model"
        )
    if 300 <= error.status < 400:
        return f"{endpoint}: the server names another address ({error}); give that one by --base_url"
    return f"{location}: {endpoint} refuses the request ({error}); {advice}"
