"""Start `cutlm` commands for tests: options from settings, and real processes to kill, to interrupt or to run as ranks.

Importing torch, transformers and TRL takes seconds, so the processes are forks of a server that has imported them.
"""

import itertools
import json
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cutlm.cli", "cutlm.training.run", "cutlm.flagging.detector"])
# What every training run of a test needs.
ON_CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def list_options(**settings: object) -> list[str]:
    """`--name value` for each setting."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class KillPoint(NamedTuple):
    """Where a process kills itself: at a call of a function.

    Attributes:
        owner: The module, or `module:Class`.
        function: The name of the function.
        call: The number of the call, from 1.
    """

    owner: str
    function: str
    call: int


class Result(NamedTuple):
    """How a process ended; a negative exit code is the signal that killed it."""

    exit_code: int
    stdout: str
    stderr: str


class Running:
    """A process that has been started.

    Args:
        target: A function of a module; its result is the exit code.
        args: Its arguments.
        env: Changes of the environment.
        kill_at: Where the process kills itself.
    """

    def __init__(
        self, target: Callable[..., Any], args: Sequence[Any], env: Mapping[str, str], kill_at: KillPoint | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        arguments = (target, args, {"OMP_NUM_THREADS": "1", **env}, self._folder.name, kill_at)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        self._process.kill()
        self._process.join()

    def wait_for_output(self, text: str, timeout: float = 120) -> None:
        """Wait until the process has printed a text."""
        deadline = time.monotonic() + timeout
        while text not in self._read("stdout"):
            assert time.monotonic() < deadline, self._read("stderr")
            assert self._process.is_alive(), self._read("stderr")
            time.sleep(0.01)

    def read_output(self) -> str:
        """Return what the process has printed so far."""
        return self._read("stdout")

    def wait(self, timeout: float = 200) -> Result:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        assert self._process.exitcode is not None
        return Result(self._process.exitcode, self._read("stdout"), self._read("stderr"))

    def _read(self, name: str) -> str:
        path = Path(self._folder.name, name)
        return path.read_text("utf-8") if path.exists() else ""


def _run(
    target: Callable[..., Any], args: Sequence[Any], env: Mapping[str, str], folder: str, kill_at: KillPoint | None
) -> None:
    os.environ.update(env)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if kill_at is not None:
        _install(kill_at)
    sys.exit(target(*args))


def _install(kill_at: KillPoint) -> None:
    owner = pkgutil.resolve_name(kill_at.owner)
    original, calls = getattr(owner, kill_at.function), itertools.count(1)

    def call_or_kill(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == kill_at.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, kill_at.function, call_or_kill)


def run_main(argv: Sequence[str]) -> int:
    from cutlm.cli import main

    return main(argv)


def start_command(argv: Sequence[str], kill_at: KillPoint | None = None) -> Running:
    """Start `cutlm` with these arguments."""
    return Running(run_main, [argv], {}, kill_at)


def run_ranks(target: Callable[..., Any], *args: Any, **env: str) -> list[Result]:
    """Run a function in two processes that find each other, as torchrun starts them.

    Args:
        target: The function.
        args: Its arguments.
        env: Further variables, such as `LOCAL_RANK`, which is the rank by default.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [Running(target, args, shared | {"RANK": rank, "LOCAL_RANK": rank} | env) for rank in ("0", "1")]
    return [process.wait() for process in running]
