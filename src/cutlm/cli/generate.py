"""Answer a file of instructions and write AlpacaEval's format (instruction, output, generator, dataset).

  cutlm generate --model MODEL --prompts FILE --out FILE
  cutlm generate --model MODEL --engine vllm --prompts FILE --out FILE
  cutlm generate --base_url http://localhost:8000/v1 --model NAME --prompts FILE --out FILE

Greedy by default. A run that was stopped resumes when started again with the same settings.

A server gets each instruction as a message and applies the model's own chat template; a merged model has that of its
training. With --template the prompts are encoded here by --tokenizer and sent as token ids. The key of the server is
read from the environment variable OPENAI_API_KEY.

The output is the final answer; a model's thoughts before it are in the field reasoning. If prompts have no answer (a
server fails after all retries, or the model does not finish its thoughts), they are listed in OUT.failures.jsonl, OUT
is not written, and the exit code is 1; start again to ask a server only for these. With --max_failure_rate, OUT is
written without them if their share of all prompts is no larger.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cutlm.cli import importing_libraries
from cutlm.cli.model_options import (
    SERVER_OPTIONS,
    SOURCES,
    ModelOptions,
    add_options,
    add_sampling_options,
    check_output,
    choose_own_template,
    load_model,
    make_encoder,
    make_sampling,
    make_server,
    read_json_object,
)
from cutlm.errors import ConfigError

LOCAL_OPTIONS = ModelOptions(("batch_size", "dtype", "device"))
ANSWERING_OPTIONS = ModelOptions(LOCAL_OPTIONS.local, ("tokenizer", *SERVER_OPTIONS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "model", "out", "overwrite")
    prompts = f"rows with 'instruction' or 'messages', or alpaca_eval: {SOURCES}"
    parser.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help=prompts)
    add_options(parser, "columns")
    engine = "what runs a local model: transformers (default), or vllm, on GPUs (pip install 'cutlm[vllm]')"
    parser.add_argument("--engine", choices=("transformers", "vllm"), help=engine)
    arguments = """further arguments of vllm.LLM: '{"tensor_parallel_size": 2, "max_model_len": 8192}'"""
    parser.add_argument("--engine_args", metavar="JSON", help=arguments)
    samples = "responses to each instruction, in successive rows (default: 1)"
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help=samples)
    add_answering_arguments(parser)
    share = "largest share of prompts without an answer with which OUT is written (default: 0)"
    parser.add_argument("--max_failure_rate", type=float, default=0.0, metavar="SHARE", help=share)


def add_answering_arguments(parser: argparse.ArgumentParser, options: ModelOptions = ANSWERING_OPTIONS) -> None:
    """Add the options of answering a file, for every command that has a model do so."""
    add_options(parser, "template", "chat_template_kwargs", "template_date")
    judgment = 'ask for a response that deserves this judgment, such as "Perfect.": for models trained by hindsight'
    parser.add_argument("--judgment", metavar="TEXT", help=judgment)
    add_options(parser, "judgment_role")
    add_sampling_options(parser)
    options.add(parser)
    parser.add_argument("--generator", metavar="NAME", help="name of the model in the output (default: its folder)")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, all in one ConfigError, and fill in the defaults."""
    problems = ANSWERING_OPTIONS.find_problems(args)
    if args.num_samples < 1:
        problems.append(f"--num_samples: expected a whole number of at least 1, got {args.num_samples}")
    if args.num_samples > 1 and not args.temperature > 0:
        problems.append(
            f"--num_samples {args.num_samples}: expected --temperature above 0, or all samples are equal, got"
            f" {args.temperature:g}"
        )
    if args.judgment is not None and not args.judgment.strip():
        problems.append('--judgment: expected text such as "Perfect.", got none; set it, or leave the option out')
    if args.judgment_role is not None and args.judgment is None:
        problems.append("--judgment_role: expected only with --judgment; set that too, or leave this out")
    if not 0 <= args.max_failure_rate < 1:
        problems.append(f"--max_failure_rate: expected a share from 0 to below 1, got {args.max_failure_rate:g}")
    if args.base_url is not None and args.template is None:
        if args.judgment is not None:
            problems.append("--judgment: its prompt is encoded here; with --base_url, set --template too")
        for name in ("tokenizer", "template_date"):
            if getattr(args, name) is not None:
                problems.append(f"--{name}: expected only with --template; set that too, or leave this out")
    if args.engine == "vllm":
        if args.base_url is not None:
            problems.append("--engine vllm: expected only without --base_url; leave one of them out")
        problems += [
            f"--{name}: not used by --engine vllm; leave it out, or see --engine_args"
            for name in ("batch_size", "device")
            if getattr(args, name) is not None
        ]
    elif args.engine_args is not None:
        problems.append("--engine_args: expected only with --engine vllm; set that too, or leave this out")
    if problems:
        raise ConfigError(problems)
    ANSWERING_OPTIONS.fill(args)


def run(args: argparse.Namespace) -> int:
    check_options(args)
    check_output(args, args.prompts)

    with importing_libraries():
        from cutlm.generation.files import load_prompts

    prompts = [row for row in load_prompts(args.prompts, args.columns) for _ in range(args.num_samples)]
    if args.engine == "vllm":
        return _answer_by_vllm(args, prompts)
    return _answer_locally(args, prompts) if args.base_url is None else _answer_by_server(args, prompts)


def _name_output(args: argparse.Namespace) -> dict[str, str]:
    name = args.generator or Path(args.model).resolve().name
    return {"generator": name, "dataset": ",".join(Path(name).name.partition(".")[0] for name in args.prompts)}


