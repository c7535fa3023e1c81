"""Micro-batches without padding: their tensors, and log-probabilities that do not depend on the rest of a batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model
from torch import Tensor, nn

from cutlm.losses import ALL_PARTS
from cutlm.model.collator import CutCollator, find_non_finite, split_batch, split_lengths
from cutlm.model.forward import PrefixTree, _group_by_length, run_inside, score_batch
from cutlm.training.trainer import count_batch

VOCAB_SIZE = 50
collate = CutCollator()


def make_row(prompt: list[int], judged: list[int] | None, response: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_ids": prompt, "judged_prompt_ids": judged, "response_ids": response} | more


UNSATISFACTORY = make_row([1, 5], [1, 5, 9], [7, 8, 2])
SATISFACTORY = make_row([1, 6], None, [4, 2])

ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9)
rows = st.builds(make_row, ids, st.none() | ids, ids)
batches = st.lists(rows, min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model(VOCAB_SIZE)


# ---- Layout ----


def test_batch_is_the_one_of_the_docstring():
    batch = collate([UNSATISFACTORY, SATISFACTORY])
    assert batch.keys() == {
        "input_ids",
        "target_ids",
        "sequence_lengths",
        "response_lengths",
        "num_unsatisfactory",
        "shared_lengths",
        "locations",
    }
    #       without the judgment     with it           satisfactory
    assert batch["input_ids"].tolist() == [1, 5, 7, 8, *[1, 5, 9, 7, 8], *[1, 6, 4]]
    assert batch["target_ids"].tolist() == [7, 8, 2, *[7, 8, 2], *[4, 2]]
    assert batch["sequence_lengths"] == [4, 5, 3]
    assert batch["response_lengths"] == [3, 3, 2]
    assert batch["num_unsatisfactory"] == 1
    assert batch["shared_lengths"] == [1]
    assert batch["locations"] == ["record 0 of the batch", "record 1 of the batch"]
    assert batch["input_ids"].dtype == batch["target_ids"].dtype == torch.long


def test_unsatisfactory_records_come_first_in_order():
    other = make_row([3], [3, 3], [9, 2], location="data.jsonl:4")
    batch = collate([SATISFACTORY, UNSATISFACTORY, SATISFACTORY, other])
    assert batch["sequence_lengths"] == [4, 2, 5, 3, 3, 3]
    assert batch["input_ids"].tolist() == [1, 5, 7, 8, *[3, 9], *[1, 5, 9, 7, 8], *[3, 3, 9], *[1, 6, 4], *[1, 6, 4]]
    assert batch["target_ids"].tolist() == [7, 8, 2, *[9, 2], *[7, 8, 2], *[9, 2], *[4, 2], *[4, 2]]
    assert batch["num_unsatisfactory"] == 2
    assert batch["locations"] == [
        "record 1 of the batch",
        "data.jsonl:4",
        "record 0 of the batch",
        "record 2 of the batch",
    ]


def test_batch_with_one_kind_of_record():
    assert collate([SATISFACTORY])["num_unsatisfactory"] == 0
    assert collate([SATISFACTORY])["sequence_lengths"] == [3]
    assert collate([UNSATISFACTORY])["sequence_lengths"] == [4, 5]


@settings(max_examples=60, deadline=None)
@given(batches)
def test_sequences_are_prompts_with_responses_without_their_last_token(batch_rows):
    batch = collate(batch_rows)
    judged = [row for row in batch_rows if row["judged_prompt_ids"] is not None]
    plain = [row for row in batch_rows if row["judged_prompt_ids"] is None]
    prompts = [row["prompt_ids"] for row in judged]
    prompts += [row["judged_prompt_ids"] for row in judged]
    prompts += [row["prompt_ids"] for row in plain]
    responses = [row["response_ids"] for row in [*judged, *judged, *plain]]

    assert len(batch["input_ids"]) == sum(batch["sequence_lengths"])
    assert len(batch["target_ids"]) == sum(batch["response_lengths"])
    inputs = batch["input_ids"].split(batch["sequence_lengths"])
    targets = batch["target_ids"].split(batch["response_lengths"])
    for prompt, response, sequence, target in zip(prompts, responses, inputs, targets, strict=True):
        assert sequence.tolist() == prompt + response[:-1]
        assert target.tolist() == response


# ---- Counts ----


def test_split_lengths_counts_each_response_once():
    batch = collate([UNSATISFACTORY, SATISFACTORY, make_row([1], [2], [5]), SATISFACTORY])
    assert split_lengths(batch) == (3 + 1, 2 + 2)


def test_count_batch_counts_tokens_or_records():
    batch = collate([UNSATISFACTORY, SATISFACTORY, make_row([1], [2], [5]), SATISFACTORY])
    # L1 is over the 3 + 1 tokens of 2 unsatisfactory records, L2 over theirs and 2 + 2 of 2 satisfactory ones.
    assert count_batch(batch, "token", ALL_PARTS) == (4, 8)
    assert count_batch(batch, "record", ALL_PARTS) == (2, 4)
    assert count_batch(collate([SATISFACTORY]), "token", ALL_PARTS) == (0, 2)
    assert count_batch(collate([SATISFACTORY]), "record", ALL_PARTS) == (0, 1)


# ---- Non-finite records ----


@settings(max_examples=80, deadline=None)
@given(batch_rows=batches, data=st.data())
def test_records_with_non_finite_log_probs_are_named(batch_rows, data):
    batch = collate([row | {"location": f"row {index}"} for index, row in enumerate(batch_rows)])
    # The row of each response token, in the order of the batch.
    judged = [index for index, row in enumerate(batch_rows) if row["judged_prompt_ids"] is not None]
    plain = [index for index, row in enumerate(batch_rows) if row["judged_prompt_ids"] is None]
    owners = [index for index in [*judged, *judged, *plain] for _ in batch_rows[index]["response_ids"]]
    logps = torch.full((len(owners),), -1.0)
    assert find_non_finite(logps, batch) == []

    bad = data.draw(st.lists(st.integers(0, len(owners) - 1), min_size=1, max_size=3))
    for position in bad:
        logps[position] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    expected = [f"row {index}" for index in judged + plain if index in {owners[position] for position in bad}]
    assert find_non_finite(logps, batch) == expected


# ---- Log-probs ----


def score_alone(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Computes log-probabilities from the model's own logits over the whole sequence."""
    sequence = torch.tensor([prompt + response])
    logps = model(input_ids=sequence).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, sequence.shape[1] - 1)
    return logps[positions, sequence[0, positions + 1]]


