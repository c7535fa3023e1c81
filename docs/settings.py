"""Generate the tables of docs/settings.md from the dataclasses that define the settings of `cutlm train`.

  python docs/settings.py            update the tables
  python docs/settings.py --check    exit with 1 if the tables are out of date

A table stands between the lines `<!-- NAME -->` and `<!-- end -->`."""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cutlm.inspect.tables import escape_cell
from cutlm.training.config import CUTConfig, DataArguments, ModelArguments

PAGE = Path(__file__).with_suffix(".md")
_TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)

# Fields inherited from transformers. Their own help texts are long and change with the version.
_TRAINING = {
    "output_dir": "Output folder for the adapter or model and the checkpoints; none: `trainer_output`.",
    "per_device_train_batch_size": "Records per micro-batch and process.",
    "gradient_accumulation_steps": "Micro-batches per optimizer step. The split does not change the gradient.",
    "num_train_epochs": "Number of epochs.",
    "max_steps": "Number of optimizer steps; if positive, overrides `num_train_epochs`.",
    "warmup_steps": "Warmup steps of the learning rate; below 1, a share of all steps.",
    "bf16": "bfloat16 autocast.",
    "activation_checkpointing": "Keep one hidden state per layer and recompute the rest in the backward pass.",
    "torch_compile": "Compile the decoder layers.",
    "use_cpu": "Train on the CPU. Required for bf16 without a GPU.",
    "eval_strategy": "When to evaluate: no, steps or epoch. Needs `eval_data` or `eval_split`.",
    "eval_steps": "Optimizer steps between evaluations; none: `logging_steps`.",
    "save_strategy": "When to save a checkpoint: no, steps or epoch.",
    "save_steps": "Optimizer steps between checkpoints; below 1, a share of all steps.",
    "save_total_limit": "Maximum number of checkpoints to keep; none: all.",
    "resume_from_checkpoint": "Checkpoint to resume from: `last` or a folder.",
    "report_to": "Metrics logger: wandb, tensorboard, ...; none: no logger.",
    "run_name": "Name of the run in the logger.",
    "seed": "Random seed for the data order, LoRA initialization, dropout, `eval_split` and `downsample`.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text("utf-8")
    after = _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", before)
    if args.check:
        sys.exit(None if after == before else f"{PAGE.name}: tables are out of date; run: python docs/settings.py")
    PAGE.write_text(after, "utf-8")


def make_own_table(kind: Any) -> str:
    """Make a table of the settings that a cutlm class declares itself, described by its docstring."""
    return make_table(kind, dict.fromkeys(kind.__annotations__, ""))


def make_table(kind: Any, meanings: dict[str, str]) -> str:
    """Make a table of fields; an empty meaning is filled from the class docstring or the field's help text."""
    documented = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(inspect.getdoc(kind) or "")}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for name, meaning in meanings.items():
        text = meaning or documented.get(name) or fields[name].metadata["help"]
        choices = [choice for choice in fields[name].metadata.get("choices") or () if choice not in text]
        text = text.replace("None", "none")
        text = text[:1].upper() + text[1:].rstrip(".") + (f"; or {', '.join(choices)}." if choices else ".")
        lines.append(f"| `{name}` | {show_default(fields[name])} | {escape_cell(text)} |")
    return "\n".join(lines)


def show_default(field: Any) -> str:
    """Format a default as it is written in a YAML file."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or value == [] or value == "none":
        return "none"
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"`{value:.1e}`".replace("e-0", "e-")
    return f"`{str(value).lower() if isinstance(value, bool) else getattr(value, 'value', value)}`"


TABLES = {
    "data": lambda: make_own_table(DataArguments),
    "model": lambda: make_own_table(ModelArguments),
    "cut": lambda: make_own_table(CUTConfig),
    "training": lambda: make_table(TrainingArguments, _TRAINING),
}

if __name__ == "__main__":
    main()
