"""The judge on a server: any OpenAI-compatible chat endpoint, several questions at a time, each paid for once.

Judgments go to a cache as they come; a run that is stopped or killed, and started again, asks for the missing ones
alone. How one question is asked is left to `cutlm.servers.chat`, its wording to `cutlm.judges.prompt`.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cutlm.errors import UserError
from cutlm.judges import Failure, Outcome, Response
from cutlm.judges.prompt import (
    DEFAULT_PROMPT,
    PARSING_VERSION,
    TRAINED_PROMPT,
    BadAnswer,
    fill_prompt,
    read_answer,
    read_trained_answer,
)
from cutlm.judges.responses import set_aside_empty
from cutlm.servers.budget import CapReached, Spending
from cutlm.servers.cache import Cache
from cutlm.servers.chat import (
    Answer,
    ChatServer,
    Malformed,
    ask,
    explain_refusal,
    make_client,
)
from cutlm.servers.http import Refused, Unreachable, read_key
from cutlm.servers.requests import GivenUp, RefusedAlone, ask_all

NOT_ASKED = "not asked"
_LONGEST_SHOWN = 2000


def judge_by_server(
    responses: Sequence[Response],
    server: ChatServer,
    cache_file: str | Path,
    *,
    template: str = DEFAULT_PROMPT,
    show_progress: bool = True,
) -> Outcome:
    """Judges responses by a language model on a server.

    Args:
        responses: What is to be judged.
        server: Whom to ask, how, and how much may be spent.
        cache_file: Where judgments are kept.
        template: The question, with `{instruction}` and `{response}`; it decides how answers are read.
        show_progress: Whether to show a progress bar.

    Returns:
        A judgment for each response, or why there is none: no answer after all attempts, a question that the server
        refuses, an answer that is no judgment, or nothing more to spend.

    Raises:
        UserError: The server refuses all that it is asked, or the cache cannot be written to. What was judged before is
            in the cache.
    """
    key = read_key()
    kept, outcome = set_aside_empty(responses)
    prompts = {index: fill_prompt(template, responses[index]) for index in kept}
    read = read_trained_answer if template == TRAINED_PROMPT else read_answer
    # Responses that are alike word for word are asked about once.
    alike: dict[str, list[int]] = {}
    for index in kept:
        alike.setdefault(make_key(server, prompts[index]), []).append(index)
    with Cache(cache_file) as cache:
        found = cache.find(alike)
        for name, judgment in found.items():
            outcome.judgments |= dict.fromkeys(alike[name], judgment)
        missing = [name for name in alike if name not in found]
        if found:
            outcome.notes.append(f"{len(outcome.judgments)} judgments were in the cache {cache.path}")
        if not missing:
            return outcome
        spending = Spending(server.max_requests, server.max_tokens_total, cache)
        progress = tqdm(
            total=len(kept), initial=len(outcome.judgments), desc="judging", unit="response", disable=not show_progress
        )
        firsts = [alike[name][0] for name in missing]
        client = make_client(server, key)
        num_redacted, stop, full = 0, threading.Event(), None
        with progress:

            def ask_one(place: int, stop: threading.Event) -> Answer:
                return ask(client, server, prompts[firsts[place]], key=key, spending=spending, stop=stop)

            for place, result in ask_all(len(firsts), ask_one, server.concurrency, stop=stop, is_answering=bool(found)):
                name, index = missing[place], firsts[place]
                num_redacted += isinstance(result, Answer) and result.is_redacted
                try:
                    judgment = _read_result(result, server, responses[index], prompts[index], read)
                except _NoJudgment as error:
                    outcome.failures |= dict.fromkeys(alike[name], error.failure)
                    if error.failure.kind == NOT_ASKED:
                        continue
                else:
                    try:
                        cache.keep(name, judgment)
                    except UserError as error:  # there may be room for what is on its way
                        full = full or error
                        stop.set()
                    outcome.judgments |= dict.fromkeys(alike[name], judgment)
                # As text: tqdm would write 4e+4 for 40000.
                progress.set_postfix(tokens=f"{spending.num_tokens}", failed=len(outcome.failures), refresh=False)
                progress.update(len(alike[name]))
        if full is not None:
            raise full
        total = spending.read_total()
    estimated = " (some of them estimated, as the server did not say)" if spending.is_estimated else ""
    outcome.notes.append(f"{spending.num_requests} requests, {spending.num_tokens} tokens{estimated}")
    if total != (spending.num_requests, spending.num_tokens):
        outcome.notes.append(f"{total[0]} requests, {total[1]} tokens by all runs with this cache")
    if num_redacted:
        outcome.notes.append(f"{num_redacted} answers held the key to the server; [key] stands in its place")
    caps = {failure.reason for failure in outcome.failures.values() if failure.kind == NOT_ASKED}
    outcome.notes.extend(f"stopped: {reason}" for reason in sorted(caps))
    return outcome


def make_key(server: ChatServer, prompt: str) -> str:
    """A hash of everything that a judgment depends on: server, request, and how its answer is read."""
    parts = [PARSING_VERSION, server.url, server.make_request(prompt)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _NoJudgment(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _read_result(
    result: Any, server: ChatServer, response: Response, prompt: str, read: Callable[..., str | None]
) -> str | None:
    """The judgment in what came of a question."""
    if isinstance(result, Refused):
        raise UserError(explain_refusal(server, result, response.location))
    if isinstance(result, CapReached | GivenUp):
        raise _NoJudgment(Failure(NOT_ASKED, str(result)))
    if isinstance(result, RefusedAlone):
        raise _NoJudgment(Failure("refused", f"{result}; if it is too long for the model, give a smaller --max_tokens"))
    if isinstance(result, Unreachable):
        raise _NoJudgment(Failure("no answer", str(result)))
    if isinstance(result, Malformed):
        raise _NoJudgment(Failure("malformed answer", str(result)))
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Answer)
    try:
        return read(result.text, result.finish_reason, response, prompt)
    except BadAnswer as error:
        raise _NoJudgment(Failure(error.kind, error.reason, (result.text or "")[:_LONGEST_SHOWN])) from None
