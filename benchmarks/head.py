"""Log-probs of given tokens by the head, forward and backward: ours, dense, torch's, and on a GPU Liger's.

  python benchmarks/head.py

"products" are the two matrix products alone, the least that a head takes. The head is frozen, as under LoRA: the
gradient goes to the hidden states alone. Memory is the peak above what the hidden states and the head take."""

import argparse
import json
import time
from typing import Any

from measuring import (
    add_run_arguments,
    describe_machine,
    describe_options,
    read_peak_bytes,
    take_turns,
    write_results,
)

KINDS = ("ours", "products", "dense", "torch", "liger")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_positions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[32000, 128000, 256000])
    parser.add_argument("--bf16", action="store_true")
    add_run_arguments(parser, num_repeats=3)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(_score(args)))
        return
    import torch

    kinds = [kind for kind in KINDS if kind != "liger" or torch.cuda.is_available()]
    variants = [f"{kind} {vocab_size}" for vocab_size in args.vocab_sizes for kind in kinds]
    results = take_turns(variants, args.repeats, "")
    rows = []
    for variant, result in results.items():
        kind, vocab_size = variant.split()
        row: dict[str, Any] = {"vocabulary": vocab_size, "head": kind}
        if "failed" in result:
            rows.append(row | {"seconds": result["failed"], "MB": ""})
        else:
            rows.append(row | {"seconds": result["seconds"], "MB": result["peak"] / 1e6})
    known = {"machine": describe_machine(), "options": describe_options(args), "results": results}
    write_results(rows, known, args.json)


def _score(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    kind, vocab_size = args.variant.split()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    # In place: a second copy, gone by then, would hide as much of the peak.
    weight = torch.randn(int(vocab_size), args.width, device=device, dtype=dtype).mul_(args.width**-0.5)
    hidden = torch.randn(args.num_positions, args.width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(int(vocab_size), (args.num_positions,), device=device)
    slopes = torch.linspace(-1, 1, args.num_positions, device=device)
    score = {
        "ours": _score_ours,
        "products": _multiply_alone,
        "dense": _score_dense,
        "torch": _score_by_torch,
        "liger": _score_by_liger,
    }[kind]
    seconds, before = [], read_peak_bytes()
    for _ in range(3):
        hidden.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        (score(hidden, weight, targets) * slopes).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # The first may wait for kernels to be made.
    return {"seconds": min(seconds), "peak": read_peak_bytes() - before}


def _score_ours(hidden: Any, weight: Any, targets: Any) -> Any:
    from cutlm.model.logprobs import token_logprobs

    return token_logprobs(hidden, weight, targets)


def _multiply_alone(hidden: Any, weight: Any, targets: Any) -> Any:
    """The two matrix products that any head takes, in chunks of ours; numbers of no meaning."""
    import torch

    from cutlm.model.logprobs import choose_chunk_size

    with torch.no_grad():
        parts = [(part @ weight.T) @ weight for part in hidden.split(choose_chunk_size(len(weight)))]
    return (hidden * torch.cat(parts)).sum(-1)


def _score_dense(hidden: Any, weight: Any, targets: Any) -> Any:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _score_by_torch(hidden: Any, weight: Any, targets: Any) -> Any:
    from torch.nn.functional import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def _score_by_liger(hidden: Any, weight: Any, targets: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets)


if __name__ == "__main__":
    main()
