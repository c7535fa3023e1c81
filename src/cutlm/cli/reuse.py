"""Responses that an evaluation makes once, by `cutlm generate`: a stopped evaluation resumes with them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cutlm.cli import generate
from cutlm.errors import ConfigError

OUTPUTS_FILE = "outputs.json"
# Files that a stopped `answer_once` can leave in a folder.
PARTS = (OUTPUTS_FILE, f"{OUTPUTS_FILE}.failures.jsonl")
# The options of `generate.add_answering_arguments` that responses depend on.
_SETTINGS = (
    *("template", "judgment", "judgment_role", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "dtype"),
    *("base_url", "extra_body", "tokenizer", "generator", "chat_template_kwargs", "template_date"),
)
# The options of `cutlm generate` that evaluations do not have.
_FIXED = {"num_samples": 1, "max_failure_rate": 0.0, "engine": None, "engine_args": None}


def check_source(args: argparse.Namespace, problems: Sequence[str] = (), *, also_used: Sequence[str] = ()) -> None:
    """Require either responses or a model to generate them, and refuse options that contradict each other.

    Args:
        args: The options of `generate.add_answering_arguments`, `model` and `outputs`.
        problems: Problems found before, reported together with these.
        also_used: Options of answering that also apply to given responses.
    """
    problems = list(problems)
    if (args.model is None) == (args.outputs is None):
        got = "neither" if args.model is None else "both"
        problems.append(f"--model or --outputs: expected a model or its responses, got {got}; set one of them")
    elif args.outputs is not None and (given := list_given(args, generate.add_answering_arguments, also_used)):
        problems.append(f"{', '.join(given)}: expected only with --model, not with --outputs; leave out")
    if args.model is not None:
        try:
            generate.check_options(argparse.Namespace(**vars(args), **_FIXED))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def list_given(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], but: Sequence[str] = ()
) -> list[str]:
    """Name the options that a function adds and that are not at their defaults, except those in `but`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name}" for name, default in defaults.items() if name not in but and getattr(args, name) != default]


def describe_source(args: argparse.Namespace) -> dict[str, Any]:
    """Return what responses depend on, for the settings of an evaluation's folder."""
    from cutlm.evaluation.shared import hash_data
    from cutlm.model.loading import fingerprint_model

    if args.outputs is not None:
        return {"outputs": hash_data(args.outputs)}
    return {"model": fingerprint_model(args.model)} | {name: getattr(args, name) for name in _SETTINGS}


def answer_once(
    args: argparse.Namespace, folder: Path, prompts: Sequence[str], columns: Mapping[str, str] | None = None
) -> Path | None:
    """Generate a file of responses as `cutlm generate` does, unless the folder of the evaluation has it.

    None if some prompts have no answer from a server.
    """
    out = folder / OUTPUTS_FILE
    if out.exists():
        print(f"{out} exists already")
        return out
    own = {
        "prompts": list(prompts),
        "columns": columns,
        "out": str(out),
        "overwrite": False,
    }
    return None if generate.run(argparse.Namespace(**vars(args) | _FIXED | own)) else out
