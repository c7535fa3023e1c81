"""CUT's loss against hand-computed cases, and against the paper's formulas written out over plain probabilities."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlm.losses import combine_parts, cut_loss
from cutlm.losses.cut import flag_tokens, log1mexp

GAMMAS = (0.0, 0.25, 1.0, 2.0)
THRESHOLDS = (1.0, 1.1, 1.2, 3.0)


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# ---- By hand ----


def test_loss_follows_the_equations():
    without = log_of(0.5, 0.2, 0.4).requires_grad_()
    with_judgment = log_of(0.5, 0.5, 0.1).requires_grad_()
    satisfactory = log_of(0.8, 0.25).requires_grad_()

    got = cut_loss(without, with_judgment, satisfactory, threshold=1.2, unlikelihood_weight=0.5, gamma=2.0)

    # Eq. 5: 0.5 > 1.2 * 0.5? no. 0.5 > 1.2 * 0.2 = 0.24? yes. 0.1 > 1.2 * 0.4? no.
    assert got.is_flagged.tolist() == [False, True, False]
    # Eq. 6: the flagged token weighs alpha * p(y|x,j)^gamma = 0.5 * 0.5^2 = 0.125, on log(1 - 0.2).
    contrast = -(math.log(0.5) + 0.125 * math.log(0.8) + math.log(0.4))
    assert got.contrast.item() == pytest.approx(contrast, rel=1e-14)
    # Eq. 7: likelihood with the judgment, and of the satisfactory response without one.
    likelihood = -(math.log(0.5) + math.log(0.5) + math.log(0.1) + math.log(0.8) + math.log(0.25))
    assert got.likelihood.item() == pytest.approx(likelihood, rel=1e-14)
    assert got.log_ratios.tolist() == pytest.approx([0.0, math.log(2.5), math.log(0.25)], abs=1e-15)

    loss = combine_parts(got.contrast, got.likelihood, 3, 5)
    assert loss.item() == pytest.approx((contrast / 3 + likelihood / 5) / 2, rel=1e-14)

    loss.backward()
    # Likelihood: -1. Unlikelihood: d/dlogp of -0.125 log(1 - p) is 0.125 p / (1 - p) = 0.125 * 0.2 / 0.8 = 0.03125.
    assert without.grad.tolist() == pytest.approx([-1 / 6, 0.03125 / 6, -1 / 6], rel=1e-14)
    assert with_judgment.grad.tolist() == pytest.approx([-1 / 10] * 3, rel=1e-14)
    assert satisfactory.grad.tolist() == pytest.approx([-1 / 10] * 2, rel=1e-14)


def test_gamma_zero_is_the_constant_weight_of_the_released_code():
    got = cut_loss(log_of(0.01), log_of(0.02), log_of(), threshold=1.1, unlikelihood_weight=0.25, gamma=0.0)
    assert got.contrast.item() == pytest.approx(-0.25 * math.log(0.99), rel=1e-14)


def test_equally_likely_token_is_not_flagged_at_threshold_one():
    got = cut_loss(
        log_of(0.3, 0.3), log_of(0.3, 0.3000001), log_of(), threshold=1.0, unlikelihood_weight=1.0, gamma=1.0
    )
    assert got.is_flagged.tolist() == [False, True]


def test_weights_multiply_both_parts():
    got = cut_loss(
        log_of(0.5, 0.1),
        log_of(0.4, 0.3),
        log_of(0.2, 0.9),
        threshold=1.1,
        unlikelihood_weight=1.0,
        gamma=1.0,
        weights=torch.tensor([0.5, 0.25]),
        weights_satisfactory=torch.tensor([2.0, 0.0]),
    )
    assert got.contrast.item() == pytest.approx(-(0.5 * math.log(0.5) + 0.25 * 0.3 * math.log(0.9)), rel=1e-12)
    assert got.likelihood.item() == pytest.approx(
        -(0.5 * math.log(0.4) + 0.25 * math.log(0.3) + 2 * math.log(0.2)), rel=1e-12
    )


def test_batch_with_one_kind_of_record_has_zero_for_the_other():
    empty = log_of()
    got = cut_loss(empty, empty, log_of(0.5), threshold=1.1, unlikelihood_weight=1.0, gamma=1.0)
    assert (got.contrast.item(), got.likelihood.item()) == (0.0, pytest.approx(math.log(2)))
    got = cut_loss(log_of(0.5), log_of(0.5), empty, threshold=1.1, unlikelihood_weight=1.0, gamma=1.0)
    assert (got.contrast.item(), got.likelihood.item()) == (pytest.approx(math.log(2)), pytest.approx(math.log(2)))


def test_combined_loss_is_the_mean_of_both_means():
    # (6 / 3 + 20 / 5) / 2 = (2 + 4) / 2
    assert combine_parts(6.0, 20.0, 3, 5) == 3.0
    assert combine_parts(torch.tensor(6.0), torch.tensor(20.0), 3, 5).item() == 3.0


def test_combined_loss_without_contrast_is_the_likelihood():
    assert combine_parts(0.0, 20.0, 0, 5) == 4.0
    assert combine_parts(torch.tensor(0.0), torch.tensor(20.0), 0.0, 5).item() == 4.0


# ---- Against a naive implementation ----


def naive_cut_loss(
    without: list[float],
    with_judgment: list[float],
    satisfactory: list[float],
    threshold: float,
    alpha: float,
    gamma: float,
    weights: list[float],
    weights_satisfactory: list[float],
) -> tuple[float, float, list[bool], list[float]]:
    """Eq. 5 to 7 over plain probabilities, and the derivative of L1's sum with respect to each log p(y_t | x)."""
    contrast, likelihood, flags, slopes = 0.0, 0.0, [], []
    for p, p_judged, weight in zip(without, with_judgment, weights, strict=True):
        is_flagged = p_judged > threshold * p
        flags.append(is_flagged)
        if is_flagged:
            contrast -= weight * alpha * p_judged**gamma * math.log(1 - p)
            slopes.append(weight * alpha * p_judged**gamma * p / (1 - p))
        else:
            contrast -= weight * math.log(p)
            slopes.append(-weight)
        likelihood -= weight * math.log(p_judged)
    for p, weight in zip(satisfactory, weights_satisfactory, strict=True):
        likelihood -= weight * math.log(p)
    return contrast, likelihood, flags, slopes


