"""JSON to a server and back, asked again where it failed for a reason that may pass.

Too many requests, a server's own errors, timeouts, cut connections and half an answer may pass; a refusal does not.
What the answers mean is left to the caller. The standard library alone: which client comes with others changes.
Addresses, the key, waits, how much of an answer is waited for and what servers say of errors are settled here for those
who ask by another client, too.
"""

import email.utils
import http.client
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from cutlm.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
LONGEST_ASKED_WAIT = 600.0
LARGEST_ANSWER = 16 * 2**20
# How many times the seconds without a byte an answer may take from its first byte to its last.
_LONGEST_ANSWER = 10
# Shorter keys are words that a server without keys is given, such as EMPTY.
_SHORTEST_SECRET = 16
_LONGEST_MESSAGE = 20_000
# Beside the server's own errors: timeout, too early, too many requests.
_PASSING = (408, 425, 429)


def describe_bad_address(url: str, option: str) -> str | None:
    """Says what is wrong with the address of a server; None where nothing is.

    Args:
        url: Such as http://localhost:8000, with or without /v1.
        option: By which it was given, for the sentence.
    """
    if "@" in url:  # and it is not shown either
        return f"{option}: expected no name or password in the address; give a key by {KEY_VARIABLE}"
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:
        is_address = False
    if not re.fullmatch(r"https?://[!-~]+", url) or not is_address:
        return f"{option}: expected an address such as http://localhost:8000, got {url!r}"
    return None


def read_key() -> str | None:
    """The key to the server, if there is one.

    Raises:
        UserError: It holds characters that no request can carry.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        # Said here: an error of the HTTP client's would quote it.
        raise UserError(f"{KEY_VARIABLE}: expected letters, digits and signs alone; set it again")
    return key or None


def is_passing(status: int) -> bool:
    """Whether another attempt may change what a server answered with this status of HTTP."""
    return status in _PASSING or status >= 500


def choose_wait(attempt: int, retry_after: str | None = None) -> float:
    """Seconds to wait after an attempt, the first being 0: doubled each time, at random, no less than was asked for."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
    return max(wait, min(LONGEST_ASKED_WAIT, _read_retry_after(retry_after)))


def hide_key(text: str, key: str | None, *, is_content: bool = False) -> str:
    """A text in which the key is not to be seen.

    Args:
        text: What a server says.
        key: Which may be in it.
        is_content: Whether a model says it: then only a key that is a secret by its length is hidden, as a short one
            may be a word of the answer.
    """
    if not key or (is_content and len(key) < _SHORTEST_SECRET):
        return text
    return text.replace(key, "[key]")


class Refused(Exception):
    """The server refuses the request, and would again.

    Attributes:
        status: Of HTTP; 0 where the connection itself is refused on our side.
        said: What the server says of it, one line, without the key.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}" if said else f"{status}")
        self.status, self.said = status, said


class Unreachable(Exception):
    """No answer after all attempts; says why the last one failed."""


class Stopped(Exception):
    """Whoever asked does not wait for the answer any more."""


class Endless(Exception):
    """An answer that is too large, or takes too long although it goes on; says which."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and the key would go to an address that nobody named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def post_json(
    url: str,
    request: Any,
    *,
    key: str | None,
    timeout: float,
    max_retries: int,
    stop: threading.Event,
    num_bytes: int = LARGEST_ANSWER,
) -> Any:
    """Posts JSON and returns the JSON of the answer.

    Args:
        url: Where to.
        request: What to send.
        key: Sent as a bearer token.
        timeout: Seconds without a byte after which an attempt is given up.
        max_retries: Attempts after the first.
        stop: Ends the waiting between attempts.
        num_bytes: The largest answer.

    Raises:
        Refused: The server answered with a status that another attempt would not change.
        Unreachable: All attempts failed.
        Stopped: `stop` was set.
    """
    reason: str | None = None
    for attempt in range(max_retries + 1):
        wait = choose_wait(attempt)
        try:
            with _open(url, request, key, timeout) as answer:
                value = json.loads(b"".join(read_bounded(_read_pieces(answer), timeout, num_bytes)))
            reason = find_error(value, key)
            if reason is None:
                return value
        except Endless as error:
            reason = str(error)
        except (OSError, http.client.HTTPException) as error:
            reason = _explain(error, key, timeout)
            if isinstance(error, urllib.error.HTTPError):
                wait = choose_wait(attempt, error.headers.get("Retry-After"))
        except (ValueError, RecursionError):
            reason = "the server's answer is not JSON"
        if stop.is_set() or (attempt < max_retries and stop.wait(wait)):
            raise Stopped
    raise Unreachable(f"{reason}, after {max_retries + 1} attempts")


