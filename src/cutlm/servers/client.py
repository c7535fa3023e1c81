"""The client for OpenAI-compatible servers, on the `openai` package.

`openai` retries transient errors (timeouts, cut connections, 408, 409, 425, 429, 5xx) with backoff and obeys
`Retry-After`. This module also retries answers that are not JSON or are errors under status 200, bounds answers in size
and duration, follows no redirects, counts every attempt against the budget and runs many requests at a time. The key is
read from the environment variable OPENAI_API_KEY alone, and removed from whatever the server says.
"""

import json
import os
import queue
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2  # the HTTP library of openai
import openai

from cutlm.errors import ConfigError, UserError
from cutlm.servers.cache import BYTES_PER_TOKEN, Budget, BudgetExceeded
from cutlm.servers.limiter import RateLimiter, Started

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER_BYTES = 16 * 2**20
# Prompt log-probabilities take about 100 bytes per token, and a token of the request at least 2.
_MAX_ANSWER_GROWTH = 500
_MAX_TIMEOUTS = 10  # that an answer may take from its first byte to its last
# Servers without keys are given words such as EMPTY, which an answer may contain.
_MIN_SECRET_LENGTH = 16
_MAX_TOKENS_REPORTED = 10**9
_TRANSIENT = (408, 409, 425, 429)
# Statuses that may concern one request alone: it is malformed, too large or cannot be processed.
_ABOUT_ONE_REQUEST = (400, 413, 422)
# Codes and types of errors that last until the user pays; 1113 is z.ai's.
_NO_CREDIT = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "exceeded_current_quota_error", "1113"}
)
_UNSUPPORTED = frozenset({"unsupported_parameter", "unsupported_value"})
_FIXED_FIELDS = ("model", "messages", "prompt", "stream", "n")

NO_ANSWER = "no answer"
MALFORMED = "malformed answer"
INCOMPLETE = "incomplete answer"  # for a reason that the user did not set
REFUSAL = "refusal"  # by the model or a content filter
REFUSED = "refused"  # by the server: the request
NOT_SENT = "not asked"

# Finish reasons of known servers, in lower case. Any other than the complete and the truncated ends is a failure.
_COMPLETE_ENDS = frozenset({"stop", "eos", "end_turn", "eos_token", "stop_sequence", "stop_sequences"})
_TRUNCATED_ENDS = frozenset(
    {"length", "max_tokens", "max_output_tokens", "max_length", "model_length", "model_context_window_exceeded"}
)
_FILTERED_ENDS = frozenset(
    {"content_filter", "refusal", "sensitive", "safety", "recitation", "blocklist", "prohibited_content", "spii"}
)
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_content")

# A user's message, messages with roles, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Server:
    """A model on an OpenAI-compatible server, and how to send requests to it.

    Args:
        base_url: The address that /chat/completions is appended to, such as http://localhost:8000/v1.
        model: The model's name on the server.
        extra_body: Further fields of every request; None removes a field.
        concurrency: Requests at a time.
        timeout: Seconds to wait for the next byte; a whole answer may take ten times as long.
        max_retries: Retries of a request after a transient error.
        max_requests: Most requests, retries included, of all runs that share a cache.
        max_tokens_total: Tokens of all runs that share a cache after which no further request is sent.
        requests_per_minute: Most requests per minute, retries included.
        tokens_per_minute: Most tokens per minute, of prompts and answers. A request under way counts with the longest
            answer that it may have.

    Raises:
        ConfigError: A setting is out of range; all such settings are named.
    """

    base_url: str
    model: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 600.0
    max_retries: int = 5
    max_requests: int | None = None
    max_tokens_total: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        problems = [problem] if (problem := _describe_bad_url(self.base_url)) else []
        minima = {"concurrency": 1, "max_retries": 0, "max_requests": 1, "max_tokens_total": 1}
        minima |= {"requests_per_minute": 1, "tokens_per_minute": 1}
        for name, least in minima.items():
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}: expected a whole number of at least {least}, got {value}")
        if not self.timeout > 0:
            problems.append(f"timeout: expected a number of seconds above 0, got {self.timeout}")
        if fixed := [name for name in _FIXED_FIELDS if name in self.extra_body]:
            problems.append(f"extra_body: expected no {', '.join(fixed)}, which cutlm sets; leave these out")
        if problems:
            raise ConfigError(problems)

    @property
    def url(self) -> str:
        """The address that paths are appended to."""
        return self.base_url.rstrip("/")

    def make_body(self, prompt: Prompt, **fields: Any) -> dict[str, Any]:
        """Return the body of a request: everything that an answer depends on besides the server."""
        if isinstance(prompt, str):
            content: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            content = {"prompt" if prompt and isinstance(prompt[0], int) else "messages": list(prompt)}
        body = {"model": self.model} | content | fields | dict(self.extra_body)
        return {name: value for name, value in body.items() if value is not None}


