"""Loss functions: pure functions of token log-probabilities, without config, device or state.

Read `unlikelihood` (the loss of flagged tokens), then `cut` (eq. 5 to 7 of the paper), then `dual_cut`.
"""

from cutlm.losses.cut import ALL_PARTS, CutLoss, Parts, combine_parts, cut_loss, flag_tokens
from cutlm.losses.dual_cut import dual_cut_loss
from cutlm.losses.unlikelihood import TokenFlags, unlikelihood_loss

__all__ = [
    "ALL_PARTS",
    "CutLoss",
    "Parts",
    "TokenFlags",
    "combine_parts",
    "cut_loss",
    "dual_cut_loss",
    "flag_tokens",
    "unlikelihood_loss",
]
