"""Options that several commands have: one name, one default and one meaning each."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.data.files import check_out_file
from cutlm.data.sources import check_columns
from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cutlm.generation.local import Sampling
    from cutlm.prompting.encoding import Encoder
    from cutlm.prompting.templates import TemplateName
    from cutlm.servers.client import Server

DEFAULTS: dict[str, Any] = {"base": None, "dtype": "auto", "device": None, "bf16": False, "batch_size": 32}
DEFAULTS |= {"max_tokens_per_batch": None, "tokenizer": None, "concurrency": 8, "timeout": 600.0, "max_retries": 5}
DEFAULTS |= {"extra_body": "{}", "requests_per_minute": None, "tokens_per_minute": None}
SOURCES = "JSON, CSV, Parquet or Arrow files, globs, folders or hub data sets (docs/data.md)"
# Of every server, besides `base_url`.
SERVER_OPTIONS = ("concurrency", "timeout", "max_retries", "extra_body", "requests_per_minute", "tokens_per_minute")


def _parse_json_object(text: str, example: str = '{"enable_thinking": false}') -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{example}', got {text!r}")
    return value


def _parse_columns(text: str) -> dict[str, str]:
    columns = _parse_json_object(text, '{"critique": "judgment"}')
    try:
        check_columns(columns)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return columns


# Every default is None here, to distinguish given options from missing ones.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "metavar": "MODEL", "help": "model or adapter folder, GGUF file, or hub name"},
    "data": {"required": True, "nargs": "+", "metavar": "FILE", "help": f"records: {SOURCES}"},
    "columns": {
        "type": _parse_columns,
        "metavar": "JSON",
        "help": """fields of columns with other names: '{"prompt": "instruction", "response": "output"}'""",
    },
    "out": {"required": True, "metavar": "FILE", "help": "file to write"},
    "overwrite": {"action": "store_true", "help": "replace the output file"},
    "template": {"choices": ("alpaca", "chat"), "help": "default: the tokenizer's chat template, which training saves"},
    "chat_template_kwargs": {
        "type": _parse_json_object,
        "metavar": "JSON",
        "help": """arguments of the chat template: '{"enable_thinking": false}'""",
    },
    "template_date": {
        "metavar": "YYYY-MM-DD",
        "help": "date for chat templates that print one (default: today, or that of the run that is resumed)",
    },
    "judgment_role": {
        "choices": ("user", "system"),
        "help": "with --template chat: the judgment is in the last message by the user (default), or a system message",
    },
    "base": {"metavar": "MODEL", "help": "base model of an adapter (default: the one that the adapter names)"},
    "dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "help": "default: auto, as stored, or float32 on a CPU faster in it",
    },
    "device": {"help": "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"},
    "bf16": {"action": "store_true", "default": None, "help": "run in bfloat16 by autocast"},
    "batch_size": {"type": int, "metavar": "N", "help": "prompts at a time (default: 32)"},
    "max_tokens_per_batch": {
        "type": int,
        "metavar": "N",
        "help": "tokens at a time (default: 8192 on a GPU, 1024 on a CPU)",
    },
    "base_url": {
        "metavar": "URL",
        "help": "address of an OpenAI-compatible server, used as given: http://localhost:8000/v1",
    },
    "tokenizer": {"metavar": "MODEL", "help": "tokenizer of the model, a folder or hub name (default: --model)"},
    "concurrency": {"type": int, "metavar": "N", "help": "requests at a time (default: 8)"},
    "timeout": {"type": float, "metavar": "SECONDS", "help": "longest wait for the next byte (default: 600)"},
    "extra_body": {
        "metavar": "JSON",
        "help": """further fields of every request; null removes one: '{"max_tokens": null, "seed": 1}'""",
    },
    "max_retries": {"type": int, "metavar": "N", "help": "retries of a request that failed (default: 5)"},
    "requests_per_minute": {"type": int, "metavar": "N", "help": "most requests per minute (default: no limit)"},
    "tokens_per_minute": {"type": int, "metavar": "N", "help": "most tokens per minute (default: no limit)"},
}


def add_options(parser: "argparse._ActionsContainer", *names: str) -> None:
    """Add options without their defaults, which are in `DEFAULTS`."""
    for name in names:
        parser.add_argument(f"--{name}", **_ARGUMENTS[name])


def check_output(args: argparse.Namespace, inputs: Sequence[str]) -> None:
    """Refuse to write to an input, or to a file that exists without --overwrite."""
    check_out_file(inputs, args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; pass another file, or replace it with --overwrite")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `make_sampling`."""
    longest = "longest response (default: 2048, or half of the context)"
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help=longest)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling (default: 42)")


