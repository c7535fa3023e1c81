"""Fold a trained adapter into its base model. The logits are compared before and after, the base model's dtype is
kept, and the tokenizer is saved with the template of training as its chat template, so that any tool prompts the
model rightly."""

import argparse
import shlex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the output_dir of a training with use_peft")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the output folder")


def run(args: argparse.Namespace) -> int:
    from cutlm.model.merging import merge_adapter

    merge = merge_adapter(args.adapter, args.out, base=args.base, overwrite=args.overwrite)
    print(f"merged {args.adapter} into {merge.base}, {str(merge.dtype).removeprefix('torch.')}: {args.out}")
    print(f"largest change of a logit by merging: {merge.difference:.1e} of the largest logit")
    if not merge.has_template:
        print("the tokenizer has no chat template; give other tools the template of training yourself")
    print(f"Next:\n  cutlm generate --model {shlex.quote(args.out)} --prompts FILE --out FILE")
    return 0
