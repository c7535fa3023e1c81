"""The judge on a server: every judgment that can be had is had once, whatever the server does on the way."""

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
from chat_server import CANARY, COMMAND, ENDLESS, PASSING, ChatServer, Handler, ask_to_wait, make_completion, stall
from judged_rows import (
    NUM_RESPONSES,
    expect,
    find_failures,
    list_options,
    make_rows,
    read_lines,
    read_number,
    write_lines,
)

import cutlm.servers.http as posting
from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.servers.cache import Cache


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(
    server: ChatServer, responses: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = PASSING[name]
    out = tmp_path / "out.jsonl"
    options = ["--concurrency", "2", "--timeout", "0.6"]
    assert main(list_options(server, responses, out, *options)) == 0, capsys.readouterr()
    assert [row["judgment"] for row in read_lines(out)] == [expect(index) for index in range(NUM_RESPONSES)]
    assert len(server.requests) == NUM_RESPONSES + 2


@pytest.mark.parametrize("is_date", [False, True])
def test_it_waits_as_long_as_the_server_asks(
    server: ChatServer, responses: Path, tmp_path: Path, is_date: bool
) -> None:
    times: list[float] = []
    server.fault = ask_to_wait(times, is_date=is_date)
    assert main(list_options(server, responses, tmp_path / "out.jsonl", "--concurrency", "1")) == 0
    assert 0.7 <= times[1] - times[0] < 5


def test_what_never_comes_is_listed_and_the_rest_is_had(
    server: ChatServer, responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd: dict[int, Any] = {
        1: make_completion(""),
        2: make_completion(None),
        4: make_completion("I’m sorry, I can't help with that."),
        5: make_completion("As an AI language model, I have no opinion."),
        6: make_completion("Answer <6>"),
        7: make_completion("The response says 7, and", "length"),
        8: make_completion("x" * 1_000_000),
        9: {"choices": []},
        10: make_completion("I cannot judge this.", "content_filter"),
    }

    def fault(handler: Handler, number: int) -> bool:
        index = int(re.findall(r"Answer <(\d+)>", server.prompts[number])[0])
        if index == 11:
            handler.answer(500, b"")
        elif index in odd:
            handler.answer(200, odd[index])
        return index in odd or index == 11

    server.fault = fault
    out = tmp_path / "out.jsonl"
    # One at a time, so that the request which is looked at is the one that is answered.
    options = list_options(server, responses, out, "--concurrency", "1", "--max_retries", "1")
    assert main(options) == 1
    assert [row["output"] for row in read_lines(out)] == ["Answer <0>", "Answer <3>"]
    failures = find_failures(out)
    assert [(row["location"], row["kind"]) for row in failures] == [
        (f"{responses}:{line}", kind)
        for line, kind in (
            (2, "empty answer"),
            (3, "empty answer"),
            (5, "refusal"),
            (6, "refusal"),
            (7, "echo of the response"),
            (8, "cut off"),
            (9, "too long"),
            (10, "malformed answer"),
            (11, "refusal"),
            (12, "no answer"),
        )
    ]
    assert failures[3]["answer"] == "As an AI language model, I have no opinion."
    assert max(len(row["answer"]) for row in failures) == 2000
    assert failures[-1]["reason"] == "the server answered 500, after 2 attempts"
    printed = capsys.readouterr().out
    assert "10 responses have no judgment (3 refusal, 2 empty answer, 1 echo of the response" in printed
    assert len(server.requests) == NUM_RESPONSES + 1

    # Failures were not kept, judgments were.
    server.fault = None
    server.requests.clear()
    assert main([*options, "--overwrite"]) == 0
    assert len(server.requests) == 10
    assert [row["judgment"] for row in read_lines(out)] == [expect(index) for index in range(NUM_RESPONSES)]
    assert "2 judgments were in the cache" in capsys.readouterr().out
    assert not Path(f"{out}.failures.jsonl").exists(), "it does not hold any more"


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_an_end_is_given_up(
    server: ChatServer, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "_LONGEST_ANSWER", 2)
    responses = write_lines(tmp_path / "in.jsonl", make_rows(2))
    server.fault, reason = ENDLESS[name]
    out = tmp_path / "out.jsonl"
    timeout = "0.3" if name == "a byte at a time" else "60"
    options = ["--timeout", timeout, "--max_retries", "0", "--concurrency", "1"]
    assert main(list_options(server, responses, out, *options)) == 1
    # The first as an answer, the second as what the server says of an error.
    assert [row["reason"] for row in find_failures(out)] == [reason, reason]


def test_an_error_that_comes_as_success_is_shown(server: ChatServer, responses: Path, tmp_path: Path) -> None:
    error = {"error": {"message": f"No more for {CANARY}.", "code": 429}}
    server.fault = lambda handler, number: handler.answer(200, error) is None
    out = tmp_path / "out.jsonl"
    options = ["--max_retries", "0", "--max_requests", "3", "--concurrency", "1"]
    assert main(list_options(server, responses, out, *options)) == 1
    assert [(row["kind"], row["reason"]) for row in find_failures(out)][:3] == [
        ("no answer", "the server answered an error (No more for [key]), after 1 attempts")
    ] * 3


def test_where_no_judgment_is_had_no_records_are_written(
    server: ChatServer, responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda prompt: ""
    out = tmp_path / "out.jsonl"
    assert main(list_options(server, responses, out)) == 1
    assert not out.exists()
    assert "no judgment was had" in capsys.readouterr().out
    assert len(find_failures(out)) == NUM_RESPONSES


def test_a_server_that_is_gone_is_not_asked_for_ever(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = write_lines(tmp_path / "many.jsonl", make_rows(40))
    server.fault = lambda handler, number: handler.answer(503, b"") is None
    out = tmp_path / "out.jsonl"
    assert main(list_options(server, responses, out, "--concurrency", "2", "--max_retries", "0")) == 1
    assert len(server.requests) < 15
    kinds = [row["kind"] for row in find_failures(out)]
    assert kinds.count("no answer") == 8
    assert kinds.count("not asked") == 32
    assert "stopped: the server gave no answer to 8 questions in a row" in capsys.readouterr().out


REFUSALS: dict[str, tuple[int, Any, str]] = {
    "no key": (401, {"error": {"message": f"Invalid key {CANARY}."}}, "wants another key (401: Invalid key [key]);"),
    "forbidden": (403, b"no", "the server wants another key (403: no); set OPENAI_API_KEY to one that it takes"),
    "no model": (404, {"message": "no such model"}, "or no model 'the-judge' (404: no such model); give the"),
    "too long": (400, {"error": {"message": "too long"}}, "refuses the request (400: too long); if it is too long"),
    "elsewhere": (307, b"", "the server names another address (307); give that one by --base_url"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence_and_not_asked_again(
    server: ChatServer, responses: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, value, expected = REFUSALS[name]

    def fault(handler: Handler, number: int) -> bool:
        handler.answer(status, value, Location=f"{server.url}/elsewhere")
        return True

    server.fault = fault
    assert main(list_options(server, responses, tmp_path / "out.jsonl", "--concurrency", "1")) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert CANARY not in printed.err + printed.out
    # One that may be about a question alone is told from one that is about all by the first few.
    assert len(server.requests) == 1 if status != 400 else 8 <= len(server.requests) < NUM_RESPONSES
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_costs_no_other_its_judgment(
    server: ChatServer, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = write_lines(tmp_path / "in.jsonl", make_rows(40))
    refused = {0, 1, 2, 17, 39}

    def fault(handler: Handler, number: int) -> bool:
        is_bad = read_number(server.requests[number]) in refused
        if is_bad:
            handler.answer(status, {"error": {"message": "maximum context length exceeded"}})
        return is_bad

    server.fault = fault
    out = tmp_path / "out.jsonl"
    options = list_options(server, responses, out, "--concurrency", "8")
    assert main(options) == 1, capsys.readouterr().err
    asked = [read_number(request) for request in server.requests]
    assert sorted(asked) == list(range(40)), "each was asked once"
    assert [row["judgment"] for row in read_lines(out)] == [
        expect(index) for index in range(40) if index not in refused
    ]
    assert [(row["location"], row["kind"], row["reason"]) for row in find_failures(out)] == [
        (
            f"{responses}:{index + 1}",
            "refused",
            f"the server refuses it ({status}: maximum context length exceeded); if it is too long for the model, give"
            " a smaller --max_tokens",
        )
        for index in sorted(refused)
    ]
    assert "5 responses have no judgment (5 refused)" in capsys.readouterr().out
    # Alone they are refused as they were among others, and no error.
    server.requests.clear()
    assert main([*options, "--overwrite"]) == 1
    assert sorted(map(read_number, server.requests)) == sorted(refused)
    assert len(read_lines(out)) == 35


ENDS: dict[str, tuple[int, int, list[str]]] = {
    "a key that expires": (401, 2, []),
    "a server that is gone": (503, 1, ["--max_retries", "0"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_on_its_way_when_the_run_ends_is_kept(server: ChatServer, tmp_path: Path, name: str) -> None:
    status, expected, more = ENDS[name]
    responses = write_lines(tmp_path / "in.jsonl", make_rows(40))
    ended = threading.Event()
    under_way = threading.Barrier(4, timeout=10)

    def fault(handler: Handler, number: int) -> bool:
        if number < 4:
            under_way.wait()
        if number in (0, 1, 2):
            ended.wait(10)
            time.sleep(0.3)
            return False
        handler.answer(status, b"")
        if number == (3 if status == 401 else 10):
            ended.set()
        return True

    server.fault = fault
    out = tmp_path / "out.jsonl"
    options = list_options(server, responses, out, "--concurrency", "4", *more)
    assert main(options) == expected
    kept = {read_number(request) for request in server.requests[:3]}
    assert len(server.requests) == 4 if status == 401 else 11 <= len(server.requests) < 15
    server.fault = None
    server.requests.clear()
    assert main([*options, "--overwrite"]) == 0
    assert {read_number(request) for request in server.requests} == set(range(40)) - kept


def test_a_cache_that_is_full_for_one_keeps_what_is_on_its_way(
    server: ChatServer,
    responses: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    under_way = threading.Barrier(4, timeout=10)

    def fault(handler: Handler, number: int) -> bool:
        if number < 4:
            under_way.wait()
        time.sleep(0.3 * number)
        return False

    def keep(self: Cache, key: str, judgment: str | None) -> None:
        kept.append(key)
        if len(kept) == 1:
            raise UserError("the disk is full")
        real(self, key, judgment)

    kept: list[str] = []
    real = Cache.keep
    server.fault = fault
    out = tmp_path / "out.jsonl"
    options = list_options(server, responses, out, "--concurrency", "4")
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "keep", keep)
        assert main(options) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert len(kept) == len(server.requests) <= 5
    server.fault = None
    server.requests.clear()
    assert main(options) == 0
    assert len(server.requests) == NUM_RESPONSES - len(kept) + 1


def test_a_killed_run_asks_only_for_what_is_missing(server: ChatServer, tmp_path: Path) -> None:
    rows = make_rows(20)
    responses, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    reached = threading.Event()
    server.fault = stall(reached, 9)
    options = list_options(server, responses, out, "--concurrency", "1")
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], stderr=subprocess.DEVNULL)
    assert reached.wait(120)
    # It asks for the tenth once the ninth's answer is there; the ninth may still be on its way to the disk.
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    server.fault = None
    first = server.prompts[:9]
    server.requests.clear()
    assert main(options) == 0
    assert len(server.requests) == 11
    assert not set(first) & set(server.prompts)
    assert [row["judgment"] for row in read_lines(out)] == [expect(index) for index in range(20)]


def test_ctrl_c_ends_it_at_once(server: ChatServer, responses: Path, tmp_path: Path) -> None:
    reached = threading.Event()
    server.fault = stall(reached, 3)
    options = list_options(server, responses, tmp_path / "out.jsonl", "--concurrency", "2")
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], stderr=subprocess.PIPE, text=True)
    assert reached.wait(120)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert "what was judged is in" in printed
    assert "Traceback" not in printed