def _describe_bad_url(url: str) -> str | None:
    if "@" in url:  # a password must not be shown
        return f"base_url: expected an address without a name or password; set a key by {KEY_VARIABLE}"
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0 and not parts.fragment
        if parts.query:  # which may hold a key
            return (
                "base_url: expected an address without a query, got one with ?; leave that out (for Azure, use the"
                " address that ends with /openai/v1)"
            )
    except ValueError:
        is_address = False
    if not re.fullmatch(r"https?://[!-~]+", url) or not is_address:
        return f"base_url: expected an address such as http://localhost:8000/v1, got {url!r}"
    return None


def find_proxy(url: str) -> str | None:
    """Return the address of the proxy that the environment sets for a server, without its name and password."""
    parts, proxies = urlsplit(url), getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass(parts.netloc):
        return None
    return re.sub("^([^/]*//)?[^/]*@", r"\1", address)


def describe_commonest(reasons: Iterable[str]) -> str:
    """Return the commonest reason of failures, with its number."""
    ((reason, num),) = Counter(reasons).most_common(1)
    return f"most often ({num}): {reason}"


def read_key() -> str | None:
    """Return the key of the server, or None; raise `UserError` if an HTTP header cannot hold it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= letter <= "~" for letter in key):  # an error of the HTTP library would quote it
        raise UserError(f"{KEY_VARIABLE}: expected only letters, digits and ASCII signs; set it again")
    return key or None


@dataclass(frozen=True)
class Answer:
    """A model's answer, complete or truncated; any other end is a failure. Fields are None if the server sends none."""

    text: str | None
    finish_reason: str | None  # "stop" or "length", whatever words the server has for them
    reasoning: str | None = None  # reasoning that the server separates from the text
    is_redacted: bool = False  # whether the key was removed from the text or the reasoning

    @property
    def is_truncated(self) -> bool:
        """Whether the answer was stopped at the maximum number of tokens or at the end of the context."""
        return self.finish_reason == "length"


class Piece(NamedTuple):
    """A piece of an answer that is streamed."""

    text: str
    reasoning: str
    is_truncated: bool  # known with the last piece


@dataclass
class _Choice:
    """Content of a completion, or of all events of a stream so far."""

    text: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    has_tool_calls: bool = False
    finish_reason: Any = None

    def add(self, other: "_Choice") -> None:
        self.text = _join(self.text, other.text)
        self.reasoning = _join(self.reasoning, other.reasoning)
        self.refusal = _join(self.refusal, other.refusal)
        self.has_tool_calls |= other.has_tool_calls
        self.finish_reason = other.finish_reason or self.finish_reason


class RequestFailed(Exception):
    """One request has no complete answer; others may have one."""

    def __init__(self, kind: str, reason: str, answer: str = "") -> None:
        super().__init__(reason)
        self.kind = kind  # NO_ANSWER, MALFORMED, INCOMPLETE, REFUSAL, REFUSED or NOT_SENT
        self.answer = answer  # its text, to be shown and never used


class Refused(Exception):
    """The server refuses a request and would refuse it again."""

    def __init__(self, status: int, message: str, codes: Collection[str] = (), advice: str = "") -> None:
        super().__init__(": ".join(filter(None, [str(status or ""), message])))
        self.status = status  # of HTTP; 0 if the connection is refused on our side
        self.has_no_credit = status == 402 or not _NO_CREDIT.isdisjoint(codes)
        self.advice = advice  # what to do about it, if that is known


