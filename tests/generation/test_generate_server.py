"""Generating by a server: every response that can be had is had once, whatever the server does on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    CANARY,
    COMMAND,
    ENDLESS,
    PASSING,
    ChatServer,
    Handler,
    ask_to_wait,
    make_completion,
    running,
)
from tiny import save_tiny_model
from transformers import AutoTokenizer

import cutlm.servers.http as posting
from cutlm.cli import main
from cutlm.prompting.encoding import Encoder

NUM_PROMPTS = 9
PROMPTS: list[dict[str, Any]] = [
    {"instruction": f"Name {index}.", "input": "Of <|im_end|> all." if index == 2 else "", "dataset": "d"}
    for index in range(NUM_PROMPTS)
]


def reply(prompt: str) -> str:
    return f"It is <b>{read_number(prompt)}</b>."


def read_number(prompt: str) -> int:
    return int(re.findall(r"Name (\d+)\.", prompt)[0])


@pytest.fixture
def server(server: ChatServer) -> ChatServer:
    server.reply = reply
    return server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def list_options(server: ChatServer, prompts: Path, out: Path, *options: str) -> list[str]:
    return [
        *("generate", "--base_url", server.url, "--model", "org/the-model", "--prompts", str(prompts)),
        *("--out", str(out), "--max_new_tokens", "64", *options),
    ]


def read_outputs(out: Path) -> list[str]:
    return [row["output"] for row in json.loads(out.read_text("utf-8"))]


EXPECTED = [f"It is <b>{index}</b>." for index in range(NUM_PROMPTS)]


def test_each_instruction_is_a_message_and_answers_stand_in_their_order(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out, "--temperature", "0.7", "--top_p", "0.9", "--seed", "5")) == 0
    rows = json.loads(out.read_text("utf-8"))
    assert rows[2] == {
        "instruction": "Name 2.",
        "output": "It is <b>2</b>.",
        "generator": "the-model",
        "input": "Of <|im_end|> all.",
        "dataset": "d",
    }
    assert [row["output"] for row in rows] == EXPECTED
    assert set(server.paths) == {"/v1/chat/completions"}
    by_number = {read_number(request["messages"][0]["content"]): request for request in server.requests}
    assert by_number[2] == {
        "model": "org/the-model",
        "messages": [{"role": "user", "content": "Name 2.\nOf <|im_end|> all."}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 7,
    }
    assert f"9 responses in {out}; 0 of them stopped at 64 tokens" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json"}


def test_samples_of_an_instruction_stand_one_below_the_other_and_have_seeds_of_their_own(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out, "--num_samples", "2", "--temperature", "1")) == 0
    assert read_outputs(out) == [text for text in EXPECTED for _ in range(2)]
    assert sorted(request["seed"] for request in server.requests) == list(range(42, 42 + 2 * NUM_PROMPTS))


def test_with_a_template_the_server_gets_the_tokens_of_training(prompts: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    encoder = Encoder(AutoTokenizer.from_pretrained(model), "alpaca")

    class TokenServer(ChatServer):
        def respond(self, request: dict[str, Any]) -> dict[str, Any]:
            text = encoder.tokenizer.decode(request["prompt"])
            choice = {"index": 0, "text": reply(text), "finish_reason": "length", "logprobs": None}
            return {"id": "1", "object": "text_completion", "model": "m", "choices": [choice]}

    out = tmp_path / "out.json"
    with running(TokenServer()) as server:
        options = ["--template", "alpaca", "--tokenizer", str(model), "--judgment", "Perfect.", "--concurrency", "1"]
        assert main(list_options(server, prompts, out, *options)) == 0
        assert set(server.paths) == {"/v1/completions"}
        assert server.requests[2]["prompt"] == encoder.encode_prompt("Name 2.\nOf <|im_end|> all.", "Perfect.")
    assert read_outputs(out) == EXPECTED


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(server: ChatServer, prompts: Path, tmp_path: Path, name: str) -> None:
    server.fault = PASSING[name]
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out, "--concurrency", "2", "--timeout", "0.6")) == 0
    assert read_outputs(out) == EXPECTED
    assert len(server.requests) == NUM_PROMPTS + 2


@pytest.mark.parametrize("is_date", [False, True])
def test_it_waits_as_long_as_the_server_asks(server: ChatServer, prompts: Path, tmp_path: Path, is_date: bool) -> None:
    times: list[float] = []
    server.fault = ask_to_wait(times, is_date=is_date)
    assert main(list_options(server, prompts, tmp_path / "out.json", "--concurrency", "1")) == 0
    assert 0.7 <= times[1] - times[0] < 5


def test_what_never_comes_is_listed_and_asked_for_alone_when_started_again(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd: dict[int, Any] = {
        1: {"choices": []},
        3: ["no completion"],
        4: {"choices": [{"message": {"content": 7}}]},
        # What a model may well do is no failure: to say nothing, a great deal, or a part.
        6: make_completion(None),
        7: make_completion("x" * 1_000_000),
        8: make_completion("It is", "length"),
    }

    def fault(handler: Handler, number: int) -> bool:
        index = read_number(server.prompts[number])
        if index == 5:
            handler.answer(500, {"error": f"boom {CANARY}"})
        elif index in odd:
            handler.answer(200, odd[index])
        return index in odd or index == 5

    server.fault = fault
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1", "--max_retries", "1")
    assert main(options) == 1
    assert not out.exists()
    failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
    malformed = "expected choices[0] with a message or text in the server's answer, got none"
    assert [(row["number"], row["reason"]) for row in failures] == [
        (2, malformed),
        (4, malformed),
        (5, "expected text in the server's answer, got something else"),
        (6, "the server answered 500 (boom [key]), after 2 attempts"),
    ]
    assert failures[0]["instruction"] == "Name 1."
    assert (
        f"4 of 9 prompts have no answer, listed with the reasons in {out}.failures.jsonl; 5 are kept in {out}.partial:"
        " start again with the same options to ask for the others alone"
    ) in capsys.readouterr().out

    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert sorted(map(read_number, server.prompts)) == [1, 3, 4, 5]
    assert read_outputs(out) == [*EXPECTED[:6], "", "x" * 1_000_000, "It is"]
    printed = capsys.readouterr().out
    assert "5 responses were there from a run that was stopped" in printed
    assert f"9 responses in {out}; 1 of them stopped at 64 tokens" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json"}


def test_as_many_as_may_be_missing_are_listed_and_left_out(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_two(handler: Handler, number: int) -> bool:
        is_refused = read_number(server.prompts[number]) in (2, 5)
        if is_refused:
            handler.answer(400, {"error": "content filter"})
        return is_refused

    server.fault = refuse_two
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    assert main([*options, "--max_failure_rate", "0.2"]) == 1  # 2 of 9 are more
    assert not out.exists()
    assert main([*options, "--max_failure_rate", "0.25"]) == 0
    printed = capsys.readouterr().out
    left_out = f"2 of 9 prompts have no answer, listed with the reasons in {out}.failures.jsonl, and are left out"
    assert f"{left_out} (--max_failure_rate 0.25)\n" in printed
    assert f"\n7 responses in {out}; " in printed
    assert read_outputs(out) == [output for index, output in enumerate(EXPECTED) if index not in (2, 5)]
    failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
    assert [row["number"] for row in failures] == [3, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json", "out.json.failures.jsonl"}


def test_a_server_that_is_gone_is_not_asked_for_every_prompt(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": f"Name {index}."}) + "\n" for index in range(40)))
    server.fault = lambda handler, number: handler.answer(503, b"") is None
    options = list_options(server, prompts, tmp_path / "out.json", "--concurrency", "2", "--max_retries", "0")
    assert main(options) == 1
    assert len(server.requests) < 15
    failures = (tmp_path / "out.json.failures.jsonl").read_text("utf-8").splitlines()
    assert sum("gave no answer to 8 questions in a row" in line for line in failures) == 32
    assert "40 of 40 prompts have no answer" in capsys.readouterr().out


REFUSALS: dict[str, tuple[int, Any, str]] = {
    "no key": (401, {"error": {"message": f"Invalid key {CANARY}."}}, "wants another key (401: Invalid key [key]);"),
    "no model": (404, {"message": "none"}, "or no model 'org/the-model' there (404: none); give the server's address"),
    "too long": (
        400,
        {"error": {"message": "too long"}},
        "prompt 1: {url}/chat/completions refuses the request (400: too long); if the prompt is too long for the model,"
        " give a smaller --max_new_tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence_and_not_asked_again(
    server: ChatServer, prompts: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, value, expected = REFUSALS[name]
    server.fault = lambda handler, number: handler.answer(status, value) is None
    assert main(list_options(server, prompts, tmp_path / "out.json", "--concurrency", "1")) == 2
    printed = capsys.readouterr()
    assert expected.format(url=server.url) in printed.err
    assert "Traceback" not in printed.err
    # One that may be about a prompt alone is told from one that is about all by the first few.
    assert len(server.requests) == 1 if status != 400 else len(server.requests) >= 8


def test_a_prompt_that_is_refused_costs_no_other_its_response(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: (
        read_number(server.prompts[number]) in (0, 5) and handler.answer(400, {"message": "too long"}) is None
    )
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    for num_asked in (NUM_PROMPTS, 2):  # the second time, they are alone
        server.requests.clear()
        assert main(options) == 1, capsys.readouterr().err
        assert len(server.requests) == num_asked
        failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
        reason = "the server refuses it (400: too long)"
        assert [(row["number"], row["reason"]) for row in failures] == [(1, reason), (6, reason)]
    assert "2 of 9 prompts have no answer" in capsys.readouterr().out
    server.fault = None
    assert main(options) == 0
    assert read_outputs(out) == EXPECTED


def test_what_is_on_its_way_when_the_run_ends_is_kept(server: ChatServer, prompts: Path, tmp_path: Path) -> None:
    under_way = threading.Barrier(4, timeout=10)

    def fault(handler: Handler, number: int) -> bool:
        under_way.wait()
        if number < 3:
            time.sleep(0.5)
        else:
            handler.answer(401, b"")
        return number >= 3

    server.fault = fault
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "4")
    assert main(options) == 2
    kept = {read_number(prompt) for prompt in server.prompts[:3]}
    assert len(server.requests) == 4
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert {read_number(prompt) for prompt in server.prompts} == set(range(NUM_PROMPTS)) - kept
    assert read_outputs(out) == EXPECTED


def test_the_key_is_sent_and_is_nowhere_to_be_seen(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda prompt: f"It is {CANARY}."
    folder = tmp_path / "results"
    assert main(list_options(server, prompts, folder / "out.json")) == 0
    assert set(server.keys) == {f"Bearer {CANARY}"}
    assert read_outputs(folder / "out.json")[0] == "It is [key]."
    printed = capsys.readouterr()
    everything = [path.read_bytes() for path in folder.iterdir()] + [(printed.out + printed.err).encode()]
    assert not any(CANARY.encode() in part for part in everything)


@pytest.mark.parametrize(("key", "is_hidden"), [("EMPTY", False), (CANARY, True)])
def test_a_key_that_is_but_a_word_stays_in_responses(
    server: ChatServer,
    prompts: Path,
    tmp_path: Path,
    key: str,
    is_hidden: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.reply = lambda prompt: f"The glass is {key}."
    out = tmp_path / "out.json"
    server.fault = lambda handler, number: number == 8 and handler.answer(500, f"no {key}".encode()) is None
    options = list_options(server, prompts, out, "--concurrency", "1", "--max_retries", "0")
    assert main(options) == 1
    assert "the server answered 500 (no [key]), after 1 attempts" in Path(f"{out}.failures.jsonl").read_text("utf-8")
    capsys.readouterr()
    server.fault = None
    assert main(options) == 0
    assert set(read_outputs(out)) == {f"The glass is {'[key]' if is_hidden else key}."}
    note = "9 responses held the key to the server; [key] stands in its place"
    assert (note in capsys.readouterr().out) == is_hidden, "those of the run that was stopped count too"


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_an_end_is_given_up(
    server: ChatServer, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "_LONGEST_ANSWER", 2)
    prompts = tmp_path / "two.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[:2]))
    server.fault, reason = ENDLESS[name]
    out = tmp_path / "out.json"
    timeout = "0.3" if name == "a byte at a time" else "60"
    options = ["--timeout", timeout, "--max_retries", "0", "--concurrency", "1"]
    assert main(list_options(server, prompts, out, *options)) == 1
    failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
    # Of an error it shows the beginning alone, as far as there is one.
    assert [row["reason"] for row in failures] == [reason, "the server answered 500, after 1 attempts"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_asks_only_for_what_is_missing(
    server: ChatServer, prompts: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    reached, release = threading.Event(), threading.Event()

    def fault(handler: Handler, number: int) -> bool:
        if number == 4:
            reached.set()
            release.wait(60)
        return False

    server.fault = fault
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], stderr=subprocess.PIPE, env=os.environ.copy())
    assert reached.wait(60)
    deadline = time.monotonic() + 30
    while len(Path(f"{out}.partial").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    stderr = process.communicate(timeout=30)[1].decode()
    release.set()
    assert process.returncode == (-sent if sent == signal.SIGKILL else 130), stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert sorted(map(read_number, server.prompts)) == [4, 5, 6, 7, 8]
    assert read_outputs(out) == EXPECTED


WRONG_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "no server": (
        ["--concurrency", "4", "--tokenizer", "x"],
        ["--tokenizer, --concurrency: expected only with --base_url; set it, or leave these out"],
    ),
    "all at once": (
        ["--base_url", "http://localhost:1", "--batch_size", "4", "--num_samples", "3", "--judgment", " "],
        [
            "--batch_size: expected only with a local model; leave out --base_url, or leave these out",
            "--num_samples 3: expected --temperature above 0, or all of them are one and the same, got 0",
            '--judgment: expected text such as "Perfect.", got an empty one; leave the option out for none',
            "--judgment: its prompt is made here; with --base_url, give --template too",
        ],
    ),
    "no samples": (["--num_samples", "0"], ["--num_samples: expected a whole number of at least 1, got 0"]),
    "no template": (
        ["--base_url", "http://localhost:1", "--tokenizer", "x"],
        ["--tokenizer: of use with --template alone; give that too, or leave this out"],
    ),
    "no address": (
        ["--base_url", "localhost", "--concurrency", "0", "--timeout", "0", "--max_retries", "-2"],
        [
            "server: expected an address such as http://localhost:8000, got 'localhost'",
            "concurrency: expected a whole number of at least 1, got 0",
            "timeout: expected a number of seconds above 0, got 0.0",
            "max_retries: expected a whole number of at least 0, got -2",
        ],
    ),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_that_are_at_odds_are_all_named(
    prompts: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = WRONG_OPTIONS[name]
    arguments = ["generate", "--model", "m", "--prompts", str(prompts), "--out", str(tmp_path / "out.json"), *options]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    for sentence in expected:
        assert sentence in printed
