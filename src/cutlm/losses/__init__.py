"""Loss functions: pure functions of token log-probabilities, without config, device or state.

Read `cut` (eq. 5 to 7 of the paper), then `dual_cut`, `distillation` and `redirect`.
"""

from cutlm.losses.cut import (
    ALL_PARTS,
    CutLoss,
    Parts,
    TokenFlags,
    combine_parts,
    cut_loss,
    flag_tokens,
    sum_terms,
    unlikelihood_loss,
)
from cutlm.losses.distillation import DIVERGENCES, Teaching, divergence, guide, self_distillation_loss
from cutlm.losses.dual_cut import dual_cut_loss
from cutlm.losses.redirect import redirect_loss

__all__ = [
    "ALL_PARTS",
    "DIVERGENCES",
    "CutLoss",
    "Parts",
    "Teaching",
    "TokenFlags",
    "combine_parts",
    "cut_loss",
    "divergence",
    "dual_cut_loss",
    "flag_tokens",
    "guide",
    "redirect_loss",
    "self_distillation_loss",
    "sum_terms",
    "unlikelihood_loss",
]
