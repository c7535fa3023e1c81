"""The base model of the tiny world as a folder: where the packaged one is, loading it, making it again.

A folder is made all or nothing, and once: it names the recipe that it was made by, and making it again by the same one
does nothing. The training is left to `cutlm.world.pretraining`, the recipe to `cutlm.world.recipe`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from cutlm.errors import UserError
from cutlm.model.loading import load_tokenizer
from cutlm.world.measure import measure_base
from cutlm.world.pretraining import NUM_STEPS, train_base
from cutlm.world.recipe import RECIPE_FILE, describe_recipe, read_recipe
from cutlm.world.tasks import list_tasks
from cutlm.world.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS_FILE = "metrics.json"


def base_path() -> Path:
    """The folder of the base model that comes with the package."""
    return Path(__file__).parent / "base_model"


def load_base(path: str | Path | None = None) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Loads the base model.

    Args:
        path: A folder made by `cutlm world build`; by default the one that comes with the package.

    Returns:
        The model in float32 and evaluation mode, and its tokenizer.
    """
    folder = base_path() if path is None else Path(path)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(folder)


def build_base(out: str | Path, seed: int = 0, num_steps: int = NUM_STEPS, show_progress: bool = True) -> bool:
    """Trains a base model and writes its folder: weights in float16, tokenizer, recipe, and metrics on the dev tasks.

    Args:
        out: The folder to make.
        seed: Of the weights and of the corpus.
        num_steps: Of the training.
        show_progress: Whether to draw a bar.

    Returns:
        Whether anything was made: False where the folder is there already, by the same recipe.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    tokenizer = make_tokenizer()
    recipe = describe_recipe(tokenizer, seed, num_steps)
    if _is_made(out, recipe):
        return False
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        # Before the training: a place where nothing can be written is told at once.
        beside.mkdir(parents=True)
        model = train_base(tokenizer, seed, num_steps, show_progress)
        model.half().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        # Of what was written, not of what was trained: the weights have been rounded on the way.
        metrics = measure_base(*load_base(beside), list_tasks("dev"))
        for name, content in ((METRICS_FILE, metrics), (RECIPE_FILE, recipe)):
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if out.is_dir():
            out.rmdir()  # empty, as was checked above; not on every system can a folder be renamed onto it
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return True


def _is_made(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder is there already, whole and by this recipe."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder to make, got a file; choose another name")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    found = read_recipe(out)
    if found is None:
        raise UserError(f"--out {out}: the folder holds something else; choose another one, or empty it")
    if found.get("hash") != recipe["hash"]:
        differing = [name for name in recipe if name != "hash" and found.get(name) != recipe[name]]
        raise UserError(
            f"--out {out}: the folder holds a base model made otherwise ({', '.join(differing)} differ); choose another"
            " one, or remove it"
        )
    return True
