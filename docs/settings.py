"""Makes the tables of docs/settings.md from the dataclasses that `cutlm train` reads its settings into.

  python docs/settings.py            fill in the tables
  python docs/settings.py --check    say whether they are those of the dataclasses; status 1 where not

A table stands between the lines `<!-- NAME -->` and `<!-- end -->`."""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cutlm.inspect.tables import escape_text
from cutlm.training.config import CUTConfig
from cutlm.training.settings import DataArguments, ModelArguments

PAGE = Path(__file__).with_suffix(".md")
_PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)

# Fields of other libraries, in our words: theirs are long, and change with their versions.
_MODEL = {
    "model_name_or_path": "A model's folder, or its name on the hub; must be given.",
    "model_revision": "Which version of it, on the hub.",
    "attn_implementation": "As of transformers, such as sdpa or flash_attention_2; none: its choice.",
    "lora_r": "Rank of LoRA.",
    "lora_dropout": "Dropout of LoRA.",
    "lora_target_parameters": "Parameters that LoRA adapts, beside modules.",
    "lora_modules_to_save": "Modules that are trained whole, beside LoRA.",
    "lora_task_type": "Leave this.",
    "use_rslora": "Rank-stabilized LoRA.",
    "use_dora": "DoRA.",
    "load_in_8bit": "The base model in 8 bits (bitsandbytes).",
    "load_in_4bit": "The base model in 4 bits (bitsandbytes).",
    "bnb_4bit_quant_type": "In which 4 bits: nf4 or fp4.",
    "use_bnb_nested_quant": "Whether the constants of quantization are quantized, too.",
    "bnb_4bit_quant_storage": "The dtype that 4-bit weights are stored in.",
}
_TRAINING = {
    "output_dir": "Where the adapter or model goes, and checkpoints; none: `trainer_output`.",
    "per_device_train_batch_size": "Records of a micro-batch, on each process.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step. Cutting a step up otherwise gives the same.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, whatever `num_train_epochs` says, where above 0.",
    "warmup_steps": "Steps in which the learning rate rises; below 1, a share of all steps.",
    "bf16": "Run in bfloat16 by autocast.",
    "activation_checkpointing": "Keep one hidden state a layer, and run each layer again on the way back.",
    "torch_compile": "Compile the decoder layers.",
    "use_cpu": "Train on the CPU; needed with bf16 where there is no GPU.",
    "eval_strategy": "Whether to evaluate: no, steps or epoch; with `eval_data` or `eval_split`.",
    "eval_steps": "Optimizer steps between evaluations; none: `logging_steps`.",
    "save_strategy": "When to save a checkpoint: no, steps or epoch.",
    "save_steps": "Optimizer steps between checkpoints; below 1, a share of all steps.",
    "save_total_limit": "Most checkpoints that are kept; none: all.",
    "resume_from_checkpoint": "`last`, or the folder of a checkpoint, to go on from.",
    "report_to": "Where figures go: wandb, tensorboard, ...; none: nowhere.",
    "run_name": "What the run is called there.",
    "seed": "Of the order of the records, the first weights of LoRA, dropout, `eval_split` and `downsample`.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text("utf-8")
    after = _PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", before)
    if args.check:
        sys.exit(None if after == before else f"{PAGE.name}: tables differ from the code; run docs/settings.py")
    PAGE.write_text(after, "utf-8")


def make_own_table(kind: Any) -> str:
    """All settings that a class of ours declares itself, as its docstring tells them."""
    return make_table(kind, dict.fromkeys(kind.__annotations__, ""))


def make_model_table() -> str:
    """All settings of the model, TRL's too."""
    return make_table(ModelArguments, {field.name: "" for field in dataclasses.fields(ModelArguments)} | _MODEL)


def make_table(kind: Any, meanings: dict[str, str]) -> str:
    """A table of some of a class's fields; what has no meaning yet is told by the docstring or the field's help."""
    told = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(inspect.getdoc(kind) or "")}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for name, meaning in meanings.items():
        text = meaning or told.get(name) or fields[name].metadata["help"]
        choices = [choice for choice in fields[name].metadata.get("choices") or () if choice not in text]
        text = text.replace("None", "none")
        text = text[:1].upper() + text[1:].rstrip(".") + (f"; or {', '.join(choices)}." if choices else ".")
        lines.append(f"| `{name}` | {show_default(fields[name])} | {escape_text(text)} |")
    return "\n".join(lines)


def show_default(field: Any) -> str:
    """A default as it would stand in a YAML file."""
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
    "model": make_model_table,
    "cut": lambda: make_own_table(CUTConfig),
    "training": lambda: make_table(TrainingArguments, _TRAINING),
}

if __name__ == "__main__":
    main()
