"""Shared code of the benchmarks: models with random weights, one process per variant, and tables.

Each variant of a benchmark runs in a fresh process, so that its peak memory is its own and no cache is warm. Variants
take turns, because a machine's speed drifts; results are medians over the turns.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any


def make_parser(description: str | None, num_repeats: int = 3) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark; hidden ones select the variant of a child process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=num_repeats, help=f"turns per variant (default: {num_repeats})")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


# Of models with random weights; "smollm2" is SmolLM2-135M's.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 32000, "num_layers": 8, "width": 512, "num_heads": 8, "num_kv_heads": None}
    | {"mlp_width": 1376, "is_tied": False},
    "smollm2": {"vocab_size": 49152, "num_layers": 30, "width": 576, "num_heads": 9, "num_kv_heads": 3}
    | {"mlp_width": 1536, "is_tied": True},
}


class _ChooseShape(argparse.Action):
    """Sets the numbers of a shape; options after it change them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        vars(namespace).update(SHAPES[values])


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("the model, a LLaMA with random weights")
    shape.add_argument("--shape", choices=SHAPES, action=_ChooseShape, help="all numbers below (default: small)")
    for name, value in SHAPES["small"].items():
        if name != "is_tied":
            shape.add_argument(f"--{name}", type=int)
        parser.set_defaults(**{name: value})
    shape.add_argument("--all_linear", action="store_true", help="LoRA on all layers (default: on the MLP)")


def make_model(args: argparse.Namespace) -> Any:
    """Make the model, always with the same weights: in float32, or on a GPU with --bf16 in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=args.mlp_width,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads or args.num_heads,
        tie_word_embeddings=args.is_tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if not torch.cuda.is_available():
        return LlamaForCausalLM(config)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.bfloat16() if args.bf16 else model


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level tokenizer of at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def read_peak_bytes() -> int:
    """Peak memory of this process in bytes; on a GPU, that of the GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_alone(variant: str, folder: str | Path) -> dict[str, Any]:
    """Run a variant of this script, with the options of this process, in a new process.

    Returns:
        The JSON object of its last line, or {"failed": reason}.
    """
    command = [sys.executable, *sys.argv, "--variant", variant, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": describe_failure(done.returncode)}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def describe_failure(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit code {status}"


def take_turns(
    variants: Sequence[str], num_repeats: int, folder: str | Path, *, limit: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Run the variants in turn.

    Args:
        variants: The names of the variants.
        num_repeats: Number of turns.
        folder: A folder for the variants.
        limit: Seconds for all turns; after the first turn, runs that would exceed it are skipped.

    Returns:
        For each variant the median of each figure, and all values of `seconds` as `all_seconds`.
    """
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    durations: dict[str, float] = {}
    began = time.monotonic()
    for turn in range(num_repeats):
        # The quick ones first, so that they are repeated within any limit.
        for variant in sorted(variants, key=lambda variant: durations.get(variant, 0.0)):
            started = time.monotonic()
            if turn and started - began + durations[variant] > limit:
                continue
            result = run_alone(variant, folder)
            durations[variant] = time.monotonic() - started
            print(f"turn {turn + 1}, {variant}: {json.dumps(result)}", file=sys.stderr, flush=True)
            results[variant].append(result)
    return {variant: _take_medians(runs) for variant, runs in results.items()}


def _take_medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        return {"failed": failed[0]}
    medians: dict[str, Any] = {name: median(run[name] for run in runs) for name in runs[0]}
    return medians | {"all_seconds": [run["seconds"] for run in runs]}


def run_benchmark(
    args: argparse.Namespace,
    variants: Sequence[str],
    run_variant: Callable[[argparse.Namespace], dict[str, Any]],
    summarize: Callable[[dict[str, dict[str, Any]]], tuple[list[dict[str, Any]], dict[str, Any]]],
    *,
    prepare: Callable[[argparse.Namespace, Path], dict[str, Any]] | None = None,
    limit: float = math.inf,
) -> None:
    """Run the variant of a child process, or else all variants in turn, and write the results.

    Args:
        args: The options.
        variants: The names of the variants.
        run_variant: Measures `args.variant`.
        summarize: Makes the rows of the table and further figures from the results.
        prepare: Writes shared files into a folder and returns further figures.
        limit: Seconds for all turns; see `take_turns`.
    """
    if args.variant:
        print(json.dumps(run_variant(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        counts = prepare(args, Path(folder)) if prepare is not None else {}
        results = take_turns(variants, args.repeats, folder, limit=limit)
    rows, figures = summarize(results)
    known = {"machine": describe_machine(), "options": describe_options(args), "results": results}
    write_results(rows, figures | counts | known, args.json)


def describe_machine() -> dict[str, Any]:
    """The date, hardware and library versions of a measurement."""
    from importlib.metadata import version

    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "transformers", "trl", "peft")}


def describe_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a benchmark that affect its results."""
    options = {name: value for name, value in vars(args).items() if name not in ("variant", "folder", "json")}
    for name in ("records", "model", "tokenizer"):
        if isinstance(options.get(name), list):
            options[name] = [Path(path).name for path in options[name]]
        elif options.get(name):
            options[name] = Path(options[name]).name
    return options


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as a Markdown table, whose header has the keys of the first row."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|---{'|---:' * (len(names) - 1)}|"]
    lines += [f"| {' | '.join(_show(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def write_results(rows: Sequence[dict[str, Any]], results: dict[str, Any], path: str | None) -> None:
    """Print the rows as a table and all results as JSON, and write the JSON to a file if `path` is given."""
    print(make_table(rows))
    text = json.dumps(results | {"rows": rows}, indent=1)
    print(text)
    if path:
        Path(path).write_text(text + "\n", "utf-8")
