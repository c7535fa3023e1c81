"""Measure training on one CUDA GPU: tokens per second, share of the GPU's matrix rate, peak memory.

  python benchmarks/gpu.py                      LLaMA shapes of 1B and 7B
  python benchmarks/gpu.py --large_vocabulary   a vocabulary of 128k and 4096 tokens per record, where released fails

bfloat16, LoRA of rank 16 on the MLP, with and without activation checkpointing, on synthetic records. The variants are
those of `train_step.py`. The work is 4 operations per weight of the body and token (forward, and the gradient of the
input, without LoRA and attention), 2 more for recomputation under activation checkpointing, and 4 per weight of the
head and response token. The matrix rate is that of a product of two 8192 x 8192 matrices.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe_machine, describe_options, write_results

SHAPES = {
    "1B": {"vocab_size": 32000, "num_layers": 16, "width": 2048, "num_heads": 32, "mlp_width": 8192},
    "7B": {"vocab_size": 32000, "num_layers": 32, "width": 4096, "num_heads": 32, "mlp_width": 11008},
}
VARIANTS = ("released", "cutlm", "frozen", "floor", "dpo", "sft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--num_records", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--large_vocabulary", action="store_true")
    parser.add_argument("--torch_compile", action="store_true", help="compile all variants but released")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("expected a CUDA GPU, found none; benchmarks/train_step.py measures on a CPU")
    rate = measure_rate()
    print(f"matrix rate: {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows, results = [], []
    for name in args.shapes:
        shape = SHAPES[name] | ({"vocab_size": 128_000} if args.large_vocabulary else {})
        for is_checkpointing in (False, True):
            options = [f"--{key}={value}" for key, value in shape.items()]
            options += [f"--num_records={args.num_records}", f"--batch_size={args.batch_size}", "--bf16", "--repeats=1"]
            options += ["--activation_checkpointing"] * is_checkpointing
            options += ["--num_tokens=4096"] * args.large_vocabulary
            options += ["--torch_compile"] * args.torch_compile
            for variant in args.variants:
                result = run(options, variant)
                results.append({"shape": name, "variant": variant, "checkpointing": is_checkpointing} | result)
                rows.append(describe(name, shape, variant, is_checkpointing, result, rate))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    known = {"machine": describe_machine(), "options": describe_options(args), "matrix_rate": rate, "results": results}
    write_results(rows, known, args.json)


def measure_rate() -> float:
    """Floating-point operations per second of a large matrix product in bfloat16."""
    import torch

    size = 8192
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        one @ other
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def run(options: list[str], variant: str) -> dict[str, Any]:
    """Run one variant of `train_step.py`."""
    script = Path(__file__).with_name("train_step.py")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(script), *options, "--variants", variant, "--json", file.name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            return {"failed": f"exit code {done.returncode}"}
        found = json.loads(Path(file.name).read_text())
        return found["results"][variant] | {name: found[name] for name in ("num_tokens", "num_response_tokens")}


def describe(
    name: str, shape: dict[str, int], variant: str, is_checkpointing: bool, result: dict[str, Any], rate: float
) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"shape": name, "checkpointing": "yes" if is_checkpointing else "no", "variant": variant}
    if "failed" in result:
        return row | {"tokens a second": result["failed"], "of the matrix rate": "", "peak GB": ""}
    num_tokens, num_responses = result["num_tokens"], result["num_response_tokens"]
    body = shape["num_layers"] * (4 * shape["width"] ** 2 + 3 * shape["width"] * shape["mlp_width"])
    head = shape["vocab_size"] * shape["width"]
    work = 2 * ((3 if is_checkpointing else 2) * body * num_tokens + 2 * head * num_responses)
    seconds = result["seconds"]
    return row | {
        "tokens a second": num_tokens / seconds,
        "of the matrix rate": work / seconds / rate,
        "peak GB": result["peak"] / 1e9,
    }


if __name__ == "__main__":
    main()
