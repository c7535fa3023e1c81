"""Checkpoints that survive a kill at any moment: written beside, synced, renamed.

A folder named `checkpoint-N` is always whole; what was being written when a process died stands in a hidden folder
that is cleared by the next save. What goes into a checkpoint is left to `transformers.Trainer`.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from cutlm.data.files import sync_directory
from cutlm.errors import UserError

# Token scores of a frozen detector: checked against the data and the model before they are used again.
SCORES_FILE = "token_scores.jsonl"
# What these depend on, and a hash of them.
SCORES_HEADER_FILE = "token_scores.json"
_STAGING = ".saving"
_REPLACED = ".replaced"
# By what stands in a checkpoint, names of its files; DeepSpeed keeps most of it in a folder of its own.
_PARTS = {
    "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
    "state of the optimizer": ("optimizer*", "global_step*"),
    "state of the schedule": (SCHEDULER_NAME, "global_step*"),
    "state of random numbers": ("rng_state*.pth",),
    "state of the trainer": (TRAINER_STATE_NAME,),
}
# Tools take a folder for a model by these; they arrive last.
_MARKERS = ("config.json", "adapter_config.json")


@contextmanager
def staged(run_dir: str, is_writer: bool, wait_for_everyone: Callable[[], None]) -> Iterator[str]:
    """Lends an empty hidden folder inside a run's folder, and clears it at the end.

    Args:
        run_dir: The run's folder.
        is_writer: Whether this process makes and clears it.
        wait_for_everyone: A barrier over all processes.
    """
    staging = os.path.join(run_dir, _STAGING)
    if is_writer:
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(staging)
    wait_for_everyone()
    try:
        yield staging
    finally:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)


def publish_checkpoint(staging: str, run_dir: str, state: TrainerState, save_total_limit: int | None) -> None:
    """Moves a whole checkpoint from the staging folder to its place, then removes those over the limit."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    source, target = os.path.join(staging, name), os.path.join(run_dir, name)
    if state.best_global_step:
        # The Trainer has just written the staging folder's name.
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        state.best_model_checkpoint = best if best == target or os.path.isdir(best) else None
        state.save_to_json(os.path.join(source, TRAINER_STATE_NAME))
    sync_tree(source)
    if os.path.isdir(target):
        os.rename(target, os.path.join(staging, _REPLACED))
    os.rename(source, target)
    sync_directory(run_dir)
    rotate_checkpoints(run_dir, save_total_limit, state.best_model_checkpoint)


def publish_files(staging: str, target: str) -> None:
    """Moves every file of a saved model from the staging folder to its place, its config last."""
    sync_tree(staging)
    names = sorted(os.listdir(staging), key=lambda name: (name in _MARKERS, name))
    for name in names:
        source = os.path.join(staging, name)
        if os.path.isdir(source):
            shutil.copytree(source, os.path.join(target, name), dirs_exist_ok=True)
        else:
            os.replace(source, os.path.join(target, name))
    sync_directory(target)


def sync_tree(folder: str) -> None:
    """Puts every file below a folder, and the names of them, on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(parent)


def find_checkpoint(output_dir: str, wanted: str) -> str:
    """Finds the checkpoint to go on from.

    Args:
        output_dir: The run's folder.
        wanted: "last" (or "true") for the newest of the run, or the path of one.

    Raises:
        UserError: There is none, or it is not whole.
    """
    if wanted.lower() in ("last", "true"):
        found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if found is None:
            raise UserError(f"{output_dir}: no checkpoint to go on from; leave --resume_from_checkpoint out to start")
        wanted = found
    elif not os.path.exists(os.path.join(wanted, TRAINER_STATE_NAME)):
        raise UserError(
            f"{wanted}: expected a checkpoint folder with {TRAINER_STATE_NAME}, found none; give one, or 'last'"
        )
    _check_whole(Path(wanted))
    return wanted


def _check_whole(folder: Path) -> None:
    """Refuses a checkpoint from which a run would go on other than it was left.

    Raises:
        UserError: Something of it is missing, or damaged.
    """
    absent = [part for part, names in _PARTS.items() if not any(any(folder.glob(name)) for name in names)]
    if absent:
        raise UserError(
            f"{folder}: expected a whole checkpoint, found no {', no '.join(absent)} (save_only_model saves none); go"
            " on from another, or start anew with --overwrite_output_dir"
        )
    damaged = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not _is_sound(path)]
    if damaged:
        raise UserError(f"{folder}: {', '.join(damaged)} cannot be read; restore it, or go on from another checkpoint")


def _is_sound(path: Path) -> bool:
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    try:
        if path.name == TRAINER_STATE_NAME:
            return "global_step" in json.loads(path.read_text("utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (ValueError, TypeError, SafetensorError):
        return False
    return True


def check_output_dir(output_dir: str, overwrite: bool) -> None:
    """Refuses to write among files that another run made, unless they are to be overwritten.

    Raises:
        UserError: The folder is not empty, or a file.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    kept = (SCORES_FILE, SCORES_HEADER_FILE, f"{SCORES_FILE}.partial")
    if not folder.is_dir() or all(path.name in kept for path in folder.iterdir()):
        return
    if not overwrite:
        last = get_last_checkpoint(output_dir)
        what = f"holds {os.path.basename(last)}" if last else "is not empty"
        raise UserError(
            f"output_dir: {output_dir} {what}; go on with --resume_from_checkpoint last, start anew with"
            " --overwrite_output_dir, or name another folder"
        )


def clear_output_dir(output_dir: str) -> None:
    """Removes what an earlier run left: its checkpoints and its model, and nothing else."""
    folder = Path(output_dir)
    # A checkpoint left by the old run would be newer than the first ones of this run, and be resumed from; its adapter
    # or model would be taken for this run's.
    for name in (*_MARKERS, "adapter_model.safetensors", "model.safetensors.index.json", TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    for path in [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / _STAGING]:
        shutil.rmtree(path, ignore_errors=True)
