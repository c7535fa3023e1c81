"""The `cutlm` command: one module per subcommand; heavy imports happen inside its `run`.

Exit codes: 0 success; 1 incomplete (such as responses without a judgment) or a bug of ours, with its traceback; 2 a
user error, without a traceback; 130 stopped by Ctrl-C.
"""

import argparse
import errno
import gc
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from cutlm import __version__
from cutlm.errors import UserError, log_errors_only, suggest_name

COMMANDS = {
    "demo": "see a tiny model answer, be judged and learn from it, on a CPU",
    "convert": "convert published judgment data to records",
    "check": "report every bad row of a file of records, and counts",
    "preview": "show what training would train on: counts, lengths, examples",
    "train": "align a model with judged records",
    "estimate": "estimate the memory of a training step, and which GPUs fit it",
    "train-judge": "train a model to judge responses, and measure how well it does",
    "train-detector": "teach adapters to read judgments, for cutlm blame",
    "merge": "merge a trained adapter into its base model",
    "generate": "generate responses to a file of instructions",
    "judge": "judge responses: by a model, here or on a server, by rules, or by a person",
    "studio": "write judgments in a browser, and see what they flag",
    "refine": "rewrite unsatisfactory responses according to their judgments",
    "align": "run the online loop: generate, judge, blame, train, merge, repeat",
    "world": "write the tasks of the tiny world, and mark wrong tokens",
    "eval": "evaluate a model: AlpacaEval, benchmarks, ROUGE, detection of wrong tokens",
    "blame": "flag the tokens that a judgment objects to, by a frozen model",
    "inspect": "make a web page of token scores",
    "chat": "chat with a model, see which tokens a judgment flags, collect records",
}
# These read every field of their settings as an option; the others reject what they do not define.
_COMMANDS_WITH_SETTINGS = ("preview", "train", "train-judge", "train-detector", "align")
# Errors of a path or a disk, not of our code.
_USER_ERRNOS = {
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
# How safetensors, datasets and torch report a full disk, each with a different exception.
_DISK_FULL = (
    "No space left on device",
    "PytorchStreamWriter failed writing file",
    "enforce fail at inline_container.cc",
)


class _CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the options that were probably meant, instead of the whole usage."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message += "".join(f"; {sentence}" for sentence in self.describe_unknown(self._given))
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def describe_unknown(self, given: Sequence[str]) -> list[str]:
        """Name the options among words that this parser does not have, and those that were probably meant."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        options = [word.partition("=")[0] for word in given if word.startswith("--") and word != "--"]
        return [
            f"option {option} is unknown; {suggest_name(option, known)}".rstrip("; ")
            for option in options
            if option not in known
        ]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands without importing their heavy parts."""
    description = "Align language models with written judgments of their responses."
    parser = _CommandParser(prog="cutlm", description=description)
    parser.add_argument("--version", action="version", version=f"cutlm {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="with --version: also libraries and devices, for a report"
    )
    add_commands(parser, COMMANDS, "command")
    return parser


def add_commands(
    parser: argparse.ArgumentParser, summaries: Mapping[str, str], dest: str, prefix: str = ""
) -> list[argparse.ArgumentParser]:
    """Add a subcommand for each module `cutlm.cli.PREFIXNAME`, which defines `add_arguments` and `run`."""
    added = []
    commands = parser.add_subparsers(dest=dest, metavar=dest.upper(), required=True)
    for name, summary in summaries.items():
        module = importlib.import_module(f"cutlm.cli.{prefix}{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(parser=command)
        module.add_arguments(command)
        if hasattr(module, "run"):  # not of a group such as `cutlm eval`
            command.set_defaults(run=module.run)
        added.append(command)
    return added


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that is not UTF-8 shows escapes
    given = sys.argv[1:] if argv is None else argv
    if {*given} == {"--version", "--verbose"}:
        from cutlm.cli.installation import describe_installation

        print(describe_installation())
        return 0
    parser = build_parser()
    if given and given[0] in ("--version", "--verbose") and [*given] != ["--version"]:
        parser.error("expected --version, alone or with --verbose, and no command")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in _COMMANDS_WITH_SETTINGS:
        args.parser.error("; ".join(args.parser.describe_unknown(rest)) or f"unknown arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        with _quiet_libraries():
            return args.run(args)
    except UserError as error:
        print(f"cutlm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ncutlm {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has exited (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        print(f"cutlm {args.command}: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:
        if not any(text in str(error) for text in _DISK_FULL):
            raise
        text = " ".join(str(error).split())
        print(f"cutlm {args.command}: cannot write ({text}); free disk space and start again", file=sys.stderr)
        return 2


@contextmanager
def importing_libraries() -> Iterator[None]:
    """Pause the garbage collector while torch and its like are imported, and exclude their objects from later searches.

    They live as long as the process, and searching them takes 1.8 of the 7.3 CPU seconds before the first step.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Suppress two messages that a user can do nothing about, and restore the settings afterwards."""
    # bitsandbytes mentions an optional CPU kernel whenever PEFT imports it.
    with log_errors_only("bitsandbytes.backends.cpu.ops"), warnings.catch_warnings():
        # PEFT reads a deprecated attribute of transformers.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
