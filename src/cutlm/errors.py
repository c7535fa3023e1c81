"""Errors that a user can fix.

The command line prints them without a traceback and exits with 2; any other exception is a bug and exits with 1.
"""

from collections.abc import Sequence

MAX_PROBLEMS_SHOWN = 50


class UserError(ValueError):
    """One or more problems in the user's input, reported together.

    Args:
        problems: One or more sentences: the location, the expected value, the actual one, and the remedy.
        hint: What to do next, printed once after the problems.
    """

    def __init__(self, problems: str | Sequence[str], hint: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "a UserError needs at least one problem"
        lines = self.problems[:MAX_PROBLEMS_SHOWN]
        if len(self.problems) > len(lines):
            lines.append(f"... and {len(self.problems) - len(lines)} more problems")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))


class DataError(UserError):
    """A data file cannot be read, or rows in it are not valid."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another."""


class NonFiniteError(UserError):
    """The loss or the gradient is not finite; raised before the optimizer step."""
