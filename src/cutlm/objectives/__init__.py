"""Objectives: pure functions of token log-probabilities, without config, device or state."""

from cutlm.objectives.cut import CutLoss, combine_parts, cut_loss

__all__ = ["CutLoss", "combine_parts", "cut_loss"]
