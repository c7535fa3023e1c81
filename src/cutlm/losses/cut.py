"""Contrastive Unlikelihood Training (Xu et al. 2023, arXiv 2312.14591v4, eq. 5 to 7).

Losses are sums over tokens. The trainer divides them by the counts of the whole optimizer step, so that micro-batches
and ranks do not change the result.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

# log(1 - p) is infinite for a p that rounds to 1. Where its slope in log p exceeds this, at p = 0.9999, the loss
# continues as a straight line.
MAX_SLOPE = 1e4


class TokenFlags(NamedTuple):
    """Flagged tokens and the weights of their unlikelihood terms, without gradient."""

    is_flagged: Tensor  # [N] bool
    weights: Tensor  # [N] alpha * p(y_t | x, j)^gamma (eq. 6) for flagged tokens, 0 for others


@dataclass(frozen=True)
class CutLoss:
    """The two parts of the loss, summed over (weighted) tokens, and the detector's results."""

    contrast: Tensor  # [] L1 (eq. 6), over unsatisfactory responses
    likelihood: Tensor  # [] L2 (eq. 7), over satisfactory responses and, with the judgment, unsatisfactory ones
    is_flagged: Tensor  # [U] bool, the inappropriate tokens (eq. 5)
    log_ratios: Tensor  # [U] log p(y_t | x, j, y_<t) - log p(y_t | x, y_<t), without gradient
    critique: Tensor | None = None  # [] -log p of the judgments, given instruction and response, if they are learned


@dataclass(frozen=True)
class Parts:
    """Which parts of the loss are used; some are off in the paper's ablations (Table 4) and with frozen detection."""

    contrast: bool = True  # L1 (eq. 6)
    satisfactory: bool = True  # L2 (eq. 7) over satisfactory responses
    unsatisfactory: bool = True  # L2 over unsatisfactory responses, with the judgment


ALL_PARTS = Parts()


def flag_tokens(
    logps_without: Tensor,
    logps_with: Tensor,
    *,
    threshold: float,
    unlikelihood_weight: float,
    gamma: float,
    can_flag: Tensor | None = None,
) -> TokenFlags:
    """Flags inappropriate tokens (eq. 5) and computes the weights of their unlikelihood terms (eq. 6).

    Args:
        logps_without: [U] log p(y_t | x, y_<t), in nats.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        threshold: lambda of eq. 5, at least 1; 0 flags every token.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6; 0 switches it off.
        can_flag: [U] bool, False for tokens that are never flagged, such as those of a chat template; None for all.

    Example:

        >>> without, with_judgment = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.5, 0.4]).log()
        >>> flag_tokens(without, with_judgment, threshold=1.1, unlikelihood_weight=0.5, gamma=1.0)
        TokenFlags(is_flagged=tensor([False,  True]), weights=tensor([0.0000, 0.2000]))
    """
    logps_with = logps_with.detach()
    is_flagged = logps_with - logps_without.detach() > (math.log(threshold) if threshold else -math.inf)
    if can_flag is not None:
        is_flagged = is_flagged & can_flag
    weights = unlikelihood_weight * torch.exp(gamma * logps_with)
    return TokenFlags(is_flagged, torch.where(is_flagged, weights, 0.0))