class _Stopped(Exception):
    """The run ends before this request is sent."""


class _BadAnswer(httpx2.RequestError):
    """An answer that `openai` takes for a failed request, and so retries."""


# Set in the threads of a run: when the event is set, a request that waits for a retry is not sent again.
_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Client:
    """Sends requests to one server.

    Args:
        server: The server.
        budget: Counts every attempt and the tokens of every answer; None for no limits.

    Raises:
        UserError: The key or the proxy in the environment cannot be used.

    Example:

        >>> client = Client(Server("http://localhost:8000/v1", "my-model"))
        >>> client.complete(client.server.make_body("Name a city.", max_tokens=20)).text
        'Canberra.'
    """

    def __init__(self, server: Server, budget: Budget | None = None) -> None:
        self.server, self._budget, self._key = server, budget, read_key()
        try:
            http_client = _HttpClient(server, self._key, budget)
        except (ImportError, ValueError):  # whose messages may quote a password
            raise UserError(
                "ALL_PROXY, HTTPS_PROXY or HTTP_PROXY: expected an address such as http://localhost:3128; fix or unset"
                " it, or, for a SOCKS proxy, run: pip install socksio"
            ) from None
        options: Any = {"max_retries": server.max_retries, "timeout": server.timeout, "http_client": http_client}
        self._client = openai.OpenAI(base_url=server.url, api_key=self._key or "none", **options)
        headers: dict[str, Any] = {"Content-Type": "application/json", "User-Agent": _name_agent()}
        self._options: Any = {"headers": headers if self._key else headers | {"Authorization": openai.Omit()}}

    def request(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON and return the JSON of the answer; raise `Refused` or `RequestFailed`."""
        content = json.dumps(body).encode()
        try:
            response = self._client.post(path, content=content, cast_to=httpx2.Response, options=self._options)
        except openai.APIError as error:
            raise self._explain(error) from None
        return json.loads(response.content)

    def complete(self, body: Mapping[str, Any]) -> Answer:
        """Request one completion, of messages or of token ids; see `Server.make_body`.

        Raises:
            Refused: The server refuses the request.
            RequestFailed: There is no answer, it is malformed, or the budget does not allow a request.
        """
        value, choice = self.request(_choose_path(body), body), _Choice()
        try:
            choice = _read_choice(value)
        finally:  # a malformed answer is paid for as well
            if self._budget is not None:
                self._budget.count_tokens(_read_num_tokens(value), _count_bytes(body, choice))
        finish_reason = self._read_end(choice)
        shown = [text and _redact(text, self._key, is_content=True) for text in (choice.text, choice.reasoning)]
        return Answer(shown[0], finish_reason, shown[1], is_redacted=shown != [choice.text, choice.reasoning])

    def stream(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """Request one completion and yield its pieces as they arrive.

        Raises:
            Refused: The server refuses the request.
            RequestFailed: There is no answer, it breaks off, or it is not complete for another reason than its length.
        """
        content, whole = json.dumps({**body, "stream": True}).encode(), _Choice()
        options: Any = {"options": self._options, "stream": True, "stream_cls": _Stream}
        try:
            with self._client.post(_choose_path(body), content=content, cast_to=object, **options) as stream:
                for event in stream:
                    choice = self._read_event(event)
                    whole.add(choice)
                    is_truncated = _classify_end(whole.finish_reason) == "length"
                    yield Piece(choice.text or "", choice.reasoning or "", is_truncated)
                is_done = stream.is_done
        except openai.APIError as error:
            raise self._explain(error) from None
        except (ValueError, RecursionError):
            raise RequestFailed(MALFORMED, "an event of the server's answer is not JSON") from None
        if not whole.finish_reason and not is_done:
            raise RequestFailed(NO_ANSWER, "the answer breaks off without a finish_reason")
        self._read_end(whole)

    def _read_event(self, event: Any) -> _Choice:
        if error := _find_error(event):
            raise RequestFailed(
                NO_ANSWER, f"the server breaks off with an error ({_shorten(json.dumps(error), self._key)})"
            )
        if isinstance(event, dict) and not event.get("choices"):  # usage, or an event that keeps the connection open
            return _Choice()
        return _read_choice(event, is_event=True)

    def _read_end(self, choice: _Choice) -> str | None:
        """Return how an answer ended, "stop", "length" or None; raise `RequestFailed` if it is not one."""
        shown = _redact(choice.text or "", self._key, is_content=True)
        if choice.refusal:
            raise RequestFailed(REFUSAL, f"the model refuses to answer ({_shorten(choice.refusal, self._key)})", shown)
        end = _classify_end(choice.finish_reason)
        if end is not None:
            named = f"finish_reason {_shorten(json.dumps(choice.finish_reason), self._key)}"
            if end == REFUSAL:
                raise RequestFailed(REFUSAL, f"the server's content filter stopped the answer ({named})", shown)
            if end == INCOMPLETE:
                raise RequestFailed(INCOMPLETE, f"the answer is not complete ({named})", shown)
        if choice.has_tool_calls:
            raise RequestFailed(INCOMPLETE, "the model calls a tool instead of answering", shown)
        return end

    def request_many(
        self, ask: Callable[[int], Any], locations: Sequence[str], *, advice: str, is_answering: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Run `ask` for the indices of `locations`, several at a time in threads.

        Yield each index with what `ask` returned, or with the `RequestFailed` that it raised. Once the server answers
        any request, a refusal of a single one is such a failure. If the server gives no answer to many requests in a
        row, the others are not sent and fail as well. Requests under way when the run ends are paid for, so they are
        awaited and yielded. Only leaving the loop, as Ctrl-C does, waits for nothing.

        Args:
            ask: Sends the request or requests of one index by `complete` or `request`, and returns what to yield.
            locations: What each request is about, for messages.
            advice: What to do about a request that the server refuses.
            is_answering: Whether the server is known to answer such requests.

        Raises:
            UserError: The server refuses every request, or `ask` raised it.
        """
        unsent: queue.SimpleQueue[int] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        missing = set(range(len(locations)))
        for index in sorted(missing):
            unsent.put(index)
        stop = threading.Event()
        num_threads = min(self.server.concurrency, len(locations))
        # Daemons, because the executors of the standard library join their threads at exit and would delay Ctrl-C.
        for _ in range(num_threads):
            threading.Thread(target=_work, args=(ask, unsent, results, stop), daemon=True).start()
        num_in_a_row, max_in_a_row, is_gone = 0, max(8, 2 * self.server.concurrency), False
        refused: list[tuple[int, Refused]] = []
        fatal: tuple[int, Exception] | None = None
        try:
            while num_threads:
                item = results.get()
                if item is None:
                    num_threads -= 1
                    continue
                index, result = item
                has_no_answer = isinstance(result, RequestFailed) and result.kind == NO_ANSWER
                if is_gone and has_no_answer:
                    continue
                missing.remove(index)
                if _is_about_one_request(result):
                    refused.append((index, result))
                    if not is_answering and len(refused) >= max_in_a_row:
                        fatal = fatal or refused[0]
                        stop.set()
                elif isinstance(result, Exception) and not isinstance(result, RequestFailed):
                    fatal = fatal or (index, result)
                else:
                    is_failed = isinstance(result, RequestFailed) and result.kind not in (INCOMPLETE, REFUSAL)
                    is_answering = is_answering or not is_failed
                    num_in_a_row = num_in_a_row + 1 if has_no_answer else 0
                    yield index, result
                    if num_in_a_row >= max_in_a_row:
                        is_gone = True
                        stop.set()
                if is_answering:
                    for index, refusal in refused:
                        reason = f"the server refuses it ({refusal}); {refusal.advice or advice}"
                        yield index, RequestFailed(REFUSED, reason)
                    refused.clear()
            fatal = fatal or (refused[0] if refused else None)
            if fatal is not None:
                index, error = fatal
                raise self.explain_refusal(error, locations[index], advice) if isinstance(error, Refused) else error
            if is_gone:
                for index in sorted(missing):
                    reason = f"the server gave no answer to {max_in_a_row} requests in a row"
                    yield index, RequestFailed(NOT_SENT, reason)
        finally:
            stop.set()

    def explain_refusal(self, error: Refused, location: str, advice: str) -> UserError:
        """Return a refusal as one sentence for the user; see `request_many` for the arguments."""
        url = self.server.url
        if not error.status:
            return UserError(f"{url}: {error}; pass another address by --base_url")
        if error.has_no_credit:
            return UserError(
                f"{url}: the account has no credit left ({error}); add credit or raise its limit, and start again:"
                " earlier answers are kept"
            )
        if error.status in (401, 403):
            return UserError(f"{url}: the server rejects the key ({error}); set {KEY_VARIABLE} to one that it accepts")
        if error.status == 404:
            fix = "fix --base_url, to which /chat/completions is appended, or the model's name on the server"
            if not urlsplit(url).path:
                fix = f"most servers need --base_url {url}/v1"
            return UserError(f"{url}: no such endpoint, or no model {self.server.model!r} ({error}); {fix}")
        if 300 <= error.status < 400:
            return UserError(f"{url}: the server redirects to another address ({error}); pass that one by --base_url")
        return UserError(f"{location}: {url} refuses the request ({error}); {error.advice or advice}")

    def _explain(self, error: openai.APIError) -> Exception:
        """The error of the package as one of ours, without the key."""
        num_attempts = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
        if isinstance(error, openai.APIStatusError):
            message = _shorten(error.response.text, self._key)
            codes = _read_codes(error.response.content)
            is_transient = error.status_code >= 500 or error.status_code in _TRANSIENT
            if not is_transient or not _NO_CREDIT.isdisjoint(codes):
                advice = "" if _UNSUPPORTED.isdisjoint(codes) else _advise_fields(json.loads(error.request.content))
                return Refused(error.status_code, message, codes, advice)
            reason = f"the server answered {error.status_code}{f' ({message})' if message else ''}"
        elif isinstance(error, openai.APITimeoutError):
            reason = f"no answer within {self.server.timeout:g} seconds"
        elif isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            proxy = find_proxy(self.server.url)
            through = f" through the proxy {proxy}" if proxy else ""
            reason = str(cause) if isinstance(cause, _BadAnswer) else f"no answer{through} ({type(cause).__name__})"
        else:  # an event of a stream
            reason = f"the server breaks off with an error ({_shorten(error.message, self._key)})"
        return RequestFailed(NO_ANSWER, f"{reason}, after {num_attempts} attempt{'s' * (num_attempts > 1)}")


class _HttpClient(openai.DefaultHttpxClient):
    """Counts every attempt, and checks each answer before `openai` decides whether to retry."""

    def __init__(self, server: Server, key: str | None, budget: Budget | None) -> None:
        super().__init__(follow_redirects=False, timeout=server.timeout)
        self._seconds, self._key, self._budget = server.timeout, key, budget
        self._limiter = RateLimiter(server.requests_per_minute, server.tokens_per_minute)

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        _sleep(0.0)
        started = self._limiter.start(_estimate_num_tokens(request.content), _sleep)
        if self._budget is not None:
            try:
                self._budget.count_request()
            except BudgetExceeded as error:
                raise RequestFailed(NOT_SENT, str(error)) from None
        try:
            response = super().send(request, stream=True, **options)
        except (httpx2.ConnectError, ssl.SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise Refused(0, "its certificate cannot be verified") from None
            raise
        if response.status_code == 425:  # "too early", which openai does not retry by itself
            response.headers["x-should-retry"] = "true"
        is_json = response.headers.get("Content-Type", "").startswith("application/json")  # an error under status 200
        if stream and response.is_success and not is_json:
            return response
        try:
            response = self._read(response, max(MAX_ANSWER_BYTES, _MAX_ANSWER_GROWTH * len(request.content)))
        finally:
            response.close()
        if response.is_success:
            response = self._check(response, started)
        if not response.is_success and not _NO_CREDIT.isdisjoint(_read_codes(response.content)):
            response.headers["x-should-retry"] = "false"
        return response

    def _read(self, response: httpx2.Response, max_bytes: int) -> httpx2.Response:
        """Read a bounded answer whole."""
        longest, body = _MAX_TIMEOUTS * self._seconds, bytearray()
        deadline = time.monotonic() + longest
        for piece in response.iter_bytes():
            body += piece
            if len(body) > max_bytes:
                raise _BadAnswer(f"the server's answer is larger than {max_bytes / 2**20:g} MiB")
            if time.monotonic() > deadline:
                raise _BadAnswer(f"the server's answer was not complete after {longest:g} seconds")
        of_transfer = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in of_transfer]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)

    def _check(self, response: httpx2.Response, started: Started) -> httpx2.Response:
        """Count the tokens of an answer, and treat an error under status 200 as one with the status in its code."""
        try:
            value = json.loads(response.content)
        except (ValueError, RecursionError):
            raise _BadAnswer("the server's answer is not JSON") from None
        if (num_tokens := _read_num_tokens(value)) is not None:
            self._limiter.correct(started, num_tokens)
        if (error := _find_error(value)) is None:
            return response
        content = json.dumps({"error": error}).encode()
        codes = _read_codes(content)
        status = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), None)
        status = 402 if not _NO_CREDIT.isdisjoint(codes) else status
        if status is None:
            raise _BadAnswer(f"the server answered with an error ({_shorten(json.dumps(error), self._key)})")
        return httpx2.Response(status, content=content, request=response.request)