def _answer_locally(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.generation.files import generate_file
    from cutlm.model.loading import fingerprint_model

    make_sampling(args)
    model, tokenizer, template = load_model(args)
    sampling = make_sampling(args, model)
    encoder, names = make_encoder(args, tokenizer, template), _name_output(args)
    names |= {"fingerprint": fingerprint_model(args.model)}
    options = names | {name: getattr(args, name) for name in ("judgment", "max_failure_rate", "overwrite")}
    generated = generate_file(model, tokenizer, encoder, prompts, args.out, sampling, **options)
    return _report(args, generated, sampling)


def _answer_by_vllm(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.generation.files import generate_file
    from cutlm.generation.local import choose_max_new_tokens_in
    from cutlm.generation.vllm import load_engine
    from cutlm.model.loading import find_base_model, fingerprint_model, is_adapter_folder, load_own_tokenizer

    arguments = read_json_object(args.engine_args or "{}", "--engine_args")
    sampling = make_sampling(args)  # loading takes minutes, so options are checked before
    tokenizer = load_own_tokenizer(args.model, find_base_model(args.model) if is_adapter_folder(args.model) else None)
    encoder = make_encoder(args, tokenizer, choose_own_template(args, tokenizer))
    engine = load_engine(args.model, dtype=args.dtype, arguments=arguments)
    if args.max_new_tokens is None:
        sampling = dataclasses.replace(sampling, max_new_tokens=choose_max_new_tokens_in(engine.context_limit))
    options: dict[str, Any] = _name_output(args) | {"fingerprint": fingerprint_model(args.model)}
    options |= {name: getattr(args, name) for name in ("judgment", "max_failure_rate", "overwrite")}
    generated = generate_file(engine, tokenizer, encoder, prompts, args.out, sampling, **options)
    return _report(args, generated, sampling)


def _answer_by_server(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    from cutlm.data.journal import Journal
    from cutlm.generation.files import (
        describe_run,
        encode_prompts,
        get_conversation,
        list_inputs,
        write_answers,
    )
    from cutlm.generation.server import generate_by_server

    server = make_server(args, args.model)
    sampling = make_sampling(args)
    conversations = [get_conversation(row) for row in prompts]
    encoded: list[list[int]] | None = None
    opening, template, date = "", "the server's", None
    if args.template is not None:
        from cutlm.generation.local import NUM_TAIL_TOKENS
        from cutlm.model.loading import load_tokenizer
        from cutlm.prompting.reasoning import find_open_thoughts

        encoder = make_encoder(args, load_tokenizer(args.tokenizer or args.model), args.template)
        template, date = encoder.fingerprint, encoder.template_date
        encoded = encode_prompts(conversations, args.judgment, encoder)
        opening = find_open_thoughts(str(encoder.tokenizer.decode(encoded[0][-NUM_TAIL_TOKENS:])))
    header = describe_run([list_inputs(conversations), args.judgment], sampling, template, args.model, date)
    journal = Journal(args.out, header | {"extra_body": server.extra_body}, overwrite=args.overwrite)
    generated = generate_by_server(server, encoded or conversations, sampling, journal, opening)
    write_answers(prompts, generated, journal, args.out, **_name_output(args), max_failure_rate=args.max_failure_rate)
    return _report(args, generated, sampling)


def _report(args: argparse.Namespace, generated: Any, sampling: Any) -> int:
    """Print the counts of a run and return the exit code."""
    num_failed, num_prompts = len(generated.failures), len(generated.failures) + len(generated.responses)
    if generated.failures:
        from cutlm.generation.files import name_failures_file
        from cutlm.generation.local import is_stopped
        from cutlm.servers.client import describe_commonest

        commonest = describe_commonest(generated.failures.values())
        print(f"{num_failed} of {num_prompts} prompts have no answer, {commonest}")
        summary = f"all are listed in {name_failures_file(args.out)}"
        if generated.has_too_many_failures(args.max_failure_rate):
            kept = f"{len(generated.responses)} answers are kept in {args.out}.partial"
            advice = "start again with the same options to ask for the others"
            if args.base_url is None:  # the same settings give the same answers
                kinds = {is_stopped(reason) for reason in generated.failures.values()}
                changes = ["a larger --max_new_tokens"] * (True in kinds)
                changes += ["a --temperature above 0 and another --seed"] * (False in kinds)
                advice = f"to start over, pass --overwrite and set {' and '.join(changes)}"
                advice += "; to leave the others out, set --max_failure_rate"
            print(f"{summary}; {kept}: {advice}")
            return 1
        print(f"{summary}, and are left out (--max_failure_rate {args.max_failure_rate:g})")
    print_counts(generated, f"responses in {args.out}", sampling)
    return 0


def print_counts(generated: Any, kind: str, sampling: Any) -> None:
    """Print the counts of a `Generated`, without those that are usually 0."""
    if generated.num_redacted:
        print(f"{generated.num_redacted} responses contained the key of the server; [key] replaces it")
    if generated.num_resumed:
        print(f"{generated.num_resumed} responses are from the run that was stopped")
    if generated.num_truncated:
        print(f"{generated.num_truncated} prompts were truncated on the left to fit the model's context")
    num_responses, num_unfinished = len(generated.responses), len(generated.unfinished)
    print(f"{num_responses} {kind}; {num_unfinished} of them stopped at {sampling.max_new_tokens} tokens")