# Above 0.9999 the loss of a flagged token continues as a straight line, which tests of their own cover.
probabilities = st.floats(1e-6, 0.9999)
token_weights = st.floats(0, 3)


@settings(max_examples=150, deadline=None)
@given(
    judged=st.lists(st.tuples(probabilities, probabilities, token_weights), max_size=8),
    plain=st.lists(st.tuples(probabilities, token_weights), max_size=4),
    threshold=st.sampled_from(THRESHOLDS) | st.floats(1, 5),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    gamma=st.sampled_from(GAMMAS),
    is_weighted=st.booleans(),
)
def test_loss_flags_and_gradient_match_a_naive_implementation(judged, plain, threshold, alpha, gamma, is_weighted):
    without, with_judgment, weights = ([row[i] for row in judged] for i in range(3))
    satisfactory, weights_satisfactory = ([row[i] for row in plain] for i in range(2))
    # Right at the threshold, probabilities and log-probabilities may round differently.
    assume(all(abs(b / a / threshold - 1) > 1e-9 for a, b in zip(without, with_judgment, strict=True)))
    if not is_weighted:
        weights, weights_satisfactory = [1.0] * len(judged), [1.0] * len(plain)
    contrast, likelihood, flags, slopes = naive_cut_loss(
        without, with_judgment, satisfactory, threshold, alpha, gamma, weights, weights_satisfactory
    )

    logps = log_of(*without).requires_grad_()
    got = cut_loss(
        logps,
        log_of(*with_judgment),
        log_of(*satisfactory),
        threshold=threshold,
        unlikelihood_weight=alpha,
        gamma=gamma,
        weights=torch.tensor(weights, dtype=torch.float64) if is_weighted else None,
        weights_satisfactory=torch.tensor(weights_satisfactory, dtype=torch.float64) if is_weighted else None,
    )

    assert got.is_flagged.tolist() == flags
    assert got.contrast.item() == pytest.approx(contrast, rel=1e-8, abs=1e-12)
    assert got.likelihood.item() == pytest.approx(likelihood, rel=1e-8, abs=1e-12)
    (grad,) = torch.autograd.grad(got.contrast, logps)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-8, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    judged=st.lists(st.tuples(probabilities, probabilities), min_size=2, max_size=8),
    size=st.integers(0, 8),
    gamma=st.sampled_from(GAMMAS),
)
def test_sums_of_a_batch_add_up_from_its_parts(judged, size, gamma):
    def run(rows):
        without, with_judgment = (log_of(*(row[i] for row in rows)) for i in range(2))
        return cut_loss(without, with_judgment, without, threshold=1.1, unlikelihood_weight=0.5, gamma=gamma)

    whole, left, right = run(judged), run(judged[:size]), run(judged[size:])
    assert whole.is_flagged.tolist() == left.is_flagged.tolist() + right.is_flagged.tolist()
    assert whole.contrast.item() == pytest.approx(left.contrast.item() + right.contrast.item(), rel=1e-12)
    assert whole.likelihood.item() == pytest.approx(left.likelihood.item() + right.likelihood.item(), rel=1e-12)


# ---- Gradients ----


