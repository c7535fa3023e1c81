"""DualCUT, which also learns from praise: an approximation of arXiv 2412.20297, made from a summary of it.

Its equations have not been checked against the paper's own text.

Unsatisfactory responses get CUT's loss. The mirror image for praise: tokens of a satisfactory response that the praise
makes more likely get a larger likelihood weight.
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
    can_flag: Tensor | None = None,
) -> CutLoss:
    """DualCUT's loss over the response tokens of a batch, an approximation of arXiv 2412.20297.

    Praised responses are learned from in both contexts. Without the judgment, a token with p(y_t | x, j, y_<t) >
    threshold * p(y_t | x, y_<t) weighs 1 + praise_weight * p(y_t | x, j, y_<t)^gamma.

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of responses with criticism or praise. See `cut_loss` for the others.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of responses that have one context.
        is_praised: [U] bool, the tokens of praised responses; these are never flagged.
        threshold: lambda, for criticism and praise.
        unlikelihood_weight: alpha, the weight of flagged tokens.
        gamma: Exponent of the dynamic weights.
        praise_weight: The additional weight of praised tokens, before the dynamic weight.

    Example:

        >>> logps = [torch.tensor(p).log() for p in ([0.5, 0.5], [0.8, 0.8], [0.3])]
        >>> settings = {"threshold": 1.1, "unlikelihood_weight": 0.5, "gamma": 1.0, "praise_weight": 2.0}
        >>> dual_cut_loss(*logps, torch.tensor([False, True]), **settings).is_flagged
        tensor([ True, False])
    """
    log_ratios = (logps_with - logps_without).detach()
    dynamic_weights = praise_weight * torch.exp(gamma * logps_with.detach())
    gains = is_praised & (log_ratios > math.log(threshold))
    if can_flag is not None:
        gains = gains & can_flag
    bonus = torch.where(gains, dynamic_weights, 0.0)
    is_criticized = ~is_praised
    criticized = cut_loss(
        logps_without[is_criticized],
        logps_with[is_criticized],
        logps_satisfactory,
        threshold=threshold,
        unlikelihood_weight=unlikelihood_weight,
        gamma=gamma,
        weights=None if weights is None else weights[is_criticized],
        weights_satisfactory=weights_satisfactory,
        can_flag=None if can_flag is None else can_flag[is_criticized],
    )
    contrast, likelihood = -logps_without * (1 + bonus), -logps_with
    if weights is not None:
        contrast, likelihood = contrast * weights, likelihood * weights
    is_flagged = torch.zeros_like(is_praised)
    is_flagged[is_criticized] = criticized.is_flagged
    contrast_sum = criticized.contrast + contrast[is_praised].sum()
    likelihood_sum = criticized.likelihood + likelihood[is_praised].sum()
    return CutLoss(contrast_sum, likelihood_sum, is_flagged, log_ratios)
