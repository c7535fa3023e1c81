"""The limits of requests and tokens per minute, on a clock that only waiting moves."""

import random

import pytest

from cutlm.servers.limiter import RateLimiter


class Clock:
    """A clock that stands still except while somebody waits."""

    def __init__(self) -> None:
        self.time = 1000.1

    def read(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds


def test_no_minute_has_more_requests_than_allowed() -> None:
    clock = Clock()
    limiter = RateLimiter(requests_per_minute=3, clock=clock.read)
    times = []
    for pause in (0, 10, 20, 5, 0, 0, 100, 0, 0, 0):
        clock.time += pause
        limiter.start(10, clock.wait)
        times.append(clock.time - 1000.1)
    assert times == pytest.approx([0, 10, 30, 60, 70, 90, 190, 190, 190, 250])


def test_no_minute_has_more_tokens_than_allowed() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=100, clock=clock.read)
    times = []
    for pause, num_tokens in ((0, 60), (10, 40), (0, 30), (0, 30), (0, 20), (0, 100), (0, 1)):
        clock.time += pause
        limiter.start(num_tokens, clock.wait)
        times.append(clock.time - 1000.1)
    assert times == pytest.approx([0, 10, 60, 60, 70, 130, 190])


def test_a_request_above_the_limit_goes_alone() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=100, clock=clock.read)
    times = []
    for num_tokens in (1, 500, 1):
        limiter.start(num_tokens, clock.wait)
        times.append(clock.time - 1000.1)
    assert times == pytest.approx([0, 60, 120])


def test_fewer_tokens_than_expected_let_the_next_request_start_earlier() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=100, clock=clock.read)
    first = limiter.start(100, clock.wait)

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        if clock.time > 1005:
            limiter.correct(first, 20)

    limiter.start(80, wait)
    assert 1005 < clock.time < 1007
    limiter.start(1, clock.wait)
    assert clock.time == pytest.approx(1060.1)


def test_random_requests_keep_both_limits_and_wait_no_longer_than_needed() -> None:
    numbers = random.Random(3)
    clock = Clock()
    limiter = RateLimiter(7, 300, clock.read)
    sent: list[tuple[float, int]] = []
    for _ in range(300):
        clock.time += numbers.choice([0.0, 0.0, 1.7, 13.3])
        before, num_tokens = clock.time, numbers.randrange(120)
        limiter.start(num_tokens, clock.wait)
        sent.append((clock.time, num_tokens))
        last_minute = [tokens for time, tokens in sent if time + 60 > clock.time]
        assert len(last_minute) <= 7
        assert sum(last_minute) <= 300
        if clock.time > before:  # a moment earlier, one more would have been too many
            earlier = [tokens for time, tokens in sent if time > clock.time - 1e-6 - 60]
            assert len(earlier) > 7 or sum(earlier) > 300


def test_without_limits_nothing_waits() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock.read)
    for _ in range(100):
        limiter.start(10**9, clock.wait)
    assert clock.time == 1000.1
