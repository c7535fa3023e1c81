"""The cache of answers and the budget of all runs that share it."""

import contextlib
import threading
from pathlib import Path

import pytest
from chat_server import ChatServer, fail_first, make_completion

from cutlm.errors import UserError
from cutlm.servers.cache import Budget, BudgetExceeded, Cache
from cutlm.servers.client import NOT_SENT, Client, RequestFailed, Server


def test_another_kind_of_file_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n" * 1000)
    with pytest.raises(UserError, match="cannot be used as a cache"):
        Cache(path)
    assert path.read_text() == "{}\n" * 1000


def test_halves_of_surrogate_pairs_are_replaced_and_all_other_text_kept(tmp_path: Path) -> None:
    answers = {"a": "<think>\ud83d</think>Wrong.", "b": "\0 \U0001f600 é", "c": "", "d": None}
    with Cache(tmp_path / "cache.sqlite") as cache:
        for key, answer in answers.items():
            cache.put(key, answer)
        assert cache.get_many(answers) == answers | {"a": "<think>?</think>Wrong."}


def test_a_damaged_cache_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with Cache(path) as cache:
        cache._connection.execute("BEGIN")
        for number in range(2000):
            cache.put(f"{number:064}", "Wrong." * 20)
        cache._connection.execute("COMMIT")
    data = bytearray(path.read_bytes())
    start = 3 * 4096  # the pages before this one make it open; the rest cannot be searched
    data[start:] = b"\x5a" * (len(data) - start)
    path.write_bytes(data)
    with Cache(path) as cache, pytest.raises(UserError, match=r"cannot use the cache .* pass another file"):
        cache.get_many(f"{number:064}" for number in range(2000))


def test_a_count_of_tokens_that_is_implausible_is_estimated(server: ChatServer, tmp_path: Path) -> None:
    server.fault = lambda handler, number: handler.answer(200, make_completion("Wrong.", total_tokens=10**400)) is None
    with Cache(tmp_path / "a.sqlite") as cache:
        budget = Budget(cache)
        client = Client(Server(server.url, "m"), budget)
        client.complete(client.server.make_body("x" * 93))
        assert (budget.num_tokens, budget.is_estimated) == (25, True)


def test_the_cap_on_requests_holds_for_retries_and_for_later_runs(server: ChatServer, tmp_path: Path) -> None:
    server.fault = fail_first(500, b"")
    for max_requests, num_requests in ((3, 3), (3, 3), (5, 5)):
        with Cache(tmp_path / "a.sqlite") as cache:
            client = Client(Server(server.url, "m", concurrency=2), Budget(cache, max_requests))
            bodies = [client.server.make_body(f"Answer <{number}>") for number in range(9)]
            results = [
                result
                for _, result in client.request_many(
                    lambda number, client=client, bodies=bodies: client.complete(bodies[number]), [""] * 9, advice=""
                )
            ]
        assert len(server.requests) == num_requests
        failures = [result for result in results if isinstance(result, RequestFailed)]
        assert {failure.kind for failure in failures} == {NOT_SENT}
        assert f"max_requests {max_requests} is reached" in str(failures[0])


@pytest.mark.parametrize("is_reported", [True, False])
def test_the_cap_on_tokens_ends_a_run(server: ChatServer, tmp_path: Path, is_reported: bool) -> None:
    if not is_reported:
        answer = make_completion("Wrong.", total_tokens=None)
        server.fault = lambda handler, number: handler.answer(200, answer) is None
    with Cache(tmp_path / "a.sqlite") as cache:
        budget = Budget(cache, None, 250)
        client = Client(Server(server.url, "m"), budget)
        body = client.server.make_body("Answer <1>" + "x" * (384 if not is_reported else 0))
        for _ in range(3):
            client.complete(body)
        with pytest.raises(RequestFailed, match="max_tokens_total 250 is reached") as failure:
            client.complete(body)
    assert failure.value.kind == NOT_SENT
    assert len(server.requests) == 3
    assert budget.is_estimated != is_reported


def test_runs_at_the_same_time_share_a_budget(tmp_path: Path) -> None:
    def spend(budget: Budget) -> None:
        with contextlib.suppress(BudgetExceeded):
            while True:
                budget.count_request()
                budget.count_tokens(3, 0)

    with Cache(tmp_path / "a.sqlite") as one, Cache(tmp_path / "a.sqlite") as other:
        budgets = [Budget(one, 40), Budget(other, 40)]
        threads = [threading.Thread(target=spend, args=(budget,)) for budget in budgets * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_requests, num_tokens = one.read_usage()
        assert num_requests == sum(budget.num_requests for budget in budgets)
        assert 40 <= num_requests <= 41, "each may send the last one"
        assert num_tokens == 3 * num_requests


def test_tokens_that_cannot_be_written_are_written_with_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UserError("full")

    with Cache(tmp_path / "a.sqlite") as cache:
        budget = Budget(cache, None, 10)
        budget.count_request()
        with monkeypatch.context() as patch:
            patch.setattr(cache, "add_usage", fail)
            budget.count_tokens(7, 0)
            with pytest.raises(UserError, match="full"):
                budget.count_request()
        assert (budget.read_total(), cache.read_usage()) == ((1, 7), (1, 0))
        budget.count_request()
        assert budget.read_total() == cache.read_usage() == (2, 7)