def test_no_gradient_flows_through_detection_or_the_dynamic_weight():
    without = log_of(0.2, 0.6).requires_grad_()
    with_judgment = log_of(0.5, 0.3).requires_grad_()
    got = cut_loss(without, with_judgment, log_of(), threshold=1.1, unlikelihood_weight=1.0, gamma=2.0)

    assert not got.is_flagged.requires_grad
    assert not got.log_ratios.requires_grad
    got.contrast.backward(retain_graph=True)
    assert with_judgment.grad is None
    got.likelihood.backward()
    assert with_judgment.grad.tolist() == [-1.0, -1.0]


@settings(max_examples=200, deadline=None)
@given(
    p_judged=st.floats(1e-6, 1.0),
    share=st.floats(1e-9, 1.0),
    threshold=st.floats(1.001, 5),
    alpha=st.sampled_from([0.25, 0.5, 1.0]),
    gamma=st.sampled_from(GAMMAS),
)
def test_slope_of_a_flagged_token_stays_below_alpha_over_threshold_minus_one(p_judged, share, threshold, alpha, gamma):
    # A flagged token has p(y|x) < p_judged / threshold; the slope reaches the bound at p_judged = share = 1.
    without = log_of(share * p_judged / threshold).requires_grad_()
    got = cut_loss(without, log_of(p_judged), log_of(), threshold=threshold, unlikelihood_weight=alpha, gamma=gamma)
    assume(got.is_flagged.item())
    got.contrast.backward()
    assert 0 <= without.grad.item() <= alpha / (threshold - 1) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_probabilities_have_finite_loss_and_gradient(dtype, gamma):
    # From p = 1 to p = exp(-1e4), in either context.
    values = [0.0, -1e-12, -1e-6, -100.0, -1e4]
    without = torch.tensor([a for a in values for _ in values], dtype=dtype, requires_grad=True)
    with_judgment = torch.tensor(values * len(values), dtype=dtype, requires_grad=True)
    got = cut_loss(
        without, with_judgment, torch.zeros(1, dtype=dtype), threshold=1.1, unlikelihood_weight=1.0, gamma=gamma
    )
    (got.contrast + got.likelihood).backward()
    assert torch.isfinite(got.contrast)
    assert torch.isfinite(got.likelihood)
    assert torch.isfinite(without.grad).all()
    assert torch.isfinite(with_judgment.grad).all()
    assert not got.is_flagged[without.detach() > -1e-3].any()
    assert (without.grad[~got.is_flagged] == -1).all()


# ---- log(1 - p) ----

HALF = -math.log(2.0)
# Both ends, and the boundary between the two formulas.
LOGPS = [-1e-12, -1e-7, -1e-3, -0.1, -0.5, HALF + 1e-9, HALF, HALF - 1e-9, -0.8, -1.0, -5.0, -20.0, -40.0, -100.0]


def exact_log1mexp(logp: float) -> tuple[float, float]:
    """log(1 - p) and its derivative -p / (1 - p) in log p, to 80 digits."""
    with localcontext() as context:
        context.prec = 80
        p = Decimal(logp).exp()
        return float((1 - p).ln()), float(-p / (1 - p))


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float64, 2**-52), (torch.float32, 2**-23)])
@pytest.mark.parametrize("logp", LOGPS)
def test_log1mexp_is_exact_at_both_ends(logp, dtype, epsilon):
    x = torch.tensor(logp, dtype=dtype, requires_grad=True)
    value, slope = exact_log1mexp(x.item())
    got = log1mexp(x)
    got.backward()
    # Subnormal numbers have fewer digits.
    smallest = torch.finfo(dtype).tiny
    assert got.item() == pytest.approx(value, rel=4 * epsilon, abs=smallest)
    assert x.grad.item() == pytest.approx(slope, rel=8 * epsilon, abs=smallest)
    assert got.item() < 0


@settings(max_examples=200, deadline=None)
@given(st.floats(-100, -1e-12))
def test_log1mexp_is_exact_in_between(logp):
    x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    value, slope = exact_log1mexp(logp)
    got = log1mexp(x)
    got.backward()
    assert got.item() == pytest.approx(value, rel=1e-14)
    assert x.grad.item() == pytest.approx(slope, rel=1e-13)


def test_tokens_that_cannot_be_flagged_are_learned() -> None:
    without = torch.tensor([0.2, 0.2, 0.5]).log()
    with_judgment = torch.tensor([0.4, 0.4, 0.5]).log()
    can_flag = torch.tensor([False, True, True])
    settings = {"threshold": 1.1, "unlikelihood_weight": 1.0, "gamma": 0.0}
    flags = flag_tokens(without, with_judgment, **settings, can_flag=can_flag)
    assert flags.is_flagged.tolist() == [False, True, False]
    assert flags.weights.tolist() == [0.0, 1.0, 0.0]
    loss = cut_loss(without, with_judgment, torch.zeros(0), **settings, can_flag=can_flag)
    assert loss.is_flagged.tolist() == [False, True, False]
    # -log 0.2 - log(1 - 0.2) - log 0.5
    assert loss.contrast.item() == pytest.approx(1.609438 + 0.223144 + 0.693147, abs=1e-5)
