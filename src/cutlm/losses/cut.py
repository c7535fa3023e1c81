"""Contrastive Unlikelihood Training (Xu et al. 2023, arXiv 2312.14591v4, eq. 5 to 7).

Sums over tokens only: what they are divided by is the caller's affair, since only the trainer knows how many
tokens the other micro-batches and ranks of an optimizer step hold.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cutlm.losses.unlikelihood import TokenFlags, unlikelihood_loss

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


@dataclass(frozen=True)
class Parts:
    """Which parts of the loss are in: all of them, but for the paper's ablations (Table 4) and frozen detection.

    Attributes:
        contrast: L1 (eq. 6).
        satisfactory: L2 (eq. 7) over satisfactory responses.
        unsatisfactory: L2 over unsatisfactory responses, with the judgment.
    """

    contrast: bool = True
    satisfactory: bool = True
    unsatisfactory: bool = True


ALL_PARTS = Parts()


def flag_tokens(
    logps_without: Tensor, logps_with: Tensor, *, threshold: float, unlikelihood_weight: float, gamma: float
) -> TokenFlags:
    """Finds the inappropriate tokens (eq. 5) and the weights of their unlikelihood terms (eq. 6).

    Args:
        logps_without: [U] log p(y_t | x, y_<t).
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        threshold: lambda of eq. 5, at least 1; 0 flags every token.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6; 0 switches it off.

    Returns:
        Flags and weights, without gradient.
    """
    logps_with = logps_with.detach()
    is_flagged = logps_with - logps_without.detach() > (math.log(threshold) if threshold else -math.inf)
    weights = unlikelihood_weight * torch.exp(gamma * logps_with)
    return TokenFlags(is_flagged, torch.where(is_flagged, weights, torch.zeros_like(weights)))


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
    blame: TokenFlags | None = None,
    blame_satisfactory: TokenFlags | None = None,
    parts: Parts = ALL_PARTS,
) -> CutLoss:
    """CUT's loss over the response tokens of a batch (eq. 5, 6 and 7).

    A flagged token has p(y_t | x) < 1 / threshold, so the slope of its unlikelihood term,
    alpha p_with^gamma p / (1 - p) for log p, stays below alpha / (threshold - 1).

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of unsatisfactory responses.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of satisfactory responses, and of whatever else is learned from
            one context alone.
        threshold: lambda of eq. 5, at least 1; 0 flags every token.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6; 0 switches it off.
        weights: [U] a factor on each token of an unsatisfactory response, in both parts; None for ones.
        weights_satisfactory: [S] likewise for satisfactory responses.
        blame: Flags and weights [U] found before, by a frozen detector; None finds them now.
        blame_satisfactory: Flags and weights [S]; None for none.
        parts: Which parts are in.

    Returns:
        Sums, flags and log ratios. Detection and the dynamic weight carry no gradient.
    """
    if blame is None:
        blame = flag_tokens(
            logps_without, logps_with, threshold=threshold, unlikelihood_weight=unlikelihood_weight, gamma=gamma
        )
    log_ratios = (logps_with - logps_without).detach()
    contrast = unlikelihood_loss(logps_without, blame)
    satisfactory = -logps_satisfactory
    if blame_satisfactory is not None:
        satisfactory = unlikelihood_loss(logps_satisfactory, blame_satisfactory)
    if weights is not None:
        contrast = contrast * weights
        logps_with = logps_with * weights
    if weights_satisfactory is not None:
        satisfactory = satisfactory * weights_satisfactory
    likelihood = satisfactory.sum() * parts.satisfactory
    if parts.unsatisfactory:
        likelihood = likelihood - logps_with.sum()
    return CutLoss(contrast.sum() * parts.contrast, likelihood, blame.is_flagged, log_ratios)


def combine_parts(contrast: Number, likelihood: Number, num_contrast: float, num_likelihood: float) -> Number:
    """One loss from the two sums: the mean of their means, or the one part alone where the other has no tokens.

    The released code's formula, over whatever the counts are of; with those of a whole optimizer step the result does
    not depend on how the step is cut into micro-batches and ranks.

    Args:
        contrast: L1, summed.
        likelihood: L2, summed.
        num_contrast: What L1 is divided by: tokens, or records where each token weighs 1/N.
        num_likelihood: Likewise for L2.
    """
    if not num_contrast and not num_likelihood:
        return contrast + likelihood  # nothing to learn from here: both are 0
    if not num_contrast:
        return likelihood / num_likelihood
    if not num_likelihood:
        return contrast / num_contrast
    return (contrast / num_contrast + likelihood / num_likelihood) / 2
