"""How the cost of training grows with the length of records, the vocabulary and the number of records.

  python benchmarks/scaling.py

For each, seconds are taken at several sizes, and the exponent e of seconds ~ size^e is fitted to them (least squares of
the logarithms): 1 is in proportion. The floor's, the body and the head alone, stands beside."""

import argparse
import json
import math
from typing import Any

from measuring import (
    add_run_arguments,
    add_shape_arguments,
    describe_machine,
    describe_options,
    make_model,
    take_turns,
    write_results,
)
from train_step import adapt, find_floor, make_adapter, make_settings, time_loop, time_trainer

SIZES = {"length": (128, 256, 512, 1024), "vocab_size": (8000, 32000, 128000), "num_records": (4, 8, 16, 32)}
DEFAULTS = {"length": 256, "vocab_size": 32000, "num_records": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.set_defaults(torch_compile=False)
    add_shape_arguments(parser)
    add_run_arguments(parser, num_repeats=3)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(_train(args)))
        return
    variants = [
        f"{kind} {name} {size}" for name, sizes in SIZES.items() for size in sizes for kind in ("cutlm", "floor")
    ]
    results = take_turns(variants, args.repeats, "")
    rows = []
    for name, sizes in SIZES.items():
        row: dict[str, Any] = {"growing": name, "sizes": ", ".join(map(str, sizes))}
        for kind in ("cutlm", "floor"):
            seconds = [results[f"{kind} {name} {size}"]["seconds"] for size in sizes]
            row |= {f"{kind}, seconds": ", ".join(f"{value:.3g}" for value in seconds)}
            row |= {f"{kind}, exponent": find_exponent(sizes, seconds)}
        rows.append(row)
    known = {"machine": describe_machine(), "options": describe_options(args), "results": results}
    write_results(rows, known, args.json)


def find_exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size), by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    import torch

    from cutlm import CUTConfig, CUTTrainer
    from cutlm.model.collator import CutCollator

    kind, name, size = args.variant.split()
    point: dict[str, int] = DEFAULTS | {name: int(size)}
    args.vocab_size = point["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    # Half of a record is its prompt; a judgment is an eighth of it.
    half, eighth = point["length"] // 2, point["length"] // 8
    rows = []
    for _ in range(point["num_records"]):
        prompt, judgment, response = (
            torch.randint(args.vocab_size, (num,), generator=generator).tolist() for num in (half, eighth, half)
        )
        rows.append({"prompt_ids": prompt, "judged_prompt_ids": [*judgment, *prompt], "response_ids": response})
    model = make_model(args)
    if kind == "floor":
        cut = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
        return time_loop(args, adapt(model, args), list(map(CutCollator(), cut)), find_floor)
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(**make_settings(args, folder), max_length=100_000)
        return time_trainer(CUTTrainer(model, config, rows, peft_config=make_adapter()))


if __name__ == "__main__":
    main()
