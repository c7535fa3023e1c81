"""The taught detector: a LoRA adapter that learns to read judgments, by likelihood given the judgment (`hindsight`)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cutlm.cli import main as run_cutlm
from cutlm.data.files import write_rows
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.model.loading import has_fast_math
from cutlm.prompting.templates import TemplateName

_SETTINGS = {
    "objective": "hindsight",
    "lora_r": 16,
    "lora_target_modules": "all-linear",
    "dtype": "bfloat16" if has_fast_math(torch.bfloat16) else "float32",
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "warmup_steps": 5,
    "max_length": 512,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 8,
    "save_total_limit": 1,
    "report_to": "none",
    "use_cpu": "true",
    "seed": 0,
}


def teach_detector(
    model: Path, template: TemplateName, records: Sequence[JudgedRecord], cache: Path, num_steps: int
) -> Path:
    """Train an adapter, or go on with an interrupted training; return its folder."""
    rows = [
        {name: getattr(record, name) for name in ("instruction", "input", "output", "judgment")} for record in records
    ]
    content = json.dumps([str(model), template, rows, num_steps, _SETTINGS])
    folder = cache / f"taught-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if (folder / "adapter_config.json").is_file():
        return folder
    data = cache / f"{folder.name}.jsonl"
    write_rows(data, rows)
    settings = _SETTINGS | {"model_name_or_path": model, "data": data, "output_dir": folder, "template": template}
    settings |= {"max_steps": num_steps}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    if any(folder.glob("checkpoint-*")):
        options += ["--resume_from_checkpoint", "last"]
    if run_cutlm(["train", *options]) != 0:
        raise UserError(f"{folder}: the training did not finish; run the command again to resume")
    return folder
