"""Train a model to judge: to write the judgment of a response, and whether the response is satisfactory.

The model learns, by likelihood, to answer a fixed question about an instruction and a response with the judgment
("Perfect." if nothing is wrong) and, on a last line, "Satisfactory: Yes" or "Satisfactory: No".

  cutlm train-judge --config recipes/judge.yaml --data records.jsonl --output_dir runs/judge
  cutlm train-judge --config my.yaml --resume_from_checkpoint last
  cutlm judge --judge local --judge_model runs/judge --responses FILE --out FILE

The settings are those of cutlm train (see its --help), except those of its objectives: objective, detector, the terms
of CUT's loss, threshold, unlikelihood_weight, gamma, praise_weight, dpo_beta, map_spans, satisfactory_only.

To evaluate a judge, trained or not, on held-out records with judgments:

  cutlm train-judge --evaluate MODEL --data heldout.jsonl --out DIR

  --max_new_tokens, --batch_size, --dtype, --device  the same as for cutlm judge --judge local
  --overwrite                                        replace the contents of DIR

Reports the accuracy of its decisions next to the share of the larger class, the confusion matrix, answers without a
judgment by kind, and ROUGE-L of its judgments of unsatisfactory responses (needs: pip install 'cutlm[eval]'). Writes
evaluation.json, evaluation.md, and judged.jsonl with its judgment of each response.
"""

import argparse
from pathlib import Path

from cutlm.cli import importing_libraries
from cutlm.cli.generate import LOCAL_OPTIONS
from cutlm.cli.judge import add_local_arguments
from cutlm.cli.model_options import add_options
from cutlm.cli.train import print_dry_run
from cutlm.errors import ConfigError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings, and the data as cutlm preview"
    )
    parser.add_argument("--evaluate", metavar="MODEL", help="evaluate this judge instead: a folder or adapter")


def run(args: argparse.Namespace) -> int:
    if args.evaluate is not None:
        return _evaluate(args)

    with importing_libraries():
        from cutlm.judges.local import make_training_records
        from cutlm.training.config import DataArguments, JudgeConfig, ModelArguments, read_settings
        from cutlm.training.run import train

    settings = read_settings((DataArguments, ModelArguments, JudgeConfig), args.config, args.rest, args.command)
    if args.dry_run:
        return print_dry_run(settings, make_training_records)
    options = ["--config", args.config, *args.rest] if args.config else args.rest
    return train(settings, options, args.command, make_training_records)


def make_evaluation_parser() -> argparse.ArgumentParser:
    """Build the parser of the options after --evaluate MODEL."""
    parser = argparse.ArgumentParser(prog="cutlm train-judge --evaluate MODEL", allow_abbrev=False)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="held-out records")
    add_options(parser, "columns")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace its contents")
    add_local_arguments(parser)
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    options = make_evaluation_parser().parse_args(args.rest)
    if args.config is not None or args.dry_run:
        raise ConfigError("--config, --dry_run: not used with --evaluate; remove these, or --evaluate")
    folder = Path(options.out)
    if (folder / "evaluation.json").exists() and not options.overwrite:
        raise UserError(f"{folder}: contains an evaluation; choose another folder, or replace it with --overwrite")

    from cutlm.judges.evaluation import evaluate_judge

    LOCAL_OPTIONS.fill(options)
    settings = {name: getattr(options, name) for name in ("max_new_tokens", *LOCAL_OPTIONS.local, "overwrite")}
    print(evaluate_judge(args.evaluate, options.data, folder, columns=options.columns, **settings), end="")
    return 0