class _Stream(openai.Stream[object]):
    """Remembers whether the server said that the stream is complete."""

    is_done = False

    def _iter_events(self) -> Iterator[Any]:
        for event in super()._iter_events():
            self.is_done = self.is_done or event.data.startswith("[DONE]")
            yield event


def _work(
    ask: Callable[[int], Any],
    unsent: "queue.SimpleQueue[int]",
    results: "queue.SimpleQueue[tuple[int, Any] | None]",
    stop: threading.Event,
) -> None:
    """Ask for one index after another until none is left or the run ends; then put None."""
    _STOP.set(stop)
    try:
        while not stop.is_set():
            index = unsent.get_nowait()
            try:
                results.put((index, ask(index)))
            except _Stopped:
                return
            except Exception as error:  # returned or raised by the thread that reads the results
                if not isinstance(error, RequestFailed) and not _is_about_one_request(error):
                    stop.set()
                results.put((index, error))
    except queue.Empty:
        pass
    finally:
        results.put(None)


def _sleep(seconds: float) -> None:
    """Wait, or raise `_Stopped` once the run ends."""
    stop = _STOP.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise _Stopped


def _is_about_one_request(result: Any) -> bool:
    return isinstance(result, Refused) and result.status in _ABOUT_ONE_REQUEST and not result.has_no_credit


