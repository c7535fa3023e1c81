"""What a user can mend, said in one sentence each.

The command line prints these without a traceback and exits with 2; anything else that is raised is a
fault of ours and exits with 1.
"""

from collections.abc import Sequence

MAX_PROBLEMS_SHOWN = 50


class UserError(ValueError):
    """One or more problems in what the user gave us, reported all at once.

    Args:
        problems: A sentence, or several: what is wrong, where, what was expected, what was got, what to do.
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
    """A file of data that cannot be read, or rows in it that cannot be used."""


class ConfigError(UserError):
    """A setting that is unknown, out of range, or at odds with another."""


class NonFiniteError(UserError):
    """The loss or the gradient stopped being a number; raised before the optimizer step."""
