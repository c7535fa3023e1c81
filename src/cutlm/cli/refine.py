"""Let a model improve its unsatisfactory responses, given the judgments. The objectives ilf_mle and ilf_dpo learn from
the improved responses (i_ans).

  cutlm refine --model MODEL --data records.jsonl --out refined.jsonl

A run that was stopped resumes when started again with the same settings."""

import argparse

from cutlm.cli.generate import LOCAL_OPTIONS, print_counts
from cutlm.cli.model_options import (
    add_options,
    add_sampling_options,
    check_output,
    load_model,
    make_encoder,
    make_sampling,
)
from cutlm.data.sources import describe_sources
from cutlm.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "model", "data", "columns", "out", "overwrite")
    template = "as in training (default: alpaca)"
    parser.add_argument("--template", choices=("alpaca", "chat"), default="alpaca", help=template)
    add_options(parser, "chat_template_kwargs", "template_date")
    add_sampling_options(parser)
    LOCAL_OPTIONS.add(parser)


def run(args: argparse.Namespace) -> int:
    LOCAL_OPTIONS.fill(args)
    check_output(args, args.data)

    from cutlm.data.records import load_records
    from cutlm.generation.files import name_failures_file, refine_file
    from cutlm.model.loading import fingerprint_model

    records = load_records(args.data, args.columns)
    if all(record.is_satisfactory or record.i_ans for record in records):
        raise DataError(
            f"{describe_sources(args.data)}: nothing to refine: every record is satisfactory or has an i_ans"
        )
    make_sampling(args)
    model, tokenizer, template = load_model(args)
    sampling = make_sampling(args, model)
    encoder, fingerprint = make_encoder(args, tokenizer, template), fingerprint_model(args.model)
    options = {"fingerprint": fingerprint, "overwrite": args.overwrite}
    refined = refine_file(model, tokenizer, encoder, records, args.out, sampling, **options)
    if refined.failures:
        listed = f"listed with the reasons in {name_failures_file(args.out)}"
        print(f"{len(refined.failures)} responses could not be improved, {listed}")
    print_counts(refined, f"of {len(records)} responses improved in {args.out}", sampling)
    if not refined.responses:
        return 1
    print(f"Next, run:\n  cutlm train --objective ilf_mle --data {args.out} ...")
    return 0
