"""Objectives: pure functions of token log-probabilities, without config, device or state."""

from cutlm.losses.cut import ALL_PARTS, CutLoss, Parts, blame_tokens, combine_parts, cut_loss
from cutlm.losses.dual_cut import dual_cut_loss
from cutlm.losses.unlikelihood import Blame, unlikelihood_loss

__all__ = [
    "ALL_PARTS",
    "Blame",
    "CutLoss",
    "Parts",
    "blame_tokens",
    "combine_parts",
    "cut_loss",
    "dual_cut_loss",
    "unlikelihood_loss",
]
