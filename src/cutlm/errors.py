"""Errors that a user can fix, and a way to hide messages that a user cannot do anything about.

The command line prints these errors without a traceback and exits with 2; any other exception is a bug, and it exits
with 1.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_PROBLEMS_SHOWN = 50


class UserError(ValueError):
    """One or more problems in the user's input, reported together.

    Args:
        problems: One or more sentences: the location, the expected value, the actual one, and the remedy.
        hint: What to do next, printed once after the problems.
        shown: Lines to print instead of the problems, if many of them have one cause.
    """

    def __init__(self, problems: str | Sequence[str], hint: str = "", shown: Sequence[str] | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "a UserError needs at least one problem"
        shown = self.problems if shown is None else shown
        lines = list(shown[:MAX_PROBLEMS_SHOWN])
        if len(shown) > len(lines):
            lines.append(f"... and {len(shown) - len(lines)} more problems")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))


class DataError(UserError):
    """A data file cannot be read, or rows in it are not valid."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another."""


class NonFiniteError(UserError):
    """The loss or the gradient is not finite; raised before the optimizer step."""


def suggest_name(name: str, names: Iterable[str]) -> str:
    """Ask for the names that a user probably meant: one spelled alike, or up to three that extend or shorten it.

    Returns:
        A question, or an empty string if there is no such name.

    Example:

        >>> suggest_name("model", ["model_revision", "model_name_or_path", "data"])
        "did you mean 'model_revision' or 'model_name_or_path'?"
    """
    names = list(names)
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    extended = (each for each in names if each.startswith(name) or name.startswith(each))
    similar = similar or sorted(extended, key=lambda each: (len(each), each))[:3]
    return f"did you mean {' or '.join(map(repr, similar))}?" if similar else ""


@contextmanager
def log_errors_only(name: str) -> Iterator[None]:
    """Let a library's logger report errors only, and restore its level afterwards."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
