"""The `cutlm` command: one short module per subcommand, heavy imports inside their `run`.

Exit codes: 0 done; 2 something the user can mend, said without a traceback; 130 stopped by Ctrl-C; 1 our fault, or of
`judge`, that not every response could be judged.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cutlm import __version__
from cutlm.errors import UserError

COMMANDS = {
    "demo": "see a tiny model answer, be judged and learn from it, on a CPU",
    "convert": "turn published judgment data into records",
    "check": "report every bad row of a file of records, and counts",
    "train": "align a model with judged records",
    "estimate": "say how much memory a training step takes, and which GPUs hold it",
    "train-judge": "train a model to judge responses as records do, and measure how well it does",
    "merge": "fold a trained adapter into its base model",
    "generate": "answer a file of instructions",
    "judge": "say what is wrong with responses: by a model, here or on a server, by rules, or by a person",
    "refine": "rewrite unsatisfactory responses by what was said about them",
    "align": "the online loop: generate, judge, blame, train, merge, and again",
    "world": "the tiny world: build its base model, compare methods on it",
    "eval": "measure a model: AlpacaEval, benchmarks, ROUGE, detection of wrong tokens",
    "blame": "find the tokens that a judgment blames, by a frozen model",
    "inspect": "make a page of token scores, to be looked at in a browser",
    "chat": "talk to a model, see what a judgment blames in its answers, collect records",
}

# What a user can mend about a path or a disk.
_USERS_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Builds the parser of all commands; imports no command's heavy parts."""
    parser = kind(prog="cutlm", description="Align language models with judgments: what is said about their answers.")
    parser.add_argument("--version", action="version", version=f"cutlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"cutlm.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # These take every field of their config as an option; the others take what they name and nothing else.
    if rest and args.command not in ("train", "train-judge", "align"):
        parser.error(f"{args.command}: unknown arguments: {' '.join(rest)}")
    args.rest = rest
    # It tells, wherever PEFT imports it, of an optional kernel for 4-bit weights on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # What PEFT asks of transformers, and nobody who trains can change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        return args.run(args)
    except UserError as error:
        print(f"cutlm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ncutlm {args.command}: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone (`| head`): nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in _USERS_ERRORS:
            raise
        print(f"cutlm {args.command}: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        text = " ".join(str(error).split())
        print(f"cutlm {args.command}: cannot write ({text}); make room on the disk and start again", file=sys.stderr)
        return 2


def _is_of_a_full_disk(error: Exception) -> bool:
    """Whether a library says so in an error of its own, as safetensors, datasets and torch do."""
    return any(said in str(error) for said in ("No space left on device", "PytorchStreamWriter failed writing file"))
