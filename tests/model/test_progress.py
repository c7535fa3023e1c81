"""Progress bars over tokens move within a forward pass, end at their total, and can be turned off."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import make_model

from cutlm.flagging import scoring
from cutlm.flagging.scoring import score_rows
from cutlm.model.progress import advance_by_layers, make_token_bar

LONG = {"prompt_ids": list(range(3, 50)), "judged_prompt_ids": list(range(9, 60)), "response_ids": [7, 8, 2]}
SHORT = {"prompt_ids": [3, 4], "judged_prompt_ids": None, "response_ids": [9, 2]}
ROWS = [SHORT, LONG | {"location": "a:2"}, SHORT]
NUM_TOKENS = [4, 50 + 54, 4]


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where the bar of `score_rows` was after each update."""
    found: list[float] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        bar = make_token_bar(*args, **kwargs)
        update = bar.update

        def record(amount: float) -> None:
            update(amount)
            found.append(bar.n)

        bar.update = record
        return bar

    monkeypatch.setattr(scoring, "make_token_bar", make)
    return found


def test_bar_moves_within_a_batch_and_ends_at_the_number_of_tokens(positions: list[float]) -> None:
    model = make_model(64)
    batches = list(score_rows(model, ROWS, max_tokens_per_batch=50))
    assert [len(batch) for batch in batches] == [1, 2]
    assert positions == sorted(positions)
    assert positions[-1] == pytest.approx(sum(NUM_TOKENS))
    within_first = {position for position in positions if 0 < position < NUM_TOKENS[1]}
    assert within_first, "after the first of its two layers"
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_bar_of_a_resumed_run_starts_at_its_tokens(positions: list[float]) -> None:
    list(score_rows(make_model(64), ROWS, done={1}))
    assert positions[0] > NUM_TOKENS[1]
    assert positions[-1] == pytest.approx(sum(NUM_TOKENS))


def test_padding_does_not_move_the_bar_beyond_its_total() -> None:
    model = make_model(64)
    with make_token_bar("test", 10) as bar:
        with advance_by_layers(bar, model, 10):
            model(input_ids=torch.ones(3, 20, dtype=torch.long))
            assert bar.n == 10
        assert bar.n == 10


def test_failed_pass_leaves_no_hooks() -> None:
    model = make_model(64)
    with make_token_bar("test", 10) as bar:
        with pytest.raises(ValueError, match="stop"), advance_by_layers(bar, model, 10):
            raise ValueError("stop")
        assert bar.n == 0
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(("value", "is_shown"), [("", True), ("1", False)])
def test_environment_turns_the_bar_off(value: str, is_shown: bool) -> None:
    code = "from cutlm.model.progress import make_token_bar\nmake_token_bar('blame', 2000, num_done=1000).close()"
    environment = os.environ | {"TQDM_DISABLE": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("1.00k/2.00k" in done.stderr) == is_shown
