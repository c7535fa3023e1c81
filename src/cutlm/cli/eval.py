"""Measure a model. Each measure leaves DIR/result.json and DIR/result.md, with the versions of the packages that made
them, and goes on where it was stopped when started again with the same settings.

alpaca, harness and rouge need further packages: pip install 'cutlm[eval]'"""

import argparse
import importlib

MEASURES = {
    "alpaca": "how often are a model's responses preferred? AlpacaEval",
    "harness": "benchmarks: ARC, HellaSwag, MMLU, TruthfulQA, and any other of lm-eval",
    "rouge": "how close do responses come to references? ROUGE, as for summarization",
    "detection": "are the flagged tokens the wrong ones? Precision and recall by threshold",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", required=True)
    for name, summary in MEASURES.items():
        module = importlib.import_module(f"cutlm.cli.eval_{name}")
        measure = measures.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(measure)
        measure.add_argument("--out", required=True, metavar="DIR", help="a folder for the result")
        measure.add_argument("--overwrite", action="store_true", help="begin anew in a folder of other settings")
        measure.set_defaults(run_measure=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_measure(args)
