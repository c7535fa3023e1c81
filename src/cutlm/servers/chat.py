"""One question to an OpenAI-compatible chat endpoint, by the `openai` package, asked again where that may help.

What may pass is asked again as in `cutlm.servers.http`; a refusal is not. Every attempt is counted, and none is made
beyond what may be spent. The key is read from the environment variable OPENAI_API_KEY alone and is shown nowhere. What
an answer means is left to `cutlm.judges.prompt`.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from cutlm.errors import ConfigError, UserError
from cutlm.servers.budget import Spending
from cutlm.servers.http import (
    KEY_VARIABLE,
    Endless,
    Refused,
    Stopped,
    Unreachable,
    choose_wait,
    describe_bad_address,
    find_error,
    hide_key,
    is_passing,
    read_bounded,
    shorten_message,
)

if TYPE_CHECKING:
    from openai import OpenAI

# Of a question and its answer; what is more is no count of them.
_MOST_TOKENS = 10**9
# The user's message, or messages with roles.
Prompt = str | Sequence[Mapping[str, str]]
# Answers are read whole, one to a question.
_FIXED_FIELDS = ("model", "messages", "stream", "n")


@dataclass(frozen=True)
class ChatServer:
    """Whom to ask, and how.

    Attributes:
        base_url: Such as http://localhost:8000/v1; without any path, /v1 is meant.
        model: The model's name on the server.
        temperature: 0 takes the likeliest answer.
        max_tokens: Of an answer.
        fields: Further fields of every request; None takes one of ours away.
        concurrency: Requests at a time.
        timeout: Seconds without a byte after which a request is given up and made again; an answer may take
            ten times as long in all.
        max_retries: Further attempts after one that failed for a reason that may pass.
        max_requests: Attempts in all, of all runs that share a cache.
        max_tokens_total: Tokens of questions and answers, of all such runs, after which nothing more is asked.
    """

    base_url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    fields: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5
    max_requests: int | None = None
    max_tokens_total: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if (problem := describe_bad_address(self.base_url, "base_url")) is not None:
            problems.append(problem)
        for name, least in (
            ("max_tokens", 1),
            ("concurrency", 1),
            ("max_retries", 0),
            ("max_requests", 1),
            ("max_tokens_total", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}: expected a whole number of at least {least}, got {value}")
        if not self.timeout > 0:
            problems.append(f"timeout: expected a number of seconds above 0, got {self.timeout}")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: expected a number of at least 0, got {self.temperature}")
        fixed = [name for name in _FIXED_FIELDS if name in self.fields]
        if fixed:
            problems.append(
                f"extra_body: expected other fields than {', '.join(fixed)}, which are set here; leave these out"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def url(self) -> str:
        """The address that requests go below."""
        url = self.base_url.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1"

    def make_request(self, prompt: Prompt) -> dict[str, Any]:
        """All that is sent for a prompt, and so all that an answer depends on beside the server."""
        own: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in (own | dict(self.fields)).items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """What the server said.

    Attributes:
        text: None where there is none.
        finish_reason: Why it ended; None where that cannot be read.
        is_redacted: Whether the key stood in it.
    """

    text: str | None
    finish_reason: str | None
    is_redacted: bool = False


class Malformed(Exception):
    """JSON that is no chat completion."""


def check_package() -> None:
    """Raises:
    UserError: The package openai is missing.
    """
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError("the package openai is missing; install it by: pip install 'cutlm[serve]'") from None


def make_client(server: ChatServer, key: str | None) -> "OpenAI":
    """A client that asks once, follows nobody to another address, and takes no answer without an end.

    Raises:
        UserError: A package is missing, or the proxy that is set cannot be used.
    """
    check_package()
    import openai

    def bound(response: Any) -> None:
        pieces = response.iter_bytes  # by which the client reads an answer whole
        response.iter_bytes = lambda: read_bounded(pieces(), server.timeout)

    try:
        client = openai.DefaultHttpxClient(
            follow_redirects=False, timeout=server.timeout, event_hooks={"response": [bound]}
        )
    except (ImportError, ValueError):  # their words may quote a password
        raise UserError(
            "ALL_PROXY, HTTPS_PROXY or HTTP_PROXY: expected an address such as http://localhost:3128, got another kind;"
            " unset it, or, for a SOCKS proxy, install: pip install socksio"
        ) from None
    return openai.OpenAI(
        base_url=server.url, api_key=key or "none", max_retries=0, timeout=server.timeout, http_client=client
    )


def ask(
    client: "OpenAI",
    server: ChatServer,
    prompt: Prompt,
    *,
    key: str | None,
    spending: Spending,
    stop: threading.Event,
) -> Answer:
    """Asks one question.

    Args:
        client: From `make_client`.
        server: How to ask.
        prompt: The question.
        key: To be taken out of whatever the server says.
        spending: What may be spent.
        stop: Ends the waiting between attempts.

    Raises:
        Refused: The server answered with a status that another attempt would not change.
        Unreachable: All attempts failed.
        Malformed: The answer is no chat completion.
        CapReached: Nothing more may be spent (`cutlm.servers.budget`).
        Stopped: `stop` was set.
    """
    import openai

    request = server.make_request(prompt)
    fixed = {name: request.pop(name) for name in ("model", "messages")}
    # Whoever has set no key sends none.
    headers: Any = {} if key else {"Authorization": openai.Omit()}
    reason: str | None = None
    for attempt in range(server.max_retries + 1):
        if stop.is_set():
            raise Stopped
        spending.take_request()
        wait = choose_wait(attempt)
        try:
            raw = client.chat.completions.with_raw_response.create(**fixed, extra_body=request, extra_headers=headers)
            value = json.loads(raw.text)
            reason = find_error(value, key)
            if reason is None:
                return _read_completion(value, prompt, key, spending)
        except openai.APIStatusError as error:
            said = shorten_message(error.response.text, key)
            if not is_passing(error.status_code):
                raise Refused(error.status_code, said) from None
            reason = f"the server answered {error.status_code}{f' ({said})' if said else ''}"
            wait = choose_wait(attempt, error.response.headers.get("Retry-After"))
        except openai.APITimeoutError:
            reason = f"no answer within {server.timeout:g} seconds"
        except (Endless, openai.APIConnectionError) as error:
            cause = error.__cause__ or error
            if "CERTIFICATE_VERIFY_FAILED" in str(cause):
                raise Refused(0, "its certificate cannot be verified") from None
            reason = str(cause) if isinstance(cause, Endless) else f"no answer ({type(cause).__name__})"
        except (ValueError, RecursionError):
            reason = "the server's answer is not JSON"
        if attempt < server.max_retries and stop.wait(wait):
            raise Stopped
    raise Unreachable(f"{reason}, after {server.max_retries + 1} attempts")


def _read_completion(value: Any, prompt: Prompt, key: str | None, spending: Spending) -> Answer:
    """Reads what is needed of a completion: no server keeps to all of its shape."""
    try:
        choice = value["choices"][0]
        text, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        text, finish_reason = False, None
    usage = value.get("usage") if isinstance(value, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    is_number = isinstance(total, int) and not isinstance(total, bool) and 0 <= total <= _MOST_TOKENS
    asked = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    num_bytes = len(asked.encode()) + (len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0)
    spending.add_tokens(total if is_number else None, num_bytes)
    if not isinstance(text, str | None):
        raise Malformed("expected choices[0].message.content in the server's answer, got none")
    shown = hide_key(text, key, is_content=True) if text else text
    return Answer(shown, finish_reason if isinstance(finish_reason, str) else None, is_redacted=shown != text)


class OptionNames(NamedTuple):
    """By which options of the command line a server was named, and what to do about a question that is too long."""

    url: str
    model: str
    fields: str
    too_long: str


JUDGE_OPTIONS = OptionNames(
    "--base_url", "--judge_model", "--extra_body", "give a smaller --max_tokens or leave this response out"
)


def explain_refusal(server: ChatServer, error: Refused, location: str, options: OptionNames = JUDGE_OPTIONS) -> str:
    """One sentence for the user, with what to do."""
    if not error.status:
        return f"{server.url}: {error.said}; give another address by {options.url}"
    if error.status in (401, 403):
        return f"{server.url}: the server wants another key ({error}); set {KEY_VARIABLE} to one that it takes"
    if error.status == 404:
        return (
            f"{server.url}: no chat endpoint there, or no model {server.model!r} ({error}); give the server's address"
            f" by {options.url}, with its /v1, and its name of the model by {options.model}"
        )
    if 300 <= error.status < 400:
        return f"{server.url}: the server names another address ({error}); give that one by {options.url}"
    return (
        f"{location}: {server.url} refuses the request ({error}); if it is too long for the model,"
        f" {options.too_long}, and if it is about a field, change that one by {options.fields}"
    )
