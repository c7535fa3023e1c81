"""Logged metrics: running sums over micro-batches and ranks, which become means when a line is logged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlm.losses import CutLoss, combine_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

_QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


class RunningMetrics:
    """Running sums on the device; nothing is copied from it until `reduce`.

    Args:
        device: Device of the losses.
        critique_weight: Weight of the critiques in `loss`.
    """

    def __init__(self, device: torch.device, critique_weight: float = 0.0) -> None:
        self.num_batches = 0
        self._critique_weight = critique_weight
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        # contrast, likelihood, critique, flagged tokens, sum of log ratios
        self._sums = torch.zeros(5, dtype=self._dtype, device=device)
        # denominators of the first three, tokens of unsatisfactory responses, tokens in all sequences
        self._counts = [0.0, 0.0, 0.0, 0.0, 0.0]
        self._flagged_shares: list[Tensor] = []

    def add(
        self,
        loss: CutLoss,
        batch: Mapping[str, Any],
        num_contrast: float,
        num_likelihood: float,
        num_critique: float = 0.0,
    ) -> None:
        """Add a micro-batch."""
        self.num_batches += 1
        critique = torch.zeros_like(loss.likelihood) if loss.critique is None else loss.critique
        lengths = batch["response_lengths"][: batch["num_unsatisfactory"]]
        praised = batch.get("is_praised") or [False] * len(lengths)
        ratios = loss.log_ratios.split(lengths) if lengths else ()
        log_ratios = sum(
            (part.sum() for part, is_praised in zip(ratios, praised, strict=True) if not is_praised),
            start=torch.zeros_like(loss.likelihood),
        )
        sums = (loss.contrast, loss.likelihood, critique, loss.is_flagged.sum(), log_ratios)
        self._sums += torch.stack([part.detach().to(self._dtype) for part in sums])
        num_judged = sum(length for length, is_praised in zip(lengths, praised, strict=True) if not is_praised)
        counts = (num_contrast, num_likelihood, num_critique, num_judged, len(batch["input_ids"]))
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]
        parts = loss.is_flagged.split(lengths) if lengths else ()
        shares = [part.float().mean() for part, is_praised in zip(parts, praised, strict=True) if not is_praised]
        if shares:
            self._flagged_shares.append(torch.stack(shares))

    def reduce(self, accelerator: "Accelerator") -> dict[str, float]:
        """Compute means over everything that was added, on all ranks.

        Returns:
            `loss_contrast` (L1), `loss_likelihood` (L2) and, if critiques are learned, `loss_critique` per token or
            record, and their combination `loss`; `flagged_share` of the tokens of unsatisfactory responses;
            `mean_log_ratio` in nats; quantiles over records of the share of flagged tokens; `num_tokens`. A metric
            without any value is absent.
        """
        totals = torch.cat([self._sums, torch.tensor(self._counts, dtype=self._dtype, device=self._device)])
        shares = torch.cat(self._flagged_shares) if self._flagged_shares else torch.zeros(0, device=self._device)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals, "sum")
            shares = accelerator.gather(accelerator.pad_across_processes(shares, pad_index=-1))
            shares = shares[shares >= 0]
        contrast, likelihood, critique, flagged, log_ratios, *counts = totals.tolist()
        num_contrast, num_likelihood, num_critique, num_judged, num_tokens = counts
        metrics = {"num_tokens": num_tokens}
        if num_contrast or num_likelihood:
            metrics["loss"] = combine_parts(contrast, likelihood, num_contrast, num_likelihood)
        if num_critique:
            metrics["loss_critique"] = critique / num_critique
            metrics["loss"] = metrics.get("loss", 0.0) + self._critique_weight * critique / num_critique
        if num_likelihood:
            metrics["loss_likelihood"] = likelihood / num_likelihood
        if num_contrast:
            metrics["loss_contrast"] = contrast / num_contrast
        if num_judged:
            metrics["flagged_share"] = flagged / num_judged
            metrics["mean_log_ratio"] = log_ratios / num_judged
            for name, quantile in _QUANTILES.items():
                metrics[f"flagged_share_{name}"] = shares.float().quantile(quantile).item()
        return metrics
