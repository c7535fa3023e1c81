"""The frozen detector on a server: the same numbers as at hand, whatever the server does on the way."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import CANARY, COMMAND, PASSING, Handler, ModelServer, ask_to_wait, running
from tiny import save_tiny_model

import cutlm.servers.http as posting
from cutlm.blame.server import read_prompt_logprobs
from cutlm.blame.token_scores import read_token_scores
from cutlm.cli import main
from cutlm.errors import ConfigError, UserError
from cutlm.servers.requests import Server

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name the capital.", "input": "Australia", "output": "Sydney.", "judgment": "It is wrong."},
    {"instruction": "Say hello." + " Please." * 9, "output": "Hello world!", "judgment": None},
    {"instruction": "Count.", "output": "12 + 34 = 46.", "judgment": "Off the point."},
    {"instruction": "Name a city.", "output": "Canberra is 🙂.", "judgment": "Perfect. A city."},
    {"instruction": "Ask.", "output": "yes", "judgment": "No question."},
]
NUM_REQUESTS = 2 * 3 + 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setattr(posting, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with running(ModelServer(model)) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return path


def list_options(server: ModelServer, model: Path, data: Path, out: Path, *options: str) -> list[str]:
    return [
        *("blame", "--base_url", server.url, "--model", "the-model", "--tokenizer", str(model), "--data", str(data)),
        *("--out", str(out), *options),
    ]


def test_a_server_gives_what_the_model_at_hand_gives(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--with_praise"]):
        server.requests.clear()
        out, local = tmp_path / f"server{len(options)}.jsonl", tmp_path / f"local{len(options)}.jsonl"
        assert main(list_options(server, model, data, out, *options)) == 0
        assert len(server.requests) == NUM_REQUESTS + 2 * len(options)
        assert main(["blame", "--model", str(model), "--data", str(data), "--out", str(local), *options]) == 0
        for one, other in zip(read_token_scores(out), read_token_scores(local), strict=True):
            assert one.record == other.record
            assert one.token_ids == other.token_ids
            assert one.is_flagged == other.is_flagged
            assert one.logps_without == pytest.approx(other.logps_without, abs=1e-4)
            assert one.logps_with == (other.logps_with and pytest.approx(other.logps_with, abs=1e-4))
            assert one.weights == pytest.approx(other.weights, rel=1e-4)
            assert one.detector == f"{server.url}/v1/completions the-model"
    assert {request["model"] for request in server.requests} == {"the-model"}
    assert all(request["temperature"] == 0 for request in server.requests)
    assert f"--model_name_or_path {model}" in capsys.readouterr().out, "the name on the server is no model here"


def test_the_same_bytes_whatever_is_asked_first(server: ModelServer, model: Path, data: Path, tmp_path: Path) -> None:
    for name, concurrency in (("a", "1"), ("b", "8")):
        out = tmp_path / f"{name}.jsonl"
        assert main(list_options(server, model, data, out, "--concurrency", concurrency)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list_options(server, model, data, tmp_path / "quiet.jsonl")) == 0
    server.requests.clear()
    server.fault = PASSING[name]
    options = ["--concurrency", "2", "--timeout", "0.5"]
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", *options)) == 0, capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()
    assert len(server.requests) == NUM_REQUESTS + 2


@pytest.mark.parametrize("is_date", [False, True])
def test_it_waits_as_long_as_the_server_asks(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, is_date: bool
) -> None:
    times: list[float] = []
    server.fault = ask_to_wait(times, is_date=is_date)
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")) == 0
    assert 0.7 <= times[1] - times[0] < 5


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return False

    waits: list[float] = []
    with pytest.raises(posting.Unreachable, match=r"^no answer \(.+\), after 9 attempts$"):
        posting.post_json("http://127.0.0.1:9/", {}, key=None, timeout=1, max_retries=8, stop=Stop())
    assert len(waits) == 8
    for place, wait in enumerate(waits):
        assert min(60, 2**place) / 2 <= wait <= min(60, 2**place)
    assert len(set(waits)) == 8


REFUSALS: dict[str, tuple[int, Any, str]] = {
    "no key": (
        401,
        {"error": {"message": f"Invalid key {CANARY}."}},
        "wants another key (401: Invalid key [key]); set OPENAI",
    ),
    "forbidden": (403, b"no", "the server wants another key (403: no); set OPENAI_API_KEY to one that it takes"),
    "no model": (404, {"message": "no such model"}, "or no model 'the-model' there (404: no such model); give the"),
    "too long": (
        400,
        {"error": {"message": "too long"}},
        "refuses the request (400: too long); if the prompt is too long",
    ),
    "controls": (
        400,
        {"error": {"message": "bad\x1b[2J\x07 \u202enews"}},
        "refuses the request (400: bad\ufffd[2J\ufffd \ufffdnews)",
    ),
    "nested": (400, b"[" * 19_000, "refuses the request (400: [[["),
    "elsewhere": (302, b"", "the server names another address (302); give that one by --base_url"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence_and_not_asked_again(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, value, expected = REFUSALS[name]

    def fault(handler: Handler, number: int) -> bool:
        handler.answer(status, value, Location=f"{server.url}/elsewhere")
        return True

    server.fault = fault
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert CANARY not in printed.err + printed.out
    assert len(server.requests) == 1


def strip_answer(handler: Handler, request: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    answer = handler.server.respond(request)
    change(answer["choices"][0])
    handler.answer(200, answer)


ODD_ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "none": (
        lambda choice: choice.pop("prompt_logprobs"),
        "expected prompt_logprobs in the server's answer, got none; use a server that returns them, such as vLLM",
    ),
    "null": (lambda choice: choice.update(prompt_logprobs=None), "expected prompt_logprobs in the server's answer"),
    "too few": (lambda choice: choice["prompt_logprobs"].pop(), "the server must take a prompt of token ids as it is"),
    "no list": (lambda choice: choice.update(prompt_logprobs={}), "tokens, got no list"),
    "other tokens": (
        lambda choice: choice["prompt_logprobs"].__setitem__(-1, {"999": {"logprob": -1}}),
        "of prompt_logprobs, got none or no log-prob; use a server that returns those of the prompt's own tokens",
    ),
    "no number": (
        lambda choice: choice["prompt_logprobs"].__setitem__(-1, None),
        "of prompt_logprobs, got none or no log-prob",
    ),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_a_server_without_prompt_logprobs_is_one_sentence(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = ODD_ANSWERS[name]

    def fault(handler: Handler, number: int) -> bool:
        strip_answer(handler, server.requests[number], change)
        return True

    server.fault = fault
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")) == 2
    assert expected in capsys.readouterr().err
    assert len(server.requests) == 1


@pytest.mark.parametrize("logp", ["-1", None, True, 0.5, float("nan"), float("-inf")])
def test_what_is_no_log_prob_is_refused(logp: Any) -> None:
    answer = {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": logp}}]}]}
    with pytest.raises(UserError, match="expected the log-prob of token 7 at place 1"):
        read_prompt_logprobs(answer, [5, 7], 1, "http://a")


def test_rounding_above_zero_is_zero_and_further_tokens_are_no_matter() -> None:
    entry = {"9": {"logprob": -3.0}, "7": {"logprob": 1e-7}}
    assert read_prompt_logprobs({"choices": [{"prompt_logprobs": [None, entry]}]}, [5, 7], 1, "") == [0.0]


def test_what_failed_is_counted_and_asked_for_when_started_again(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = list_options(server, model, data, tmp_path / "out.jsonl", "--max_retries", "1")

    def fault(handler: Handler, number: int) -> bool:
        is_bad = server.requests[number]["prompt"][-len(bad_ids) :] == bad_ids
        if is_bad:
            handler.answer(500, {"error": f"boom {CANARY}"})
        return is_bad

    assert main(list_options(server, model, data, tmp_path / "quiet.jsonl")) == 0
    bad_ids = read_token_scores(tmp_path / "quiet.jsonl")[2].token_ids
    server.fault = fault
    assert main(options) == 2
    message = capsys.readouterr().err
    assert (
        f"1 of 5 records failed; the first is {data}:3: the server answered 500 (boom [key]), after 2 attempts; what is"
        " finished is kept: start again with the same options to ask only for what is missing"
    ) in message
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert len(server.requests) == 2, "the two contexts of the one that is missing"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()
    assert "4 records were there from a run that was stopped" in capsys.readouterr().out


def test_a_server_that_is_gone_is_not_asked_for_every_record(
    server: ModelServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(RECORDS[1] | {"input": str(number)}) + "\n" for number in range(40)))

    def fault(handler: Handler, number: int) -> bool:
        handler.answer(502, b"")
        return True

    server.fault = fault
    options = ["--max_retries", "0", "--concurrency", "1"]
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", *options)) == 2
    assert "8 of 40 records failed, and 32 not asked for any more; the first is" in capsys.readouterr().err
    assert len(server.requests) < 12


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_run_asks_only_for_what_is_missing(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, kill: signal.Signals, code: int
) -> None:
    assert main(list_options(server, model, data, tmp_path / "whole.jsonl")) == 0
    server.requests.clear()
    hangs = threading.Event()

    def fault(handler: Handler, number: int) -> bool:
        if number >= 5:
            hangs.set()
            time.sleep(3)
            return True
        return False

    server.fault = fault
    options = list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1", "--timeout", "60")
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], stderr=subprocess.PIPE, text=True)
    assert hangs.wait(120)
    time.sleep(0.3)  # what was answered is on the disk by now
    asked = time.monotonic()
    process.send_signal(kill)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    assert time.monotonic() - asked < 2.5, "it does not wait for the requests under way"
    assert "Traceback" not in message
    assert (kill == signal.SIGKILL) != ("start again with the same options" in message)
    lines = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    done = [json.loads(line)["index"] for line in lines[1:]]
    assert 0 < len(done) < len(RECORDS)
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    is_missing = [index for index in range(len(RECORDS)) if index not in done]
    assert len(server.requests) == sum(1 if index in (1, 3) else 2 for index in is_missing)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_key_is_sent_and_shown_nowhere(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(handler: Handler, number: int) -> bool:
        if number > 3:
            handler.answer(500, {"error": {"message": handler.headers["Authorization"]}})
        return number > 3

    out = tmp_path / "results" / "out.jsonl"
    server.fault = fault
    assert main(list_options(server, model, data, out, "--concurrency", "1", "--max_retries", "1")) == 2
    assert set(server.keys) == {f"Bearer {CANARY}"}
    everything = [path.read_text() for path in (tmp_path / "results").iterdir()]
    assert len(everything) == 1
    server.fault = None
    assert main(list_options(server, model, data, out)) == 0
    everything += [path.read_text() for path in (tmp_path / "results").iterdir()]
    printed = capsys.readouterr()
    assert "Bearer [key]" in printed.err
    assert CANARY not in "".join([*everything, printed.out, printed.err])


def test_without_a_key_none_is_sent(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(list_options(server, model, data, tmp_path / "out.jsonl")) == 0
    assert set(server.keys) == {None}


def test_a_key_that_cannot_be_sent_is_not_quoted(
    server: ModelServer,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\nX-Evil: 1")
    assert main(list_options(server, model, data, tmp_path / "out.jsonl")) == 2
    message = capsys.readouterr().err
    assert "OPENAI_API_KEY: expected letters, digits and signs alone; set it again" in message
    assert CANARY not in message
    monkeypatch.setenv("OPENAI_API_KEY", f" {CANARY}\n")  # as read from a file
    assert main(list_options(server, model, data, tmp_path / "out.jsonl")) == 0
    assert set(server.keys) == {f"Bearer {CANARY}"}


def test_another_server_does_not_go_on_with_a_stopped_run(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(handler: Handler, number: int) -> bool:
        if number > 2:
            handler.answer(400, b"")
        return number > 2

    server.fault = fault
    options = list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")
    assert main(options) == 2
    options[options.index("the-model")] = "another-model"
    assert main(options) == 2
    assert "started with other settings (model differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?x=1", "http://a b", "http://ü.de"]
)
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match=r"server: expected an address such as http://localhost:8000, got '"):
        Server(url, "m")


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(
        ConfigError, match=r"expected no name or password in the address; give a key by OPENAI"
    ) as error:
        Server(f"http://me:{CANARY}@host", "m")
    assert CANARY not in str(error.value)


def test_server_settings_out_of_range_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Server("http://a", "m", concurrency=0, timeout=0, max_retries=-1)
    kinds = Counter(problem.partition(":")[0] for problem in error.value.problems)
    assert kinds == {"concurrency": 1, "timeout": 1, "max_retries": 1}


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_the_address_may_name_the_version_or_not(url: str) -> None:
    assert Server(url, "m").endpoint == "http://a:1/v1/completions"
