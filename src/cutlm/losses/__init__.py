"""Loss functions: pure functions of token log-probabilities, without config, device or state.

Read `cut` (eq. 5 to 7 of the paper), then `dual_cut`.
"""

from cutlm.losses.cut import (
    ALL_PARTS,
    CutLoss,
    Parts,
    TokenFlags,
    combine_parts,
    cut_loss,
    flag_tokens,
    unlikelihood_loss,
)
from cutlm.losses.dual_cut import dual_cut_loss

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
