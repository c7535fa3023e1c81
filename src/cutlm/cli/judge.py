"""Say what is wrong with responses, and write records to be trained on: judged by a model, by rules, or by a person.

  cutlm judge --responses FILE --judge http --base_url URL --judge_model NAME --out FILE
  cutlm judge --responses FILE --judge local --judge_model MODEL --out FILE
  cutlm judge --responses FILE --judge rules --rules package.module:function --out FILE
  cutlm judge --responses FILE --judge human --out FILE                 lists to be filled, then the same with --labels

Responses come as `cutlm generate` writes them: instruction, input, output; other fields are kept. A satisfactory
response gets the judgment null. One whose judgment could not be had is no record: it is left out, counted, and listed
with the reason in OUT.failures.jsonl.

http: an OpenAI-compatible chat endpoint; a key to it is read from the environment variable OPENAI_API_KEY. Judgments
are kept in a cache as they come: a run that was stopped, or had failures, asks only for the missing ones when started
again. What is spent is kept there, too: --max_requests and --max_tokens_total are totals of all runs that share the
cache, and a start after a stop does not spend anew. At --max_tokens_total nothing more is asked, but what is under way
is still answered, and counts.

local: a model that cutlm train-judge trained, an adapter or whole. A run that was stopped goes on where it was when
started again with the same settings. On a server, the same model is asked by --judge http --trained.

Exits with 0 when every response has its judgment, with 2 when something must be mended first, and with 1 when
judgments are missing although nothing is wrong with what was given: not all is done, and another try may do it."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.model_options import DEFAULTS, add_options

if TYPE_CHECKING:
    from cutlm.judges import Outcome, Response
    from cutlm.servers.chat import ChatServer

JUDGES = ("http", "local", "rules", "human")
_SERVER = ("concurrency", "timeout", "max_retries")
_RUNNING = ("batch_size", "dtype", "device")
# Options that mean something to some judges alone; their defaults.
_HTTP: dict[str, Any] = {
    "base_url": None,
    "judge_model": None,
    "prompt_file": None,
    "trained": False,
    "temperature": 0.0,
    "max_tokens": 1024,
    "extra_body": "{}",
    "cache": None,
    **{name: DEFAULTS[name] for name in _SERVER},
    "max_requests": None,
    "max_tokens_total": None,
}
_LOCAL: dict[str, Any] = {
    "judge_model": None,
    "max_new_tokens": None,
    **{name: DEFAULTS[name] for name in _RUNNING},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "http": _HTTP,
    "local": _LOCAL,
    "rules": {"rules": None},
    "human": {"labels": None},
}
_LOCAL_SETTINGS = tuple(name for name in _LOCAL if name != "judge_model")
_NEEDED = {"http": ("base_url", "judge_model"), "local": ("judge_model",), "rules": ("rules",), "human": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", required=True, metavar="FILE", help="JSON array or JSON Lines, not judged yet")
    parser.add_argument("--judge", required=True, choices=JUDGES, help="who judges")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file of records to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--judge_model", metavar="MODEL", help="http: its name on the server; local: a folder")
    http = parser.add_argument_group("--judge http")
    add_options(http, "base_url")
    http.add_argument("--prompt_file", metavar="FILE", help="another question, with {instruction} and {response}")
    http.add_argument(
        "--trained", action="store_const", const=True, help="the model is one of cutlm train-judge: ask it as trained"
    )
    http.add_argument("--temperature", type=float, help="0 takes the likeliest answer (default)")
    http.add_argument("--max_tokens", type=int, metavar="N", help="of an answer (default: 1024)")
    http.add_argument(
        "--extra_body",
        metavar="JSON",
        help="""further fields of every request; null takes one away: '{"max_tokens": null, "seed": 1}'""",
    )
    http.add_argument("--cache", metavar="FILE", help="where judgments are kept (default: OUT.cache.sqlite)")
    add_options(http, *_SERVER)
    http.add_argument(
        "--max_requests", type=int, metavar="N", help="most attempts, of all runs with this cache together"
    )
    http.add_argument(
        "--max_tokens_total", type=int, metavar="N", help="most tokens, of all runs with this cache together"
    )
    add_local_arguments(parser.add_argument_group("--judge local"))
    rules = parser.add_argument_group("--judge rules")
    rules.add_argument("--rules", metavar="NAME", help="a function of instruction and response: module:function")
    human = parser.add_argument_group("--judge human")
    human.add_argument("--labels", metavar="FILE", help="OUT.todo.csv or OUT.todo.jsonl, with every judgment filled")


def add_local_arguments(parser: "argparse._ActionsContainer") -> None:
    """How a model at hand judges."""
    parser.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="of an answer (default: 1024, or a quarter of its context)"
    )
    add_options(parser, *_RUNNING)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting
    from cutlm.errors import UserError

    fill_options(args)
    refuse_overwriting([args.responses, *filter(None, (args.labels, args.prompt_file))], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")

    from cutlm.judges.responses import describe_outcome, read_responses, write_outcome

    server = _make_server(args) if args.judge == "http" else None
    responses = read_responses(args.responses)
    if args.judge == "human" and args.labels is None:
        return _write_todo(args, responses)
    if args.judge == "local":
        from cutlm.judges.local import judge_locally

        outcome, journal = judge_locally(
            responses, args.judge_model, args.out, **{name: getattr(args, name) for name in _LOCAL_SETTINGS}
        )
    else:
        outcome, journal = _judge(args, responses, server), None
    write_outcome(responses, outcome, args.out)
    if journal is not None:
        journal.remove()
    print(describe_outcome(outcome, args.out))
    if not outcome.failures:
        return 0
    if server is not None:
        print("start again with the same options and --overwrite to ask only for what is missing")
    return 1


def fill_options(args: argparse.Namespace) -> None:
    """Refuses options of other judges, asks for those of this one, and puts in the defaults."""
    from cutlm.errors import ConfigError

    own, given = _OPTIONS[args.judge], defaultdict(list)
    for name in {name: None for options in _OPTIONS.values() for name in options}:
        if getattr(args, name) is None:
            setattr(args, name, own.get(name))
        elif name not in own:
            given[" or ".join(judge for judge in JUDGES if name in _OPTIONS[judge])].append(f"--{name}")
    problems = [
        f"{', '.join(names)}: of use with --judge {judges} alone; leave out the one or the other"
        for judges, names in given.items()
    ]
    missing = [f"--{name}" for name in _NEEDED[args.judge] if getattr(args, name) is None]
    if missing:
        problems.append(f"--judge {args.judge}: expected {' and '.join(missing)} too, got none; name what to judge by")
    if args.trained and args.prompt_file is not None:
        problems.append(
            "--prompt_file, --trained: expected one of them, got both; a trained judge has its own question"
        )
    if problems:
        raise ConfigError(problems)


def _make_server(args: argparse.Namespace) -> "ChatServer":
    from cutlm.servers.chat import ChatServer, check_package

    server = ChatServer(
        args.base_url,
        args.judge_model,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        fields=read_fields(args.extra_body, "--extra_body"),
        concurrency=args.concurrency,
        timeout=args.timeout,
        max_retries=args.max_retries,
        max_requests=args.max_requests,
        max_tokens_total=args.max_tokens_total,
    )
    check_package()  # before anything is begun
    return server


def read_fields(text: str, option: str) -> dict[str, Any]:
    """Further fields of a request, as an option gives them.

    Raises:
        ConfigError: It is no JSON object.
    """
    import json

    from cutlm.errors import ConfigError

    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"""{option}: expected a JSON object such as '{{"seed": 1}}', got {text!r}""")
    return fields


def _judge(args: argparse.Namespace, responses: "list[Response]", server: "ChatServer | None") -> "Outcome":
    if server is not None:
        from cutlm.judges.prompt import DEFAULT_PROMPT, TRAINED_PROMPT, read_prompt_file
        from cutlm.judges.server import judge_by_server

        template = TRAINED_PROMPT if args.trained else DEFAULT_PROMPT
        if args.prompt_file is not None:
            template = read_prompt_file(args.prompt_file)
        cache = args.cache or f"{args.out}.cache.sqlite"
        try:
            return judge_by_server(responses, server, cache, template=template)
        except KeyboardInterrupt:
            print(f"\nwhat was judged is in {cache}; start again with the same options", file=sys.stderr)
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
    num_empty = len(responses) - num_rows
    if num_empty:
        print(f"{num_empty} responses are empty and are left out")
    print(
        f"{num_rows} responses to judge in {lines} and {table}: fill the column 'judgment' of one of them, with"
        f' "Perfect." where nothing is wrong; then:\n  cutlm judge --responses {args.responses} --judge human'
        f" --labels {table} --out {args.out}"
    )
    return 0
