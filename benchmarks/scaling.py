"""Measure how the cost of training grows with the length of records, the vocabulary and the number of records.

  python benchmarks/scaling.py

Seconds are measured at several sizes, and the exponent e of seconds ~ size^e is fitted (least squares of the
logarithms); 1 means proportional. The floor, only the body and the head, is measured for comparison."""

import argparse
import math
import statistics
from typing import Any

from common import add_shape_arguments, make_model, make_parser, run_benchmark
from train_step import adapt, find_floor, make_adapter, make_settings, time_loop, time_trainer

SIZES = {"length": (128, 256, 512, 1024), "vocab_size": (8000, 32000, 128000), "num_records": (4, 8, 16, 32)}
DEFAULTS = {"length": 256, "vocab_size": 32000, "num_records": 8}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.set_defaults(torch_compile=False)
    add_shape_arguments(parser)
    args = parser.parse_args()
    variants = [
        f"{kind} {name} {size}" for name, sizes in SIZES.items() for size in sizes for kind in ("cutlm", "floor")
    ]
    run_benchmark(args, variants, _train, summarize)


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for name, sizes in SIZES.items():
        row: dict[str, Any] = {"growing": name, "sizes": ", ".join(map(str, sizes))}
        for kind in ("cutlm", "floor"):
            seconds = [results[f"{kind} {name} {size}"]["seconds"] for size in sizes]
            row |= {f"{kind}, seconds": ", ".join(f"{value:.3g}" for value in seconds)}
            row |= {f"{kind}, exponent": find_exponent(sizes, seconds)}
        rows.append(row)
    return rows, {}


def find_exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size), by least squares."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, seconds))).slope


def _train(args: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    import torch

    from cutlm import CUTConfig, CUTTrainer
    from cutlm.model.collator import CutCollator

    kind, name, size = args.variant.split()
    point: dict[str, int] = DEFAULTS | {name: int(size)}
    args.vocab_size = point["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    # The prompt and the response have half of the tokens each, the judgment an eighth.
    half, eighth = point["length"] // 2, point["length"] // 8
    rows = []
    for _ in range(point["num_records"]):
        prompt, judgment, response = (
            torch.randint(args.vocab_size, (num,), generator=generator).tolist() for num in (half, eighth, half)
        )
        rows.append({"prompt_ids": prompt, "judged_prompt_ids": [*judgment, *prompt], "response_ids": response})
    model = make_model(args)
    if kind == "floor":
        parts = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
        return time_loop(args, adapt(model, args), list(map(CutCollator(), parts)), find_floor)
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(**make_settings(args, folder), max_length=100_000)
        return time_trainer(CUTTrainer(model, config, rows, peft_config=make_adapter(args.all_linear)))


if __name__ == "__main__":
    main()
