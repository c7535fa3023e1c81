"""An adapter folded into its base model, checked, and saved so that every tool prompts it as it was trained."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlm.data.files import sync_directory, sync_tree
from cutlm.errors import UserError
from cutlm.model.loading import find_base_model, load_adapter, load_model, load_own_tokenizer

# Largest difference of a logit, as a share of the largest logit. Rounding a merged weight to bfloat16 costs up to
# 2^-9 of it, at every layer.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Merge:
    """A finished merge.

    Attributes:
        base: The base model.
        dtype: Of the merged weights: that of the base model.
        difference: Largest difference of a logit before and after, as a share of the largest logit.
        has_template: Whether the tokenizer carries the template of training as its chat template.
    """

    base: str
    dtype: torch.dtype
    difference: float
    has_template: bool


def merge_adapter(adapter: str | Path, out: str | Path, *, base: str | None = None, overwrite: bool = False) -> Merge:
    """Folds an adapter into its base model and saves the result with the tokenizer it was trained with.

    The folder appears under its name only when it is whole.

    Args:
        adapter: The folder of the adapter.
        out: The folder to make.
        base: The base model; None takes the one that the adapter names.
        overwrite: Replace a folder that holds a model.

    Raises:
        UserError: No adapter, no base model, a filled output folder, an adapter that does not fit its base or holds
            values that are no numbers, or logits that change more than rounding explains.
    """
    out = Path(out)
    base = find_base_model(adapter, base)
    if out.exists() and Path(base).exists() and out.samefile(base):
        raise UserError(f"{out}: is the base model of {adapter}; name another folder")
    _check_out(out, overwrite)
    base_model = load_model(base)
    dtype = base_model.dtype
    model: Any = load_adapter(base_model, adapter).eval()
    tokenizer = load_own_tokenizer(adapter, base)
    probe = _make_probe(base_model.config.get_text_config().vocab_size)
    before = _read_logits(model, probe)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{adapter}: not merged ({error})") from error
    after = _read_logits(merged, probe)
    difference = ((after - before).abs().max() / before.abs().max().clamp_min(1e-6)).item()
    tolerance = _TOLERANCES.get(dtype, 1e-1)
    if not difference <= tolerance:
        raise UserError(
            f"{adapter}: merging changed the logits by {difference:.2g} of the largest, at most {tolerance} expected in"
            f" {dtype}; nothing was saved"
        )
    _save(merged, tokenizer, out)
    return Merge(base, dtype, difference, bool(tokenizer.chat_template))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"{out}: expected a folder to make, got a file")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out}: is not empty; name another folder, or replace it with --overwrite")
        if not (out / "config.json").is_file():
            raise UserError(f"{out}: is no model folder, so it is not replaced; name another folder")


def _make_probe(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, 32), generator=generator)


@torch.no_grad()
def _read_logits(model: nn.Module, probe: Tensor) -> Tensor:
    return model(input_ids=probe).logits.float()


def _save(model: nn.Module, tokenizer: object, out: Path) -> None:
    beside = out.with_name(f".{out.name}.saving")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        model.save_pretrained(beside)  # type: ignore[operator]
        tokenizer.save_pretrained(beside)  # type: ignore[attr-defined]
        sync_tree(str(beside))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # half a model on a disk that may be full
        raise
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.is_dir():
        os.rename(out, replaced)
    os.rename(beside, out)
    sync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
