"""Self-distillation: the model that has read the judgment teaches the model that has not.

The teacher's distribution q at a position of a response is that of a model whose prompt holds a judgment (`guide`).
The student's is p(v | x, y_<t), of the tokens v to which q gives most, and of all others together (the tail). Where
each comes from: SDPO (Huebotter et al. 2026, arXiv 2601.20802), and offline, from feedback of users (2603.12273).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Of the most likely token: the teacher is guided only among tokens that it finds this likely.
SUPPORT = 0.01
# The reverse KL divergence is infinite where the teacher gives no probability.
_MIN_TAIL = 1e-6


class Teaching(NamedTuple):
    """Distributions of the teacher and the student at M of the N tokens of a batch."""

    is_taught: Tensor  # [N] bool, the M tokens
    teacher_logps: Tensor  # [M, K] log q of the K tokens, -inf for padding
    student_logps: Tensor  # [M, K + 1] log p of the same tokens, and of all others together


def guide(logps: Tensor, reference: Tensor, guidance: float) -> Tensor:
    """Guide a teacher away from another context, as classifier-free guidance does.

    q(v) is proportional to p(v) [p(v) / r(v)]^guidance on the tokens v with p(v) >= 0.01 max p, and 0 elsewhere.

    Args:
        logps: [..., V] log p(v) of the whole vocabulary, with the praise or the advice in the prompt.
        reference: [..., V] log r(v), with the judgment in the prompt.
        guidance: beta.

    Returns:
        [..., V] log q(v).

    Example:

        >>> praised, judged = torch.tensor([0.6, 0.4]).log(), torch.tensor([0.8, 0.2]).log()
        >>> guide(praised, judged, 1.0).exp()  # 0.36 / 0.8 = 0.45 to 0.16 / 0.2 = 0.8
        tensor([0.3600, 0.6400])
    """
    is_supported = logps >= logps.amax(-1, keepdim=True) + math.log(SUPPORT)
    guided = (1 + guidance) * logps - guidance * reference
    return torch.where(is_supported, guided, -torch.inf).log_softmax(-1)


def divergence(teacher_logps: Tensor, student_logps: Tensor, kind: str = "forward_kl") -> Tensor:
    """Divergence of the student's distribution from the teacher's, over K tokens and the tail.

    Args:
        teacher_logps: [M, K] log q of K tokens, -inf for padding.
        student_logps: [M, K + 1] log p of the same tokens, and of all others together.
        kind: "forward_kl" for KL(q || p), "reverse_kl" for KL(p || q), "jsd" for the mean of both to (p + q) / 2.

    Returns:
        [M], in nats.

    Example:

        >>> teacher, student = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> divergence(teacher, student)  # 0.5 log 2 + 0 + 0.25 log 0.5
        tensor([0.1733])
    """
    likelihoods = teacher_logps.exp()
    tail = (1 - likelihoods.sum(-1, keepdim=True)).clamp(min=0)
    q = torch.cat([likelihoods, tail], -1)
    # Rounding may leave a tail where it should be 0.
    log_q = torch.cat([teacher_logps, tail.clamp(min=_MIN_TAIL).log()], -1)
    is_used = log_q > -torch.inf
    log_q = torch.where(is_used, log_q, 0.0)
    if kind == "forward_kl":
        terms = q * (log_q - student_logps)
    elif kind == "reverse_kl":
        terms = student_logps.exp() * (student_logps - log_q)
    else:
        log_mean = torch.logaddexp(student_logps, log_q) - math.log(2)
        terms = (q * (log_q - log_mean) + student_logps.exp() * (student_logps - log_mean)) / 2
    return torch.where(is_used, terms, 0.0).sum(-1)


def distill(teaching: Teaching, kind: str, clip: float | None) -> Tensor:
    """The terms [M] of taught tokens: the divergence, or for "sampled" the teacher's advantage on the response's token.

    The sampled term is -sg[log q(y_t) - log p(y_t)] log p(y_t), whose expectation over y_t has the gradient of the
    reverse KL divergence. It needs no other tokens: K is 1.

    Args:
        teaching: Distributions of the teacher and the student.
        kind: "sampled", or one of `DIVERGENCES`.
        clip: Largest advantage in absolute value, or largest divergence, beyond which the gradient stops growing; None
            for no limit.
    """
    if kind == "sampled":
        logps = teaching.student_logps[:, 0]
        advantages = teaching.teacher_logps[:, 0] - logps.detach()
        if clip is not None:
            advantages = advantages.clamp(-clip, clip)
        return -advantages * logps
    terms = divergence(teaching.teacher_logps, teaching.student_logps, kind)
    if clip is not None:
        terms = terms * (clip / terms.detach().clamp(min=clip))
    return terms


def self_distillation_loss(
    logps: Tensor,
    teaching: Teaching,
    *,
    kind: str = "forward_kl",
    clip: float | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """The terms [N] of self-distillation: `distill` for taught tokens, -log p for the others.

    Args:
        logps: [N] log p(y_t | x, y_<t).
        teaching: Distributions of both; none for satisfactory responses, which are learned.
        kind: See `distill`, also for `clip`.
        importance: [M] factors of the taught tokens, such as min(p / p_old, 2) for responses of an older model.

    Example:

        >>> logps = torch.tensor([0.5, 0.25]).log()
        >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()  # of tokens a, b and the rest
        >>> teaching = Teaching(torch.tensor([False, True]), torch.tensor([[0.5, 0.5]]).log(), student)
        >>> self_distillation_loss(logps, teaching)  # -log 0.5; 0.5 log (0.5 / 0.25) + 0.5 log (0.5 / 0.5)
        tensor([0.6931, 0.3466])
    """
    terms = distill(teaching, kind, clip)
    if importance is not None:
        terms = terms * importance
    return (-logps).masked_scatter(teaching.is_taught, terms)
