"""The judge on a server: a language model behind any OpenAI-compatible chat endpoint.

A run that is stopped or killed and started again asks only for the missing judgments.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from cutlm.judges.answers import AnswerFormat, BadAnswer, Verdict, locate_quotes, read_answer
from cutlm.judges.prompt import DEFAULT_PROMPT, RESPONSE_FORMAT, fill_prompt
from cutlm.judges.responses import Failure, Outcome, Response, set_aside_empty
from cutlm.servers.cache import Budget, Cache
from cutlm.servers.client import NOT_SENT, Answer, Client, Refused, RequestFailed, Server

VerdictT = TypeVar("VerdictT")

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
    show_progress: bool = True,
) -> Outcome:
    """Judge responses by a language model on a server; its answers are cached in `cache_file` as they arrive.

    For JSON, the request asks the server to enforce the fields with `response_format`. If it refuses that, the prompt
    alone asks for them. Passages that the judge quotes become `wrong_spans`.

    Args:
        responses: The responses.
        server: The server and the model on it.
        cache_file: An SQLite file of the answers that are judgments.
        template: The question, with `{instruction}` and `{response}`.
        answer_format: The format that the template asks for.
        temperature: 0 for greedy decoding.
        max_tokens: The maximum length of an answer.
        show_progress: Show a progress bar.

    Raises:
        UserError: The server refuses every request, or the cache cannot be written.
    """
    kept, outcome = set_aside_empty(responses)
    groups: dict[str, list[int]] = {}  # identical responses share one request
    for index in kept:
        groups.setdefault(fill_prompt(template, responses[index]), []).append(index)

    def read(question: str, text: str | None, finish_reason: str | None) -> Verdict:
        return read_answer(text, finish_reason, responses[groups[question][0]], question, answer_format)

    asked = ask_server(
        {question: [responses[index].location for index in group] for question, group in groups.items()},
        server,
        cache_file,
        read,
        response_format=RESPONSE_FORMAT if answer_format == "json" else None,
        temperature=temperature,
        max_tokens=max_tokens,
        show_progress=show_progress,
    )
    outcome.notes += asked.notes
    for question, failure in asked.failures.items():
        outcome.failures |= dict.fromkeys(groups[question], failure)
    _add_verdicts(outcome, responses, [(groups[question], verdict) for question, verdict in asked.verdicts.items()])
    outcome.notes += asked.list_reasons_of_stop()
    return outcome


@dataclass
class Asked(Generic[VerdictT]):
    """Answers of a server to questions.

    Attributes:
        verdicts: Verdicts in its answers, by the question.
        failures: Reasons for missing verdicts, by the question.
        notes: Sentences for the user.
    """

    verdicts: dict[str, VerdictT] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def list_reasons_of_stop(self) -> list[str]:
        """Return a sentence for each reason for which questions were not sent."""
        reasons = {failure.reason for failure in self.failures.values() if failure.kind == NOT_SENT}
        return [f"stopped: {reason}" for reason in sorted(reasons)]


def ask_server(
    questions: Mapping[str, Sequence[str]],
    server: Server,
    cache_file: str | Path,
    read: Callable[[str, str | None, str | None], VerdictT],
    *,
    response_format: Mapping[str, Any] | None,
    temperature: float,
    max_tokens: int,
    show_progress: bool = True,
) -> Asked[VerdictT]:
    """Ask a language model on a server questions; its answers are cached in `cache_file` as they arrive.

    Args:
        questions: The locations of the rows that each question is about.
        server: The server and the model on it.
        cache_file: An SQLite file of the answers that were understood.
        read: Reads an answer, from the question, the text and why it ends; raises `BadAnswer` if it is not understood.
        response_format: Format for the server to enforce; if it refuses that, the question alone asks for it.
        temperature: 0 for greedy decoding.
        max_tokens: The maximum length of an answer.
        show_progress: Show a progress bar.

    Raises:
        UserError: The server refuses every request, or the cache cannot be written.
    """
    asked: Asked[VerdictT] = Asked()
    fields: list[dict[str, Any]] = [{}] if response_format is None else [{"response_format": response_format}, {}]
    bodies = {
        question: [
            server.make_body(question, temperature=temperature, max_tokens=max_tokens, **more) for more in fields
        ]
        for question in questions
    }
    with Cache(cache_file) as cache:
        keys = {question: [make_key(server, body) for body in bodies[question]] for question in questions}
        cached = cache.get_many({key for some in keys.values() for key in some})
        for question, some in keys.items():
            for text in (cached[key] for key in some if key in cached):
                try:
                    asked.verdicts[question] = read(question, text, None)
                except BadAnswer:  # read otherwise by the version that cached it
                    continue
        num_cached = sum(len(questions[question]) for question in asked.verdicts)
        if num_cached:
            asked.notes.append(f"{num_cached} judgments were in the cache {cache.path}")
        missing = [question for question in questions if question not in asked.verdicts]
        if not missing:
            return asked
        budget = Budget(cache, server.max_requests, server.max_tokens_total)
        is_accepted = any(some[0] in cached for some in keys.values() if len(some) > 1)
        requester = _Requester(Client(server, budget), is_accepted)

        def ask(number: int) -> tuple[VerdictT | Failure, bool]:
            question = missing[number]
            body, answer = requester.complete(bodies[question])
            try:
                verdict = read(question, answer.text, answer.finish_reason)
            except BadAnswer as error:
                failure = Failure(error.kind, error.reason, (answer.text or "")[:_MAX_ANSWER_SHOWN])
                return failure, answer.is_redacted
            cache.put(make_key(server, body), answer.text)
            return verdict, answer.is_redacted

        num_all = sum(map(len, questions.values()))
        num_redacted = num_failed = 0
        options: Any = {} if show_progress else {"disable": True}  # an explicit False would override TQDM_DISABLE
        with tqdm(total=num_all, initial=num_cached, desc="judging", unit="response", **options) as progress:
            for number, result in requester.client.request_many(
                ask, [questions[question][0] for question in missing], advice=_ADVICE, is_answering=bool(cached)
            ):
                question = missing[number]
                if isinstance(result, RequestFailed):
                    result = Failure(result.kind, str(result), result.answer[:_MAX_ANSWER_SHOWN]), False
                verdict, is_redacted = result
                num_redacted += is_redacted
                if isinstance(verdict, Failure):
                    asked.failures[question] = verdict
                    num_failed += len(questions[question])
                    if verdict.kind == NOT_SENT:
                        continue
                else:
                    asked.verdicts[question] = verdict
                # As text, because tqdm would write 4e+4 for 40000.
                progress.set_postfix(tokens=f"{budget.num_tokens}", failed=num_failed, refresh=False)
                progress.update(len(questions[question]))
        asked.notes += _describe_usage(budget, num_redacted)
        if requester.is_format_refused:
            asked.notes.append("the server refuses response_format; the prompt alone asks for JSON")
    return asked


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
