"""Let a tiny model answer, hear what is wrong with its answers, and learn from it: three iterations of generating,
judging, blaming, training and merging, in about a minute, on a CPU, without a network.

The base model, its instructions and their judge come with the package. The folder gets the files of each stage, a
picture of the progress, and a page of answers before and after, every token shaded by what the judgment changes."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="the folder to make (default: demo)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try that everything runs")


def run(args: argparse.Namespace) -> int:
    # Where others use the processor too, threads that wait by spinning make this three times as slow. Read by the
    # OpenMP library when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _tidy_bars()

    from cutlm.world.demo import FULL, QUICK, run_demo

    run_demo(args.out, QUICK if args.quick else FULL)
    return 0


def _tidy_bars() -> None:
    """Progress bars that fit a narrow terminal and vanish at their end; none where nobody looks."""
    wanted = {"TQDM_NCOLS": "80", "TQDM_LEAVE": ""} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ |= wanted
    try:
        import tqdm  # noqa: F401 (it reads the environment once, now)
    finally:
        for name in wanted:
            del os.environ[name]
