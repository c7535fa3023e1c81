"""Talk to a model in the terminal, see which tokens of an answer a judgment would blame, and save what you judged as
records to train on. /help lists the commands.

  cutlm chat --model MODEL
  cutlm chat --base_url http://localhost:8000 --model NAME

Greedy by default. Where standard input is no terminal, its lines are the messages. A server prompts the model by the
model's own chat template; with --template the prompts are made here, by --tokenizer. /judge needs --tokenizer or
--template there, and a server that returns prompt_logprobs. A key to it is read from the environment variable
OPENAI_API_KEY."""

import argparse
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cutlm.cli.model_options import ModelOptions, add_sampling_options, make_sampling, make_server

if TYPE_CHECKING:
    from cutlm.chat.session import Engine

_OPTIONS = ModelOptions(("dtype", "device"), ("tokenizer", "timeout"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or adapter folder, or a hub name")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), help="default: the tokenizer's chat template, which training saves"
    )
    parser.add_argument("--threshold", type=float, default=1.1, help="lambda of eq. 5, for /judge (default: 1.1)")
    add_sampling_options(parser)
    _OPTIONS.add(parser)


def run(args: argparse.Namespace) -> int:
    _OPTIONS.fill(args)
    is_interactive = sys.stdin.isatty()
    has_prompts = is_interactive and sys.stdout.isatty()
    if has_prompts:
        with suppress(ImportError):  # not everywhere; it gives input() editing and a history
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are told, and no reason to end
    engine = _prepare_server(args) if args.base_url else _prepare_model(args)

    from cutlm.chat.session import Session, remark

    if is_interactive:
        remark(f"{args.model}, prompted by {engine.template or 'its server'}; /help lists the commands, Ctrl-D leaves")
    Session(engine).run(lambda prompt: input(prompt if has_prompts else ""), is_interactive=is_interactive)
    return 0


def _prepare_model(args: argparse.Namespace) -> "Engine":
    from cutlm.blame.detector import FlagSettings
    from cutlm.chat.local import LocalEngine
    from cutlm.errors import UserError
    from cutlm.model.loading import load_trained
    from cutlm.prompting.encoding import choose_template

    settings = FlagSettings(args.threshold)
    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; say how to prompt it by --template alpaca")
    template = args.template or choose_template(tokenizer)
    return LocalEngine(model, tokenizer, template, make_sampling(args, model), settings)


def _prepare_server(args: argparse.Namespace) -> "Engine":
    from cutlm.blame.detector import FlagSettings
    from cutlm.chat.server import ServerEngine
    from cutlm.model.loading import load_tokenizer

    # A person sees at once that there was no answer, and asks again.
    server = make_server(args, concurrency=1, max_retries=0)
    sampling = make_sampling(args)
    settings = FlagSettings(args.threshold)
    name = args.tokenizer or (args.model if args.template else None)
    tokenizer = None if name is None else load_tokenizer(name)
    return ServerEngine(server, tokenizer, args.template, sampling, settings)
