"""The client: retries, refusals, limits, the key, and many requests at a time."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    CANARY,
    ChatServer,
    Fault,
    Handler,
    answer_half,
    drip,
    fail_first,
    hang,
    hang_up,
    make_completion,
    pour,
    stall,
    stream_events,
)

from cutlm import __version__
from cutlm.errors import ConfigError, UserError
from cutlm.servers.cache import Budget, Cache
from cutlm.servers.client import (
    MALFORMED,
    NO_ANSWER,
    NOT_SENT,
    REFUSED,
    Client,
    Refused,
    RequestFailed,
    Server,
    find_proxy,
)
from cutlm.servers.limiter import RateLimiter, Started


@pytest.fixture
def server(server: ChatServer) -> ChatServer:
    server.reply = lambda prompt: f"You said {prompt}."
    return server


def make_client(server: ChatServer, **settings: Any) -> Client:
    return Client(Server(server.url, "the-model", **{"timeout": 5.0, "max_retries": 1} | settings))


def complete(client: Client, text: str = "hi") -> str | None:
    return client.complete(client.server.make_body(text)).text


def request_many(client: Client, num: int, **options: Any) -> dict[int, Any]:
    """Returns the text or the failure of each of a number of requests, in order of their arrival."""
    locations = [f"row {number}" for number in range(num)]

    def ask(number: int) -> str | None:
        return complete(client, f"{number}")

    return dict(client.request_many(ask, locations, **{"advice": "shorten it"} | options))


TRANSIENT: dict[str, Fault] = {
    **{f"status {status}": fail_first(status, b"oops") for status in (408, 409, 425, 429, 500, 503)},
    "an error under status 200": fail_first(200, {"error": {"message": "Rate limit exceeded", "code": 429}}),
    "not JSON": fail_first(200, b'{"choices": [{"mess'),
    "nested too deeply": fail_first(200, b"[" * 200_000),
    "a cut connection": hang_up,
    "half an answer": answer_half,
    "a timeout": hang,
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_errors_are_retried_and_every_attempt_counts(server: ChatServer, tmp_path: Path, name: str) -> None:
    server.fault = TRANSIENT[name]
    with Cache(tmp_path / "cache.sqlite") as cache:
        client = Client(Server(server.url, "m", timeout=0.3, max_retries=2), Budget(cache))
        assert complete(client) == "You said hi."
        assert len(server.requests) == 2
        assert cache.read_usage() == (2, 100)


def test_a_retry_waits_as_long_as_the_server_asks(server: ChatServer) -> None:
    times: list[float] = []

    def fault(handler: Handler, number: int) -> bool:
        times.append(time.monotonic())
        return number == 0 and handler.answer(429, {}, Retry_After="0.8") is None

    server.fault = fault
    assert complete(make_client(server)) == "You said hi."
    assert times[1] - times[0] >= 0.8, "longer than the backoff of a first retry"


def always(status: int, value: Any) -> Fault:
    return lambda handler, number: handler.answer(status, value) is None


FAILURES: dict[str, tuple[Fault, str]] = {
    "a status": (always(500, {"error": {"message": f"boom {CANARY}"}}), "500 (boom [key]), after 1 attempt"),
    "an error under status 200": (always(200, {"error": f"no more for {CANARY}"}), "an error (no more for [key])"),
    "a timeout": (hang, "no answer within 0.1 seconds"),
    "a cut connection": (hang_up, "no answer (RemoteProtocolError)"),
    "a byte at a time": (drip, "not complete after 1 seconds"),
    "too much": (pour, "larger than 16 MiB"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_exhausted_retries_are_a_failure_with_a_reason(server: ChatServer, name: str) -> None:
    server.fault, reason = FAILURES[name]
    with pytest.raises(RequestFailed) as failure:
        complete(make_client(server, timeout=0.1, max_retries=0))
    assert failure.value.kind == NO_ANSWER
    assert reason in str(failure.value)
    assert len(server.requests) == 1


def test_the_number_of_attempts_is_in_the_reason(server: ChatServer) -> None:
    server.fault = always(503, b"")
    with pytest.raises(RequestFailed, match=r"503, after 3 attempts$"):
        complete(make_client(server, max_retries=2))


def test_a_server_that_is_not_there_has_no_answer(server: ChatServer) -> None:
    client = Client(Server("http://127.0.0.1:1", "m", max_retries=0))
    with pytest.raises(RequestFailed, match=r"no answer \(ConnectError\)"):
        complete(client)


@pytest.mark.parametrize(
    "value", [{"choices": []}, ["no completion"], {}, {"choices": [{"message": {"content": 7}}]}, {"choices": 3}]
)
def test_an_answer_of_another_form_is_malformed_and_not_retried(server: ChatServer, value: Any) -> None:
    server.fault = always(200, value)
    with pytest.raises(RequestFailed) as failure:
        complete(make_client(server))
    assert failure.value.kind == MALFORMED
    assert len(server.requests) == 1


REFUSALS: dict[str, tuple[int, Any, str]] = {
    "no key": (401, {"error": {"message": f"Invalid key {CANARY}."}}, "rejects the key (401: Invalid key [key]); set"),
    "forbidden": (403, b"no", "rejects the key (403: no)"),
    "no model": (404, {"message": "none"}, "no model 'the-model' (404: none); fix --base_url"),
    "too long": (
        400,
        {"error": {"message": "too long"}},
        "row 0: {url} refuses the request (400: too long); shorten it",
    ),
    "control characters": (400, {"error": "bad\x1b[2J\x07 \u202enews"}, "(400: bad\ufffd[2J\ufffd \ufffdnews)"),
    "nested too deeply": (400, b"[" * 19_000, "(400: [[["),
    "a redirect": (302, b"", "redirects to another address (302); pass that one by --base_url"),
    "a redirect of a POST": (307, b"", "redirects to another address (307)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_of_everything_ends_the_run_with_one_sentence(server: ChatServer, name: str) -> None:
    status, value, expected = REFUSALS[name]
    server.fault = lambda handler, number: handler.answer(status, value, Location=f"{server.url}/elsewhere") is None
    with pytest.raises(UserError) as error:
        request_many(make_client(server, concurrency=1), 20)
    assert expected.format(url=server.url) in str(error.value)
    assert CANARY not in str(error.value)
    # Statuses that may concern one request are tried with a few more.
    assert 8 <= len(server.requests) < 12 if status == 400 else len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_of_one_request_is_a_failure_of_that_request(server: ChatServer, status: int) -> None:
    refused = {0, 1, 2, 17, 39}
    server.fault = lambda handler, number: (
        int(server.prompts[number]) in refused and handler.answer(status, {"error": "too long"}) is None
    )
    results = request_many(make_client(server), 40)
    assert len(server.requests) == len(results) == 40
    failed = {index: result for index, result in results.items() if isinstance(result, RequestFailed)}
    assert set(failed) == refused
    assert {failure.kind for failure in failed.values()} == {REFUSED}
    assert {str(failure) for failure in failed.values()} == {f"the server refuses it ({status}: too long); shorten it"}
    # A server that has answered before may refuse all that is left.
    server.fault = always(status, b"")
    results = request_many(make_client(server), 12, is_answering=True)
    assert {result.kind for result in results.values()} == {REFUSED}
    assert len(results) == 12


def test_a_server_that_is_gone_is_not_tried_with_every_request(server: ChatServer) -> None:
    server.fault = always(503, b"")
    results = request_many(make_client(server, concurrency=2, max_retries=0), 40)
    assert len(server.requests) < 15
    kinds = [result.kind for result in results.values()]
    assert (kinds.count(NO_ANSWER), kinds.count(NOT_SENT)) == (8, 32)


@pytest.mark.parametrize("status", [401, 503])
def test_requests_under_way_when_the_run_ends_are_awaited(server: ChatServer, status: int) -> None:
    ended = threading.Event()
    under_way = threading.Barrier(4, timeout=10)

    def fault(handler: Handler, number: int) -> bool:
        if number < 4:
            under_way.wait()
        if number in (0, 1, 2):
            ended.wait(10)
            time.sleep(0.1)
            return False
        handler.answer(status, b"")
        if number == (3 if status == 401 else 10):
            ended.set()
        return True

    server.fault = fault
    client, texts = make_client(server, concurrency=4, max_retries=0), []
    run = client.request_many(lambda number: complete(client, f"{number}"), [""] * 40, advice="")
    try:
        texts += [result for _, result in run if isinstance(result, str)]
    except UserError:
        assert status == 401
    assert len(texts) == 3 if status == 503 else len(server.requests) == 4


def test_an_error_in_ask_ends_the_run_and_is_raised(server: ChatServer) -> None:
    def ask(number: int) -> None:
        raise UserError("no log-probs") if number == 3 else RequestFailed(MALFORMED, "")

    with pytest.raises(UserError, match="no log-probs"):
        list(make_client(server, concurrency=1).request_many(ask, [""] * 9, advice=""))


def test_requests_run_at_the_same_time(server: ChatServer) -> None:
    together = threading.Barrier(6, timeout=10)

    def fault(handler: Handler, number: int) -> bool:
        together.wait()  # broken unless six requests arrive together
        return False

    server.fault = fault
    results = request_many(make_client(server, concurrency=6), 18)
    assert {index: f"You said {index}." for index in range(18)} == results


def test_ctrl_c_does_not_wait_for_requests(server: ChatServer) -> None:
    reached = threading.Event()
    server.fault = stall(reached, 3)
    code = (
        "from cutlm.servers.client import Client, Server\n"
        f"client = Client(Server({server.url!r}, 'm', concurrency=2))\n"
        "ask = lambda number: client.complete(client.server.make_body(f'{number}'))\n"
        "for _ in client.request_many(ask, [''] * 9, advice=''): pass"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert reached.wait(60)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)  # the server stalls for 60 seconds
    assert process.returncode in (-signal.SIGINT, 130, 1)
    assert "KeyboardInterrupt" in printed


@pytest.mark.parametrize(("key", "is_hidden"), [("EMPTY", False), (CANARY, True)])
def test_the_key_is_sent_and_removed_from_answers_unless_it_is_a_word(
    server: ChatServer, key: str, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {key}\n")  # as read from a file
    server.reply = lambda prompt: f"The glass is {key}."
    client = make_client(server)
    answer = client.complete(client.server.make_body("hi"))
    assert (answer.text, answer.is_redacted) == (f"The glass is {'[key]' if is_hidden else key}.", is_hidden)
    assert server.keys == [f"Bearer {key}"]


def test_no_key_is_sent_if_there_is_none(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert complete(make_client(server)) == "You said hi."
    assert server.keys == [None]


def test_a_key_that_no_header_can_hold_is_not_quoted(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\nX-Evil: 1")
    with pytest.raises(UserError, match="OPENAI_API_KEY: expected only letters") as error:
        make_client(server)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("address", ["socks5://me:hush@localhost:1", "foo://me:hush@localhost:1"])
def test_a_proxy_that_cannot_be_used_is_not_quoted(
    server: ChatServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(UserError, match="ALL_PROXY, HTTPS_PROXY or HTTP_PROXY") as error:
        make_client(server)
    assert "hush" not in str(error.value)


def test_a_completion_of_token_ids_goes_to_its_own_path(server: ChatServer) -> None:
    server.fault = always(200, {"choices": [{"text": "So.", "finish_reason": "length"}]})
    client = make_client(server)
    answer = client.complete(client.server.make_body([1, 2], temperature=0))
    assert (answer.text, answer.finish_reason) == ("So.", "length")
    assert server.paths == ["/v1/completions"]
    assert server.requests == [{"model": "the-model", "prompt": [1, 2], "temperature": 0}]


def test_extra_fields_are_added_and_removed() -> None:
    server = Server("http://a", "m", extra_body={"max_tokens": None, "max_completion_tokens": 50, "seed": 3})
    assert server.make_body("Hi.", max_tokens=9, temperature=0.0) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi."}],
        "temperature": 0.0,
        "max_completion_tokens": 50,
        "seed": 3,
    }


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1beta/openai", "/api/paas/v4/", "/openai/v1"])
def test_paths_are_appended_to_the_address_as_it_is_given(server: ChatServer, path: str) -> None:
    server.fault = always(200, {"choices": [{"message": {"content": "Hi."}, "finish_reason": "stop"}]})
    client = Client(Server(server.url.removesuffix("/v1") + path, "m"))
    assert complete(client) == "Hi."
    client.request("/completions", client.server.make_body([1, 2]))
    client.request("/chat/completions", client.server.make_body("hi"))
    start = path.rstrip("/")
    assert server.paths == [f"{start}/chat/completions", f"{start}/completions", f"{start}/chat/completions"]


@pytest.mark.parametrize(("path", "is_advised"), [("", True), ("/", True), ("/v1", False)])
def test_without_a_path_a_404_advises_adding_v1(server: ChatServer, path: str, is_advised: bool) -> None:
    server.fault = always(404, {"detail": "Not Found"})
    address = server.url.removesuffix("/v1")
    client = Client(Server(address + path, "m"))
    with pytest.raises(UserError) as error:
        request_many(client, 1)
    assert (f"--base_url {address}/v1" in str(error.value)) is is_advised


def test_requests_name_cutlm_as_their_agent(server: ChatServer) -> None:
    agents = []

    def fault(handler: Handler, number: int) -> bool:
        agents.append(handler.headers.get_all("User-Agent"))
        return number > 0 and stream_events(handler, [make_event("Hi.", "stop")])

    server.fault = fault
    client = make_client(server)
    complete(client)
    read_stream(client)
    assert agents == [[f"cutlm/{__version__}"]] * 2


NO_CREDIT: dict[str, tuple[int, Any]] = {
    "OpenAI": (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
    "only the type": (429, {"error": {"message": "no", "type": "insufficient_quota", "code": None}}),
    "a limit": (429, {"error": {"message": "Billing hard limit", "code": "billing_hard_limit_reached"}}),
    "a limit, 400": (400, {"error": {"message": "Billing hard limit", "code": "billing_hard_limit_reached"}}),
    "z.ai": (429, {"error": {"message": "Insufficient balance", "code": "1113"}}),
    "status 402": (402, {"error": {"message": "Insufficient Balance"}}),
    "under status 200": (200, {"error": {"message": "no", "code": "insufficient_quota"}}),
    "status 402 under status 200": (200, {"error": {"message": "Insufficient credits", "code": 402}}),
}


@pytest.mark.parametrize("name", NO_CREDIT)
def test_an_account_without_credit_ends_the_run_at_once(server: ChatServer, name: str) -> None:
    status, value = NO_CREDIT[name]
    server.fault = lambda handler, number: number >= 2 and handler.answer(status, value) is None
    with pytest.raises(UserError, match="no credit"):
        request_many(make_client(server, concurrency=1, max_retries=5), 20)
    assert len(server.requests) == 3


def test_a_rate_limit_is_no_lack_of_credit(server: ChatServer) -> None:
    server.fault = fail_first(429, {"error": {"message": "Slow down", "code": "rate_limit_exceeded"}})
    assert complete(make_client(server)) == "You said hi."


def test_an_unsupported_field_is_named_with_the_way_out(server: ChatServer) -> None:
    error = {"code": "unsupported_parameter", "param": "max_tokens", "message": "Unsupported parameter: 'max_tokens'"}
    server.fault = lambda handler, number: (
        "max_tokens" in server.requests[number] and handler.answer(400, {"error": error}) is None
    )
    client = make_client(server)
    body = client.server.make_body("hi", max_tokens=50, temperature=0.0)
    with pytest.raises(UserError) as refusal:
        list(client.request_many(lambda number: client.complete(body), ["row 1"], advice="shorten it"))
    advised = re.findall(r"--extra_body: '(\{.*\})'", str(refusal.value))
    assert json.loads(advised[0]) == {"max_tokens": None, "max_completion_tokens": 50, "temperature": None}
    server.requests.clear()
    client = make_client(server, extra_body=json.loads(advised[0]))
    client.complete(client.server.make_body("hi", max_tokens=50, temperature=0.0))
    assert set(server.requests[0]) == {"model", "messages", "max_completion_tokens"}


def test_errors_in_a_list_are_read(server: ChatServer) -> None:
    server.fault = always(400, [{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}])
    with pytest.raises(Refused, match=r"^400: API key not valid$"):
        complete(make_client(server))


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({"HTTP_PROXY": "http://me:hu@sh@proxy:3128"}, "http://api.example/v1", "http://proxy:3128"),
        ({"https_proxy": "proxy:3128"}, "https://api.example/v1", "proxy:3128"),
        ({"ALL_PROXY": "socks5://me:hush@proxy"}, "https://api.example/v1", "socks5://proxy"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://api.example/v1", None),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "api.example"}, "http://api.example:8000/v1", None),
        ({}, "http://api.example/v1", None),
    ],
)
def test_the_proxy_of_the_environment_is_found_without_its_password(
    variables: dict[str, str], url: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_proxy(url) == expected


def test_a_proxy_that_does_not_answer_is_named(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hush@127.0.0.1:1")
    with pytest.raises(RequestFailed, match=r"through the proxy http://127\.0\.0\.1:1 ") as failure:
        complete(Client(Server("http://api.example/v1", "m", max_retries=0)))
    assert "hush" not in str(failure.value)


def test_a_limit_of_tokens_per_minute_counts_what_the_server_reports(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reported = [], []

    class Limiter(RateLimiter):
        def start(self, num_tokens: int, sleep: Callable[[float], object]) -> Started:
            expected.append(num_tokens)
            return super().start(num_tokens, sleep)

        def correct(self, started: Started, num_tokens: int) -> None:
            reported.append((started.num_tokens, num_tokens))

    monkeypatch.setattr("cutlm.servers.client.RateLimiter", Limiter)
    server.fault = lambda handler, number: number == 0 and handler.answer(503, b"") is None
    client = make_client(server)
    client.complete(client.server.make_body("hi", max_tokens=500))
    assert len(expected) == 2, "a retry counts as well"
    assert 500 < expected[1] < 540
    assert reported == [(expected[1], 100)]
    server.fault = always(200, {"choices": []})
    client.request("/completions", client.server.make_body([5] * 40, max_tokens=1))
    assert expected[2] == 41


def test_a_request_that_waits_for_the_limit_is_not_sent_once_the_run_ends(server: ChatServer) -> None:
    server.fault = always(401, b"")
    with pytest.raises(UserError, match="rejects the key"):
        request_many(make_client(server, concurrency=4, requests_per_minute=1), 20)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?x=1", "http://a b", "http://ü.de"),
        f"http://me:{CANARY}@host",
    ],
)
def test_a_bad_address_is_refused_and_no_password_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^base_url: expected an address") as error:
        Server(url, "m")
    assert CANARY not in str(error.value)


def test_all_settings_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError) as error:
        Server("a", "m", {"stream": True}, 0, 0, -1, 0, 0, 0, 0)
    names = [problem.partition(":")[0] for problem in error.value.problems]
    settings = ["concurrency", "max_retries", "max_requests", "max_tokens_total"]
    settings += ["requests_per_minute", "tokens_per_minute", "timeout", "extra_body"]
    assert names == ["base_url", *settings]


def make_event(text: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def read_stream(client: Client) -> list[str]:
    return [piece.text for piece in client.stream(client.server.make_body("hi")) if piece.text]


def test_pieces_of_a_stream_arrive_before_it_ends(server: ChatServer) -> None:
    is_read = threading.Event()

    def fault(handler: Handler, number: int) -> bool:
        stream_events(handler, [make_event(None), make_event("It "), {"choices": [], "usage": {"total_tokens": 9}}])
        is_read.wait(10)
        end = f"data: {json.dumps(make_event('is.', 'stop'))}\n\ndata: [DONE]\n\n"
        handler.wfile.write(end.encode())
        return True

    server.fault = fault
    client = make_client(server)
    pieces = []
    for piece in client.stream(client.server.make_body("hi")):
        pieces.append(piece)
        if piece.text:
            is_read.set()
    assert "".join(piece.text for piece in pieces) == "It is."
    assert not pieces[-1].is_truncated
    assert server.requests[0]["stream"] is True


BAD_STREAMS: dict[str, tuple[Callable[[Handler, int], bool], str]] = {
    "breaks off": (lambda handler, _: stream_events(handler, [make_event("It")]), "breaks off"),
    "empty": (lambda handler, _: stream_events(handler, []), "breaks off"),
    "not a stream": (always(200, make_completion("Hi!")), "breaks off"),
    "an error": (
        lambda handler, _: stream_events(handler, [{"error": {"message": f"no memory {CANARY}\x1b[2J"}}]),
        "an error (no memory [key]\ufffd[2J)",
    ),
    "not JSON": (lambda handler, _: stream_events(handler, ["no JSON"]), "not JSON"),
    "no choices": (lambda handler, _: stream_events(handler, [{"choices": 3}]), "expected pieces of a completion"),
    "no text": (lambda handler, _: stream_events(handler, [make_event(3)]), "expected pieces of a completion"),
    "a status": (always(500, b"oops"), "the server answered 500 (oops)"),
    "a cut connection": (hang_up, "no answer"),
    "a timeout": (hang, "no answer within 0.3 seconds"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_a_bad_stream_is_a_failure(server: ChatServer, name: str) -> None:
    server.fault, reason = BAD_STREAMS[name]
    with pytest.raises(RequestFailed, match=re.escape(reason)):
        read_stream(make_client(server, timeout=0.3, max_retries=0))
    server.fault = always(401, b"")
    with pytest.raises(Refused):
        read_stream(make_client(server))
