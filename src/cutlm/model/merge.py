"""Merge a LoRA adapter into its base model, and verify and save the result."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cutlm.data.files import sync_directory, sync_tree
from cutlm.errors import UserError
from cutlm.model.card import Facts, describe_base, read_facts, write_card
from cutlm.model.generation_config import find_end_of_turn_id, stopping_at
from cutlm.model.loading import find_base_model, load_adapter, load_model, load_own_tokenizer, read_stored_dtypes
from cutlm.model.saving import (
    choose_probe_ids,
    compute_logits,
    read_probe,
    repair_generation_config,
    select_logprobs,
)

logger = logging.getLogger(__name__)

# Largest expected change of a logit, relative to the largest logit. Rounding a merged weight to bfloat16 costs up to
# 2^-9 of it, at every layer.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for log-probabilities that were recorded in training, which may have run on other hardware.
_RECORDED_TOLERANCES = {"float32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Merge:
    """A finished merge."""

    base: str  # the base model
    dtype: torch.dtype  # of the merged weights and of the base model
    # Largest change of a log-probability from the trained model, relative to the largest log-probability; without its
    # record, largest change of a logit from the reloaded adapter, relative to the largest logit.
    difference: float
    is_recorded: bool  # whether the trained model's log-probabilities were saved with the adapter
    quantization: str | None  # of the base model in training, which the merged one does not have, such as "4-bit"
    has_template: bool  # whether the tokenizer has the training template as its chat template


def merge_adapter(adapter: str | Path, out: str | Path, *, base: str | None = None, overwrite: bool = False) -> Merge:
    """Merge an adapter into its base model and save the result with the tokenizer it was trained with.

    Args:
        adapter: The adapter's folder.
        out: The folder to write; it appears only when it is complete.
        base: The base model; None for the one that the adapter names.
        overwrite: Whether to replace a folder that holds a model.

    Raises:
        UserError: Adapter or base model are missing, do not fit each other or are non-finite, the output folder is not
            empty, or the saved model's outputs differ from those of the trained one by more than rounding explains.

    Example:

        >>> merge_adapter("runs/cut", "models/cut-merged").difference
        3.1e-06
    """
    out = Path(out)
    base = find_base_model(adapter, base)
    if out.exists() and Path(base).exists() and out.samefile(base):
        raise UserError(f"{out}: this is the base model of {adapter}; choose another folder")
    _check_out(out, overwrite)
    probe = read_probe(adapter)
    base_model = load_model(base)
    dtype, dtypes = base_model.dtype, dict[str, torch.dtype]()
    if dtype == torch.float32:  # perhaps only to compute in
        dtype, dtypes = read_stored_dtypes(base)
    model: Any = load_adapter(base_model, adapter).eval()
    tokenizer = load_own_tokenizer(adapter, base)
    ids = choose_probe_ids(base_model) if probe is None else torch.tensor([probe.token_ids])
    reloaded = compute_logits(model, ids).float()
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: non-finite values
        raise UserError(f"{adapter}: cannot merge it ({error})") from error
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))  # other buffers, as RoPE's, are not saved
    for field in repair_generation_config(merged):
        logger.warning("generation_config: %s is not valid, and left out of the merged model", field)
    facts = _describe_merge(adapter, base, dtype)
    with _saving(merged, tokenizer, out, facts) as folder:
        del base_model, model, merged  # the memory is needed to load the saved model
        logits = compute_logits(load_model(folder), ids).float()
        is_recorded, quantization = probe is not None, probe.quantization if probe is not None else None
        change = ((logits - reloaded).abs().max() / reloaded.abs().max().clamp_min(1e-6)).item()
        tolerance = _TOLERANCES.get(dtype, 1e-1)
        if not change <= tolerance:
            raise UserError(
                f"{adapter}: merging changed the logits by {change:.2g} of the largest, expected at most {tolerance} in"
                f" {dtype}; nothing was saved"
            )
        difference = change
        if probe is not None:
            recorded = torch.tensor(probe.logprobs)
            difference = ((select_logprobs(logits, ids) - recorded).abs().max() / recorded.abs().max()).item()
            tolerance = max(_RECORDED_TOLERANCES.get(name, 1e-1) for name in (str(dtype)[6:], probe.dtype))
            if quantization is None and not difference <= tolerance:
                raise UserError(
                    f"{adapter}: the log-probabilities of the merged model differ from those of the trained one by"
                    f" {difference:.2g} of the largest, expected at most {tolerance} in {dtype}; nothing was saved. Is"
                    f" {base} the base model of the training, unchanged? An adapter that was initialized by"
                    " pissa_niter is only complete in the output_dir of a finished run, not in its checkpoints"
                )
    return Merge(base, dtype, difference, is_recorded, quantization, bool(tokenizer.chat_template))


def _describe_merge(adapter: str | Path, base: str, dtype: torch.dtype) -> Facts:
    """The facts for the card of a merged model: those of the adapter, of whose base the license is asked if unknown."""
    facts = read_facts(adapter)
    found = facts.get("base") or {}
    if not found.get("license") or Path(base).exists():
        found = describe_base(base)
    return facts | {"kind": "merged", "base": found, "merge": {"dtype": str(dtype).removeprefix("torch.")}}


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"{out}: expected a folder, got a file")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out}: the folder is not empty; choose another one or pass --overwrite")
        if not (out / "config.json").is_file():
            raise UserError(f"{out}: not a model folder, so --overwrite does not replace it; choose another folder")


@contextmanager
def _saving(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path, facts: Facts) -> Iterator[Path]:
    """Save into a temporary folder next to `out`, and rename it at the end of the context."""
    saving = out.with_name(f".{out.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        with stopping_at(model, tokenizer.eos_token_id, find_end_of_turn_id(tokenizer)):
            model.save_pretrained(saving)
        tokenizer.save_pretrained(saving)
        write_card(saving, facts, out.resolve().name)
        del model
        yield saving
        sync_tree(saving)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)  # frees the disk, which may be full
        raise
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.is_dir():
        os.rename(out, replaced)
    os.rename(saving, out)
    sync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
