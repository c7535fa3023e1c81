"""Log-probs of responses from a server that returns those of a prompt's own tokens, as vLLM's does.

Each context goes as one prompt of token ids, the response's among them, to the OpenAI-compatible completions
endpoint with `prompt_logprobs: 0`. What is made of the numbers is left to `cutlm.blame`. The key is read from the
environment variable OPENAI_API_KEY alone and is shown nowhere.
"""

import queue
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from cutlm.errors import ConfigError, UserError
from cutlm.posting import (
    KEY_VARIABLE,
    Refused,
    Stopped,
    Unreachable,
    describe_bad_address,
    post_json,
    read_key,
)
from cutlm.scoring import Scored, count_tokens


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
    def endpoint(self) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/completions"


def score_rows_by_server(
    server: Server,
    rows: Sequence[Mapping[str, Any]],
    *,
    done: Collection[int] = (),
    show_progress: bool = True,
) -> Generator[list[Scored], None, None]:
    """Scores the responses of encoded rows, several at a time, the longest first.

    Args:
        server: Whom to ask.
        rows: With `prompt_ids`, `judged_prompt_ids` (or None), `response_ids` and `place`.
        done: Indices of rows to leave out.
        show_progress: Whether to show a progress bar.

    Yields:
        One row at a time, as it is finished: its index, log-probs [T] and those with the judgment [T] or None.

    Raises:
        UserError: The server refuses what it is asked, or some rows failed even after all attempts: the others have
            been yielded before.
    """
    key = read_key()
    order = sorted(set(range(len(rows))) - set(done), key=lambda index: (-count_tokens(rows[index]), index))
    tasks: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    for index in order:
        tasks.put(index)

    def work() -> None:
        while not stop.is_set():
            try:
                index = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((index, _score_row(server, rows[index], key, stop)))
            except Stopped:
                return
            except Unreachable as error:
                results.put((index, error))
            except Exception as error:  # raised again by whoever waits for the result; nobody is to ask for more
                stop.set()
                results.put((index, error))

    # No pool of the standard library: those wait for their threads at the end, and so would Ctrl-C for each request.
    for _ in range(min(server.concurrency, len(order))):
        threading.Thread(target=work, daemon=True).start()
    failed: dict[int, str] = {}
    num_failed_in_a_row, num_left = 0, len(order)
    progress = tqdm(total=len(rows), initial=len(done), desc="blaming", unit="record", disable=not show_progress)
    try:
        with progress:
            # A server that is gone for good is not waited for once more with every row.
            while num_left and num_failed_in_a_row < max(8, 2 * server.concurrency):
                index, result = results.get()
                num_left -= 1
                if isinstance(result, Unreachable):
                    failed[index] = str(result)
                    num_failed_in_a_row += 1
                    continue
                if isinstance(result, BaseException):
                    raise result
                num_failed_in_a_row = 0
                progress.update()
                without, judged = (
                    None if logps is None else torch.tensor(logps, dtype=torch.float64) for logps in result
                )
                assert without is not None
                yield [(index, without, judged)]
    finally:
        stop.set()
    if failed:
        first = min(failed)
        rest = f", and {num_left} not asked for any more" if num_left else ""
        raise UserError(
            f"{len(failed)} of {len(order)} records failed{rest}; the first is {rows[first]['place']}: {failed[first]};"
            " what is finished is kept: start again with the same options to ask only for what is missing"
        )


def _score_row(
    server: Server, row: Mapping[str, Any], key: str | None, stop: threading.Event
) -> tuple[list[float], list[float] | None]:
    """Asks for one row in its one or two contexts."""
    without = _ask(server, row["prompt_ids"], row, key, stop)
    if row["judged_prompt_ids"] is None:
        return without, None
    return without, _ask(server, row["judged_prompt_ids"], row, key, stop)


def _ask(
    server: Server, prompt_ids: list[int], row: Mapping[str, Any], key: str | None, stop: threading.Event
) -> list[float]:
    ids = [*prompt_ids, *row["response_ids"]]
    request = {
        "model": server.model,
        "prompt": ids,
        "prompt_logprobs": 0,  # of the prompt's own tokens, and of no others
        "max_tokens": 1,  # what the server must be asked for at least
        "temperature": 0,
    }
    try:
        answer = post_json(
            server.endpoint, request, key=key, timeout=server.timeout, max_retries=server.max_retries, stop=stop
        )
    except Refused as error:
        raise UserError(_explain(server, error, row["place"])) from None
    return read_prompt_logprobs(answer, ids, len(prompt_ids), server.endpoint)


def _explain(server: Server, error: Refused, place: str) -> str:
    if not error.status:
        return f"{server.endpoint}: {error.said}; give another address by --server"
    said = f"{error.status}: {error.said}" if error.said else str(error.status)
    if error.status in (401, 403):
        return f"{server.endpoint}: the server wants another key ({said}); set {KEY_VARIABLE} to one that it takes"
    if error.status == 404:
        return (
            f"{server.endpoint}: no such address, or no model {server.model!r} there ({said}); give the server's"
            " address by --server and its name of the model by --model"
        )
    if 300 <= error.status < 400:
        return f"{server.endpoint}: the server names another address ({said}); give that one by --server"
    return (
        f"{place}: {server.endpoint} refuses the request ({said}); if the prompt is too long for the server, give a"
        " smaller --max_length"
    )


def read_prompt_logprobs(answer: Any, ids: Sequence[int], start: int, endpoint: str) -> list[float]:
    """Reads the log-probs of a prompt's own tokens from a server's answer.

    Args:
        answer: `choices[0].prompt_logprobs` is null for the first token, and for each other one an object that has
            the token's id as a key, and under it `logprob`.
        ids: The prompt's token ids.
        start: The first token that is asked for, at least 1.
        endpoint: For messages.

    Raises:
        UserError: The answer has another shape.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if entries is None:
        raise UserError(
            f"{endpoint}: expected prompt_logprobs in the server's answer, got none; use a server that returns them,"
            " such as vLLM"
        )
    if not isinstance(entries, list) or len(entries) != len(ids):
        got = f"{len(entries)}" if isinstance(entries, list) else "no list"
        raise UserError(
            f"{endpoint}: expected prompt_logprobs of {len(ids)} tokens, got {got}; the server must take a prompt of"
            " token ids as it is"
        )
    logps = []
    for place in range(start, len(ids)):
        entry = entries[place]
        own = entry.get(str(ids[place])) if isinstance(entry, dict) else None
        logp = own.get("logprob") if isinstance(own, dict) else None
        # A little above 0 is rounding. The comparison fails for what is not a number too.
        if not isinstance(logp, int | float) or isinstance(logp, bool) or not -float("inf") < logp <= 1e-3:
            raise UserError(
                f"{endpoint}: expected the log-prob of token {ids[place]} at place {place} of prompt_logprobs, got none"
                " or no log-prob; use a server that returns those of the prompt's own tokens, such as vLLM"
            )
        logps.append(min(0.0, float(logp)))
    return logps
