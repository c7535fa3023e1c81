"""Unlikelihood of flagged tokens, likelihood of all others (Welleck et al. 2019, arXiv 1908.04319)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# log(1 - p) is infinite for a p that rounds to 1. Where its slope in log p exceeds this, at p = 0.9999, the loss
# continues as a straight line.
MAX_SLOPE = 1e4


class TokenFlags(NamedTuple):
    """Flagged tokens and the weights of their unlikelihood terms, without gradient.

    Attributes:
        is_flagged: [N] bool.
        weights: [N] alpha * p(y_t | x, j)^gamma of CUT's eq. 6 for flagged tokens, 0 for others.
    """

    is_flagged: Tensor
    weights: Tensor


def unlikelihood_loss(logps: Tensor, flags: TokenFlags) -> Tensor:
    """The terms of CUT's eq. 6: -log p of an unflagged token, -weight * log(1 - p) of a flagged one.

    The slope of a flagged term in log p is weight * p / (1 - p). CUT's own flags (eq. 5) bound it; for other flags,
    which may be on a token that the model is sure of, it stops growing at `MAX_SLOPE`.

    Args:
        logps: [N] log p(y_t | x, y_<t), in nats.
        flags: The flags of the same tokens.

    Returns:
        [N] loss of each token.

    Example:

        >>> flags = TokenFlags(torch.tensor([False, True]), torch.tensor([0.0, 0.5]))
        >>> unlikelihood_loss(torch.tensor([0.5, 0.8]).log(), flags)  # -log 0.5, -0.5 * log 0.2
        tensor([0.6931, 0.8047])
    """
    # Unflagged tokens get a harmless value: the gradient of log(1 - p) at p = 1 is infinite, and 0 * inf is NaN.
    flagged = torch.where(flags.is_flagged, logps, torch.full_like(logps, -1.0))
    max_logp = -math.log1p(1 / MAX_SLOPE)  # where p / (1 - p) = MAX_SLOPE
    excess = (flagged - max_logp).clamp(min=0)
    log_unlikelihood = log1mexp(flagged - excess) - MAX_SLOPE * excess
    return -torch.where(flags.is_flagged, flags.weights * log_unlikelihood, logps)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p < 0, accurate at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    is_likely = logp > -math.log(2.0)
    # Each branch gets values that are safe for it, so that an infinite slope is never multiplied by zero.
    likely = torch.log(-torch.expm1(torch.where(is_likely, logp, torch.full_like(logp, -0.5))))
    unlikely = torch.log1p(-torch.exp(torch.where(is_likely, torch.full_like(logp, -1.0), logp)))
    return torch.where(is_likely, likely, unlikely)
