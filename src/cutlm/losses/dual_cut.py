"""DualCUT: praise is learned from as well (arXiv 2412.20297, eq. 5 to 9).

Contrastive Unlikelihood Training for what a judgment objects to, and its mirror image for what one praises: tokens of
a satisfactory response that the praise makes likelier get a larger likelihood weight.
"""

import math

import torch
from torch import Tensor

from cutlm.losses.cut import CutLoss, cut_loss


def dual_cut_loss(
    logps_without: Tensor,
    logps_with: Tensor,
    logps_satisfactory: Tensor,
    is_praised: Tensor,
    *,
    threshold: float,
    unlikelihood_weight: float,
    gamma: float,
    praise_weight: float,
    weights: Tensor | None = None,
    weights_satisfactory: Tensor | None = None,
) -> CutLoss:
    """The loss over responses that are run with and without a judgment, be it an objection or praise.

    Unsatisfactory responses: as CUT. Praised ones: likelihood in both contexts; without the judgment a token with
    p(y_t | x, j, y_<t) > threshold * p(y_t | x, y_<t) weighs 1 + praise_weight * p(y_t | x, j, y_<t)^gamma.

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of responses with a judgment of either kind.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of whatever is learned from one context alone.
        is_praised: [U] bool, the tokens of satisfactory responses.
        threshold: Of either kind of token.
        unlikelihood_weight: Of inappropriate tokens.
        gamma: Exponent of the dynamic weight of either kind.
        praise_weight: What a praised token weighs more than others, before the dynamic weight.
        weights: [U] a factor on each token; None for ones.
        weights_satisfactory: [S] likewise.

    Returns:
        Sums, flags (of inappropriate tokens; praised ones are not among them) and log ratios.
    """
    bonus = torch.zeros_like(logps_without)
    is_likelier = (logps_with - logps_without).detach() > math.log(threshold)
    bonus = torch.where(is_praised & is_likelier, praise_weight * torch.exp(gamma * logps_with.detach()), bonus)
    objected = cut_loss(
        logps_without[~is_praised],
        logps_with[~is_praised],
        logps_satisfactory,
        threshold=threshold,
        unlikelihood_weight=unlikelihood_weight,
        gamma=gamma,
        weights=None if weights is None else weights[~is_praised],
        weights_satisfactory=weights_satisfactory,
    )
    praised = -logps_without * (1 + bonus)
    likelihood = -logps_with
    if weights is not None:
        praised, likelihood = praised * weights, likelihood * weights
    is_flagged = torch.zeros_like(is_praised)
    is_flagged[~is_praised] = objected.is_flagged
    return CutLoss(
        contrast=objected.contrast + praised[is_praised].sum(),
        likelihood=objected.likelihood + likelihood[is_praised].sum(),
        is_flagged=is_flagged,
        log_ratios=(logps_with - logps_without).detach(),
    )
