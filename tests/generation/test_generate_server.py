"""Generation by a server: requests, failures and resuming. The client has its own tests."""

import argparse
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
from chat_server import CANARY, ChatServer, Handler, make_completion, running
from tiny import save_tiny_model
from transformers import AutoTokenizer

from cutlm.cli import main
from cutlm.cli.model_options import make_server
from cutlm.judges.responses import read_responses
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


def read_failures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]


EXPECTED = [f"It is <b>{index}</b>." for index in range(NUM_PROMPTS)]


def test_each_instruction_is_a_message_and_answers_are_in_order(
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


def test_samples_of_an_instruction_are_successive_rows_with_their_own_seeds(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out, "--num_samples", "2", "--temperature", "1")) == 0
    assert read_outputs(out) == [text for text in EXPECTED for _ in range(2)]
    assert sorted(request["seed"] for request in server.requests) == list(range(42, 42 + 2 * NUM_PROMPTS))


def test_with_a_template_the_server_gets_the_token_ids_of_training(prompts: Path, tmp_path: Path) -> None:
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


def test_failures_are_listed_and_requested_again_by_the_next_run(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd: dict[int, Any] = {
        1: {"choices": []},
        # A model may say nothing, a great deal, or stop early: these are responses.
        6: make_completion(None),
        7: make_completion("x" * 1_000_000),
        8: make_completion("It is", "length"),
    }

    def fault(handler: Handler, number: int) -> bool:
        index = read_number(server.prompts[number])
        if index == 5:
            handler.answer(400, {"error": f"too long {CANARY}"})
        elif index in odd:
            handler.answer(200, odd[index])
        return index in odd or index == 5

    server.fault = fault
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    assert main(options) == 1
    assert not out.exists()
    failures = read_failures(out)
    assert [row["number"] for row in failures] == [2, 6]
    assert "expected the text of choices[0]" in failures[0]["reason"]
    assert "the server refuses it (400: too long [key])" in failures[1]["reason"]
    assert failures[0]["instruction"] == "Name 1."
    printed = capsys.readouterr().out
    assert "2 of 9 prompts have no answer, most often (1): " in printed
    assert f"7 answers are kept in {out}.partial" in printed

    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert sorted(map(read_number, server.prompts)) == [1, 5]
    assert read_outputs(out) == [*EXPECTED[:6], "", "x" * 1_000_000, "It is"]
    printed = capsys.readouterr().out
    assert "7 responses are from the run that was stopped" in printed
    assert f"9 responses in {out}; 1 of them stopped at 64 tokens" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json"}


@pytest.mark.parametrize("text", ["It is \ud83d", "It\0is."])
def test_an_answer_that_no_record_may_have_is_a_failure(
    server: ChatServer, prompts: Path, tmp_path: Path, text: str
) -> None:
    server.fault = lambda handler, number: (
        read_number(server.prompts[number]) == 3 and handler.answer(200, make_completion(text, "length")) is None
    )
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out, "--max_failure_rate", "0.2")) == 0
    (failure,) = read_failures(out)
    assert failure["number"] == 4
    assert "surrogate" in failure["reason"]
    assert read_outputs(out) == [*EXPECTED[:3], *EXPECTED[4:]]
    assert len(read_responses(out)) == NUM_PROMPTS - 1


def test_only_complete_and_truncated_answers_become_responses(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {1: "error", 2: "abort", 3: "SAFETY", 4: "tool_calls", 5: "MAX_TOKENS", 6: "end_turn", 7: "error"}

    def fault(handler: Handler, number: int) -> bool:
        index = read_number(server.prompts[number])
        if index in ends:
            handler.answer(200, make_completion(f"It is <b>{index}</b>.", ends[index]))
        return index in ends

    server.fault = fault
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out)) == 1
    assert not out.exists()
    failures = read_failures(out)
    assert [row["number"] for row in failures] == [2, 3, 4, 5, 8]
    assert all(ends[row["number"] - 1] in row["reason"] for row in failures)
    assert "most often (2): the answer is not complete (finish_reason error)" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(f"{out}.partial").read_text("utf-8").splitlines()[1:]]
    assert {line["index"]: line["is_unfinished"] for line in lines} == {0: False, 5: True, 6: False, 8: False}