@settings(max_examples=20, deadline=None)
@given(batch_rows=batches, chunk_size=st.sampled_from([None, 1, 4]))
def test_log_probs_of_a_record_do_not_depend_on_the_batch(model, batch_rows, chunk_size):
    batch = collate(batch_rows)
    with torch.no_grad():
        logps = score_batch(model, batch, chunk_size)
        parts = logps.split(batch["response_lengths"])
        judged = [row for row in batch_rows if row["judged_prompt_ids"] is not None]
        plain = [row for row in batch_rows if row["judged_prompt_ids"] is None]
        alone = [score_alone(model, row["prompt_ids"], row["response_ids"]) for row in judged]
        alone += [score_alone(model, row["judged_prompt_ids"], row["response_ids"]) for row in judged]
        alone += [score_alone(model, row["prompt_ids"], row["response_ids"]) for row in plain]
    assert logps.dtype == torch.float32
    for got, want in zip(parts, alone, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_match_those_of_separate_records():
    batch_rows = [UNSATISFACTORY, SATISFACTORY, make_row([3, 4, 4, 1], [3, 4, 4, 1, 1], [9, 2])]
    model = make_model(VOCAB_SIZE)
    parameters = dict(model.named_parameters())
    weights = torch.linspace(-1, 1, 3 + 2 + 3 + 2 + 2)
    got = torch.autograd.grad((score_batch(model, collate(batch_rows), 4) * weights).sum(), parameters.values())
    first, last, plain = batch_rows[0], batch_rows[2], batch_rows[1]
    alone = [
        score_alone(model, first["prompt_ids"], first["response_ids"]),
        score_alone(model, last["prompt_ids"], last["response_ids"]),
        score_alone(model, first["judged_prompt_ids"], first["response_ids"]),
        score_alone(model, last["judged_prompt_ids"], last["response_ids"]),
        score_alone(model, plain["prompt_ids"], plain["response_ids"]),
    ]
    want = torch.autograd.grad((torch.cat(alone) * weights).sum(), parameters.values())
    for name, ours, theirs in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_contexts_of_like_length_share_a_forward_pass(model):
    calls: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        for batch_rows, expected in [
            ([SATISFACTORY], [2 + 1]),
            # Sequences of 2 + 2 and 3 + 2 tokens are padded to 5; one of 2 + 1 would need too much padding.
            ([UNSATISFACTORY], [2 * 5]),
            ([SATISFACTORY, UNSATISFACTORY, SATISFACTORY], [2 * 5, 2 * 3]),
        ]:
            calls.clear()
            with torch.no_grad():
                score_batch(model, collate(batch_rows))
            assert calls == expected
    finally:
        hook.remove()


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 2000))
def test_groups_hold_every_sequence_once_with_little_padding(lengths, limit):
    trees = [PrefixTree((index,), 0, length) for index, length in enumerate(lengths)]
    groups = [[tree.indices[0] for tree in group] for group in _group_by_length(trees, limit, lengths)]
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert len(group) == 1 or padded <= limit
        assert padded <= 9 / 8 * sum(lengths[index] for index in group)


