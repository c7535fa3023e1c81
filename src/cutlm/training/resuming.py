"""Whether a start goes on with the run that left a checkpoint: its settings, its data, its processes.

Whether the checkpoint is whole is `cutlm.training.checkpoints`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cutlm.data.files import open_atomic, read_bytes
from cutlm.errors import ConfigError, UserError
from cutlm.training.settings import Settings

SETTINGS_FILE = "cutlm_train.yaml"
RUN_FILE = "cutlm_run.json"
# With another one of these a resumed run would skip records or see others, or have no use for what it left.
_SETTINGS_OF_A_RUN = (
    "data_seed",
    "detector",
    "downsample",
    "eval_split",
    "gradient_accumulation_steps",
    "load_in_4bit",
    "load_in_8bit",
    "lora_alpha",
    "lora_modules_to_save",
    "lora_r",
    "lora_target_modules",
    "max_length",
    "objective",
    "optim",
    "per_device_train_batch_size",
    "satisfactory_only",
    "seed",
    "template",
    "train_sampling_strategy",
    "use_dora",
    "use_contrast_loss",
    "use_satisfactory_loss",
    "use_peft",
    "use_rslora",
)


def describe_run(data: str) -> dict[str, Any]:
    """What no setting says of a run, and what it must have again to go on.

    Args:
        data: The file that it learns from.

    Returns:
        `data_sha256`, None where the file cannot be read, and `num_processes`.
    """
    try:
        digest = hashlib.sha256(read_bytes(data)).hexdigest()
    except (OSError, UserError):
        digest = None  # what is wrong with it is said where it is read
    return {"data_sha256": digest, "num_processes": int(os.environ.get("WORLD_SIZE", "1"))}


def compare_settings(settings: Settings, run_facts: Mapping[str, Any], folder: Path) -> None:
    """Says which settings differ from those of the run that is gone on with.

    Args:
        settings: Of this start.
        run_facts: Of this start, by `describe_run`.
        folder: Of that run.

    Raises:
        ConfigError: One differs that decides which records come when, or what is trained.
    """
    path, run_path = folder / SETTINGS_FILE, folder / RUN_FILE
    if not path.is_file():
        print(f"{folder}: no {SETTINGS_FILE} there, so these settings are not compared with that run's")
        return
    try:
        before = dict(yaml.safe_load(path.read_text("utf-8")))
        run = dict(json.loads(run_path.read_text("utf-8"))) if run_path.is_file() else {}
    except (ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{path}, {run_path.name}: damaged, so the run cannot be gone on with; restore them") from None
    pairs = {name: (before.get(name), settings.resolved.get(name)) for name in before | settings.resolved}
    fixed = _SETTINGS_OF_A_RUN if "data_sha256" in run else ("data", *_SETTINGS_OF_A_RUN)
    problems = [
        f"{name}: the run to go on with has {old!r}, got {new!r}; give the same, or start anew"
        for name, (old, new) in sorted(pairs.items())
        if old != new and name in fixed
    ]
    digest, num_processes = run_facts["data_sha256"], run_facts["num_processes"]
    if digest is not None and run.get("data_sha256", digest) != digest:
        problems.append(
            f"data: {settings.parts[0].data} holds something else than when the run began; restore it, or start anew"
        )
    if run.get("num_processes", num_processes) != num_processes:
        problems.append(
            f"the run to go on with has {run['num_processes']} processes, got {num_processes}; start as many, or start"
            " anew with --overwrite_output_dir"
        )
    if problems:
        raise ConfigError(problems)
    for name, (old, new) in sorted(pairs.items()):
        if old != new and name not in ("resume_from_checkpoint", "overwrite_output_dir"):
            print(f"{name} was {old!r} before this resume, and is {new!r} now")


def save_settings(settings: Settings, run_facts: Mapping[str, Any], folder: Path) -> None:
    """Writes the resolved settings beside the output, and what else a run that goes on must have again."""
    with open_atomic(folder / SETTINGS_FILE) as file:
        file.write(settings.to_yaml().encode("utf-8"))
    with open_atomic(folder / RUN_FILE) as file:
        file.write(json.dumps(run_facts).encode("utf-8"))
