"""Merge a trained adapter into its base model.

The merged model has the base model's dtype. Its log-probabilities are compared with those that training recorded next
to the adapter (`cutlm_probe.json`), and its tokenizer has the training template as its chat template, so that other
tools prompt the model as it was trained.
"""

import argparse
import shlex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="output_dir of a training run with use_peft")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one that the adapter names)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the output folder")


def run(args: argparse.Namespace) -> int:
    from cutlm.model.merge import merge_adapter

    merge = merge_adapter(args.adapter, args.out, base=args.base, overwrite=args.overwrite)
    print(f"Merged {args.adapter} into {merge.base} ({str(merge.dtype).removeprefix('torch.')}): {args.out}")
    if merge.is_recorded:
        print(f"Largest change of a log-probability since training: {merge.difference:.1e} of the largest one")
    else:
        print(f"Largest change of a logit by merging: {merge.difference:.1e} of the largest logit")
        print("The adapter has no record of the trained model, so it was compared as it loads now")
    if merge.quantization:
        print(f"It was trained on a {merge.quantization} base model and is merged into the full one, hence the change")
    if not merge.has_template:
        print("The tokenizer has no chat template; set the training template in other tools yourself")
    print(f"Next:\n  cutlm generate --model {shlex.quote(args.out)} --prompts FILE --out FILE")
    return 0
