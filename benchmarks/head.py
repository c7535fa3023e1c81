"""Measure token log-probabilities from the head, forward and backward: ours, dense, torch's, and on a GPU Liger's.

  python benchmarks/head.py

"products" are only the two matrix products, which every head needs. The head is frozen, as under LoRA, so only the
hidden states get a gradient. Memory is the peak without the hidden states and the head's weight."""

import argparse
import time
from typing import Any

from common import make_parser, read_peak_bytes, run_benchmark

KINDS = ("ours", "products", "dense", "torch", "liger")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num_positions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[32000, 128000, 256000])
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    import torch

    kinds = [kind for kind in KINDS if kind != "liger" or torch.cuda.is_available()]
    variants = [f"{kind} {vocab_size}" for vocab_size in args.vocab_sizes for kind in kinds]
    run_benchmark(args, variants, _score, summarize)


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for variant, result in results.items():
        kind, vocab_size = variant.split()
        known = {"seconds": result.get("failed"), "MB": ""}
        if "failed" not in result:
            known = {"seconds": result["seconds"], "MB": result["peak"] / 1e6}
        rows.append({"vocabulary": vocab_size, "head": kind} | known)
    return rows, {}


def _score(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    kind, vocab_size = args.variant.split()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    # In place, because a temporary second copy would raise the peak before the measurement.
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
    # The first run may compile kernels.
    return {"seconds": min(seconds), "peak": read_peak_bytes() - before}


def _score_ours(hidden: Any, weight: Any, targets: Any) -> Any:
    from cutlm.model.logprobs import token_logprobs

    return token_logprobs(hidden, weight, targets)


def _multiply_alone(hidden: Any, weight: Any, targets: Any) -> Any:
    """The two matrix products that every head needs, in our chunks; the result is arbitrary."""
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