def unlikelihood_loss(logps: Tensor, flags: TokenFlags) -> Tensor:
    """The terms [N] of CUT's eq. 6: -log p of an unflagged token, -weight * log(1 - p) of a flagged one.

    The slope of a flagged term in log p is weight * p / (1 - p). CUT's own flags (eq. 5) bound it; for other flags,
    which may be on a token that the model is sure of, it stops growing at `MAX_SLOPE`.

    Example:

        >>> flags = TokenFlags(torch.tensor([False, True]), torch.tensor([0.0, 0.5]))
        >>> unlikelihood_loss(torch.tensor([0.5, 0.8]).log(), flags)  # -log 0.5, -0.5 * log 0.2
        tensor([0.6931, 0.8047])
    """
    # Unflagged tokens get a harmless value: the gradient of log(1 - p) at p = 1 is infinite, and 0 * inf is NaN.
    flagged = torch.where(flags.is_flagged, logps, -1.0)
    max_logp = -math.log1p(1 / MAX_SLOPE)  # where p / (1 - p) = MAX_SLOPE
    excess = (flagged - max_logp).clamp(min=0)
    log_unlikelihood = log1mexp(flagged - excess) - MAX_SLOPE * excess
    return -torch.where(flags.is_flagged, flags.weights * log_unlikelihood, logps)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    is_likely = logp > -math.log(2.0)
    # Each branch gets values that are safe for it, so that an infinite slope is never multiplied by zero.
    likely = torch.log(-torch.expm1(torch.where(is_likely, logp, -0.5)))
    unlikely = torch.log1p(-torch.exp(torch.where(is_likely, -1.0, logp)))
    return torch.where(is_likely, likely, unlikely)


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
    flags: TokenFlags | None = None,
    flags_satisfactory: TokenFlags | None = None,
    can_flag: Tensor | None = None,
    parts: Parts = ALL_PARTS,
) -> CutLoss:
    """CUT's loss over the response tokens of a batch (eq. 5 to 7).

    A flagged token has p(y_t | x) < 1 / threshold, so the slope of its unlikelihood term in log p,
    alpha p_with^gamma p / (1 - p), is below alpha / (threshold - 1).

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of unsatisfactory responses, in nats.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of satisfactory responses and of others that have one context.
        threshold: See `flag_tokens`, also for `unlikelihood_weight` and `gamma`.
        weights: [U] factors on the tokens of unsatisfactory responses, in both parts; None for ones.
        weights_satisfactory: [S] factors on the other tokens; None for ones.
        flags: [U] flags computed before, by a frozen detector; None computes them here.
        flags_satisfactory: [S] flags of the other tokens; None for none.
        can_flag: [U] bool; see `flag_tokens`.
        parts: Which parts of the loss are used.

    Example:

        >>> logps = [torch.tensor(p).log() for p in ([0.5, 0.2], [0.5, 0.5], [0.8])]
        >>> loss = cut_loss(*logps, threshold=1.2, unlikelihood_weight=0.5, gamma=2.0)
        >>> loss.is_flagged
        tensor([False,  True])
        >>> combine_parts(loss.contrast, loss.likelihood, 2, 3)
        tensor(0.4485)
    """
    if flags is None:
        flags = flag_tokens(
            logps_without,
            logps_with,
            threshold=threshold,
            unlikelihood_weight=unlikelihood_weight,
            gamma=gamma,
            can_flag=can_flag,
        )
    log_ratios = (logps_with - logps_without).detach()
    contrast = unlikelihood_loss(logps_without, flags)
    satisfactory = -logps_satisfactory
    if flags_satisfactory is not None:
        satisfactory = unlikelihood_loss(logps_satisfactory, flags_satisfactory)
    contrast_sum, likelihood_sum = sum_terms(contrast, logps_with, satisfactory, weights, weights_satisfactory, parts)
    return CutLoss(contrast_sum, likelihood_sum, flags.is_flagged, log_ratios)


def sum_terms(
    contrast: Tensor,
    logps_with: Tensor,
    satisfactory: Tensor,
    weights: Tensor | None,
    weights_satisfactory: Tensor | None,
    parts: Parts,
) -> tuple[Tensor, Tensor]:
    """Sum the terms of tokens into L1 and L2.

    Args:
        contrast: [U] the terms of tokens of unsatisfactory responses without the judgment.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        satisfactory: [S] the terms of the other tokens.
        weights: [U] factors on the tokens of unsatisfactory responses, in both parts; None for ones.
        weights_satisfactory: [S] factors on the other tokens; None for ones.
        parts: Which parts of the loss are used.
    """
    if weights is not None:
        contrast, logps_with = contrast * weights, logps_with * weights
    if weights_satisfactory is not None:
        satisfactory = satisfactory * weights_satisfactory
    likelihood = satisfactory.sum() * parts.satisfactory
    if parts.unsatisfactory:
        likelihood = likelihood - logps_with.sum()
    return contrast.sum() * parts.contrast, likelihood


def combine_parts(contrast: Number, likelihood: Number, num_contrast: float, num_likelihood: float) -> Number:
    """Combine both sums as the released code does: the mean of their means, or one mean if the other has no tokens.

    The denominators `num_contrast` and `num_likelihood` are tokens, or records if each token weighs 1/N.

    Example:

        >>> combine_parts(6.0, 20.0, 3, 5)  # (6 / 3 + 20 / 5) / 2
        3.0
    """
    if not num_contrast and not num_likelihood:
        return contrast + likelihood  # both are 0
    if not num_contrast:
        return likelihood / num_likelihood
    if not num_likelihood:
        return contrast / num_contrast
    return (contrast / num_contrast + likelihood / num_likelihood) / 2
