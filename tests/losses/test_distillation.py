"""The losses that learn from a teacher: cases by hand, a naive implementation over plain probabilities, gradients."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlm.losses import Teaching, TokenFlags, divergence, guide, redirect_loss, self_distillation_loss
from cutlm.losses.distillation import DIVERGENCES, distill


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def make_teaching(is_taught: Sequence[bool], teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Teaching:
    return Teaching(torch.tensor(is_taught), torch.stack([*teacher]), torch.stack([*student]))


# ---- By hand ----


def test_guidance_divides_by_the_context_to_avoid():
    # 0.5 * (0.5 / 0.8) = 0.3125; 0.3 * (0.3 / 0.1) = 0.9; 0.2 * (0.2 / 0.1) = 0.4; the sum is 1.6125.
    got = guide(log_of(0.5, 0.3, 0.2), log_of(0.8, 0.1, 0.1), 1.0).exp()
    assert got.tolist() == pytest.approx([0.3125 / 1.6125, 0.9 / 1.6125, 0.4 / 1.6125], rel=1e-12)
    # beta 2: 0.5 * 0.625^2 = 0.1953125; 0.3 * 3^2 = 2.7; 0.2 * 2^2 = 0.8.
    got = guide(log_of(0.5, 0.3, 0.2), log_of(0.8, 0.1, 0.1), 2.0).exp()
    assert got.tolist() == pytest.approx([value / 3.6953125 for value in (0.1953125, 2.7, 0.8)], rel=1e-12)


def test_guidance_leaves_out_what_the_teacher_finds_a_hundred_times_less_likely():
    praised, judged = log_of(0.9, 0.0089, 0.0911), log_of(0.98, 1e-9, 0.02)
    # 0.0089 < 0.01 * 0.9, so that its ratio of 9 million does not count.
    got = guide(praised, judged, 1.0).exp()
    kept = (0.9 * 0.9 / 0.98, 0.0911 * 0.0911 / 0.02)
    assert got.tolist() == pytest.approx([kept[0] / sum(kept), 0, kept[1] / sum(kept)], rel=1e-12)


def test_divergences_are_over_the_columns_and_the_tail():
    # q = (0.5, 0.25) and a tail of 0.25; p = (0.25, 0.25) and a tail of 0.5.
    teacher, student = log_of(0.5, 0.25)[None], log_of(0.25, 0.25, 0.5)[None]
    forward = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(teacher, student).item() == pytest.approx(forward, rel=1e-12)
    reverse = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    assert divergence(teacher, student, "reverse_kl").item() == pytest.approx(reverse, rel=1e-12)
    # The mean is (0.375, 0.25, 0.375).
    to_mean = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)
    assert divergence(teacher, student, "jsd").item() == pytest.approx(to_mean, rel=1e-12)


def test_padding_does_not_count():
    padded = torch.cat([log_of(0.5, 0.25), torch.tensor([-torch.inf])])[None]
    # The third column repeats the first one, as in a batch.
    student = log_of(0.25, 0.25, 0.25, 0.5)[None].requires_grad_()
    for kind in DIVERGENCES:
        expected = divergence(log_of(0.5, 0.25)[None], log_of(0.25, 0.25, 0.5)[None], kind)
        got = divergence(padded, student, kind)
        assert got.item() == pytest.approx(expected.item(), rel=1e-12), kind
        (grad,) = torch.autograd.grad(got.sum(), student)
        assert grad[0, 2].item() == 0
        assert torch.isfinite(grad).all()


def test_the_reverse_divergence_is_finite_where_the_teacher_gives_no_probability():
    # q has no tail: it counts as 1e-6, so 0.5 log(0.5 / 1) + 0.5 log(0.5 / 1e-6).
    got = divergence(log_of(1.0)[None], log_of(0.5, 0.5)[None], "reverse_kl")
    assert got.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5e6), rel=1e-9)


def test_taught_tokens_get_the_divergence_and_others_the_likelihood():
    logps = log_of(0.5, 0.25, 0.1).requires_grad_()
    student = log_of(0.25, 0.5, 0.25).requires_grad_()
    teaching = make_teaching([False, True, False], [log_of(0.5, 0.5)], [student])
    terms = self_distillation_loss(logps, teaching)
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.5)
    assert terms.tolist() == pytest.approx([math.log(2), 0.5 * math.log(2), math.log(10)], rel=1e-12)
    terms.sum().backward()
    assert logps.grad.tolist() == [-1, 0, -1]
    assert student.grad.tolist() == pytest.approx([-0.5, -0.5, 0], abs=1e-12)


def test_the_sampled_form_weighs_the_tokens_of_the_response_by_the_advantage():
    student = log_of(0.25, 0.8).requires_grad_()
    teacher = log_of(0.5, 0.1)
    teaching = Teaching(torch.tensor([True, True]), teacher[:, None], student[:, None])
    # Advantages: log(0.5 / 0.25) = log 2, and log(0.1 / 0.8) = -log 8.
    terms = self_distillation_loss(student, teaching, kind="sampled")
    assert terms.tolist() == pytest.approx([math.log(2) * math.log(4), math.log(8) * math.log(0.8)], rel=1e-12)
    (grad,) = torch.autograd.grad(terms.sum(), student)
    assert grad.tolist() == pytest.approx([-math.log(2), math.log(8)], rel=1e-12)
    clipped = self_distillation_loss(student, teaching, kind="sampled", clip=1.0)
    (grad,) = torch.autograd.grad(clipped.sum(), student)
    assert grad.tolist() == pytest.approx([-math.log(2), 1.0], rel=1e-12)


def test_a_clipped_divergence_keeps_the_direction_of_its_gradient():
    student = log_of(0.01, 0.99).requires_grad_()
    teaching = make_teaching([True], [log_of(1.0)], [student])
    whole = distill(teaching, "forward_kl", None)  # log 100 = 4.6
    clipped = distill(teaching, "forward_kl", 2.0)
    assert (whole.item(), clipped.item()) == (pytest.approx(math.log(100)), pytest.approx(2))
    (grad,) = torch.autograd.grad(clipped.sum(), student)
    assert grad.tolist() == pytest.approx([-2 / math.log(100), 0])
    assert distill(teaching, "forward_kl", 5.0).item() == pytest.approx(math.log(100))


def test_importance_weighs_taught_tokens_only():
    teaching = make_teaching([True, False], [log_of(0.5, 0.5)], [log_of(0.25, 0.5, 0.25)])
    got = self_distillation_loss(log_of(0.5, 0.5), teaching, importance=torch.tensor([3.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([1.5 * math.log(2), math.log(2)])


@pytest.mark.parametrize("has_unlikelihood", [True, False])
def test_redirect_moves_the_mass_of_flagged_tokens(has_unlikelihood):
    logps = log_of(0.5, 0.8).requires_grad_()
    student = log_of(0.1, 0.1, 0.8).requires_grad_()
    flags = TokenFlags(torch.tensor([False, True]), torch.tensor([0.0, 0.5], dtype=torch.float64))
    teaching = make_teaching([False, True], [log_of(0.75, 0.25)], [student])
    terms = redirect_loss(logps, flags, teaching, has_unlikelihood=has_unlikelihood)
    # 0.75 log(0.75 / 0.1) + 0.25 log(0.25 / 0.1), and -0.5 log(1 - 0.8)
    expected = 0.75 * math.log(7.5) + 0.25 * math.log(2.5) - has_unlikelihood * 0.5 * math.log(0.2)
    assert terms.tolist() == pytest.approx([math.log(2), expected], rel=1e-12)
    terms.sum().backward()
    # The slope of the unlikelihood term is 0.5 * 0.8 / 0.2 = 2.
    assert logps.grad.tolist() == pytest.approx([-1, 2 * has_unlikelihood], rel=1e-12)
    assert student.grad.tolist() == pytest.approx([-0.75, -0.25, 0], abs=1e-12)


# ---- Against a naive implementation ----


def naive_divergence(q: Sequence[float], p: Sequence[float], kind: str) -> float:
    """Over plain probabilities that sum to 1."""

    def kl(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    mean = [(x + y) / 2 for x, y in zip(q, p, strict=True)]
    return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": (kl(q, mean) + kl(p, mean)) / 2}[kind]


def normalize(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


masses = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(normalize)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(masses, masses), min_size=1, max_size=5), kind=st.sampled_from(DIVERGENCES))
def test_divergences_match_a_naive_implementation(rows, kind):
    teacher = torch.stack([log_of(*q[:-1]) for q, _ in rows])
    student = torch.stack([log_of(*p) for _, p in rows])
    expected = [naive_divergence(q, p, kind) for q, p in rows]
    assert divergence(teacher, student, kind).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [*DIVERGENCES, "sampled"])
def test_gradients_match_finite_differences(kind):
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(6, generator=generator, dtype=torch.float64) - 0.1
    is_taught = torch.tensor([True, False, True, True, False, True])
    width = 1 if kind == "sampled" else 4
    teacher = torch.randn(4, width + 1, generator=generator, dtype=torch.float64).log_softmax(-1)[:, :-1]
    student = torch.randn(4, width + 1, generator=generator, dtype=torch.float64).log_softmax(-1)
    advantages = teacher[:, 0] - student[:, 0]

    def compute(logps: Tensor, student: Tensor) -> Tensor:
        if kind == "sampled":  # the advantage has no gradient, so it is a number here
            return (-logps).masked_scatter(is_taught, -advantages * student[:, 0])
        return self_distillation_loss(logps, Teaching(is_taught, teacher, student), kind=kind)

    inputs = (logps.requires_grad_(), student.requires_grad_())
    assert torch.autograd.gradcheck(compute, inputs)
    if kind == "sampled":
        got = self_distillation_loss(logps, Teaching(is_taught, teacher, student), kind=kind)
        ours = torch.autograd.grad(got.sum(), inputs)
        expected = torch.autograd.grad(compute(*inputs).sum(), inputs)
        assert all(torch.allclose(one, other) for one, other in zip(ours, expected, strict=True))


def test_redirect_gradients_match_finite_differences():
    generator = torch.Generator().manual_seed(1)
    logps = (-torch.rand(5, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    is_flagged = torch.tensor([True, False, True, False, False])
    flags = TokenFlags(is_flagged, torch.tensor([0.5, 0, 2, 0, 0], dtype=torch.float64))
    teacher = torch.randn(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1)[:, :-1]
    student = torch.randn(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1).requires_grad_()

    def compute(logps: Tensor, student: Tensor) -> Tensor:
        return redirect_loss(logps, flags, Teaching(is_flagged, teacher, student))

    assert torch.autograd.gradcheck(compute, (logps, student))


def test_a_student_that_agrees_with_the_teacher_has_no_gradient():
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logps = logits.log_softmax(-1)
    student = torch.cat([logps[:, :4], logps[:, 4:].logsumexp(-1, keepdim=True)], -1)
    for kind in DIVERGENCES:
        loss = divergence(student[:, :4].detach(), student, kind).sum()
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.item() == pytest.approx(0, abs=1e-12), kind
        assert grad.abs().max().item() < 1e-12, kind
