"""Answer a file of instructions, in AlpacaEval's format (instruction, output, generator, dataset).

Greedy by default. A run that was stopped goes on where it was when started again with the same settings."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON array or JSON Lines with 'instruction'; or alpaca_eval"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), help="default: the tokenizer's chat template, which training saves"
    )
    parser.add_argument(
        "--judgment",
        metavar="TEXT",
        help='what the responses shall deserve to be told, such as "Perfect.": for models that learned from hindsight',
    )
    add_sampling_arguments(parser)
    parser.add_argument("--generator", metavar="NAME", help="the model's name in the output (default: its folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How a local model draws responses, for every command that has it do so."""
    parser.add_argument("--max_new_tokens", type=int, help="stop here (default: 2048, or half of the model's context)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="total probability to draw from (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="of the random numbers (default: 42)")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default: 16)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    from cutlm.errors import UserError
    from cutlm.jsonl import refuse_overwriting

    refuse_overwriting([args.prompts], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")

    from cutlm.encoding import Encoder, choose_template
    from cutlm.generation import Sampling, choose_max_new_tokens, fingerprint_model, generate_file, load_prompts
    from cutlm.model import load_trained

    if args.judgment is not None and not args.judgment.strip():
        raise UserError('--judgment: expected text such as "Perfect.", got an empty one; leave the option out for none')
    prompts = load_prompts(args.prompts)
    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; say how to prompt it by --template alpaca")
    max_new_tokens = choose_max_new_tokens(model) if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(max_new_tokens, args.temperature, args.top_p, args.seed, args.batch_size)
    counts = generate_file(
        model,
        tokenizer,
        Encoder(tokenizer, args.template or choose_template(tokenizer)),
        prompts,
        args.out,
        sampling,
        generator=args.generator or Path(args.model).resolve().name,
        dataset=Path(args.prompts).name.partition(".")[0],
        fingerprint=fingerprint_model(args.model),
        judgment=args.judgment,
    )
    if counts.num_resumed:
        print(f"{counts.num_resumed} responses were there from a run that was stopped")
    if counts.num_cut:
        print(f"{counts.num_cut} prompts were cut from the left to fit the model's context")
    print(f"{len(prompts)} responses in {args.out}; {counts.num_unfinished} of them stopped at {max_new_tokens} tokens")
    return 0