def _name_agent() -> str:
    try:
        return f"cutlm/{version('cutlm')}"
    except PackageNotFoundError:  # the source is used without being installed
        return "cutlm"


def _choose_path(body: Mapping[str, Any]) -> str:
    return "/chat/completions" if "messages" in body else "/completions"


def _estimate_num_tokens(content: bytes) -> int:
    """The tokens that a request takes at most: those of its prompt and of the longest answer."""
    body = json.loads(content)
    prompt, longest = body.get("prompt"), body.get("max_completion_tokens") or body.get("max_tokens")
    num_prompt = len(prompt) if isinstance(prompt, list) else -(-len(content) // BYTES_PER_TOKEN)
    return num_prompt + (longest if isinstance(longest, int) else 0)


def _read_codes(content: bytes) -> set[str]:
    """The code and the type of an error."""
    try:
        error = _unwrap_error(json.loads(content))
    except (ValueError, RecursionError):
        return set()
    return {str(error[name]) for name in ("code", "type") if error.get(name)} if isinstance(error, dict) else set()


def _unwrap_error(value: Any) -> Any:
    """The error in a server's answer, which for Gemini is a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.get("error") or value if isinstance(value, dict) else value


def _advise_fields(body: Mapping[str, Any]) -> str:
    """Say how to leave out fields that reasoning models do not support."""
    fields: dict[str, Any] = {}
    if "max_tokens" in body:
        fields = {"max_tokens": None, "max_completion_tokens": body["max_tokens"]}
    fields |= {name: None for name in ("temperature", "top_p") if name in body}
    return f"leave the field out by --extra_body: '{json.dumps(fields or {'NAME': None})}'"


def _read_num_tokens(value: Any) -> int | None:
    """The tokens that the server reports; None if it reports no plausible number."""
    usage = value.get("usage") if isinstance(value, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and 0 <= total <= _MAX_TOKENS_REPORTED else None


def _count_bytes(body: Mapping[str, Any], choice: _Choice) -> int:
    texts = [message["content"] for message in body.get("messages", ())]
    texts += filter(None, (choice.text, choice.reasoning))
    return sum(len(part.encode("utf-8", "replace")) for part in texts)


def _find_error(value: Any) -> Any:
    """Return the error in a completion or an event, at its top level or in a choice; None without an error."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    own = value if value.get("object") == "error" else None
    return value.get("error") or own or (choice.get("error") if isinstance(choice, dict) else None) or None


def _classify_end(finish_reason: Any) -> str | None:
    """Return "stop", "length", REFUSAL or INCOMPLETE for a finish reason; None if the server gives none."""
    if finish_reason is None or finish_reason == "":
        return None
    name = finish_reason.strip().lower() if isinstance(finish_reason, str) else "of another type"
    name = re.sub(r"^finish_?reason[._]", "", name)
    if name in _COMPLETE_ENDS:
        return "stop"
    if name in _TRUNCATED_ENDS:
        return "length"
    return REFUSAL if name in _FILTERED_ENDS else INCOMPLETE


def _read_choice(value: Any, *, is_event: bool = False) -> _Choice:
    """Read a completion or an event of a stream, which may lack everything."""
    what = "pieces of a completion" if is_event else "the text of choices[0]"
    try:
        choice = value["choices"][0]
        message = choice.get("delta" if is_event else "message")
        if message is None:  # a completion of token ids
            message = {"content": choice.get("text", None if is_event else False)}
        read = _read_content(message.get("content"))
        names = ("reasoning_content", "reasoning", "thinking")  # some servers send the same text under two of them
        texts = (_read_reasoning(message.get(name)) for name in names)
        read.reasoning = next(filter(None, texts), read.reasoning)
        refusal = message.get("refusal")
        read.refusal = refusal if isinstance(refusal, str) else read.refusal
        read.has_tool_calls = bool(message.get("tool_calls") or message.get("function_call"))
        read.finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed(MALFORMED, f"expected {what} in the server's answer, got something else") from None
    return read


def _read_content(content: Any) -> _Choice:
    """Read text, or a list of parts with text, reasoning or refusals; raise `TypeError` for anything else."""
    read = _Choice()
    if content is None:
        return read
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            read.text = (read.text or "") + part
        elif part.get("type", "text") in ("text", "output_text"):
            read.text = (read.text or "") + part["text"]
        elif part["type"] in _REASONING_PARTS:
            texts = (_read_reasoning(part.get(name)) for name in ("thinking", "reasoning", "text", "summary"))
            read.reasoning = (read.reasoning or "") + next(filter(None, texts), "")
        elif part["type"] == "refusal":
            read.refusal = (read.refusal or "") + part["refusal"]
        else:
            raise TypeError
    return read


def _read_reasoning(value: Any) -> str | None:
    """Read reasoning: text, or a list of parts with text. Other forms are ignored."""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return "".join(text for text in texts if isinstance(text, str)) or None
    return value if isinstance(value, str) else None


def _join(first: str | None, second: str | None) -> str | None:
    return first if second is None else (first or "") + second


def _redact(text: str, key: str | None, *, is_content: bool = False) -> str:
    """Remove the key; from the content of an answer only if it is too long to be a word of it."""
    if not key or (is_content and len(key) < _MIN_SECRET_LENGTH):
        return text
    return text.replace(key, "[key]")


def _shorten(text: str, key: str | None) -> str:
    """A server's error message as one short line of printable characters, without the key."""
    try:
        value = _unwrap_error(json.loads(text))
        for name in ("message", "detail"):
            value = value.get(name, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        pass
    line = " ".join(_redact(text, key).split())[:200].rstrip(".")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
