"""Teach adapters to read judgments, for cutlm blame only: two adapters, each trained on one half of the records by the
likelihood of the responses given their judgments (objective hindsight), which then blame each other's half.

  cutlm train-detector --model_name_or_path MODEL --data records.jsonl --output_dir runs/detector
  cutlm blame --model runs/detector/detector-1 --data runs/detector/half-2.jsonl --out scores-2.jsonl
  cutlm blame --model runs/detector/detector-2 --data runs/detector/half-1.jsonl --out scores-1.jsonl
  cat scores-1.jsonl scores-2.jsonl > scores.jsonl
  cutlm train --data scores.jsonl --model_name_or_path MODEL --output_dir runs/cut

The settings are those of cutlm train (see its --help), except those of its objectives. All responses to an instruction
are in the same half. Use --contrast perfect or foreign with cutlm blame: without a judgment, these adapters were not
trained. A run that was stopped resumes with --resume_from_checkpoint last; a finished half is not trained again.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")


def run(args: argparse.Namespace) -> int:
    from collections.abc import Sequence

    from cutlm.training.config import DataArguments, DetectorConfig, ModelArguments, Settings, read_settings

    def read(options: Sequence[str]) -> Settings:
        return read_settings((DataArguments, ModelArguments, DetectorConfig), args.config, options, args.command)

    if args.dry_run:
        print(read(args.rest).to_yaml(), end="")
        return 0

    from cutlm.training.taught import train_detector

    return train_detector(read, args.rest)
