"""What a judge on a server may spend, over all runs that share a cache."""

import contextlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from chat_server import (
    COMMAND,
    ChatServer,
    answer_once,
    make_completion,
    stall,
)
from judged_rows import (
    NUM_RESPONSES,
    find_failures,
    list_options,
    read_lines,
)

from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.servers.budget import CapReached, Spending
from cutlm.servers.cache import Cache


def test_a_count_of_tokens_that_is_none_is_estimated(
    server: ChatServer, responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda handler, number: (
        handler.answer(200, make_completion("It is wrong.", total_tokens=10**400)) is None
    )
    assert main(list_options(server, responses, tmp_path / "out.jsonl")) == 0
    assert re.search(r"12 requests, \d{4} tokens \(some of them estimated", capsys.readouterr().out)


def test_the_cap_on_requests_counts_every_attempt(
    server: ChatServer, responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = answer_once(500, b"")
    out = tmp_path / "out.jsonl"
    assert main(list_options(server, responses, out, "--max_requests", "7", "--concurrency", "3")) == 1
    assert len(server.requests) == 7
    assert len(read_lines(out)) == 5
    cache = f"{out}.cache.sqlite"
    reason = f"--max_requests 7 is reached by all runs that share the cache {cache}; give a larger one to go on"
    assert {(row["kind"], row["reason"]) for row in find_failures(out)} == {("not asked", reason)}
    assert f"stopped: {reason}" in capsys.readouterr().out
    server.fault = None
    server.requests.clear()
    assert main(list_options(server, responses, out, "--overwrite", "--max_requests", "7")) == 1
    assert not server.requests, "a second start has no more to spend"
    assert main(list_options(server, responses, out, "--overwrite", "--max_requests", "9")) == 1
    assert len(server.requests) == 2
    assert main(list_options(server, responses, out, "--overwrite")) == 0
    assert len(server.requests) == NUM_RESPONSES - 5, "what was had is kept"
    assert "5 requests, 500 tokens\n14 requests, 1200 tokens by all runs with this cache" in capsys.readouterr().out


def test_what_a_killed_run_has_spent_counts(server: ChatServer, responses: Path, tmp_path: Path) -> None:
    reached = threading.Event()
    server.fault = stall(reached, 5)
    out = tmp_path / "out.jsonl"
    options = list_options(server, responses, out, "--concurrency", "1", "--max_requests", "8")
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], stderr=subprocess.DEVNULL)
    assert reached.wait(120)
    process.kill()
    process.wait()
    server.fault = None
    assert main(options) == 1
    assert len(server.requests) == 8, "six before, the one without an answer among them, and two now"
    with Cache(f"{out}.cache.sqlite") as cache:
        assert cache.read_spent() == (8, 700)
    assert len(read_lines(out)) == 7


def test_runs_at_the_same_time_share_what_they_may_spend(tmp_path: Path) -> None:
    def spend(spending: Spending) -> None:
        with contextlib.suppress(CapReached):
            while True:
                spending.take_request()
                spending.add_tokens(3, 0)

    with Cache(tmp_path / "a.sqlite") as one, Cache(tmp_path / "a.sqlite") as other:
        spendings = [Spending(40, None, one), Spending(40, None, other)]
        threads = [threading.Thread(target=spend, args=(spending,)) for spending in spendings * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_requests, num_tokens = one.read_spent()
        assert num_requests == sum(spending.num_requests for spending in spendings)
        assert 40 <= num_requests <= 41, "each may take the last"
        assert num_tokens == 3 * num_requests


def test_tokens_that_cannot_be_written_down_cost_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        spending = Spending(None, 10, cache)
        spending.take_request()
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_write", lambda *arguments: (_ for _ in ()).throw(UserError("full")))
            spending.add_tokens(7, 0)
            with pytest.raises(UserError, match="full"):
                spending.take_request()
        assert (spending.read_total(), cache.read_spent()) == ((1, 7), (1, 0))
        spending.take_request()
        assert spending.read_total() == cache.read_spent() == (2, 7)


@pytest.mark.parametrize("is_said", [True, False])
def test_the_cap_on_tokens_stops_asking(
    server: ChatServer, responses: Path, tmp_path: Path, is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not is_said:
        server.fault = lambda handler, number: handler.answer(200, make_completion("Wrong.", total_tokens=None)) is None
    cap = 250 if is_said else 600  # about 220 tokens a question, by their bytes
    out = tmp_path / "out.jsonl"
    assert main(list_options(server, responses, out, "--max_tokens_total", str(cap), "--concurrency", "1")) == 1
    assert len(server.requests) == len(read_lines(out)) == 3
    printed = capsys.readouterr().out
    assert f"stopped: --max_tokens_total {cap} is reached" in printed
    assert ("estimated" in printed) != is_said
