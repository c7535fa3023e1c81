"""Judge responses and write records to train on. The judge is a model, a set of rules or a person.

  cutlm judge --responses FILE --judge http --base_url URL --judge_model NAME --out FILE
  cutlm judge --responses FILE --judge local --judge_model MODEL --out FILE
  cutlm judge --responses FILE --judge rules --rules package.module:function --out FILE
  cutlm judge --responses FILE --judge human --out FILE        # writes lists to fill in; then again with --labels

Responses have the fields that `cutlm generate` writes: instruction, input, output; other fields are kept. A
satisfactory response gets the judgment null. A response whose judgment fails is left out, counted, and listed with the
reason in OUT.failures.jsonl.

http: an OpenAI-compatible chat endpoint; its key is read from the environment variable OPENAI_API_KEY. Judgments are
cached as they arrive: a run that was stopped, or had failures, asks only for the missing ones when started again. The
caps --max_requests and --max_tokens_total hold for all runs that share the cache. At --max_tokens_total no further
request is sent, but requests under way are still answered, and count.

The judge is asked for a JSON object with "judgment", "quotes" (passages of the response that are wrong; they become
wrong_spans) and "satisfactory". A prompt of your own may ask for the same (--answer_format json), or for text
(--answer_format text): "Perfect." and nothing else, or the judgment, with a first or last line "Satisfactory: yes" or
"Satisfactory: no". Without this line, only text that clearly names a fault is an objection. An answer that is not
understood is a failure.

rules: a function in a module on Python's path or in the current directory. It gets the instruction (for a conversation,
all turns as text) and the response, and returns what is wrong, or None; or a pair of that and the wrong spans.

local: a model trained by cutlm train-judge, an adapter or a whole model. A run that was stopped resumes when started
again with the same settings. The same model on a server is asked by --judge http --trained.

--compare_prompts: measure how much a model could learn from a teacher (objectives self_distillation and redirect),
before training. FILE has judged records. For a sample of the unsatisfactory ones, the model answers again under the
plain prompt and under the teacher's, the judge judges both, and OUT gets the gain of the teacher's prompt with its
interval, and the lengths of the responses; OUT.records.jsonl gets the judged responses.

  cutlm judge --compare_prompts --model MODEL --responses FILE --judge rules --rules NAME --out gain.json

Exit codes: 0 if every response has a judgment; 1 if judgments are missing, such as those of empty responses or after an
error of a server; 2 if something must be fixed first."""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.model_options import (
    DEFAULTS,
    SERVER_OPTIONS,
    SOURCES,
    add_options,
    check_output,
    load_model,
    make_encoder,
    make_server,
)
from cutlm.errors import ConfigError

if TYPE_CHECKING:
    from cutlm.data.journal import Journal
    from cutlm.data.records import JudgedRecord
    from cutlm.flagging.teacher import TeacherSettings
    from cutlm.judges import Outcome, Response
    from cutlm.servers.client import Server

