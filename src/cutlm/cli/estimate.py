"""Estimate the memory of a training step from a model's config, and which GPUs are large enough.

  cutlm estimate --model MODEL --load_in_4bit
  cutlm estimate --shape llama-2-70b --use_peft false --num_gpus 8 --fsdp
  cutlm estimate --table          # LLaMA 2 with 7B, 13B and 70B weights, as in docs/scale.md

No weights are loaded. The defaults are those of the recipes of `cutlm train`: LoRA of rank 16 on the MLP, bfloat16,
activation checkpointing. A pass has --max_tokens_per_batch tokens, by default those of one unsatisfactory record of
--max_length in both contexts.
"""

import argparse
from typing import TYPE_CHECKING, Any

from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from cutlm.model.memory import Plan, Shape

_SHAPES = ("llama-2-7b", "llama-2-13b", "llama-2-70b")


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", metavar="MODEL", help="a folder or a name on the hub, of which only the config is read"
    )
    model.add_argument("--config", metavar="FILE", help="a config.json")
    model.add_argument("--shape", choices=_SHAPES, help="a known model")
    model.add_argument("--table", action="store_true", help="print the table of docs/scale.md")
    truth: dict[str, Any] = {"type": _read_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    parser.add_argument("--use_peft", default=True, **truth, help="train LoRA (default), or with false all weights")
    parser.add_argument("--lora_r", type=int, metavar="N", default=16, help="LoRA rank (default: 16)")
    modules = "modules that LoRA adapts (default: gate_proj down_proj up_proj)"
    default = ["gate_proj", "down_proj", "up_proj"]
    parser.add_argument("--lora_target_modules", nargs="+", metavar="NAME", default=default, help=modules)
    parser.add_argument("--load_in_4bit", default=False, **truth, help="base model in 4 bits (default: false)")
    parser.add_argument("--load_in_8bit", default=False, **truth, help="base model in 8 bits (default: false)")
    parser.add_argument("--bf16", default=True, **truth, help="compute in bfloat16 (default)")
    parser.add_argument("--activation_checkpointing", default=True, **truth, help="default: true")
    parser.add_argument(
        "--max_length", type=int, metavar="N", default=2048, help="of prompt and response (default: 2048)"
    )
    tokens = "tokens in one forward and backward pass (default: one unsatisfactory record of --max_length)"
    parser.add_argument("--max_tokens_per_batch", type=int, metavar="N", help=tokens)
    parser.add_argument("--num_gpus", type=int, metavar="N", default=1, help="number of GPUs (default: 1)")
    parser.add_argument("--fsdp", action="store_true", help="shard weights over the GPUs (FSDP2 or ZeRO-3)")


def run(args: argparse.Namespace) -> int:
    from cutlm.model.memory import GPU_SIZES, USABLE, choose_gpus, estimate

    if args.table:
        print("\n".join(_make_table()))
        return 0
    if not (args.model or args.config or args.shape):
        raise ConfigError("expected one of --model, --config, --shape, --table, got none")
    shape, plan = _find_shape(args), _read_plan(args)
    memory = estimate(shape, plan)
    print(f"{shape.num_weights:,} weights, {plan.num_tokens:,} tokens per pass; peak memory of a step on each GPU:")
    for name in ("weights", "gradients", "optimizer", "activations", "work", "total"):
        print(f"  {name:<12}{getattr(memory, name) / 1e9:>10.2f} GB")
    fitting = choose_gpus(memory)
    sizes = ", ".join(map(str, fitting or GPU_SIZES))
    fits = "fits" if fitting else "fits none of the"
    print(f"{fits} GPUs of {sizes} GB, if {USABLE:.0%} of their memory is usable")
    return 0


def _find_shape(args: argparse.Namespace) -> "Shape":
    from pathlib import Path

    from cutlm.model.loading import load_config
    from cutlm.model.memory import SHAPES, read_shape

    if args.shape:
        return SHAPES[args.shape]
    if args.config and not Path(args.config).is_file():
        raise UserError(f"--config {args.config}: no such file; pass a config.json")
    if args.config and Path(args.config).suffix in (".yaml", ".yml"):
        raise UserError(f"--config {args.config}: expected a model's config.json, got YAML; use --model for its model")
    return read_shape(load_config(args.config or args.model))


def _read_plan(args: argparse.Namespace) -> "Plan":
    from cutlm.model.memory import Plan

    if args.load_in_4bit and args.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit: expected one of them, got both")
    return Plan(
        # An unsatisfactory record runs in both contexts.
        num_tokens=2 * args.max_length if args.max_tokens_per_batch is None else args.max_tokens_per_batch,
        lora_r=args.lora_r if args.use_peft else None,
        lora_targets=args.lora_target_modules,
        load_in=4 if args.load_in_4bit else 8 if args.load_in_8bit else None,
        # `cutlm train` loads float32 weights for full training, and the checkpoint's bfloat16 for LoRA.
        weight_size=2 if args.use_peft and args.bf16 else 4,
        is_bf16=args.bf16,
        is_checkpointed=args.activation_checkpointing,
        num_gpus=args.num_gpus,
        is_sharded=args.fsdp,
    )


def _make_table() -> list[str]:
    """A row for each model and way of training: GB on each GPU, and the smallest GPU that is large enough."""
    from dataclasses import replace

    from cutlm.model.memory import SHAPES, Plan, choose_gpus, estimate

    lora = Plan(num_tokens=4096)
    ways = {"LoRA": lora, "QLoRA (4 bits)": replace(lora, load_in=4), "full": replace(lora, lora_r=None, weight_size=4)}
    lines = ["| model | trained weights | 1 GPU | 8 GPUs | 8 GPUs, `--fsdp` |", "|---|---|---:|---:|---:|"]
    for name in _SHAPES:
        for way, plan in ways.items():
            cells = []
            for num_gpus, is_sharded in ((1, False), (8, False), (8, True)):
                try:
                    memory = estimate(SHAPES[name], replace(plan, num_gpus=num_gpus, is_sharded=is_sharded))
                except ConfigError:  # quantized weights cannot be sharded
                    cells.append("–")
                    continue
                fitting = choose_gpus(memory)
                holder = f"{fitting[0]} GB" if fitting else "none"
                cells.append(f"{memory.total / 1e9:.0f} → {holder}")
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return lines
