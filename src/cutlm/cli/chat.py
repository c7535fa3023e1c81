"""Talk to a model in the terminal, see which tokens of an answer a judgment would blame, and save what you judged as
records to train on. /help lists the commands.

  cutlm chat --model MODEL
  cutlm chat --server http://localhost:8000 --model NAME

Greedy by default. Where standard input is no terminal, its lines are the messages. A server prompts the model by the
model's own chat template; with --template the prompts are made here, by --tokenizer. /judge needs --tokenizer or
--template there, and a server that returns prompt_logprobs. A key to it is read from the environment variable
OPENAI_API_KEY."""

import argparse
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cutlm.cli.generate import add_sampling_arguments

if TYPE_CHECKING:
    from cutlm.chat import Engine

_LOCAL = {"dtype": "auto", "device": None}
_SERVER = {"tokenizer": None, "timeout": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), help="default: the tokenizer's chat template, which training saves"
    )
    parser.add_argument("--threshold", type=float, default=1.1, help="lambda of eq. 5, for /judge (default: 1.1)")
    add_sampling_arguments(parser)
    server = parser.add_argument_group("a model on a server")
    server.add_argument(
        "--server", metavar="URL", help="address of an OpenAI-compatible server; --model is its name there"
    )
    server.add_argument(
        "--tokenizer", metavar="MODEL", help="for --template and /judge: folder or hub name (with --template: --model)"
    )
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="without a byte of an answer (default: 600)")


def run(args: argparse.Namespace) -> int:
    from cutlm.errors import ConfigError

    others = _LOCAL if args.server else _SERVER
    given = ", ".join(f"--{name}" for name, default in others.items() if getattr(args, name) != default)
    if given:
        raise ConfigError(
            f"{given}: of use for a local model alone; leave out these, or --server"
            if args.server
            else f"{given}: of use with --server alone; leave these out, or give --server"
        )
    is_interactive = sys.stdin.isatty()
    has_prompts = is_interactive and sys.stdout.isatty()
    if has_prompts:
        with suppress(ImportError):  # not everywhere; it gives input() editing and a history
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are told, and no reason to end
    engine = _prepare_server(args) if args.server else _prepare_model(args)

    from cutlm.chat.session import Session, remark

    if is_interactive:
        remark(f"{args.model}, prompted by {engine.template or 'its server'}; /help lists the commands, Ctrl-D leaves")
    Session(engine).run(lambda prompt: input(prompt if has_prompts else ""), is_interactive=is_interactive)
    return 0


def _prepare_model(args: argparse.Namespace) -> "Engine":
    from cutlm.blame.detector import FlagSettings
    from cutlm.chat.local import LocalEngine
    from cutlm.errors import UserError
    from cutlm.generation.local import Sampling, choose_max_new_tokens
    from cutlm.model.loading import load_trained
    from cutlm.prompting.encoding import choose_template

    settings = FlagSettings(args.threshold)
    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; say how to prompt it by --template alpaca")
    max_new_tokens = choose_max_new_tokens(model) if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(max_new_tokens, args.temperature, args.top_p, args.seed)
    return LocalEngine(model, tokenizer, args.template or choose_template(tokenizer), sampling, settings)


def _prepare_server(args: argparse.Namespace) -> "Engine":
    from cutlm.blame.detector import FlagSettings
    from cutlm.chat.server import ServerEngine
    from cutlm.generation.local import Sampling
    from cutlm.model.loading import load_tokenizer
    from cutlm.servers.requests import Server

    # A person sees at once that there was no answer, and asks again.
    server = Server(args.server, args.model, 1, 600.0 if args.timeout is None else args.timeout, max_retries=0)
    max_new_tokens = 2048 if args.max_new_tokens is None else args.max_new_tokens
    sampling = Sampling(max_new_tokens, args.temperature, args.top_p, args.seed)
    settings = FlagSettings(args.threshold)
    name = args.tokenizer or (args.model if args.template else None)
    tokenizer = None if name is None else load_tokenizer(name)
    return ServerEngine(server, tokenizer, args.template, sampling, settings)