JUDGES = ("http", "local", "rules", "human")
_LOCAL = ("batch_size", "dtype", "device")
# The options of each judge and their defaults.
_HTTP: dict[str, Any] = {"base_url": None, "judge_model": None, "prompt_file": None, "trained": False}
_HTTP |= {"answer_format": None, "temperature": 0.0, "max_tokens": 1024, "cache": None}
_HTTP |= {"max_requests": None, "max_tokens_total": None}
_OPTIONS: dict[str, dict[str, Any]] = {
    "http": _HTTP | {name: DEFAULTS[name] for name in SERVER_OPTIONS},
    "local": {"judge_model": None, "max_new_tokens": None, **{name: DEFAULTS[name] for name in _LOCAL}},
    "rules": {"rules": None},
    "human": {"labels": None},
}
# Options of --compare_prompts and their defaults, besides those of the judge.
_COMPARISON: dict[str, Any] = {"model": None, "teacher_context": "praise", "teacher_sees_response": False}
_COMPARISON |= {"template": None, "chat_template_kwargs": None, "template_date": None, "judgment_role": None}
_COMPARISON |= {"num_records": 64, "max_response_tokens": None, "seed": 42}
_REQUIRED = {"http": ("base_url", "judge_model"), "local": ("judge_model",), "rules": ("rules",), "human": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", required=True, nargs="+", metavar="FILE", help=f"not judged yet: {SOURCES}")
    add_options(parser, "columns")
    parser.add_argument("--judge", required=True, choices=JUDGES, help="the kind of judge")
    add_options(parser, "out", "overwrite")
    parser.add_argument("--judge_model", metavar="MODEL", help="http: its name on the server; local: a folder")
    http = parser.add_argument_group("--judge http")
    add_options(http, "base_url")
    http.add_argument("--prompt_file", metavar="FILE", help="your own prompt, with {instruction} and {response}")
    formats = "format of the judge's answer (default: json; with --prompt_file: text)"
    http.add_argument("--answer_format", choices=("json", "text"), help=formats)
    trained = "the model is trained by cutlm train-judge: use its prompt"
    http.add_argument("--trained", action="store_const", const=True, help=trained)
    http.add_argument("--temperature", type=float, help="0: greedy (default)")
    http.add_argument("--max_tokens", type=int, metavar="N", help="longest answer (default: 1024)")
    http.add_argument("--cache", metavar="FILE", help="cache of judgments (default: OUT.cache.sqlite)")
    add_options(http, *SERVER_OPTIONS)
    requests = "most requests of all runs with this cache, retries included"
    http.add_argument("--max_requests", type=int, metavar="N", help=requests)
    http.add_argument("--max_tokens_total", type=int, metavar="N", help="most tokens of all runs with this cache")
    add_local_arguments(parser.add_argument_group("--judge local"))
    rules = parser.add_argument_group("--judge rules")
    rules.add_argument("--rules", metavar="NAME", help="a function of instruction and response: module:function")
    human = parser.add_argument_group("--judge human")
    human.add_argument("--labels", metavar="FILE", help="OUT.todo.csv or OUT.todo.jsonl with every judgment filled in")
    _add_comparison_arguments(parser.add_argument_group("--compare_prompts, by a local model"))


def _add_comparison_arguments(parser: "argparse._ActionsContainer") -> None:
    """Add the options of comparing prompts; those of the judge are added before."""
    teacher = "compare responses under the teacher's prompt with plain ones"
    parser.add_argument("--compare_prompts", action="store_true", help=teacher)
    parser.add_argument("--model", metavar="MODEL", help="model or adapter folder, GGUF file, or hub name")
    parser.add_argument("--teacher_context", choices=("praise", "advice"), help="the prompt (default: praise)")
    shown = "show the response with the advice"
    parser.add_argument("--teacher_sees_response", action="store_const", const=True, help=shown)
    add_options(parser, "template", "chat_template_kwargs", "template_date", "judgment_role")
    records = "unsatisfactory records to compare on, drawn by the seed (default: 64)"
    parser.add_argument("--num_records", type=int, metavar="N", help=records)
    longest = "longest response (default: 2048, or half of the context)"
    parser.add_argument("--max_response_tokens", type=int, metavar="N", help=longest)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the records and the responses (default: 42)")


def add_local_arguments(parser: "argparse._ActionsContainer") -> None:
    """Add the options of a local judge."""
    longest = "longest answer (default: 1024, or a quarter of the context)"
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=longest)
    add_options(parser, *_LOCAL)


def run(args: argparse.Namespace) -> int:
    fill_options(args)
    check_output(args, [*args.responses, *filter(None, (args.labels, args.prompt_file))])
    if args.compare_prompts:
        return _compare_prompts(args)

    from cutlm.judges.responses import EMPTY_RESPONSE, read_responses

    server = _make_server(args) if args.judge == "http" else None
    responses = read_responses(args.responses, args.columns)
    if args.judge == "human" and args.labels is None:
        return _write_todo(args, responses)
    outcome = _judge_into(args, responses, server, args.out)
    if not outcome.failures:
        return 0
    if server is not None and set(outcome.failures.values()) != {EMPTY_RESPONSE}:
        print(_suggest_retry(args))
    return 1


def _suggest_retry(args: argparse.Namespace) -> str:
    overwrite = " and --overwrite" if Path(args.out).exists() and not args.overwrite else ""
    return (
        f"run it again with the same options{overwrite} to request only the missing judgments; if no request reaches"
        f" the server, check --base_url {args.base_url}"
    )


