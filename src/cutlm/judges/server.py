"""The judge on a server: a language model behind any OpenAI-compatible chat endpoint.

A run that is stopped or killed and started again asks only for the missing judgments.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cutlm.judges.answers import AnswerFormat, BadAnswer, Verdict, locate_quotes, read_answer
from cutlm.judges.prompt import DEFAULT_PROMPT, RESPONSE_FORMAT, fill_prompt
from cutlm.judges.responses import Failure, Outcome, Response, set_aside_empty
from cutlm.servers.cache import Budget, Cache
from cutlm.servers.client import NOT_SENT, Answer, Client, Refused, RequestFailed, Server

_ADVICE = "if it is too long for the model, set a smaller --max_tokens; if it names a field, change it by --extra_body"
_MAX_ANSWER_SHOWN = 2000
# Statuses by which servers refuse `response_format`, and what they call it in the message.
_ABOUT_FORMAT = (400, 404, 415, 422, 501)
_FORMAT_NAMES = re.compile(r"response.?format|schema|structured|grammar|guided", re.IGNORECASE)


def judge_by_server(
    responses: Sequence[Response],
    server: Server,
    cache_file: str | Path,
    *,
    template: str = DEFAULT_PROMPT,
    answer_format: AnswerFormat = "json",
    temperature: float = 0.0,
    max_tokens: int = 1024,
) -> Outcome:
    """Judge responses by a language model on a server; its answers are cached in `cache_file` as they arrive.

    For JSON, the server is told to enforce the fields by `response_format`. If it refuses that, the prompt alone asks
    for them. Passages that the judge quotes become `wrong_spans`.

    Args:
        responses: The responses.
        server: The server and the model on it.
        cache_file: An SQLite file of the answers that are judgments.
        template: The question, with `{instruction}` and `{response}`.
        answer_format: What the template asks for.
        temperature: 0 for greedy decoding.
        max_tokens: The maximum length of an answer.

    Raises:
        UserError: The server refuses every request, or the cache cannot be written.
    """
    kept, outcome = set_aside_empty(responses)
    groups: dict[str, list[int]] = {}  # identical responses share one request
    for index in kept:
        groups.setdefault(fill_prompt(template, responses[index]), []).append(index)
    fields = [{"response_format": RESPONSE_FORMAT}, {}] if answer_format == "json" else [{}]
    bodies = {
        question: [
            server.make_body(question, temperature=temperature, max_tokens=max_tokens, **more) for more in fields
        ]
        for question in groups
    }

    def read(question: str, text: str | None, finish_reason: str | None) -> Verdict:
        return read_answer(text, finish_reason, responses[groups[question][0]], question, answer_format)

    verdicts: dict[str, Verdict] = {}
    with Cache(cache_file) as cache:
        keys = {question: [make_key(server, body) for body in bodies[question]] for question in groups}
        cached = cache.get_many({key for some in keys.values() for key in some})
        for question, some in keys.items():
            for text in (cached[key] for key in some if key in cached):
                try:
                    verdicts[question] = read(question, text, None)
                except BadAnswer:  # read otherwise by the version that cached it
                    continue
        num_cached = sum(len(groups[question]) for question in verdicts)
        if num_cached:
            outcome.notes.append(f"{num_cached} judgments were in the cache {cache.path}")
        missing = [question for question in groups if question not in verdicts]
        if missing:
            budget = Budget(cache, server.max_requests, server.max_tokens_total)
            is_accepted = any(some[0] in cached for some in keys.values() if len(some) > 1)
            requester = _Requester(Client(server, budget), is_accepted)

            def ask(number: int) -> tuple[Verdict | Failure, bool]:
                question = missing[number]
                body, answer = requester.complete(bodies[question])
                try:
                    verdict = read(question, answer.text, answer.finish_reason)
                except BadAnswer as error:
                    failure = Failure(error.kind, error.reason, (answer.text or "")[:_MAX_ANSWER_SHOWN])
                    return failure, answer.is_redacted
                cache.put(make_key(server, body), answer.text)
                return verdict, answer.is_redacted

            locations = [responses[groups[question][0]].location for question in missing]
            num_redacted = 0
            with tqdm(total=len(kept), initial=num_cached, desc="judging", unit="response") as progress:
                for number, result in requester.client.request_many(
                    ask, locations, advice=_ADVICE, is_answering=bool(cached)
                ):
                    group = groups[missing[number]]
                    if isinstance(result, RequestFailed):
                        result = Failure(result.kind, str(result), result.answer[:_MAX_ANSWER_SHOWN]), False
                    verdict, is_redacted = result
                    num_redacted += is_redacted
                    if isinstance(verdict, Failure):
                        outcome.failures |= dict.fromkeys(group, verdict)
                        if verdict.kind == NOT_SENT:
                            continue
                    else:
                        verdicts[missing[number]] = verdict
                    # As text, because tqdm would write 4e+4 for 40000.
                    progress.set_postfix(tokens=f"{budget.num_tokens}", failed=len(outcome.failures), refresh=False)
                    progress.update(len(group))
            outcome.notes += _describe_usage(budget, num_redacted)
            if requester.is_format_refused:
                outcome.notes.append("the server refuses response_format; the prompt alone asks for JSON")
    _add_verdicts(outcome, responses, [(groups[question], verdict) for question, verdict in verdicts.items()])
    reasons = {failure.reason for failure in outcome.failures.values() if failure.kind == NOT_SENT}
    outcome.notes.extend(f"stopped: {reason}" for reason in sorted(reasons))
    return outcome


class _Requester:
    """Sends requests with a field that a server may refuse; then without it for the rest of the run."""

    def __init__(self, client: Client, is_accepted: bool) -> None:
        self.client = client
        self.is_format_refused = False
        self._is_accepted = is_accepted  # whether the server has answered a request with the field

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Answer]:
        """Return the answer to the first of two bodies that the server accepts, with this body; or to the only one."""
        first, last = bodies[0], bodies[-1]
        if first == last or self.is_format_refused:
            return last, self.client.complete(last)
        try:
            answer = self.client.complete(first)
        except (Refused, RequestFailed) as error:
            is_named = _FORMAT_NAMES.search(str(error)) is not None
            is_status = isinstance(error, Refused) and error.status in _ABOUT_FORMAT and not self._is_accepted
            if not is_named and not is_status:
                raise
            answer = self.client.complete(last)  # refused again if the field is not the reason
            self.is_format_refused = True
            return last, answer
        self._is_accepted = True
        return first, answer


def make_key(server: Server, body: Mapping[str, Any]) -> str:
    """Return a hash of everything that an answer depends on: the server and the request."""
    return hashlib.sha256(json.dumps([server.url, body], sort_keys=True).encode()).hexdigest()


def _add_verdicts(
    outcome: Outcome, responses: Sequence[Response], verdicts: Sequence[tuple[Sequence[int], Verdict]]
) -> None:
    num_quotes = num_missing = 0
    for group, verdict in verdicts:
        for index in group:
            outcome.judgments[index] = verdict.judgment
            spans, num = locate_quotes(verdict.quotes, responses[index].output)
            if spans:
                outcome.wrong_spans[index] = spans
            num_quotes, num_missing = num_quotes + len(verdict.quotes), num_missing + num
    if num_missing:
        unlocated = f"{num_missing} of {num_quotes} quotes do not occur exactly once in their response"
        outcome.notes.append(f"{unlocated}; they are not in wrong_spans")


def _describe_usage(budget: Budget, num_redacted: int) -> list[str]:
    estimated = " (partly estimated, because the server did not report them)" if budget.is_estimated else ""
    notes = [f"{budget.num_requests} requests, {budget.num_tokens} tokens{estimated}"]
    num_requests, num_tokens = budget.read_total()
    if (num_requests, num_tokens) != (budget.num_requests, budget.num_tokens):
        notes.append(f"{num_requests} requests, {num_tokens} tokens by all runs with this cache")
    if num_redacted:
        notes.append(f"{num_redacted} answers contained the key of the server; [key] replaces it")
    return notes
