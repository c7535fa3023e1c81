"""Answer a file of instructions, in AlpacaEval's format (instruction, output, generator, dataset).

  cutlm generate --model MODEL --prompts FILE --out FILE
  cutlm generate --base_url http://localhost:8000 --model NAME --prompts FILE --out FILE

Greedy by default. A run that was stopped goes on where it was when started again with the same settings.

A server gets each instruction as a message, and prompts the model by the model's own chat template: a merged model has
that of training. With --template it gets the tokens of the prompt instead, made here by --tokenizer. A key to it is
read from the environment variable OPENAI_API_KEY. Where it has no answer to some prompts even after all attempts, these
are listed in OUT.failures.jsonl, nothing else is written, and the exit status is 1; start again to ask for them alone.
With --max_failure_rate, OUT is written without them where they are no larger a share of all.
"""

import argparse
from pathlib import Path
from typing import Any

from cutlm.cli.model_options import ModelOptions, add_sampling_options, make_sampling, make_server

LOCAL_OPTIONS = ModelOptions(("batch_size", "dtype", "device"))
ANSWERING_OPTIONS = ModelOptions(LOCAL_OPTIONS.local, ("tokenizer", "concurrency", "timeout", "max_retries"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON array or JSON Lines with 'instruction'; or alpaca_eval"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--num_samples", type=int, default=1, metavar="N", help="responses to each instruction, one below the other"
    )
    add_answering_arguments(parser)
    parser.add_argument(
        "--max_failure_rate",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of prompts to which a server may have no answer: the others are written (default: 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def add_answering_arguments(parser: argparse.ArgumentParser, options: ModelOptions = ANSWERING_OPTIONS) -> None:
    """Adds the options that decide how a model answers a file, for every command that has one do so."""
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), help="default: the tokenizer's chat template, which training saves"
    )
    parser.add_argument(
        "--judgment",
        metavar="TEXT",
        help='ask for a response that deserves this judgment, such as "Perfect.": for models trained by hindsight',
    )
    add_sampling_options(parser)
    options.add(parser)
    parser.add_argument("--generator", metavar="NAME", help="name of the model in the output (default: its folder)")


def check_options(args: argparse.Namespace) -> None:
    """Refuses options that are at odds, and puts in the defaults of the engine.

    Raises:
        ConfigError: All such options are named.
    """
    from cutlm.errors import ConfigError

    problems = []
    if args.num_samples < 1:
        problems.append(f"--num_samples: expected a whole number of at least 1, got {args.num_samples}")
    if args.num_samples > 1 and not args.temperature > 0:
        problems.append(
            f"--num_samples {args.num_samples}: expected --temperature above 0, or all of them are one and the same,"
            f" got {args.temperature:g}"
        )
    if args.judgment is not None and not args.judgment.strip():
        problems.append('--judgment: expected text such as "Perfect.", got an empty one; leave the option out for none')
    problems += ANSWERING_OPTIONS.find_problems(args)
    if not 0 <= args.max_failure_rate < 1:
        problems.append(f"--max_failure_rate: expected a share from 0 to below 1, got {args.max_failure_rate:g}")
    if args.base_url is None and args.max_failure_rate:
        problems.append("--max_failure_rate: expected only with --base_url; set it, or leave this out")
    if args.base_url is not None and args.template is None:
        if args.judgment is not None:
            problems.append("--judgment: its prompt is made here; with --base_url, give --template too")
        if args.tokenizer is not None:
            problems.append("--tokenizer: of use with --template alone; give that too, or leave this out")
    if problems:
        raise ConfigError(problems)
    ANSWERING_OPTIONS.fill(args)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting
    from cutlm.errors import UserError

    check_options(args)
    refuse_overwriting([args.prompts], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")

    from cutlm.generation.local import load_prompts

    prompts = [row for row in load_prompts(args.prompts) for _ in range(args.num_samples)]
    return _answer_locally(args, prompts) if args.base_url is None else _answer_by_server(args, prompts)


def _name_output(args: argparse.Namespace) -> dict[str, str]:
    return {
        "generator": args.generator or Path(args.model).resolve().name,
        "dataset": Path(args.prompts).name.partition(".")[0],
    }


def _answer_locally(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.errors import UserError
    from cutlm.generation.local import generate_file
    from cutlm.model.loading import fingerprint_model, load_trained
    from cutlm.prompting.encoding import Encoder, choose_template

    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; say how to prompt it by --template alpaca")
    sampling = make_sampling(args, model)
    counts = generate_file(
        model,
        tokenizer,
        Encoder(tokenizer, args.template or choose_template(tokenizer)),
        prompts,
        args.out,
        sampling,
        **_name_output(args),
        fingerprint=fingerprint_model(args.model),
        judgment=args.judgment,
    )
    if counts.num_truncated:
        print(f"{counts.num_truncated} prompts were cut from the left to fit the model's context")
    _print_counts(args, len(prompts), counts, sampling.max_new_tokens)
    return 0


def _answer_by_server(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.data.files import write_rows
    from cutlm.data.journal import Journal
    from cutlm.generation.local import describe_run, join_instruction, make_rows
    from cutlm.generation.server import Prompt, generate_by_server

    server = make_server(args)
    sampling = make_sampling(args)
    instructions = [join_instruction(row) for row in prompts]
    asked: list[Prompt] = list(instructions)
    if args.template is not None:
        from cutlm.model.loading import load_tokenizer
        from cutlm.prompting.encoding import Encoder

        encoder = Encoder(load_tokenizer(args.tokenizer or args.model), args.template)
        asked = [encoder.encode_prompt(instruction, args.judgment) for instruction in instructions]
    header = describe_run(instructions, args.judgment, sampling, args.template or "the server's", args.model)
    journal = Journal(args.out, header)
    counts, failures, num_redacted = generate_by_server(server, asked, sampling, journal)
    if num_redacted:
        print(f"{num_redacted} responses held the key to the server; [key] stands in its place")
    failures_file = Path(f"{args.out}.failures.jsonl")
    if failures:
        write_rows(
            failures_file,
            [{"number": index + 1, "reason": failures[index]} | prompts[index] for index in sorted(failures)],
        )
        listed = f"{len(failures)} of {len(prompts)} prompts have no answer, listed with the reasons in {failures_file}"
        if not counts.responses or len(failures) > args.max_failure_rate * len(prompts):
            print(
                f"{listed}; {len(counts.responses)} are kept in {journal.path}: start again with the same options to"
                " ask for the others alone"
            )
            return 1
        print(f"{listed}, and are left out (--max_failure_rate {args.max_failure_rate:g})")
    write_rows(args.out, make_rows(prompts, counts.responses, **_name_output(args)))
    journal.remove()
    if not failures:
        failures_file.unlink(missing_ok=True)  # of an earlier start: it does not hold any more
    _print_counts(args, len(counts.responses), counts, sampling.max_new_tokens)
    return 0


def _print_counts(args: argparse.Namespace, num_responses: int, counts: Any, max_new_tokens: int) -> None:
    if counts.num_resumed:
        print(f"{counts.num_resumed} responses were there from a run that was stopped")
    print(
        f"{num_responses} responses in {args.out}; {counts.num_unfinished} of them stopped at {max_new_tokens} tokens"
    )
