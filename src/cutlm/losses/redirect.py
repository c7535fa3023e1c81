"""Redirect: flag tokens as CUT does, and say where the probability of a flagged token should go.

CUT lowers the probability of a flagged token, and the model decides which tokens gain it. Here the gain goes to the
tokens that a teacher prefers: the model before training, praised instead of judged (see `cutlm.losses.distillation`).
Flagged tokens, a few among many, and all others are averaged separately; the loss is the mean of both averages.
"""

import torch
from torch import Tensor

from cutlm.losses.cut import TokenFlags, unlikelihood_loss
from cutlm.losses.distillation import Teaching, divergence


def redirect_loss(logps: Tensor, flags: TokenFlags, teaching: Teaching, *, has_unlikelihood: bool = True) -> Tensor:
    """The terms [N] of redirect: -log p of an unflagged token, KL(q || p) of a flagged one.

    Args:
        logps: [N] log p(y_t | x, y_<t).
        flags: [N] flags of a frozen detector, and the weights of their unlikelihood terms.
        teaching: Distributions of the teacher and the student at the flagged tokens.
        has_unlikelihood: Add CUT's unlikelihood term (eq. 6) to that of a flagged token.

    Example:

        >>> logps = torch.tensor([0.5, 0.8]).log()
        >>> flags = TokenFlags(torch.tensor([False, True]), torch.tensor([0.0, 0.5]))
        >>> teaching = Teaching(flags.is_flagged, torch.tensor([[1.0]]).log(), torch.tensor([[0.1, 0.9]]).log())
        >>> redirect_loss(logps, flags, teaching)  # -log 0.5; -log 0.1 - 0.5 log 0.2
        tensor([0.6931, 3.1073])
    """
    terms = unlikelihood_loss(logps, flags) if has_unlikelihood else torch.where(flags.is_flagged, 0.0, -logps)
    taught = divergence(teaching.teacher_logps, teaching.student_logps)
    return terms + torch.zeros_like(terms).masked_scatter(teaching.is_taught, taught)
