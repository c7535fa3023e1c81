"""Facts about a run for the model card: its settings, data, measurements and versions."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow
from datasets import Dataset
from pyarrow import compute

from cutlm.data.sources import find_hub_names
from cutlm.model.card import Facts
from cutlm.training.config import CUTConfig, DetectorConfig, JudgeConfig, Settings

_ID_COLUMNS = ("prompt_ids", "judged_prompt_ids", "response_ids", "chosen_ids", "rejected_ids")
# Settings of transformers that change the result. Never any that holds a path, an address or a key.
_INHERITED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "bf16", "fp16", "seed", "data_seed"),
)
# cutlm's own settings that do not change the result.
_WITHOUT_EFFECT = (
    *("dataset_num_proc", "head_chunk_size", "max_tokens_per_batch", "sensitivity_records", "logging_steps"),
    *("remove_unused_columns", "logging_nan_inf_filter"),
)
_OF_MODELS = ("model_revision", "dtype", "load_in_4bit", "load_in_8bit")
_OF_LORA = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora"),
    "init_lora_weights",
)


def describe_config(config: CUTConfig, model: Any) -> Facts:
    """Describe a run by its settings and the model that it trains."""
    names = [name for name in (*CUTConfig.__annotations__, *_INHERITED) if name not in _WITHOUT_EFFECT]
    role = "detector" if isinstance(config, DetectorConfig) else "judge" if isinstance(config, JudgeConfig) else None
    adapters = getattr(model, "peft_config", {})
    facts: Facts = {
        "kind": "adapter" if adapters else "model",
        "role": role,
        "objective": config.objective,
        "settings": _list_changed(config, dict.fromkeys(names)),
        "versions": _read_versions(),
    }
    if adapters:
        lora = next(iter(adapters.values()))
        facts["lora"] = {name: value for name in _OF_LORA if (value := getattr(lora, name, None)) not in (None, False)}
    return {name: value for name, value in facts.items() if value is not None}


def _read_versions() -> dict[str, str]:
    versions = {}
    for name in ("cutlm", "torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):  # not installed, but on the path
            versions[name] = version(name)
    return versions


def describe_settings(settings: Settings) -> Facts:
    """Describe what `cutlm train` knows besides: settings of the model, and names of data on the hub."""
    data_args, model_args, _ = settings.parts
    names = find_hub_names([*data_args.data, *(data_args.eval_data or [])])
    return {"settings": _list_changed(model_args, dict.fromkeys(_OF_MODELS)), "datasets": names}


def _list_changed(values: Any, names: Mapping[str, None]) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    fields = {field.name: field for field in dataclasses.fields(values)}
    changed = {}
    for name in names:
        field, value = fields[name], getattr(values, name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default and field.init:
            changed[name] = getattr(value, "value", value)
    return changed


def describe_rows(rows: Dataset, num_left_out: int) -> dict[str, Any]:
    """Count the rows of a training dataset."""
    counts: dict[str, Any] = {"num_records": len(rows)}
    if "is_satisfactory" in rows.column_names:
        num_satisfactory = sum(map(bool, rows["is_satisfactory"]))
        counts |= {"num_satisfactory": num_satisfactory, "num_unsatisfactory": len(rows) - num_satisfactory}
    return counts | {"num_left_out": num_left_out}


def hash_rows(rows: Dataset) -> str:
    """Compute the SHA-256 of the token ids of a training dataset, in its order."""
    digest = hashlib.sha256()
    names = [name for name in _ID_COLUMNS if name in rows.column_names]
    for table in rows.select_columns(names).with_format("arrow").iter(1000):
        for name in names:
            # A column that holds only None has the type null.
            lists = table.column(name).combine_chunks().cast(pyarrow.list_(pyarrow.int64()))
            lengths = compute.fill_null(compute.list_value_length(lists), -1)
            for values in (lengths, lists.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def describe_progress(state: Any, best_step: int | None = None) -> Facts:
    """Summarize the log of a trainer: steps, loss, sensitivity and the last evaluation.

    Args:
        state: The state of the trainer.
        best_step: The step whose weights the model has, if these are not the last ones.
    """
    num_steps, epoch = state.global_step, state.epoch
    history: Sequence[Mapping[str, Any]] = state.log_history
    if best_step is not None:
        history = [line for line in history if line["step"] <= best_step]
        num_steps, epoch = best_step, history[-1]["epoch"]
    training = {"num_steps": num_steps, "num_epochs": round(float(epoch or 0), 2)}
    if losses := [line["loss"] for line in history if "loss" in line]:
        training["final_loss"] = losses[-1]
    facts: Facts = {"training": training}
    for prefix in ("", "eval_"):
        found = next((line for line in history if f"{prefix}pairwise" in line), None)
        if found is not None:
            names = ("flag_signal", "pairwise")
            facts["sensitivity"] = {name: found[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in found}
            break
    if evaluations := [line for line in history if "eval_runtime" in line]:
        times = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
        facts["evaluation"] = {
            name.removeprefix("eval_"): value
            for name, value in evaluations[-1].items()
            if name.startswith("eval_") and name not in times
        }
    return facts
