"""Make a tiny model, train it by what was said about its answers, merge it, and show what changed: the whole of cutlm
in two to three minutes, on a CPU, without a network.

Nothing is downloaded: tokenizer, base model and texts are made on the spot from a seed, the 240 judged records come
with the package."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="the folder to make (default: demo)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try that everything runs")


def run(args: argparse.Namespace) -> int:
    # Where others use the processor too, threads that wait by spinning make this three times as slow. Read by the
    # OpenMP library when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from cutlm.demo import FULL, QUICK, run_demo

    run_demo(args.out, QUICK if args.quick else FULL)
    return 0
