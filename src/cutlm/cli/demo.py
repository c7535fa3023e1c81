"""Watch a tiny model learn from judgments: three iterations of generating, judging, blaming, training and merging, in
one to two minutes, on a CPU, without a network.

The base model, its instructions and the judge come with the package. The output folder gets the files of each stage, a
learning curve, and a page of answers before and after, with every token shaded by how much the judgment changes it."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="output folder (default: demo)")
    parser.add_argument("--quick", action="store_true", help="run a few steps only, to see that everything works")


def run(args: argparse.Namespace) -> int:
    _import_with_defaults()

    from cutlm.world.demo import FULL, QUICK, run_demo

    run_demo(args.out, QUICK if args.quick else FULL)
    return 0


def _import_with_defaults() -> None:
    """Import the libraries that read environment variables once, with defaults for those that the user has not set."""
    # When other programs use the CPU, too, threads that spin while they wait make the demo three times as slow.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    # Progress bars fit a narrow terminal and vanish when they are done. They are off unless stderr is a terminal.
    defaults |= {"TQDM_NCOLS": "80", "TQDM_LEAVE": ""} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ |= missing
    try:
        import torch  # noqa: F401
        import tqdm  # noqa: F401
    finally:
        for name in missing:
            del os.environ[name]
