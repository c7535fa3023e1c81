"""From the log-probs of a micro-batch to its loss: which tokens go to which part of the objective.

The objectives themselves are `cutlm.losses`, the order of the tokens is `cutlm.model.collator`'s. Dividing the sums by
the counts of the whole optimizer step is left to `cutlm.training.trainer`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cutlm.losses import ALL_PARTS, CutLoss, Parts, TokenFlags, cut_loss, dual_cut_loss
from cutlm.model.collator import split_lengths
from cutlm.training.config import CUTConfig


def compute_batch_loss(logps: Tensor, batch: Mapping[str, Any], args: CUTConfig) -> CutLoss:
    """The sums of a micro-batch.

    Args:
        logps: [R] log-probs, in the order of `batch["target_ids"]`.
        batch: As made by `CutCollator`.
        args: Settings of the objective.
    """
    num_tokens, num_satisfactory_tokens = split_lengths(batch)
    without, with_judgment, satisfactory = logps.split([num_tokens, num_tokens, num_satisfactory_tokens])
    weights, weights_satisfactory = _weigh_records(batch, args.normalization, logps.device)
    if args.objective == "dual_cut":
        lengths = batch["response_lengths"][: batch["num_unsatisfactory"]]
        praised = [flag for flag, n in zip(batch.get("is_praised", []), lengths, strict=True) for _ in range(n)]
        return dual_cut_loss(
            without,
            with_judgment,
            satisfactory,
            torch.tensor(praised, dtype=torch.bool, device=logps.device),
            threshold=args.threshold,
            unlikelihood_weight=args.unlikelihood_weight,
            gamma=args.gamma,
            praise_weight=args.praise_weight,
            weights=weights,
            weights_satisfactory=weights_satisfactory,
        )
    blame = blame_satisfactory = None
    if "is_flagged" in batch:
        sizes = [num_tokens, num_satisfactory_tokens]
        flags, flag_weights = batch["is_flagged"].split(sizes), batch["flag_weights"].split(sizes)
        blame, blame_satisfactory = TokenFlags(flags[0], flag_weights[0]), TokenFlags(flags[1], flag_weights[1])
    return cut_loss(
        without,
        with_judgment,
        satisfactory,
        threshold=0 if args.detector == "off" else args.threshold,
        unlikelihood_weight=args.unlikelihood_weight,
        gamma=args.gamma,
        weights=weights,
        weights_satisfactory=weights_satisfactory,
        blame=blame,
        blame_satisfactory=blame_satisfactory,
        parts=args.parts,
    )


def count_batch(batch: Mapping[str, Any], normalization: str, parts: Parts = ALL_PARTS) -> tuple[float, float]:
    """What a batch adds to the denominators of L1 and L2: its tokens, or its records under `normalization: record`."""
    num_unsatisfactory, num_satisfactory = split_lengths(batch)
    if normalization == "record":
        num_unsatisfactory = batch["num_unsatisfactory"]
        num_satisfactory = len(batch["locations"]) - num_unsatisfactory
    return (
        num_unsatisfactory * parts.contrast,
        num_unsatisfactory * parts.unsatisfactory + num_satisfactory * parts.satisfactory,
    )


def _weigh_records(
    batch: Mapping[str, Any], normalization: str, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """1 / N for each token of a response of N tokens under `normalization: record`; None for ones."""
    if normalization == "token":
        return None, None
    num_unsatisfactory, lengths = batch["num_unsatisfactory"], batch["response_lengths"]
    unsatisfactory = [1 / n for n in lengths[:num_unsatisfactory] for _ in range(n)]
    satisfactory = [1 / n for n in lengths[2 * num_unsatisfactory :] for _ in range(n)]
    return torch.tensor(unsatisfactory, device=device), torch.tensor(satisfactory, device=device)