def _judge_into(args: argparse.Namespace, responses: "list[Response]", server: "Server | None", out: str) -> "Outcome":
    """Judge responses, write the records and print the counts."""
    from cutlm.judges.responses import describe_outcome, write_outcome

    journal = None
    if args.judge == "local":
        from cutlm.judges.local import judge_locally

        options = {name: getattr(args, name) for name in ("max_new_tokens", *_LOCAL, "overwrite")}
        outcome, journal = judge_locally(responses, args.judge_model, out, **options)
    else:
        outcome = _judge(args, responses, server)
    write_outcome(responses, outcome, out)
    if journal is not None:
        journal.remove()
    print(describe_outcome(outcome, out))
    return outcome


def _compare_prompts(args: argparse.Namespace) -> int:
    """Write how the responses under a teacher's prompt compare with plain ones."""
    from cutlm.data.records import check_records, raise_problems
    from cutlm.data.sources import describe_sources
    from cutlm.flagging.teacher import TeacherSettings
    from cutlm.judges.comparison import compare_verdicts, write_comparison
    from cutlm.judges.paired import draw_records
    from cutlm.judges.prompt import read_prompt_file
    from cutlm.judges.rules import load_rules

    teacher = TeacherSettings(args.teacher_context, args.teacher_sees_response)
    server = _make_server(args) if args.judge == "http" else None
    # What is wrong with the judge comes out before responses are generated.
    if args.rules is not None:
        load_rules(args.rules)
    if args.prompt_file is not None:
        read_prompt_file(args.prompt_file)
    check = check_records(args.responses, args.columns)
    raise_problems(check, describe_sources(args.responses))
    drawn = draw_records(check.records, args.num_records, args.seed)
    records, locations = [check.records[index] for index in drawn], [check.locations[index] for index in drawn]
    responses, journal = _answer_under_both(args, records, locations, teacher)
    outcome = _judge_into(args, responses, server, f"{args.out}.records.jsonl")
    comparison = compare_verdicts(responses, outcome)
    is_retried = server is not None and (comparison is None or comparison.num_missing > 0)
    if comparison is None:
        print(f"no pair of responses has both verdicts; {args.out} was not written")
    else:
        settings = {"model": args.model, "seed": args.seed}
        write_comparison(args.out, comparison, teacher, settings)
        print("\n".join([comparison.describe(), *(f"warning: {text}" for text in comparison.list_warnings())]))
    if is_retried:
        print(_suggest_retry(args))
    else:
        journal.remove()
    return 1 if comparison is None or comparison.num_missing else 0


def _answer_under_both(
    args: argparse.Namespace, records: "Sequence[JudgedRecord]", locations: Sequence[str], teacher: "TeacherSettings"
) -> "tuple[list[Response], Journal]":
    """Let the model answer under the plain prompt and the teacher's; also return the journal of its responses."""
    from cutlm.data.journal import Journal
    from cutlm.generation.local import Sampling, choose_max_new_tokens
    from cutlm.judges.paired import answer_under_both, describe_answers
    from cutlm.model.loading import fingerprint_model

    model, tokenizer, template = load_model(args)
    encoder = make_encoder(args, tokenizer, template)
    max_new_tokens = args.max_response_tokens or choose_max_new_tokens(model)
    sampling = Sampling(max_new_tokens, temperature=1.0, seed=args.seed, batch_size=args.batch_size)
    header = describe_answers(records, teacher, sampling, encoder, fingerprint_model(args.model), model)
    journal = Journal(args.out, header, overwrite=args.overwrite)
    return answer_under_both(model, tokenizer, encoder, records, locations, teacher, sampling, journal), journal


