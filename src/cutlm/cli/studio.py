"""Read responses in a browser, write judgments, and see at once which tokens a model flags because of them.

  cutlm studio --responses responses.jsonl --out records.jsonl
  cutlm studio --responses responses.jsonl --model MODEL --out records.jsonl
  cutlm studio --data records.jsonl --out reviewed.jsonl            # review judgments
  cutlm studio --responses responses.jsonl --before MODEL --after runs/first --out records.jsonl
  cutlm studio --responses responses.jsonl --judge http --base_url URL --judge_model NAME --out records.jsonl

Open the address that it prints. Every change is saved at once, in a journal for each reviewer in the folder OUT.studio;
OUT has the records to train on, of all reviewers. Start the command again to continue. Without a model, the page shows
texts only. With a judge, each response has a first draft, which counts only once you accept it.

The server is for you alone: it listens at 127.0.0.1, and its address has a secret token. For reviewers on other
machines, start one with --host for each of them, with a password in the environment variable CUTLM_STUDIO_PASSWORD; the
connection is not encrypted, so use it in a trusted network, or behind a proxy with TLS. Press Ctrl-C to stop."""

import argparse
import contextlib
import getpass
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.model_options import DEFAULTS, SERVER_OPTIONS, SOURCES, add_options, make_server
from cutlm.data.files import check_out_file
from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from cutlm.studio.drafts import DraftJudge
    from cutlm.studio.scoring import Models

