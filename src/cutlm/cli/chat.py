"""Talk to a model in the terminal, see which tokens of an answer a judgment flags, and save what you judged as records
to train on. /help lists the commands.

  cutlm chat --model MODEL
  cutlm chat --base_url http://localhost:8000/v1 --model NAME

Greedy by default. If standard input is not a terminal, its lines are the messages. A server applies the model's own
chat template; with --template the prompts are encoded here by --tokenizer. There, /judge needs --tokenizer or
--template, and a server that returns prompt_logprobs. The key of the server is read from the environment variable
OPENAI_API_KEY."""

import argparse
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cutlm.cli.model_options import (
    ModelOptions,
    add_options,
    add_sampling_options,
    load_model,
    make_sampling,
    make_server,
)

if TYPE_CHECKING:
    from cutlm.chat.session import Engine
    from cutlm.prompting.templates import JudgmentRole

_OPTIONS = ModelOptions(("dtype", "device"), ("tokenizer", "timeout", "extra_body"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "model", "template", "chat_template_kwargs", "judgment_role")
    parser.add_argument("--threshold", type=float, default=1.1, help="lambda of eq. 5, for /judge (default: 1.1)")
    add_sampling_options(parser)
    _OPTIONS.add(parser)


def run(args: argparse.Namespace) -> int:
    _OPTIONS.fill(args)
    is_interactive = sys.stdin.isatty()
    has_prompts = is_interactive and sys.stdout.isatty()
    if has_prompts:
        with suppress(ImportError):  # gives input() line editing and a history, but is not on every platform
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the session reports bytes that are not text
    engine = _make_local_engine(args) if args.base_url is None else _make_server_engine(args)

    from cutlm.chat.session import Session, remark

    if is_interactive:
        template = engine.template or "the server's"
        remark(f"{args.model}, {template} template; /help lists the commands, Ctrl-D leaves")
    Session(engine).run(lambda prompt: input(prompt if has_prompts else ""), is_interactive=is_interactive)
    return 0


def _make_local_engine(args: argparse.Namespace) -> "Engine":
    from cutlm.chat.local import LocalEngine
    from cutlm.flagging.detector import FlagSettings

    settings = FlagSettings(args.threshold)
    make_sampling(args)
    model, tokenizer, template = load_model(args)
    role: JudgmentRole = args.judgment_role or "user"
    return LocalEngine(model, tokenizer, template, make_sampling(args, model), settings, role)


def _make_server_engine(args: argparse.Namespace) -> "Engine":
    from cutlm.chat.server import ServerEngine
    from cutlm.flagging.detector import FlagSettings
    from cutlm.model.loading import load_tokenizer
    from cutlm.prompting.templates import set_arguments

    # The user sees at once that there is no answer and can send the message again.
    server = make_server(args, args.model, concurrency=1, max_retries=0)
    name = args.tokenizer or (args.model if args.template else None)
    tokenizer = None if name is None else set_arguments(load_tokenizer(name), args.chat_template_kwargs or {})
    role: JudgmentRole = args.judgment_role or "user"
    return ServerEngine(server, tokenizer, args.template, make_sampling(args), FlagSettings(args.threshold), role)
