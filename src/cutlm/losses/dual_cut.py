"""DualCUT, which also learns from praise (Liu and Chen 2024, arXiv 2412.20297, eq. 5 to 9).

The paper has criticism and praise of each response, and compares each with the other (its lambda_1 and lambda_3). A
record has one judgment, so here both are 0, and only the comparisons with the prompt without feedback remain.
"""

import math

import torch
from torch import Tensor

from cutlm.losses.cut import CutLoss, Parts, TokenFlags, sum_terms, unlikelihood_loss

# sigma_1 and sigma_2, for which the paper names no value: less likely tokens are neither flagged nor praised.
LEAST_LIKELIHOOD = 0.01


def dual_cut_loss(
    logps_without: Tensor,
    logps_with: Tensor,
    logps_satisfactory: Tensor,
    is_praised: Tensor,
    *,
    threshold: float,
    unlikelihood_weight: float,
    praise_weight: float,
    weights: Tensor | None = None,
    weights_satisfactory: Tensor | None = None,
    can_flag: Tensor | None = None,
) -> CutLoss:
    """DualCUT's loss over the response tokens of a batch.

    With r = p(y_t | x, j, y_<t) / p(y_t | x, y_<t), the tokens with r > threshold and p(y_t | x, j, y_<t) > 0.01 are
    marked. A marked token of a criticized response has the term -alpha sigmoid(r - threshold) log(1 - p(y_t | x)), one
    of a praised response -(1 + beta sigmoid(r - threshold)) log p(y_t | x), and any other token -log p(y_t | x).

    Args:
        logps_without: [U] log p(y_t | x, y_<t) of responses with criticism or praise.
        logps_with: [U] log p(y_t | x, j, y_<t) of the same tokens; they get no gradient.
        logps_satisfactory: [S] log p(y_t | x, y_<t) of responses that have one context.
        is_praised: [U] bool, the tokens of praised responses; these are never flagged.
        threshold: lambda_2 and lambda_4.
        unlikelihood_weight: alpha.
        praise_weight: beta.
        weights: [U] factors on the tokens; None for ones.
        weights_satisfactory: [S] likewise.
        can_flag: [U] bool, False for tokens that are never marked, such as those of a chat template; None for all.

    Example:

        >>> logps = [torch.tensor(p).log() for p in ([0.4, 0.4], [0.8, 0.8], [0.3])]
        >>> settings = {"threshold": 1.5, "unlikelihood_weight": 1.0, "praise_weight": 2.0}
        >>> loss = dual_cut_loss(*logps, torch.tensor([False, True]), **settings)
        >>> loss.is_flagged
        tensor([ True, False])
        >>> loss.contrast  # with s = sigmoid(2 - 1.5) = 0.62, -s log 0.6 - (1 + 2 s) log 0.4
        tensor(2.3750)
    """
    judged = logps_with.detach()
    log_ratios = judged - logps_without.detach()
    is_marked = (log_ratios > math.log(threshold)) & (judged > math.log(LEAST_LIKELIHOOD))
    if can_flag is not None:
        is_marked = is_marked & can_flag
    scales = torch.sigmoid(log_ratios.exp() - threshold)
    flags = TokenFlags(is_marked & ~is_praised, unlikelihood_weight * scales)
    terms = unlikelihood_loss(logps_without, flags)
    terms = torch.where(is_marked & is_praised, (1 + praise_weight * scales) * terms, terms)
    parts = Parts(unsatisfactory=False)
    sums = sum_terms(terms, logps_with, -logps_satisfactory, weights, weights_satisfactory, parts)
    return CutLoss(*sums, flags.is_flagged, log_ratios)