@dataclass(frozen=True)
class ModelOptions:
    """The options of one command whose model is local or, with --base_url, on a server."""

    local: tuple[str, ...]  # only for a local model
    server: tuple[str, ...] = ()  # only for a server, besides `base_url`; empty for a command that uses none

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add all of them, in a group for each backend."""
        add_options(parser.add_argument_group("a local model"), *self.local)
        if self.server:
            add_options(parser.add_argument_group("a model on a server"), "base_url", *self.server)

    def find_problems(self, args: argparse.Namespace) -> list[str]:
        """Name the options of the other backend that were given."""
        is_local = not self.server or args.base_url is None
        given = [f"--{name}" for name in (self.server if is_local else self.local) if getattr(args, name) is not None]
        if not given:
            return []
        advice = "only with --base_url; set it" if is_local else "only with a local model; leave out --base_url"
        return [f"{', '.join(given)}: expected {advice}, or leave these out"]

    def fill(self, args: argparse.Namespace) -> None:
        """Refuse options of the other backend and fill in the defaults."""
        if problems := self.find_problems(args):
            raise ConfigError(problems)
        for name in (*self.local, *self.server):
            if getattr(args, name) is None:
                setattr(args, name, DEFAULTS[name])


def make_server(args: argparse.Namespace, model: str, **others: Any) -> "Server":
    """Return the server that the options name, for a model's name on it and other settings of `Server`.

    Name a proxy that the environment sets, because nothing else shows that the requests go there.
    """
    from cutlm.servers.client import Server, find_proxy

    body = read_json_object(args.extra_body, "--extra_body")
    if arguments := getattr(args, "chat_template_kwargs", None):
        body["chat_template_kwargs"] = {**arguments, **body.get("chat_template_kwargs", {})}
    names = [name for name in SERVER_OPTIONS if name != "extra_body" and hasattr(args, name)]
    server = Server(args.base_url, model, body, **{name: getattr(args, name) for name in names}, **others)
    if proxy := find_proxy(server.url):
        print(f"requests go through the proxy {proxy}, which the environment sets", file=sys.stderr)
    return server


def read_json_object(text: str, option: str) -> dict[str, Any]:
    """Read an option that holds a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"""{option}: expected a JSON object such as '{{"seed": 1}}', got {text!r}""")
    return value


def make_sampling(args: argparse.Namespace, model: Any = None) -> "Sampling":
    """Return how to sample by the options of `add_sampling_options` and `batch_size`.

    The context of a local model bounds the default of `max_new_tokens`. Without a model, a server generates, or the
    options are only checked, because loading a model can take minutes.
    """
    from cutlm.generation.local import MAX_NEW_TOKENS, Sampling, choose_max_new_tokens

    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = MAX_NEW_TOKENS if model is None else choose_max_new_tokens(model)
    batches = {"batch_size": args.batch_size} if hasattr(args, "batch_size") else {}
    return Sampling(max_new_tokens, args.temperature, args.top_p, args.seed, **batches)


def load_model(args: argparse.Namespace) -> "tuple[Any, PreTrainedTokenizerBase, TemplateName]":
    """Load the local model and its tokenizer, and choose the prompt template."""
    from cutlm.model.loading import load_trained
    from cutlm.prompting.templates import set_arguments

    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    tokenizer = set_arguments(tokenizer, args.chat_template_kwargs or {})
    return model, tokenizer, choose_own_template(args, tokenizer)


def choose_own_template(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> "TemplateName":
    """Choose the prompt template: that of the options, or that of the chat template saved with the model."""
    from cutlm.prompting.encoding import choose_template

    if args.template is None and not tokenizer.chat_template:
        raise UserError(f"{args.model}: its tokenizer has no chat template; set --template alpaca")
    return args.template or choose_template(tokenizer)


def make_encoder(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", template: "TemplateName") -> "Encoder":
    """Return the encoder of a command that writes `args.out`, with the date of the run that it resumes."""
    from cutlm.data.journal import read_header
    from cutlm.prompting.encoding import Encoder
    from cutlm.prompting.templates import parse_date, set_arguments

    date = args.template_date or read_header(args.out).get("template_date")
    tokenizer = set_arguments(tokenizer, args.chat_template_kwargs or {})
    return Encoder(tokenizer, template, parse_date(date), getattr(args, "judgment_role", None) or "user")
