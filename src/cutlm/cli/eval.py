"""Evaluate a model. Each measure writes DIR/result.json and DIR/result.md with the versions of the packages that made
them; started again with the same settings, it resumes.

alpaca, harness and rouge need more packages: pip install 'cutlm[eval]'"""

import argparse

from cutlm.cli import add_commands

MEASURES = {
    "alpaca": "AlpacaEval: how often a model's responses are preferred",
    "harness": "benchmarks of lm-eval: ARC, HellaSwag, MMLU, TruthfulQA or any other",
    "rouge": "ROUGE: how similar responses are to references, as for summarization",
    "detection": "precision and recall of flagged tokens by threshold",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for measure in add_commands(parser, MEASURES, "measure", "eval_"):
        measure.add_argument("--out", required=True, metavar="DIR", help="folder of the result")
        measure.add_argument("--overwrite", action="store_true", help="start over in a folder of other settings")
