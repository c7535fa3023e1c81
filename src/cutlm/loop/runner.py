"""What a stage may ask for, and how it says that it failed. Processes are `cutlm.loop.processes`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass(frozen=True)
class Runner:
    """What a stage may ask for; see `cutlm.loop.loop`.

    Attributes:
        run: Runs `cutlm` with arguments, and maybe a launcher; returns the exit status.
        run_shell: Runs a shell command; returns the exit status.
        serve: A context in which a model is served, where one is to be.
    """

    run: Callable[..., int]
    run_shell: Callable[[str], int]
    serve: Callable[[str], AbstractContextManager[None]]


class StageFailed(Exception):
    """A stage's command did not do what it was to do.

    Args:
        message: What happened, and what to do.
        status: The exit status for the loop.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_status(status: int, arguments: list[str]) -> None:
    """Raises:
    StageFailed: A command's exit status says that it failed.
    """
    if status == 0:
        return
    what = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
    raise StageFailed(
        f"cutlm {arguments[0]} {what}; what it said stands above; mend it and start again, what is finished is kept",
        2 if status == 2 else 1,
    )
