"""Let a model improve its unsatisfactory responses, given the judgments. The objectives ilf_mle and ilf_dpo learn from
the improved responses (i_ans).

  cutlm refine --model MODEL --data records.jsonl --out refined.jsonl

A run that was stopped resumes when started again with the same settings."""

import argparse
from pathlib import Path

from cutlm.cli.generate import LOCAL_OPTIONS, print_counts
from cutlm.cli.model_options import add_sampling_options, load_model, make_sampling
from cutlm.data.files import refuse_overwriting
from cutlm.errors import DataError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument("--data", required=True, metavar="FILE", help="records: JSON array or JSON Lines")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), default="alpaca", help="as in training (default: alpaca)"
    )
    add_sampling_options(parser)
    LOCAL_OPTIONS.add(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def run(args: argparse.Namespace) -> int:
    LOCAL_OPTIONS.fill(args)
    refuse_overwriting([args.data], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; pass another file, or replace it with --overwrite")

    from cutlm.data.records import load_records
    from cutlm.generation.files import refine_file
    from cutlm.model.loading import fingerprint_model
    from cutlm.prompting.encoding import Encoder

    records = load_records(args.data)
    if all(record.is_satisfactory or record.i_ans for record in records):
        raise DataError(f"{args.data}: nothing to refine: every record is satisfactory or has an i_ans")
    model, tokenizer, template = load_model(args)
    sampling = make_sampling(args, model)
    refined = refine_file(
        model,
        tokenizer,
        Encoder(tokenizer, template),
        records,
        args.out,
        sampling,
        fingerprint=fingerprint_model(args.model),
    )
    print_counts(refined)
    print(
        f"{len(refined.responses)} of {len(records)} responses improved in {args.out}; {len(refined.unfinished)} of"
        f" them stopped at {sampling.max_new_tokens} tokens. Next, run:\n"
        f"  cutlm train --objective ilf_mle --data {args.out} ..."
    )
    return 0
