"""Merge a LoRA adapter into its base model, and verify and save the result."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.files import sync_directory, sync_tree
from cutlm.errors import UserError
from cutlm.model.generation_config import find_end_of_turn_id, stopping_at
from cutlm.model.loading import find_base_model, load_adapter, load_model, load_own_tokenizer, read_stored_dtypes

# Largest expected change of a logit, relative to the largest logit. Rounding a merged weight to bfloat16 costs up to
# 2^-9 of it, at every layer.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Merge:
    """A finished merge."""

    base: str  # the base model
    dtype: torch.dtype  # of the merged weights and of the base model
    difference: float  # largest change of a logit by merging, relative to the largest logit
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
            empty, or logits change by more than rounding explains.

    Example:

        >>> merge_adapter("runs/cut", "models/cut-merged").difference
        3.1e-06
    """
    out = Path(out)
    base = find_base_model(adapter, base)
    if out.exists() and Path(base).exists() and out.samefile(base):
        raise UserError(f"{out}: this is the base model of {adapter}; choose another folder")
    _check_out(out, overwrite)
    base_model = load_model(base)
    dtype, dtypes = base_model.dtype, dict[str, torch.dtype]()
    if dtype == torch.float32:  # perhaps only to compute in
        dtype, dtypes = read_stored_dtypes(base)
    model: Any = load_adapter(base_model, adapter).eval()
    tokenizer = load_own_tokenizer(adapter, base)
    vocab_size = base_model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    before = _compute_logits(model, ids)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: non-finite values
        raise UserError(f"{adapter}: cannot merge it ({error})") from error
    computed = {name: weight.dtype for name, weight in _list_weights(merged)}
    _cast_weights(merged, dtypes)  # rounds them as they will be saved
    _cast_weights(merged, computed)
    difference = ((_compute_logits(merged, ids) - before).abs().max() / before.abs().max().clamp_min(1e-6)).item()
    tolerance = _TOLERANCES.get(dtype, 1e-1)
    if not difference <= tolerance:
        raise UserError(
            f"{adapter}: merging changed the logits by {difference:.2g} of the largest, expected at most {tolerance} in"
            f" {dtype}; nothing was saved"
        )
    _cast_weights(merged, dtypes)
    _save(merged, tokenizer, out)
    return Merge(base, dtype, difference, bool(tokenizer.chat_template))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"{out}: expected a folder, got a file")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out}: the folder is not empty; choose another one or pass --overwrite")
        if not (out / "config.json").is_file():
            raise UserError(f"{out}: not a model folder, so --overwrite does not replace it; choose another folder")


def _list_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _cast_weights(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast the named weights and buffers in place; others, such as RoPE's frequencies, are not saved."""
    for name, weight in _list_weights(model):
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))


@torch.no_grad()
def _compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float()


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save into a temporary folder next to `out`, then renames it."""
    saving = out.with_name(f".{out.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        with stopping_at(model, tokenizer.eos_token_id, find_end_of_turn_id(tokenizer)):
            model.save_pretrained(saving)
        tokenizer.save_pretrained(saving)
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
