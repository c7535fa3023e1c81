"""Unlikelihood of given flags, CUT with parts switched off, and DualCUT, by hand and against plain probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlm.losses import Parts, TokenFlags, combine_parts, cut_loss, dual_cut_loss, flag_tokens, unlikelihood_loss
from cutlm.losses.cut import MAX_SLOPE

SETTINGS = {"threshold": 1.1, "unlikelihood_weight": 0.5, "gamma": 1.0}
EMPTY = torch.zeros(0, dtype=torch.float64)


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def make_flags(*weights: float | None) -> TokenFlags:
    is_flagged = torch.tensor([weight is not None for weight in weights])
    return TokenFlags(is_flagged, torch.tensor([weight or 0.0 for weight in weights], dtype=torch.float64))


def test_flagged_tokens_get_weighted_unlikelihood_and_others_likelihood():
    logps = log_of(0.5, 0.8, 0.25).requires_grad_()
    losses = unlikelihood_loss(logps, make_flags(None, 0.5, None))
    # -log 0.5; -0.5 * log(1 - 0.8); -log 0.25
    assert losses.tolist() == pytest.approx([math.log(2), -0.5 * math.log(0.2), math.log(4)], rel=1e-14)
    losses.sum().backward()
    # Slope of the flagged token in log p: 0.5 * 0.8 / (1 - 0.8) = 2.
    assert logps.grad.tolist() == pytest.approx([-1, 2, -1], rel=1e-13)


def test_flagged_token_of_weight_zero_has_no_loss_and_no_gradient():
    logps = log_of(0.5).requires_grad_()
    loss = unlikelihood_loss(logps, TokenFlags(torch.tensor([True]), torch.zeros(1, dtype=torch.float64))).sum()
    loss.backward()
    assert (loss.item(), logps.grad.item()) == (0, 0)


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-5, -9e-5])
def test_slope_of_a_flagged_token_near_probability_one_is_bounded(logp):
    logps = torch.tensor([logp], dtype=torch.float32, requires_grad=True)
    loss = unlikelihood_loss(logps, TokenFlags(torch.tensor([True]), torch.ones(1))).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert logps.grad.item() == pytest.approx(MAX_SLOPE, rel=1e-3)


def test_slope_below_the_bound_is_exact():
    p = 0.9998
    logps = log_of(p).requires_grad_()
    unlikelihood_loss(logps, make_flags(1.0)).sum().backward()
    assert logps.grad.item() == pytest.approx(p / (1 - p), rel=1e-9)


def test_flags_and_weights_follow_equations_5_and_6():
    flags = flag_tokens(log_of(0.5, 0.2, 0.4), log_of(0.54, 0.5, 0.1), **SETTINGS)
    # 0.54 > 1.1 * 0.5 = 0.55? no. 0.5 > 0.22? yes, weight 0.5 * 0.5^1. 0.1 > 0.44? no.
    assert flags.is_flagged.tolist() == [False, True, False]
    assert flags.weights.tolist() == pytest.approx([0, 0.25, 0])


def test_threshold_zero_flags_every_token():
    flags = flag_tokens(log_of(0.5, 0.9), log_of(0.5, 0.1), threshold=0, unlikelihood_weight=1.0, gamma=1.0)
    assert flags.is_flagged.tolist() == [True, True]
    assert flags.weights.tolist() == pytest.approx([0.5, 0.1])


def test_given_flags_replace_detection():
    without, with_judgment = log_of(0.5, 0.2), log_of(0.5, 0.9)
    got = cut_loss(without, with_judgment, EMPTY, flags=make_flags(0.3, None), **SETTINGS)
    assert got.is_flagged.tolist() == [True, False]
    assert got.contrast.item() == pytest.approx(-0.3 * math.log(0.5) - math.log(0.2), rel=1e-13)


def test_responses_with_one_context_can_have_flags():
    got = cut_loss(EMPTY, EMPTY, log_of(0.5, 0.25), flags_satisfactory=make_flags(None, 0.4), **SETTINGS)
    assert got.likelihood.item() == pytest.approx(-math.log(0.5) - 0.4 * math.log(0.75), rel=1e-13)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (Parts(), (math.log(2) / 1 + (math.log(4) + math.log(5)) / 2) / 2),
        (Parts(contrast=False), (math.log(4) + math.log(5)) / 2),
        (Parts(satisfactory=False), (math.log(2) + math.log(4)) / 2),
        (Parts(unsatisfactory=False), (math.log(2) + math.log(5)) / 2),
        (Parts(satisfactory=False, unsatisfactory=False), math.log(2)),
    ],
)
def test_disabled_parts_count_in_neither_sum_nor_denominator(parts, expected):
    # p = 1/2 without and 1/4 with the judgment, so not flagged; 1/5 of a satisfactory response.
    got = cut_loss(log_of(1 / 2), log_of(1 / 4), log_of(1 / 5), parts=parts, **SETTINGS)
    counts = (1 * parts.contrast, 1 * parts.unsatisfactory + 1 * parts.satisfactory)
    assert combine_parts(got.contrast, got.likelihood, *counts).item() == pytest.approx(expected, rel=1e-14)


def test_step_without_tokens_has_zero_loss():
    assert combine_parts(0.0, 0.0, 0, 0) == 0


DUAL = {"threshold": 1.25, "unlikelihood_weight": 0.5, "praise_weight": 2.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dual_cut_marks_and_weighs_tokens_by_the_ratio():
    # Ratios: 1.6, 0.5, and 3 of an unlikely token, of a criticized response; 1.6, 1, 3 of a praised one.
    without = log_of(0.5, 0.2, 0.002, 0.5, 0.4, 0.002).requires_grad_()
    with_judgment = log_of(0.8, 0.1, 0.006, 0.8, 0.4, 0.006).requires_grad_()
    is_praised = torch.tensor([False, False, False, True, True, True])
    got = dual_cut_loss(without, with_judgment, log_of(0.3), is_praised, **DUAL)

    assert got.is_flagged.tolist() == [True, False, False, False, False, False]
    scale = sigmoid(1.6 - 1.25)
    criticized = -0.5 * scale * math.log(0.5) - math.log(0.2) - math.log(0.002)
    praised = -(1 + 2 * scale) * math.log(0.5) - math.log(0.4) - math.log(0.002)
    assert got.contrast.item() == pytest.approx(criticized + praised, rel=1e-13)
    assert got.likelihood.item() == pytest.approx(-math.log(0.3), rel=1e-13)
    got.contrast.backward()
    # Neither the weights nor the responses in the judged context have a gradient.
    assert with_judgment.grad is None
    assert without.grad.tolist() == pytest.approx(
        [0.5 * scale * 0.5 / 0.5, -1, -1, -(1 + 2 * scale), -1, -1], rel=1e-13
    )


def test_dual_cut_marks_no_token_of_a_chat_template():
    without, with_judgment = log_of(0.2, 0.2), log_of(0.8, 0.8)
    can_flag = torch.tensor([False, False])
    got = dual_cut_loss(without, with_judgment, EMPTY, torch.tensor([False, True]), can_flag=can_flag, **DUAL)
    assert got.contrast.item() == pytest.approx(-2 * math.log(0.2), rel=1e-13)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.booleans(), st.floats(0.1, 2)),
        min_size=1,
        max_size=12,
    )
)
def test_dual_cut_matches_a_naive_implementation(tokens):
    expected = 0.0
    for p, q, is_praised, weight in tokens:
        scale = sigmoid(q / p - 1.25) if q / p > 1.25 and q > 0.01 else None
        if scale is None:
            expected -= weight * math.log(p)
        elif is_praised:
            expected -= weight * (1 + 2 * scale) * math.log(p)
        else:
            expected -= weight * 0.5 * scale * math.log(1 - p)
    columns = list(zip(*tokens, strict=True))
    weights = torch.tensor(columns[3], dtype=torch.float64)
    args = (log_of(*columns[0]), log_of(*columns[1]), EMPTY, torch.tensor(columns[2]))
    assert dual_cut_loss(*args, weights=weights, **DUAL).contrast.item() == pytest.approx(expected, rel=1e-10)
