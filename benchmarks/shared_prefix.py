"""Compare a CUT step with a likelihood step for long prompts and short responses, as in summarization.

python benchmarks/shared_prefix.py

  likelihood   likelihood of the responses in the plain context
  cut          CUT in both contexts, whose shared prefix runs once (template: chat)
  apart        CUT in both contexts, which run separately
  frozen       CUT on token scores: the plain context, with known flags
  blame        the pass without gradient that computes token scores"""

import argparse
import time
from typing import Any

from common import add_shape_arguments, make_model, make_parser, read_peak_bytes, run_benchmark
from train_step import add_flags, make_adapter, make_settings, time_trainer

VARIANTS = ("likelihood", "cut", "apart", "frozen", "blame")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num_records", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_prompt", type=int, default=800, help="tokens of a prompt (default: 800)")
    parser.add_argument("--num_response", type=int, default=80, help="tokens of a response (default: 80)")
    parser.add_argument("--num_judgment", type=int, default=60, help="tokens of a judgment (default: 60)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.set_defaults(torch_compile=False)
    add_shape_arguments(parser)
    args = parser.parse_args()
    run_benchmark(args, VARIANTS, lambda args: _blame(args) if args.variant == "blame" else _train(args), summarize)


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    base = results["likelihood"]["seconds"]
    figures = {f"{variant}_over_likelihood": results[variant]["seconds"] / base for variant in VARIANTS[1:]}
    rows = [
        {
            "step": variant,
            "seconds": result["seconds"],
            "over likelihood": result["seconds"] / base,
            "peak GB": result["peak"] / 1e9,
        }
        for variant, result in results.items()
    ]
    return rows, figures


def _make_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random tokens in the order of the chat template: the judgment follows the shared prefix of both contexts."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> list[int]:
        return torch.randint(args.vocab_size, (num,), generator=generator).tolist()

    rows = []
    for _ in range(args.num_records):
        # Lengths within a quarter of the mean.
        scale = 0.75 + 0.5 * torch.rand((), generator=generator).item()
        prompt, ending = draw(round(args.num_prompt * scale)), draw(4)
        judgment, response = draw(round(args.num_judgment * scale)), draw(round(args.num_response * scale))
        rows.append(
            {
                "prompt_ids": [*prompt, *ending],
                "judged_prompt_ids": [*prompt, *judgment, *ending],
                "response_ids": response,
            }
        )
    return rows


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm import CUTConfig, CUTTrainer
    from cutlm.model.forward import PADDED

    rows = _make_rows(args)
    if args.variant == "likelihood":
        rows = [row | {"judged_prompt_ids": None} for row in rows]
    if args.variant == "frozen":
        rows = [add_flags(row) for row in rows]
    detector = "frozen" if args.variant == "frozen" else None
    config = CUTConfig(**make_settings(args, args.folder), detector=detector, max_length=100_000)
    trainer = CUTTrainer(make_model(args), config, rows, peft_config=make_adapter(args.all_linear))
    if args.variant == "apart":
        trainer._layout = PADDED
    return time_trainer(trainer)


def _blame(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm.flagging.scoring import score_rows

    model = make_model(args)
    rows = _make_rows(args)
    began = time.perf_counter()
    for _ in score_rows(model, rows, is_bf16=args.bf16, show_progress=False):
        pass
    return {"seconds": time.perf_counter() - began, "peak": read_peak_bytes()}


if __name__ == "__main__":
    main()