def read_bounded(pieces: Iterable[bytes], timeout: float, num_bytes: int = LARGEST_ANSWER) -> Iterator[bytes]:
    """Passes the pieces of an answer on as long as it is of reasonable length.

    Args:
        pieces: As they come.
        timeout: Seconds without a byte; in all it may take ten times as long.
        num_bytes: The most in all.

    Raises:
        Endless: There are more, or they take longer.
    """
    longest, left = _LONGEST_ANSWER * timeout, num_bytes
    deadline = time.monotonic() + longest
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise Endless(f"the server's answer is larger than {num_bytes / 2**20:g} MiB")
        if time.monotonic() > deadline:
            raise Endless(f"the server's answer was not whole after {longest:g} seconds")
        yield piece


def _read_pieces(answer: Any) -> Iterator[bytes]:
    """What has come by now, again and again, up to the end."""
    return iter(lambda: answer.read1(2**16), b"")


def find_error(value: Any, key: str | None) -> str | None:
    """Says what is wrong by a server that gives an error the status of success; None where it gives none."""
    if not isinstance(value, dict) or value.get("choices"):
        return None
    if not value.get("error") and value.get("object") != "error":
        return None
    return f"the server answered an error ({shorten_message(json.dumps(value), key)})"


def post_for_events(url: str, request: Any, *, key: str | None, timeout: float) -> Generator[str, None, None]:
    """Posts JSON once, and yields the data of each server-sent event of the answer as it comes.

    Args:
        url: Where to.
        request: What to send.
        key: Sent as a bearer token.
        timeout: Seconds without a byte after which the answer is given up.

    Raises:
        Refused: The server answered with a status that another attempt would not change.
        Unreachable: No answer, or no more of it.
    """
    try:
        with _open(url, request, key, timeout) as answer:
            for line in answer:
                name, _, data = line.partition(b":")
                if name == b"data":
                    yield data.decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(_explain(error, key, timeout)) from None


def _open(url: str, request: Any, key: str | None, timeout: float) -> Any:
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(NoRedirect)
    return opener.open(
        urllib.request.Request(url, json.dumps(request).encode(), headers, method="POST"), timeout=timeout
    )


def _explain(error: OSError | http.client.HTTPException, key: str | None, timeout: float) -> str:
    """Why there was no answer, where another attempt may have one.

    Raises:
        Refused: It will not.
    """
    if isinstance(error, urllib.error.HTTPError):
        said = _read_message(error, key, timeout)
        if not is_passing(error.code):
            raise Refused(error.code, said) from None
        return f"the server answered {error.code}{f' ({said})' if said else ''}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise Refused(0, "its certificate cannot be verified") from None
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} seconds"
    return f"no answer ({_describe(cause)})"


def _describe(cause: Any) -> str:
    return getattr(cause, "strerror", None) or type(cause).__name__


def _read_message(error: urllib.error.HTTPError, key: str | None, timeout: float) -> str:
    text = b""
    try:
        for piece in read_bounded(_read_pieces(error.fp), timeout):
            text += piece
            if len(text) >= _LONGEST_MESSAGE:
                break
    except (OSError, http.client.HTTPException, Endless):
        return ""
    return shorten_message(text[:_LONGEST_MESSAGE].decode("utf-8", "replace"), key)


def shorten_message(text: str, key: str | None) -> str:
    """What a server says of an error: one short line, in which the key is not to be seen."""
    try:
        value = json.loads(text)
        for name in ("error", "message", "detail"):
            value = value.get(name, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        pass
    text = hide_key(text, key)
    # Nothing of it may steer the terminal on which it is shown.
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return line[:200].rstrip(".")


def _read_retry_after(value: str | None) -> float:
    """Seconds to wait, of a header that gives these or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
