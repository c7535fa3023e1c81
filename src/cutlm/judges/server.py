"""The judge on a server: a language model behind any OpenAI-compatible chat endpoint.

A run that is stopped or killed and started again asks only for the missing judgments.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cutlm.judges.prompt import (
    DEFAULT_PROMPT,
    PARSING_VERSION,
    TRAINED_PROMPT,
    BadAnswer,
    fill_prompt,
    read_answer,
    read_trained_answer,
)
from cutlm.judges.responses import Failure, Outcome, Response, set_aside_empty
from cutlm.servers.cache import Budget, Cache
from cutlm.servers.client import NOT_SENT, Client, RequestFailed, Server

_ADVICE = "if it is too long for the model, set a smaller --max_tokens; if it names a field, change it by --extra_body"
_MAX_ANSWER_SHOWN = 2000


def judge_by_server(
    responses: Sequence[Response],
    server: Server,
    cache_file: str | Path,
    *,
    template: str = DEFAULT_PROMPT,
    temperature: float = 0.0,
    max_tokens: int = 1024,
) -> Outcome:
    """Judge responses by a language model on a server; judgments are cached in `cache_file` as they arrive.

    The template has `{instruction}` and `{response}`, and decides how answers are parsed.

    Raises:
        UserError: The server refuses every request, or the cache cannot be written.
    """
    kept, outcome = set_aside_empty(responses)
    prompts = {index: fill_prompt(template, responses[index]) for index in kept}
    read = read_trained_answer if template == TRAINED_PROMPT else read_answer
    bodies: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[int]] = {}  # identical responses share one request
    for index in kept:
        body = server.make_body(prompts[index], temperature=temperature, max_tokens=max_tokens)
        key = make_key(server, body)
        bodies[key] = body
        groups.setdefault(key, []).append(index)
    with Cache(cache_file) as cache:
        cached = cache.get_many(groups)
        for key, judgment in cached.items():
            outcome.judgments |= dict.fromkeys(groups[key], judgment)
        if cached:
            outcome.notes.append(f"{len(outcome.judgments)} judgments were in the cache {cache.path}")
        missing = [key for key in groups if key not in cached]
        if not missing:
            return outcome
        budget = Budget(cache, server.max_requests, server.max_tokens_total)
        client = Client(server, budget)

        def ask(number: int) -> tuple[str | Failure | None, bool]:
            key = missing[number]
            first = groups[key][0]
            answer = client.complete(bodies[key])
            try:
                judgment = read(answer.text, answer.finish_reason, responses[first], prompts[first])
            except BadAnswer as error:
                failure = Failure(error.kind, error.reason, (answer.text or "")[:_MAX_ANSWER_SHOWN])
                return failure, answer.is_redacted
            cache.put(key, judgment)
            return judgment, answer.is_redacted

        locations = [responses[groups[key][0]].location for key in missing]
        num_redacted = 0
        with tqdm(total=len(kept), initial=len(outcome.judgments), desc="judging", unit="response") as progress:
            for number, result in client.request_many(ask, locations, advice=_ADVICE, is_answering=bool(cached)):
                group = groups[missing[number]]
                if isinstance(result, RequestFailed):
                    result = Failure(result.kind, str(result), result.answer[:_MAX_ANSWER_SHOWN]), False
                judgment, is_redacted = result
                num_redacted += is_redacted
                if isinstance(judgment, Failure):
                    outcome.failures |= dict.fromkeys(group, judgment)
                    if judgment.kind == NOT_SENT:
                        continue
                else:
                    outcome.judgments |= dict.fromkeys(group, judgment)
                # As text, because tqdm would write 4e+4 for 40000.
                progress.set_postfix(tokens=f"{budget.num_tokens}", failed=len(outcome.failures), refresh=False)
                progress.update(len(group))
        outcome.notes += _describe_usage(budget, num_redacted)
    reasons = {failure.reason for failure in outcome.failures.values() if failure.kind == NOT_SENT}
    outcome.notes.extend(f"stopped: {reason}" for reason in sorted(reasons))
    return outcome


def make_key(server: Server, body: Mapping[str, Any]) -> str:
    """Return a hash of everything that a judgment depends on: server, request, and how its answer is parsed."""
    return hashlib.sha256(json.dumps([PARSING_VERSION, server.url, body], sort_keys=True).encode()).hexdigest()


def _describe_usage(budget: Budget, num_redacted: int) -> list[str]:
    estimated = " (partly estimated, because the server did not report them)" if budget.is_estimated else ""
    notes = [f"{budget.num_requests} requests, {budget.num_tokens} tokens{estimated}"]
    num_requests, num_tokens = budget.read_total()
    if (num_requests, num_tokens) != (budget.num_requests, budget.num_tokens):
        notes.append(f"{num_requests} requests, {num_tokens} tokens by all runs with this cache")
    if num_redacted:
        notes.append(f"{num_redacted} answers contained the key of the server; [key] replaces it")
    return notes