def test_extra_fields_are_in_every_request_and_part_of_the_run(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: number == 8 and handler.answer(400, {"error": "no"}) is None
    out = tmp_path / "out.json"
    body = '{"max_tokens": null, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": false}}'
    assert main(list_options(server, prompts, out, "--extra_body", body)) == 1
    for request in server.requests:
        assert request["max_completion_tokens"] == 9
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
        assert "max_tokens" not in request
    server.fault = None
    assert main(list_options(server, prompts, out)) == 2, "responses to other requests do not belong to this run"
    assert main(list_options(server, prompts, out, "--extra_body", body)) == 0


def test_arguments_of_the_chat_template_are_sent(server: ChatServer) -> None:
    options = {"base_url": server.url, "extra_body": '{"chat_template_kwargs": {"a": 1}, "seed": 2}'}
    made = make_server(argparse.Namespace(**options, chat_template_kwargs={"a": 0, "b": False}), "m")
    assert made.extra_body == {"chat_template_kwargs": {"a": 1, "b": False}, "seed": 2}
    made = make_server(argparse.Namespace(**options, chat_template_kwargs=None), "m")
    assert made.extra_body == {"chat_template_kwargs": {"a": 1}, "seed": 2}


def test_a_proxy_of_the_environment_is_named_once(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hush@127.0.0.1:1")
    options = ["--base_url", "http://api.example/v1", "--model", "m", "--prompts", str(prompts), "--max_retries", "0"]
    assert main(["generate", *options, "--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("http://127.0.0.1:1") == 1
    assert "hush" not in printed.err + printed.out + Path(f"{tmp_path}/out.json.failures.jsonl").read_text()


def test_failures_within_the_allowed_rate_are_left_out(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: (
        read_number(server.prompts[number]) in (2, 5) and handler.answer(400, {"error": "content filter"}) is None
    )
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    assert main([*options, "--max_failure_rate", "0.2"]) == 1  # 2 of 9 are more
    assert not out.exists()
    assert main([*options, "--max_failure_rate", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 9 prompts have no answer" in printed
    assert f"\n7 responses in {out}; " in printed
    assert read_outputs(out) == [output for index, output in enumerate(EXPECTED) if index not in (2, 5)]
    assert [row["number"] for row in read_failures(out)] == [3, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json", "out.json.failures.jsonl"}


def test_a_refusal_of_everything_is_one_sentence(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: handler.answer(400, {"error": {"message": "too long"}}) is None
    assert main(list_options(server, prompts, tmp_path / "out.json", "--concurrency", "1")) == 2
    printed = capsys.readouterr().err
    assert "prompt 1: " in printed
    assert "(400: too long); if the prompt is too long for the model, set a smaller --max_new_tokens" in printed
    assert "Traceback" not in printed


def test_the_key_is_in_no_file_and_not_printed_after_resuming_either(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda prompt: f"It is {CANARY}."
    server.fault = lambda handler, number: number == 8 and handler.answer(500, f"no {CANARY}".encode()) is None
    folder = tmp_path / "results"
    options = list_options(server, prompts, folder / "out.json", "--concurrency", "1", "--max_retries", "0")
    assert main(options) == 1
    assert "(no [key])" in read_failures(folder / "out.json")[0]["reason"]
    everything = [path.read_bytes() for path in folder.iterdir()]
    server.fault = None
    assert main(options) == 0
    assert set(read_outputs(folder / "out.json")) == {"It is [key]."}
    printed = capsys.readouterr()
    assert "9 responses contained the key" in printed.out, "those before the stop included"
    everything += [path.read_bytes() for path in folder.iterdir()] + [(printed.out + printed.err).encode()]
    assert not any(CANARY.encode() in part for part in everything)


def test_a_killed_run_resumes(server: ChatServer, prompts: Path, tmp_path: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def fault(handler: Handler, number: int) -> bool:
        if number == 4:
            reached.set()
            release.wait(60)
        return False

    server.fault = fault
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out, "--concurrency", "1")
    process = subprocess.Popen([sys.executable, "-m", "cutlm", *options], stderr=subprocess.DEVNULL)
    assert reached.wait(120)
    deadline = time.monotonic() + 30
    while len(Path(f"{out}.partial").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    release.set()
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
            "--num_samples 3: expected --temperature above 0",
            '--judgment: expected text such as "Perfect."',
            "--judgment: its prompt is encoded here; with --base_url, set --template too",
        ],
    ),
    "no samples": (["--num_samples", "0"], ["--num_samples: expected a whole number of at least 1, got 0"]),
    "no template": (
        ["--base_url", "http://localhost:1", "--tokenizer", "x"],
        ["--tokenizer: expected only with --template"],
    ),
    "no address": (
        ["--base_url", "localhost", "--concurrency", "0", "--timeout", "0", "--max_retries", "-2"],
        ["base_url: expected", "concurrency: expected", "timeout: expected", "max_retries: expected"],
    ),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_at_odds_are_all_named(
    prompts: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = WRONG_OPTIONS[name]
    arguments = ["generate", "--model", "m", "--prompts", str(prompts), "--out", str(tmp_path / "out.json"), *options]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    for sentence in expected:
        assert sentence in printed


THOUGHTS = "Which number is it?"
_HARMONY = f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>final<|message|>It is"
REASONING: dict[int, dict[str, Any]] = {
    0: make_completion(f"<think>{THOUGHTS}</think>\n\nIt is <b>0</b>."),
    1: make_completion("\n\nIt is <b>1</b>.", reasoning_content=THOUGHTS),
    2: make_completion(_HARMONY),
    3: make_completion("It is <b>3</b>."),
    4: make_completion(f"{THOUGHTS}</think>It is", "length"),
    # Failures.
    5: make_completion(f"<think>{THOUGHTS}", "length"),
    6: make_completion(THOUGHTS, "length"),
    7: make_completion(f"<think>{THOUGHTS}"),
    8: make_completion(None, reasoning_content=THOUGHTS),
}


def test_thoughts_are_separated_and_answers_within_them_are_failures(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: handler.answer(200, REASONING[read_number(server.prompts[number])]) is None
    out = tmp_path / "out.json"
    options = list_options(server, prompts, out)
    for num_asked in (NUM_PROMPTS, 4):  # the second run resumes, and asks again for those without an answer
        server.requests.clear()
        assert main(options) == 1
        assert len(server.requests) == num_asked
        assert not out.exists()
        reasons = {row["number"] - 1: row["reason"] for row in read_failures(out)}
        assert list(reasons) == [5, 6, 7, 8]
        assert all("stopped at 64 tokens, before the final answer" in reasons[index] for index in (5, 6))
    assert main([*options, "--max_failure_rate", "0.5"]) == 0
    rows = json.loads(out.read_text("utf-8"))
    assert [row["output"] for row in rows] == [
        "It is <b>0</b>.",
        "It is <b>1</b>.",
        "It is",
        "It is <b>3</b>.",
        "It is",
    ]
    assert [row.get("reasoning") for row in rows] == [THOUGHTS, THOUGHTS, THOUGHTS, None, THOUGHTS]
    assert "1 of them stopped at 64 tokens" in capsys.readouterr().out


def test_an_answer_that_was_stopped_within_thoughts_is_requested_again(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    answers = {index: make_completion(f"{THOUGHTS}</think>{text}") for index, text in enumerate(EXPECTED)}
    answers[4] = make_completion(THOUGHTS, "length")
    server.fault = lambda handler, number: handler.answer(200, answers[read_number(server.prompts[number])]) is None
    out = tmp_path / "out.json"
    assert main(list_options(server, prompts, out)) == 1
    assert [row["number"] for row in read_failures(out)] == [5]
    answers[4] = make_completion(EXPECTED[4])
    answers[0] = make_completion("It is not asked again.")
    # Another failure, so that the third run reads both answers of the journal.
    lines = Path(f"{out}.partial").read_text("utf-8").splitlines(keepends=True)
    Path(f"{out}.partial").write_text("".join(line for line in lines if '"index": 6,' not in line), "utf-8")
    answers[6] = make_completion("Hm", "length")
    assert main(list_options(server, prompts, out)) == 1
    assert [row["number"] for row in read_failures(out)] == [7]
    answers[6] = make_completion(EXPECTED[6])
    assert main(list_options(server, prompts, out)) == 0
    assert read_outputs(out) == EXPECTED


def test_thoughts_that_the_prompt_begins_are_no_answer(prompts: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    tokenizer.save_pretrained(model)

    class TokenServer(ChatServer):
        def respond(self, request: dict[str, Any]) -> dict[str, Any]:
            number = read_number(tokenizer.decode(request["prompt"]))
            text = f"{THOUGHTS}</think>{EXPECTED[number]}" if number else THOUGHTS
            return {"choices": [{"text": text, "finish_reason": "stop"}]}

    out = tmp_path / "out.json"
    with running(TokenServer()) as server:
        assert main(list_options(server, prompts, out, "--template", "chat", "--tokenizer", str(model))) == 1
    assert [(row["number"], row["reason"]) for row in read_failures(out)] == [
        (1, "the answer has thoughts without an end")
    ]
    lines = [json.loads(line) for line in Path(f"{out}.partial").read_text("utf-8").splitlines()[1:]]
    assert {line["index"]: line["output"] for line in lines} == dict(list(enumerate(EXPECTED))[1:])
    assert {line["reasoning"] for line in lines} == {THOUGHTS}


def test_a_conversation_is_sent_as_it_is(server: ChatServer, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name 1."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Name 2."},
    ]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    path.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n")
    assert main(list_options(server, path, out)) == 0
    (body,) = server.requests
    assert body["messages"] == turns
    assert body["tools"] == [tool]
    (row,) = json.loads(out.read_text())
    assert row["messages"] == [*turns, {"role": "assistant", "content": row["output"]}]
    assert row["instruction"] == "Name 2."
