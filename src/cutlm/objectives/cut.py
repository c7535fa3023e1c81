"""Contrastive Unlikelihood Training (Xu et al. 2023, arXiv 2312.14591v4, eq. 5 to 7).

Sums over tokens only: what they are divided by is the caller's affair, since only the trainer knows how many
tokens the other micro-batches and ranks of an optimizer step hold.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class CutLoss:
    """The two parts of the loss, summed over (weighted) tokens, and what was found on the way.

    Attributes:
        contrast: [] sum of eq. 6 (L1) over the tokens of unsatisfactory responses.
        likelihood: [] sum of eq. 7 (L2) over satisfactory responses and, with the judgment, unsatisfactory ones.
        is_flagged: [U] bool, the inappropriate tokens (eq. 5).
        log_ratios: [U] log p(y_t | x, j, y_<t) - log p(y_t | x, y_<t), without gradient.
    """

    contrast: Tensor
    likelihood: Tensor
    is_flagged: Tensor
    log_ratios: Tensor


def cut_loss(
    logps_without: Tensor,
    logps_with: Tensor,
    logps_satisfactory: Tensor,
    *,
    threshold: float,
    unlikelihood_weight: float,
    gamma: float,
    weights: Tensor | None = None,
    weights_satisfactory: Tensor | None = None,
) -> CutLoss:
    """CUT's loss over the response tokens of a batch (eq. 5, 6 and 7).

    A flagged token has p(y_t | x) < 1 / threshold, so the slope of its unlikelihood term,
    alpha p_with^gamma p / (1 - p) for log p, stays below alpha / (threshold - 1).

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of unsatisfactory responses.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of satisfactory responses.
        threshold: lambda of eq. 5, at least 1.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6; 0 switches it off.
        weights: [U] a factor on each token of an unsatisfactory response, in both parts; None for ones.
        weights_satisfactory: [S] likewise for satisfactory responses.

    Returns:
        Sums, flags and log ratios. Detection and the dynamic weight carry no gradient.
    """
    log_ratios = (logps_with - logps_without).detach()
    is_flagged = log_ratios > math.log(threshold)
    dynamic_weight = unlikelihood_weight * torch.exp(gamma * logps_with.detach())
    # Unflagged tokens get a harmless stand-in: the gradient of log(1 - p) at p = 1 is infinite, and 0 * inf is nan.
    stand_in = torch.full_like(logps_without, -1.0)
    log_unlikelihood = log1mexp(torch.where(is_flagged, logps_without, stand_in))
    contrast = -torch.where(is_flagged, dynamic_weight * log_unlikelihood, logps_without)
    if weights is not None:
        contrast = contrast * weights
        logps_with = logps_with * weights
    if weights_satisfactory is not None:
        logps_satisfactory = logps_satisfactory * weights_satisfactory
    return CutLoss(
        contrast=contrast.sum(),
        likelihood=-(logps_with.sum() + logps_satisfactory.sum()),
        is_flagged=is_flagged,
        log_ratios=log_ratios,
    )


def combine_parts(contrast: Number, likelihood: Number, num_contrast: float, num_likelihood: float) -> Number:
    """One loss from the two sums: the mean of their means, or L2 alone where there is nothing to contrast.

    The released code's formula, over whatever the counts are of; with those of a whole optimizer step the result does
    not depend on how the step is cut into micro-batches and ranks.

    Args:
        contrast: L1, summed.
        likelihood: L2, summed.
        num_contrast: What L1 is divided by: tokens, or records where each token weighs 1/N.
        num_likelihood: Likewise for L2.
    """
    if not num_contrast:
        return likelihood / num_likelihood
    return (contrast / num_contrast + likelihood / num_likelihood) / 2


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p < 0, exact at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    is_likely = logp > -math.log(2.0)
    # Each branch sees only values it is safe for, so that the other's infinite slope never meets a zero.
    likely = torch.log(-torch.expm1(torch.where(is_likely, logp, torch.full_like(logp, -0.5))))
    unlikely = torch.log1p(-torch.exp(torch.where(is_likely, torch.full_like(logp, -1.0), logp)))
    return torch.where(is_likely, likely, unlikely)
