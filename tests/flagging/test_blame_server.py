"""Blame by a server: the same numbers as a local model. The client has its own tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import CANARY, Handler, ModelServer, running
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.flagging.server import read_prompt_logprobs
from cutlm.flagging.token_scores import read_token_scores

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name the capital.", "input": "Australia", "output": "Sydney.", "judgment": "It is wrong."},
    {"instruction": "Say hello." + " Please." * 9, "output": "Hello world!", "judgment": None},
    {"instruction": "Count.", "output": "12 + 34 = 46.", "judgment": "Off the point."},
    {"instruction": "Name a city.", "output": "Canberra is 🙂.", "judgment": "Perfect. A city."},
    {"instruction": "Ask.", "output": "yes", "judgment": "No question."},
]
NUM_REQUESTS = 3 * 3 + 2  # each unsatisfactory response is scored with a foreign judgment, too


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
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


def test_extra_fields_are_in_every_request(server: ModelServer, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(list_options(server, model, data, out, "--extra_body", '{"add_special_tokens": false}')) == 0
    assert len(server.requests) == NUM_REQUESTS
    assert all(request["add_special_tokens"] is False for request in server.requests)


def test_a_server_gives_what_a_local_model_gives(
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
            assert one.detector == f"{server.url} the-model"
    assert {request["model"] for request in server.requests} == {"the-model"}
    assert all(request["temperature"] == 0 for request in server.requests)
    assert set(server.paths) == {"/v1/completions"}
    assert f"--model_name_or_path {model}" in capsys.readouterr().out, "the name on the server is not a model here"


def test_the_output_does_not_depend_on_the_order_of_answers(
    server: ModelServer, model: Path, data: Path, tmp_path: Path
) -> None:
    for name, concurrency in (("a", "1"), ("b", "8")):
        out = tmp_path / f"{name}.jsonl"
        assert main(list_options(server, model, data, out, "--concurrency", concurrency)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


ODD_ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "none": (lambda choice: choice.pop("prompt_logprobs"), "expected prompt_logprobs in the server's answer, got none"),
    "null": (lambda choice: choice.update(prompt_logprobs=None), "expected prompt_logprobs in the server's answer"),
    "too few": (lambda choice: choice["prompt_logprobs"].pop(), "takes a prompt of token ids unchanged"),
    "no list": (lambda choice: choice.update(prompt_logprobs={}), "tokens, got no list"),
    "other tokens": (
        lambda choice: choice["prompt_logprobs"].__setitem__(-1, {"999": {"logprob": -1}}),
        "of prompt_logprobs, got none or a value that is not one",
    ),
    "no number": (
        lambda choice: choice["prompt_logprobs"].__setitem__(-1, None),
        "of prompt_logprobs, got none or a value that is not one",
    ),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_a_server_without_prompt_logprobs_is_an_error(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = ODD_ANSWERS[name]

    def fault(handler: Handler, number: int) -> bool:
        answer = server.respond(server.requests[number])
        change(answer["choices"][0])
        handler.answer(200, answer)
        return True

    server.fault = fault
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")) == 2
    assert expected in capsys.readouterr().err
    assert len(server.requests) == 1


@pytest.mark.parametrize("logp", ["-1", None, True, 0.5, float("nan"), float("-inf")])
def test_a_value_that_is_not_a_log_prob_is_refused(logp: Any) -> None:
    answer = {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": logp}}]}]}
    with pytest.raises(UserError, match="expected the log-prob of token 7 at index 1"):
        read_prompt_logprobs(answer, [5, 7], 1, "http://a")


def test_rounding_above_zero_is_zero_and_other_tokens_are_ignored() -> None:
    entry = {"9": {"logprob": -3.0}, "7": {"logprob": 1e-7}}
    assert read_prompt_logprobs({"choices": [{"prompt_logprobs": [None, entry]}]}, [5, 7], 1, "") == [0.0]


def test_failed_records_are_counted_and_requested_again_by_the_next_run(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = list_options(server, model, data, tmp_path / "results" / "out.jsonl", "--max_retries", "1")
    assert main(list_options(server, model, data, tmp_path / "whole.jsonl")) == 0
    bad_ids = read_token_scores(tmp_path / "whole.jsonl")[2].token_ids

    def fault(handler: Handler, number: int) -> bool:
        is_bad = server.requests[number]["prompt"][-len(bad_ids) :] == bad_ids
        if is_bad:
            handler.answer(500, {"error": f"boom {handler.headers['Authorization']}"})
        return is_bad

    server.fault = fault
    assert main(options) == 2
    message = capsys.readouterr().err
    assert f"1 of 5 records failed; the first is {data}:3: the server answered 500 (boom Bearer [key])" in message
    everything = [message, *(path.read_text() for path in (tmp_path / "results").iterdir())]
    assert CANARY not in "".join(everything)
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert len(server.requests) == 2 + 3, "the contexts of the missing record, and all foreign judgments"
    assert (tmp_path / "results" / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_records_that_were_not_sent_are_counted(
    server: ModelServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(RECORDS[1] | {"input": str(number)}) + "\n" for number in range(20)))
    server.fault = lambda handler, number: handler.answer(502, b"") is None
    options = ["--max_retries", "0", "--concurrency", "1"]
    assert main(list_options(server, model, data, tmp_path / "out.jsonl", *options)) == 2
    assert "8 of 20 records failed, and 12 more were not sent; the first is" in capsys.readouterr().err


def test_another_model_cannot_resume_a_stopped_run(
    server: ModelServer, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: number > 2 and handler.answer(401, b"") is None
    options = list_options(server, model, data, tmp_path / "out.jsonl", "--concurrency", "1")
    assert main(options) == 2
    options[options.index("the-model")] = "another-model"
    assert main(options) == 2
    assert "(model differ)" in capsys.readouterr().err
