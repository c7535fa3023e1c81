"""Unlikelihood of the tokens that are blamed, likelihood of all others (Welleck et al. 2019, arXiv 1908.04319).

Which tokens are blamed, and how much, is decided elsewhere: by eq. 5 (`cutlm.losses.cut`), by a frozen detector
(`cutlm.blame.detector`), by a person's spans, or by a method that blames every token.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond this slope for log p, reached at p = 0.9999, the loss goes on as a straight line: log(1 - p) of a float that
# rounds to 1 is infinite. For the logit, the slope is at most the weight in any case.
MAX_SLOPE = 1e4


class TokenFlags(NamedTuple):
    """Which tokens are inappropriate, and the factor of each one's unlikelihood term. Carries no gradient.

    Attributes:
        is_flagged: [N] bool.
        weights: [N] alpha * p(y_t | x, j)^gamma of eq. 6 for a flagged token; 0 for any other.
    """

    is_flagged: Tensor
    weights: Tensor


def unlikelihood_loss(logps: Tensor, blame: TokenFlags) -> Tensor:
    """Eq. 6 before it is summed: -log p of an unflagged token, -weight * log(1 - p) of a flagged one.

    The slope of the latter for log p is weight * p / (1 - p), which eq. 5 bounds where it made the flags. Flags from
    elsewhere may stand on a token that the model is sure of: there the slope stops growing at `MAX_SLOPE`.

    Args:
        logps: [N] log p(y_t | x, y_<t).
        blame: Of the same tokens.

    Returns:
        [N], each token's loss.
    """
    # Unflagged tokens get a harmless stand-in: the gradient of log(1 - p) at p = 1 is infinite, and 0 * inf is nan.
    flagged = torch.where(blame.is_flagged, logps, torch.full_like(logps, -1.0))
    # p / (1 - p) = MAX_SLOPE here.
    highest = -math.log1p(1 / MAX_SLOPE)
    excess = (flagged - highest).clamp(min=0)
    log_unlikelihood = log1mexp(flagged - excess) - MAX_SLOPE * excess
    return -torch.where(blame.is_flagged, blame.weights * log_unlikelihood, logps)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p < 0, exact at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    is_likely = logp > -math.log(2.0)
    # Each branch sees only values it is safe for, so that the other's infinite slope never meets a zero.
    likely = torch.log(-torch.expm1(torch.where(is_likely, logp, torch.full_like(logp, -0.5))))
    unlikely = torch.log1p(-torch.exp(torch.where(is_likely, torch.full_like(logp, -1.0), logp)))
    return torch.where(is_likely, likely, unlikely)
