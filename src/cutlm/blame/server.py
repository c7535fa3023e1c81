"""Log-probs of responses from a server that returns those of a prompt's own tokens, as vLLM's does.

Each context goes as one prompt of token ids, the response's among them, to the OpenAI-compatible completions endpoint
with `prompt_logprobs: 0`. What is made of the numbers is left to `cutlm.blame.detector`. The key is read from the
environment variable OPENAI_API_KEY alone and is shown nowhere.
"""

import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from cutlm.blame.scoring import Scored, count_tokens
from cutlm.errors import UserError
from cutlm.servers.http import LARGEST_ANSWER, Refused, Unreachable, post_json, read_key
from cutlm.servers.requests import GivenUp, Server, ask_all, explain_refusal

# About a hundred are usual: the token's id and text, its rank and log-prob.
_MOST_BYTES_PER_TOKEN = 1000


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
    failed: dict[int, str] = {}
    num_left = 0
    progress = tqdm(total=len(rows), initial=len(done), desc="blaming", unit="record", disable=not show_progress)
    with progress:
        for place, result in ask_all(
            len(order), lambda place, stop: _score_row(server, rows[order[place]], key, stop), server.concurrency
        ):
            index = order[place]
            if isinstance(result, GivenUp):
                num_left += 1
                continue
            if isinstance(result, Unreachable):
                failed[index] = str(result)
                continue
            if isinstance(result, BaseException):
                raise result
            progress.update()
            without, judged = (None if logps is None else torch.tensor(logps, dtype=torch.float64) for logps in result)
            assert without is not None
            yield [(index, without, judged)]
    if failed:
        first = min(failed)
        rest = f", and {num_left} not asked for any more" if num_left else ""
        raise UserError(
            f"{len(failed)} of {len(order)} records failed{rest}; the first is {rows[first]['location']}:"
            f" {failed[first]};"
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
            server.endpoint,
            request,
            key=key,
            timeout=server.timeout,
            max_retries=server.max_retries,
            stop=stop,
            num_bytes=max(LARGEST_ANSWER, _MOST_BYTES_PER_TOKEN * len(ids)),
        )
    except Refused as error:
        advice = "if the prompt is too long for the server, give a smaller --max_length"
        raise UserError(explain_refusal(server, server.endpoint, error, row["location"], advice)) from None
    return read_prompt_logprobs(answer, ids, len(prompt_ids), server.endpoint)


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