def fill_options(args: argparse.Namespace) -> None:
    """Refuse options of other judges, require those of this one, and fill in the defaults."""
    own, given = dict(_OPTIONS[args.judge]), defaultdict(list)
    if args.compare_prompts:  # the model that answers has these options, too
        own |= {name: DEFAULTS[name] for name in _LOCAL}
    for name in {name: None for options in _OPTIONS.values() for name in options}:
        if getattr(args, name) is None:
            setattr(args, name, own.get(name))
        elif name not in own:
            given[" or ".join(judge for judge in JUDGES if name in _OPTIONS[judge])].append(f"--{name}")
    problems = [
        f"{', '.join(names)}: expected only with --judge {judges}; leave them out or change --judge"
        for judges, names in given.items()
    ]
    problems += _fill_comparison_options(args)
    missing = [f"--{name}" for name in _REQUIRED[args.judge] if getattr(args, name) is None]
    if missing:
        problems.append(f"--judge {args.judge}: expected {' and '.join(missing)} too, got none; set them")
    if args.trained and args.prompt_file is not None:
        problems.append("--prompt_file, --trained: expected one, got both; a trained judge has its own prompt")
    if args.trained and args.answer_format is not None:
        problems.append("--answer_format, --trained: expected one, got both; a trained judge has its own format")
    if problems:
        raise ConfigError(problems)


def _fill_comparison_options(args: argparse.Namespace) -> list[str]:
    """Fill in the defaults of the options of --compare_prompts, and return a sentence for each problem."""
    given = [f"--{name}" for name in _COMPARISON if getattr(args, name) is not None]
    for name, default in _COMPARISON.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not args.compare_prompts:
        return [f"{', '.join(given)}: expected only with --compare_prompts; leave them out"] if given else []
    problems = []
    if args.judge == "human":
        problems.append("--compare_prompts: expected a judge that needs no person, got human; set rules, http or local")
    if args.model is None:
        problems.append("--compare_prompts: expected --model too, got none; set it")
    for name in ("num_records", "max_response_tokens"):
        if (number := getattr(args, name)) is not None and number < 1:
            problems.append(f"--{name}: expected a whole number of at least 1, got {number}")
    if args.teacher_sees_response and args.teacher_context != "advice":
        problems.append(f"--teacher_sees_response: expected --teacher_context advice, got {args.teacher_context}")
    return problems


def _make_server(args: argparse.Namespace) -> "Server":
    problems = []
    if args.max_tokens < 1:
        problems.append(f"max_tokens: expected a whole number of at least 1, got {args.max_tokens}")
    if not 0 <= args.temperature < float("inf"):
        problems.append(f"temperature: expected a number of at least 0, got {args.temperature}")
    if problems:
        raise ConfigError(problems)
    limits = {"max_requests": args.max_requests, "max_tokens_total": args.max_tokens_total}
    return make_server(args, args.judge_model, **limits)


def _judge(args: argparse.Namespace, responses: "list[Response]", server: "Server | None") -> "Outcome":
    if server is not None:
        from cutlm.judges.answers import AnswerFormat
        from cutlm.judges.prompt import DEFAULT_PROMPT, TRAINED_PROMPT, read_prompt_file
        from cutlm.judges.server import judge_by_server

        template = TRAINED_PROMPT if args.trained else DEFAULT_PROMPT
        answer_format: AnswerFormat = "trained" if args.trained else args.answer_format or "json"
        if args.prompt_file is not None:
            template, answer_format = read_prompt_file(args.prompt_file), args.answer_format or "text"
        cache = args.cache or f"{args.out}.cache.sqlite"
        settings = {"temperature": args.temperature, "max_tokens": args.max_tokens}
        try:
            return judge_by_server(responses, server, cache, template=template, answer_format=answer_format, **settings)
        except KeyboardInterrupt:
            print(f"\nfinished judgments are in {cache}; resume with the same options", file=sys.stderr)
            raise
    if args.judge == "rules":
        from cutlm.judges.rules import judge_by_rules, load_rules

        return judge_by_rules(responses, load_rules(args.rules))
    from cutlm.judges.human import read_todo

    return read_todo(responses, args.labels)


def _write_todo(args: argparse.Namespace, responses: "list[Response]") -> int:
    from cutlm.judges.human import name_todo_files, write_todo

    num_rows = write_todo(responses, args.out)
    lines, table = name_todo_files(args.out)
    if num_empty := len(responses) - num_rows:
        print(f"{num_empty} responses are empty and are left out")
    print(
        f"{num_rows} responses to judge in {lines} and {table}: fill in the column 'judgment' of one of them, with"
        " \"Perfect.\" if nothing is wrong, and if you like, copy the wrong passages into the column 'quotes', one a"
        f" line; then run:\n  cutlm judge --responses {shlex.join(args.responses)} --judge human"
        f" --labels {table} --out {args.out}"
    )
    return 0