_DEFAULT_PORT = 8642
_PASSWORD = "CUTLM_STUDIO_PASSWORD"
_JUDGE: dict[str, Any] = {"base_url": None, "judge_model": None, "cache": None, "max_requests": None}
_JUDGE |= {name: DEFAULTS[name] for name in SERVER_OPTIONS} | {"max_tokens_total": None}
_MODEL = ("template", "chat_template_kwargs", "template_date", "base", "dtype", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", nargs="+", metavar="FILE", help=f"not judged yet: {SOURCES}")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="records whose judgments are drafts to review")
    add_options(parser, "columns", "out", "overwrite")
    parser.add_argument("--reviewer", metavar="NAME", help="whose verdicts these are (default: the user's name)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    port = f"default: {_DEFAULT_PORT}, or another one if it is taken"
    parser.add_argument("--port", type=int, metavar="N", help=port)
    model = parser.add_argument_group("a model")
    model.add_argument("--model", metavar="MODEL", help="model or adapter folder, GGUF file, or hub name")
    model.add_argument("--before", metavar="MODEL", help="the model before training, with --after")
    model.add_argument("--after", metavar="MODEL", help="the model after training")
    model.add_argument("--threshold", type=float, default=1.1, help="lambda of eq. 5 at the start (default: 1.1)")
    longest = "of prompt and response (default: 2048, or the model's context)"
    model.add_argument("--max_length", type=int, metavar="N", help=longest)
    add_options(model, *_MODEL)
    config = 'settings of cutlm train for "Train on this"; see recipes/'
    model.add_argument("--train_config", metavar="FILE", help=config)
    judge = parser.add_argument_group("first drafts by a judge")
    judge.add_argument("--judge", choices=("http",), help="an OpenAI-compatible server; see cutlm judge")
    add_options(judge, "base_url")
    judge.add_argument("--judge_model", metavar="NAME", help="the name of the judge on the server")
    judge.add_argument("--cache", metavar="FILE", help="cache of judgments (default: OUT.cache.sqlite)")
    add_options(judge, *SERVER_OPTIONS)
    judge.add_argument("--max_requests", type=int, metavar="N", help="most requests of all runs with this cache")
    judge.add_argument("--max_tokens_total", type=int, metavar="N", help="most tokens of all runs with this cache")


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    inputs = [*(args.responses or []), *(args.data or [])]
    check_out_file(inputs, args.out)
    try:
        import uvicorn

        from cutlm.studio.security import Access
        from cutlm.studio.server import Studio, make_app
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'cutlm[studio]'") from None
    from cutlm.studio.items import read_items
    from cutlm.studio.journal import Journal, find_folder, name_journal
    from cutlm.studio.session import Session
    from cutlm.studio.worker import Worker

    journal_path = name_journal(args.out, _find_user() if args.reviewer is None else args.reviewer)
    if Path(args.out).exists() and not find_folder(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; pass another file, or replace it with --overwrite")
    items, num_empty = read_items(args.responses, args.data, args.columns)
    with contextlib.ExitStack() as stack:
        # Stopped by another program, it writes the records and ends a training run, as after Ctrl-C.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        session = stack.enter_context(Session(items, args.out, stack.enter_context(Journal(journal_path))))
        listener = stack.enter_context(_listen(args.host, args.port))
        models = _load_models(args)
        studio = Studio(
            session,
            stack.enter_context(Worker()),
            models,
            args.threshold,
            _make_judge(args) if args.judge else None,
            args.train_config,
        )
        stack.callback(studio.close)
        if studio.drafter is not None:
            stack.enter_context(studio.drafter)
        access = Access(args.host, listener.getsockname()[1], os.environ.get(_PASSWORD) or None)
        app = make_app(studio, access)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        studio.is_ending = lambda: server.should_exit
        if num_empty:
            print(f"{num_empty} responses are empty and are left out")
        decided = session.measure_pace().num_decided
        print(f"{len(items)} responses, {decided} judged by {session.reviewer}; records go to {args.out}")
        if access.password is not None:
            print("the connection is not encrypted; use it in a trusted network, or behind a proxy with TLS")
        print(f"open {access.url}\npress Ctrl-C to stop", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn stops, and raises it then
            server.run(sockets=[listener])
    merged = session.write()
    disputed = f"; {len(merged.disputed)} responses are disputed, see {args.out}.disputed.jsonl"
    print(f"{len(merged.rows)} records in {args.out}{disputed if merged.disputed else ''}")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    problems = []
    if not args.responses and not args.data:
        problems.append("--responses, --data: expected at least one of them, got none")
    if (args.before is None) != (args.after is None):
        problems.append("--before, --after: expected both, got one of them; set the other, or --model")
    if args.model is not None and args.before is not None:
        problems.append("--model, --before: expected one, got both; leave out --model")
    has_model = args.model is not None or args.before is not None
    given = [f"--{name}" for name in (*_MODEL, "max_length", "train_config") if getattr(args, name) is not None]
    if given and not has_model:
        problems.append(f"{', '.join(given)}: expected only with --model; set it, or leave these out")
    if not 1 <= args.threshold < float("inf"):
        problems.append(f"threshold: expected a number of at least 1, got {args.threshold}")
    if args.port is not None and not 0 <= args.port < 2**16:
        problems.append(f"port: expected a number from 0 to 65535, got {args.port}")
    if args.judge and not (args.base_url and args.judge_model):
        problems.append("--judge http: expected --base_url and --judge_model too; set them")
    given = [f"--{name}" for name in _JUDGE if getattr(args, name) is not None]
    if given and not args.judge:
        problems.append(f"{', '.join(given)}: expected only with --judge http; set it, or leave these out")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get(_PASSWORD):
        problems.append(
            f"--host {args.host}: other machines can reach this address; set a password in the environment variable"
            f" {_PASSWORD}, or leave out --host"
        )
    if args.train_config is not None and not Path(args.train_config).is_file():
        problems.append(f"--train_config {args.train_config}: no such file; check the path")
    if problems:
        raise ConfigError(problems)
    for name, default in _JUDGE.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _find_user() -> str:
    """Return the user's name, or "reviewer" if it is unknown or cannot be the name of a file."""
    try:
        name = re.sub(r"[^\w.@+-]", "", getpass.getuser()).lstrip(".@+-")
    except (KeyError, OSError):
        name = ""
    return name[:64] or "reviewer"


def _listen(host: str, port: int | None) -> socket.socket:
    """Open the port before a model is loaded, which takes long."""
    ports = [_DEFAULT_PORT, 0] if port is None else [port]
    try:
        family, *_ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: not an address of this machine ({error.strerror or error})") from None
    for number in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
        except OSError as error:
            listener.close()
            problem = f"--host {host} --port {number}: cannot listen there ({error.strerror or error})"
        else:
            return listener
    raise UserError(f"{problem}; choose another --port")


def _load_models(args: argparse.Namespace) -> "Models | None":
    paths = [path for path in (args.model, args.before, args.after) if path is not None]
    if not paths:
        return None
    print(f"loading {' and '.join(paths)}", flush=True)

    from cutlm.studio.scoring import Models, ModelSettings

    options = {name: getattr(args, name) for name in (*_MODEL, "threshold", "max_length")}
    options["dtype"] = args.dtype or DEFAULTS["dtype"]
    return Models(paths, ModelSettings(**options))


def _make_judge(args: argparse.Namespace) -> "DraftJudge":
    from cutlm.studio.drafts import DraftJudge

    limits = {"max_requests": args.max_requests, "max_tokens_total": args.max_tokens_total}
    server = make_server(args, args.judge_model, **limits)
    return DraftJudge(server, Path(args.cache or f"{args.out}.cache.sqlite"))
