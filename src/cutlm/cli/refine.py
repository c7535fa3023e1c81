"""Let a model rewrite its unsatisfactory responses, given the judgments: the improved responses (i_ans) that the
objectives ilf_mle and ilf_dpo learn from.

  cutlm refine --model MODEL --data records.jsonl --out refined.jsonl

A run that was stopped goes on where it was when started again with the same settings."""

import argparse
from pathlib import Path

from cutlm.cli.model_options import ModelOptions, add_sampling_options, make_sampling

_OPTIONS = ModelOptions(("batch_size", "dtype", "device"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument("--data", required=True, metavar="FILE", help="records: JSON array or JSON Lines")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), default="alpaca", help="as in training (default: alpaca)"
    )
    add_sampling_options(parser)
    _OPTIONS.add(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def run(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting
    from cutlm.errors import DataError, UserError

    _OPTIONS.fill(args)
    refuse_overwriting([args.data], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")

    from cutlm.data.records import load_records
    from cutlm.generation.refine import refine_file
    from cutlm.model.loading import fingerprint_model, load_trained
    from cutlm.prompting.encoding import Encoder

    records = load_records(args.data)
    if all(record.is_satisfactory or record.i_ans for record in records):
        raise DataError(f"{args.data}: nothing to refine: every record is satisfactory or has an i_ans")
    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    sampling = make_sampling(args, model)
    counts = refine_file(
        model,
        tokenizer,
        Encoder(tokenizer, args.template),
        records,
        args.out,
        sampling,
        fingerprint=fingerprint_model(args.model),
    )
    if counts.num_resumed:
        print(f"{counts.num_resumed} responses were there from a run that was stopped")
    if counts.num_truncated:
        print(f"{counts.num_truncated} prompts were cut from the left to fit the model's context")
    print(
        f"{len(counts.responses)} of {len(records)} responses rewritten in {args.out}; {counts.num_unfinished} of them"
        f" stopped at {sampling.max_new_tokens} tokens. Next:\n  cutlm train --objective ilf_mle --data {args.out} ..."
    )
    return 0
