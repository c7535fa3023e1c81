"""What another command makes for an evaluation is made once: a stopped evaluation goes on with it."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cutlm.cli import generate

OUTPUTS_FILE = "outputs.json"
# Files that a stopped `answer_once` can leave in a folder.
PARTS = (OUTPUTS_FILE, f"{OUTPUTS_FILE}.failures.jsonl")
# What responses depend on, of the options of `generate.add_answering_arguments`.
_SETTINGS = (
    *("template", "judgment", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "dtype"),
    *("base_url", "tokenizer", "generator"),
)


def check_source(args: argparse.Namespace, problems: Sequence[str] = (), *, also_used: Sequence[str] = ()) -> None:
    """Refuses to have neither or both of responses and a model to give them, and options of answering at odds.

    Args:
        args: Options of `generate.add_answering_arguments`, `model` and `outputs`.
        problems: Found before; they are told together.
        also_used: Options of answering that mean something for responses that are there, too.

    Raises:
        ConfigError: All such options are named.
    """
    from cutlm.errors import ConfigError

    problems = list(problems)
    if (args.model is None) == (args.outputs is None):
        got = "none of them" if args.model is None else "both"
        problems.append(f"--model or --outputs: expected a model to answer, or its responses, got {got}; give one")
    elif args.outputs is not None and (given := list_given(args, generate.add_answering_arguments, also_used)):
        problems.append(f"{', '.join(given)}: of use with --model alone, for the responses are there; leave out")
    if args.model is not None:
        try:
            generate.check_options(argparse.Namespace(**vars(args), num_samples=1, max_failure_rate=0.0))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def list_given(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], but: Sequence[str] = ()
) -> list[str]:
    """Names the options, of those that a function adds, that are not at their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name}" for name, default in defaults.items() if name not in but and getattr(args, name) != default]


def describe_source(args: argparse.Namespace) -> dict[str, Any]:
    """What responses depend on, as settings of an evaluation's folder."""
    from cutlm.evaluation.shared import hash_file
    from cutlm.model.loading import fingerprint_model

    if args.outputs is not None:
        return {"outputs": hash_file(args.outputs)}
    return {"model": fingerprint_model(args.model)} | {name: getattr(args, name) for name in _SETTINGS}


def answer_once(args: argparse.Namespace, folder: Path, prompts: str) -> Path | None:
    """Has the model answer, as `cutlm generate` does, unless it has in this folder.

    Args:
        args: Options of `generate.add_answering_arguments`, and `model`.
        folder: Of the evaluation.
        prompts: As of `cutlm generate --prompts`.

    Returns:
        The file of responses; None where a server had no answer to some.
    """
    out = folder / OUTPUTS_FILE
    if out.exists():
        print(f"{out} is there already")
        return out
    own = vars(args) | {
        "prompts": prompts,
        "out": str(out),
        "num_samples": 1,
        "max_failure_rate": 0.0,
        "overwrite": False,
    }
    return None if generate.run(argparse.Namespace(**own)) else out
