"""Show what cutlm train would read, without loading the model: counts, lengths and examples.

  cutlm preview --config my.yaml
  cutlm preview --data records.jsonl --model_name_or_path MODEL --template chat --max_length 4096

Prints doubtful records, counts, truncated and omitted records, the lengths in tokens with their percentiles, the number
of steps, and three examples exactly as the model reads them. In an example, [[ ]] enclose the trained tokens, and {{ }}
those to unlearn, if they are known before training.

The options are those of cutlm train, whose --dry_run prints the same as comments below the settings.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")


def run(args: argparse.Namespace) -> int:
    from cutlm.training.config import CUTConfig, DataArguments, ModelArguments, read_settings
    from cutlm.training.preview import preview_run

    settings = read_settings((DataArguments, ModelArguments, CUTConfig), args.config, args.rest)
    for line in preview_run(settings):
        print(line)
    return 0