def test_frozen_judged_contexts_get_no_gradient(model):
    batch = collate([UNSATISFACTORY, SATISFACTORY])
    whole = score_batch(model, batch)
    logps = score_batch(model, batch, needs_judged_grad=False)
    torch.testing.assert_close(logps, whole)
    without, with_judgment, satisfactory = logps.split([3, 3, 2])
    weight = next(model.base_model.layers.parameters())
    assert torch.autograd.grad(with_judgment.sum(), weight, retain_graph=True)[0].abs().sum() == 0
    (got,) = torch.autograd.grad(without.sum() + satisfactory.sum(), weight)
    (want,) = torch.autograd.grad(whole.split([3, 3, 2])[0].sum() + whole.split([3, 3, 2])[2].sum(), weight)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(batch_rows=batches, max_tokens=st.integers(1, 60), data=st.data())
def test_split_batch_equals_collating_each_part(batch_rows, max_tokens, data):
    has_flags = data.draw(st.booleans())
    named = [row | {"location": f"row {index}", "is_praised": index % 2 == 0} for index, row in enumerate(batch_rows)]
    if has_flags:
        for index, row in enumerate(named):
            size = len(row["response_ids"])
            row |= {"is_flagged": [index % 2 == 1] * size, "weights": [float(index)] * size}
    parts = split_batch(collate(named), max_tokens)
    locations = [location for part in parts for location in part["locations"]]
    assert sorted(locations) == sorted(row["location"] for row in named)
    by_location = {row["location"]: row for row in named}
    for part in parts:
        expected = collate([by_location[location] for location in part["locations"]])
        assert part.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(part[name], value) if isinstance(value, Tensor) else part[name] == value
        assert len(part["locations"]) == 1 or len(part["input_ids"]) <= max_tokens


def test_split_batch_puts_the_longest_records_first_and_together():
    long, short = make_row([1] * 20, None, [2]), make_row([1] * 3, [1] * 4, [2, 3])
    batch = collate(
        [short | {"location": "a"}, long | {"location": "b"}, short | {"location": "c"}, long | {"location": "d"}]
    )
    # Long records have 20 tokens; short ones 3 + 1 and 4 + 1 in their two contexts.
    assert [part["locations"] for part in split_batch(batch, 40)] == [["b", "d"], ["a", "c"]]
    assert [part["locations"] for part in split_batch(batch, 10)] == [["b"], ["d"], ["a"], ["c"]]
    assert [part["locations"] for part in split_batch(batch, 58)] == [["a", "c", "b", "d"]]


def test_flags_follow_the_order_of_the_plain_contexts():
    judged = UNSATISFACTORY | {"is_flagged": [False, True, False], "weights": [0.0, 0.5, 0.0]}
    alone = judged | {"judged_prompt_ids": None, "is_flagged": [True, False, False], "weights": [0.25, 0.0, 0.0]}
    batch = collate([SATISFACTORY, alone, judged])
    # The judged record, then the satisfactory one, then the one with flags and a single context.
    assert batch["is_flagged"].tolist() == [*[False, True, False], *[False, False], *[True, False, False]]
    assert batch["flag_weights"].tolist() == [*[0, 0.5, 0], *[0, 0], *[0.25, 0, 0]]


def test_praise_follows_the_order_of_the_judged_records():
    praised = UNSATISFACTORY | {"is_praised": True}
    assert collate([SATISFACTORY, UNSATISFACTORY, praised])["is_praised"] == [False, True]


def test_run_inside_calls_the_wrapper_and_restores_the_module(model):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.num_calls = 0

        def forward(self, *args):
            self.num_calls += 1
            return self.module(*args)

    wrapper, batch = Wrapper(model), collate([UNSATISFACTORY])
    with torch.no_grad():
        expected = score_batch(model, batch, 2)
        assert torch.equal(run_inside(wrapper, model, score_batch, batch, 2), expected)
        assert torch.equal(run_inside(model, model, score_batch, batch, 2), expected)
    assert wrapper.num_calls == 1
    assert "forward" not in vars(model)

    def fail(module: nn.Module) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        run_inside(wrapper, model, fail)
    assert "forward" not in vars(model)


def test_tokens_of_the_chat_template_cannot_be_flagged() -> None:
    rows = [
        {"prompt_ids": [1], "judged_prompt_ids": [1, 9], "response_ids": [5, 6, 2], "num_template_tokens": 2},
        {"prompt_ids": [1], "judged_prompt_ids": None, "response_ids": [5, 6, 2], "num_template_tokens": 2},
        {"prompt_ids": [1], "judged_prompt_ids": [1, 8, 9], "response_ids": [5, 2], "num_template_tokens": None},
    ]
    batch = CutCollator()(rows)
    assert batch["can_flag"].tolist() == [False, False, True, True, True]
    parts = split_batch(batch, 1)
    assert [part["can_flag"].tolist() for part in parts if "can_flag" in part] == [[False, False, True], [True, True]]
    assert "can_flag" not in CutCollator()([rows[1], rows[2]])
