"""Measure `cutlm blame` and `cutlm generate` on a bfloat16 model and on its float32 copy, on a CPU.

  OMP_NUM_THREADS=1 python benchmarks/cpu_dtype.py --model "$(make -s real-model)" --records FILE --max_isa AVX2

On a CPU without units for bfloat16, both compute in float32. `--max_isa AVX2` makes oneDNN, with which torch multiplies
matrices, take any x86 CPU for such a one. A command is timed as a whole, with its imports and loading its model. On a
shared machine, compare CPU seconds, with one thread, so that none spends them waiting for another."""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import make_parser, run_benchmark

START = time.perf_counter()
COMMANDS = ("blame", "generate")
DTYPES = ("bfloat16", "float32")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder")
    parser.add_argument("--records", required=True, metavar="FILE", help="judged records")
    parser.add_argument("--num_records", type=int, default=27)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_isa", metavar="ISA", help="value of ONEDNN_MAX_CPU_ISA for the commands, such as AVX2")
    args = parser.parse_args()
    if args.max_isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = args.max_isa
    run_benchmark(
        args, [f"{command} {dtype}" for command in COMMANDS for dtype in DTYPES], _run, _summarize, prepare=_save
    )


def _save(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save the model in both dtypes, with the same values, and the records."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cutlm import load_records

    model = AutoModelForCausalLM.from_pretrained(args.model)
    for dtype in DTYPES:  # in this order, so that both have the same values
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / dtype)
    records = load_records(args.records)[: args.num_records]
    prompts = [{"instruction": record.full_instruction} for record in records]
    rows = [record.model_dump(mode="json") for record in records]
    for name, lines in (("records", rows), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"num_records": len(rows)}


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm.cli import main as run_cutlm

    command, dtype = args.variant.split()
    folder = Path(args.folder)
    options = ["--model", str(folder / dtype), "--device", "cpu", "--template", "chat"]
    options += ["--out", str(folder / "out.json"), "--overwrite"]
    if command == "blame":
        options += ["--data", str(folder / "records.jsonl")]
    else:
        options += ["--prompts", str(folder / "prompts.jsonl"), "--max_new_tokens", str(args.max_new_tokens)]
    with contextlib.redirect_stdout(sys.stderr):
        assert run_cutlm([command, *options]) == 0
    return {"seconds": time.perf_counter() - START, "cpu_seconds": time.process_time()}


def _summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, figures = [], {}
    for variant, result in results.items():
        command, dtype = variant.split()
        row = {"command": f"cutlm {command}", "model": dtype, "seconds": result.get("failed")}
        if "failed" not in result:
            row |= {"seconds": result["seconds"], "CPU seconds": result["cpu_seconds"]}
        rows.append(row)
    for command in COMMANDS:
        for unit in ("seconds", "cpu_seconds"):
            pair = [results[f"{command} {dtype}"] for dtype in DTYPES]
            if not any("failed" in result for result in pair):
                figures[f"{command}_{unit}_bfloat16_over_float32"] = pair[0][unit] / pair[1][unit]
    return rows, figures


if __name__ == "__main__":
    main()
