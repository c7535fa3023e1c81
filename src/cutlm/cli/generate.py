"""Answer a file of instructions, in AlpacaEval's format (instruction, output, generator, dataset).

  cutlm generate --model MODEL --prompts FILE --out FILE
  cutlm generate --server http://localhost:8000 --model NAME --prompts FILE --out FILE

Greedy by default. A run that was stopped goes on where it was when started again with the same settings.

A server gets each instruction as a message, and prompts the model by the model's own chat template: a merged model has
that of training. With --template it gets the tokens of the prompt instead, made here by --tokenizer. A key to it is
read from the environment variable OPENAI_API_KEY. Where it has no answer to some prompts even after all attempts, these
are listed in OUT.failures.jsonl, nothing else is written, and the exit status is 1; start again to ask for them alone.
With --max_missing, OUT is written without them where they are no larger a share of all.
"""

import argparse
from pathlib import Path
from typing import Any

# Options that mean something to one of the two engines alone, and their defaults.
_LOCAL: dict[str, Any] = {"batch_size": 16, "dtype": "auto", "device": None}
_SERVER: dict[str, Any] = {"tokenizer": None, "concurrency": 8, "timeout": 600.0, "max_retries": 5}
_MAX_NEW_TOKENS = 2048


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
        "--max_missing",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of prompts to which a server may have no answer: the others are written (default: 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def add_answering_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model, at hand or on a server, answers a file, for every command that has it do so."""
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), help="default: the tokenizer's chat template, which training saves"
    )
    parser.add_argument(
        "--judgment",
        metavar="TEXT",
        help='what the responses shall deserve to be told, such as "Perfect.": for models that learned from hindsight',
    )
    add_sampling_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default: 16)")
    server = parser.add_argument_group("a model on a server")
    server.add_argument(
        "--server", metavar="URL", help="address of an OpenAI-compatible server; --model is its name there"
    )
    server.add_argument("--tokenizer", metavar="MODEL", help="for --template: folder or hub name (default: --model)")
    server.add_argument("--concurrency", type=int, metavar="N", help="requests at a time (default: 8)")
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="without a byte of an answer (default: 600)")
    server.add_argument("--max_retries", type=int, metavar="N", help="further attempts (default: 5)")
    parser.add_argument("--generator", metavar="NAME", help="the model's name in the output (default: its folder)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How a local model draws responses, for every command that has it do so."""
    parser.add_argument("--max_new_tokens", type=int, help="stop here (default: 2048, or half of the model's context)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="total probability to draw from (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="of the random numbers (default: 42)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


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
    given = [f"--{name}" for name, default in _LOCAL.items() if getattr(args, name) != default]
    if args.server is not None and given:
        problems.append(f"{', '.join(given)}: of use for a local model alone; leave out these, or --server")
    if not 0 <= args.max_missing < 1:
        problems.append(f"--max_missing: expected a share from 0 to below 1, got {args.max_missing:g}")
    given = [f"--{name}" for name in _SERVER if getattr(args, name) is not None]
    given += ["--max_missing"] * bool(args.max_missing)
    if args.server is None and given:
        problems.append(f"{', '.join(given)}: of use with --server alone; leave these out, or give --server")
    if args.server is not None and args.template is None:
        if args.judgment is not None:
            problems.append("--judgment: its prompt is made here; with --server, give --template too")
        if args.tokenizer is not None:
            problems.append("--tokenizer: of use with --template alone; give that too, or leave this out")
    if problems:
        raise ConfigError(problems)
    for name, default in _SERVER.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting
    from cutlm.errors import UserError

    check_options(args)
    refuse_overwriting([args.prompts], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")

    from cutlm.generation.local import load_prompts

    prompts = [row for row in load_prompts(args.prompts) for _ in range(args.num_samples)]
    return _answer_locally(args, prompts) if args.server is None else _answer_by_server(args, prompts)


def _name_output(args: argparse.Namespace) -> dict[str, str]:
    return {
        "generator": args.generator or Path(args.model).resolve().name,
        "dataset": Path(args.prompts).name.partition(".")[0],
    }


def _answer_locally(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.errors import UserError
    from cutlm.generation.local import Sampling, choose_max_new_tokens, generate_file
    from cutlm.model.loading import fingerprint_model, load_trained
    from cutlm.prompting.encoding import Encoder, choose_template

    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; say how to prompt it by --template alpaca")
    max_new_tokens = choose_max_new_tokens(model) if args.max_new_tokens is None else args.max_new_tokens
    counts = generate_file(
        model,
        tokenizer,
        Encoder(tokenizer, args.template or choose_template(tokenizer)),
        prompts,
        args.out,
        Sampling(max_new_tokens, args.temperature, args.top_p, args.seed, args.batch_size),
        **_name_output(args),
        fingerprint=fingerprint_model(args.model),
        judgment=args.judgment,
    )
    if counts.num_truncated:
        print(f"{counts.num_truncated} prompts were cut from the left to fit the model's context")
    _print_counts(args, len(prompts), counts, max_new_tokens)
    return 0


def _answer_by_server(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.data.files import write_rows
    from cutlm.data.journal import Journal
    from cutlm.generation.local import Sampling, describe_run, join_instruction, make_rows
    from cutlm.generation.server import Prompt, generate_by_server
    from cutlm.servers.requests import Server

    server = Server(args.server, args.model, args.concurrency, args.timeout, args.max_retries)
    max_new_tokens = _MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(max_new_tokens, args.temperature, args.top_p, args.seed)
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
        if not counts.responses or len(failures) > args.max_missing * len(prompts):
            print(
                f"{listed}; {len(counts.responses)} are kept in {journal.path}: start again with the same options to"
                " ask for the others alone"
            )
            return 1
        print(f"{listed}, and are left out (--max_missing {args.max_missing:g})")
    write_rows(args.out, make_rows(prompts, counts.responses, **_name_output(args)))
    journal.remove()
    if not failures:
        failures_file.unlink(missing_ok=True)  # of an earlier start: it does not hold any more
    _print_counts(args, len(counts.responses), counts, max_new_tokens)
    return 0


def _print_counts(args: argparse.Namespace, num_responses: int, counts: Any, max_new_tokens: int) -> None:
    if counts.num_resumed:
        print(f"{counts.num_resumed} responses were there from a run that was stopped")
    print(
        f"{num_responses} responses in {args.out}; {counts.num_unfinished} of them stopped at {max_new_tokens} tokens"
    )
