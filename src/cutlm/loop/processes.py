"""Processes of the online loop: a stage's command, and a server that stands beside it.

What they are for is left to `cutlm.loop.stages`. None of them outlives the loop for long: each is asked to stop when
the loop is stopped, and, on Linux, when it is killed. A shell command of the user's is asked with all that it has
started, see `cutlm.loop.guard`.
"""

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cutlm.errors import UserError
from cutlm.loop.guard import SECONDS_TO_STOP
from cutlm.servers.http import NoRedirect, read_key

_PR_SET_PDEATHSIG = 1
_SECONDS_TO_STOP = 60.0
_SECONDS_BETWEEN_LOOKS = 0.1


class Interrupted(Exception):
    """The loop was asked to stop, and the stage has stopped.

    Args:
        number: The signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Keeps a folder to one loop and its stages.

    A stage inherits the lock. So after a kill of the loop alone, the next one waits until its stage has stopped too.

    Yields:
        The lock's file descriptor, to be inherited.

    Raises:
        UserError: Another loop is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _SECONDS_TO_STOP
        is_said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                if _is_alive(owner):
                    raise UserError(
                        f"{folder}: another cutlm align is at work here (process {owner}); wait for it, or stop it"
                    ) from None
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder}: a process that an earlier cutlm align started here is still at work; wait for it,"
                        " or stop it"
                    ) from None
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be locked ({error.strerror}), so that two loops could be at work here; name an"
                    " output_dir on another file system"
                ) from None
            if not is_said:
                print("waiting for a stage to stop, whose loop was killed", flush=True)
                is_said = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def run_command(arguments: Sequence[str], log: Path, lock: int, launcher: str | None = None) -> int:
    """Runs `cutlm` with arguments; its output goes to a log, and from there to the terminal.

    Args:
        arguments: Of `cutlm`.
        log: A file to append to.
        lock: The folder's lock, for the process to hold too.
        launcher: A command that starts Python modules on several devices, with its options.

    Returns:
        The exit status; that of a process killed by signal n is -n.

    Raises:
        Interrupted: The loop was asked to stop.
    """
    start = shlex.split(os.path.expandvars(launcher)) if launcher else [sys.executable]
    try:
        return _run([*start, "-m", "cutlm", *arguments], log, lock)
    except FileNotFoundError:
        raise UserError(f"launcher: no program {start[0]!r}; install it, or give another") from None


def run_shell(command: str, log: Path, lock: int) -> int:
    """Runs a shell command of the user's, otherwise as `run_command`."""
    return _run(_guard(command), log, lock)


def _guard(command: str) -> list[str]:
    return [sys.executable, "-m", "cutlm.loop.guard", command]


def _run(command: Sequence[str], log: Path, lock: int) -> int:
    errors = log.with_suffix(".err")
    _append_errors(errors, log)  # of a loop that was killed
    try:
        return _run_and_show(command, log, errors, lock)
    finally:
        _append_errors(errors, log)


def _run_and_show(command: Sequence[str], log: Path, errors: Path, lock: int) -> int:
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if process is not None and process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(log, "a", encoding="utf-8") as file, open(errors, "wb") as error_file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n")
            file.flush()
            # Into files, not through this process: a stage whose loop is killed can still say and save what it has.
            # In a group of its own: Ctrl-C in a terminal reaches the loop alone, which passes it on once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=error_file,
                # Progress bars go to a file as well.
                env={"TQDM_MININTERVAL": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"},
                process_group=0,
                pass_fds=(lock,),
                preexec_fn=_stop_with_parent,
            )
            start = file.tell()
        if received:
            process.send_signal(received[0])
        with open(log, encoding="utf-8", errors="replace") as lines, open(errors, newline="", errors="replace") as said:
            lines.seek(start)
            is_over = False
            while not is_over:
                is_over = process.poll() is not None  # before the last look into the files
                for line in lines:
                    print(f"  {line}", end="", flush=True)
                sys.stderr.write(said.read())
                sys.stderr.flush()
                if not is_over:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
    assert process.returncode is not None
    return process.returncode


def _append_errors(errors: Path, log: Path) -> None:
    """Keeps what a stage said of errors in its log, less what a progress bar wrote over."""
    if not errors.exists():
        return
    lines = errors.read_bytes().decode("utf-8", "replace").split("\n")
    kept = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    with open(log, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in kept if line.strip()))
    errors.unlink()


def _stop_with_parent() -> None:
    """Has Linux ask this process to stop when the loop is killed; elsewhere it ends its stage first."""
    # A shell that started the loop in the background has it ignore Ctrl-C; its stages are asked by the loop.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def serve(command: str, model: str, url: str, seconds: float, log: Path, lock: int) -> Iterator[None]:
    """Lets a server of the user's run for a while.

    Args:
        command: A shell command with `{model}`.
        model: The folder that it is to serve.
        url: Where it will answer, `/v1` included.
        seconds: In which it must answer.
        log: Where its output goes.
        lock: The folder's lock: a later loop waits until the server of a killed one is gone.

    Raises:
        UserError: Another server has the address, or this one ended, or did not answer in time.
    """
    if _answers(url):
        raise UserError(
            f"server_command: something answers at {url} before it is started; stop that, or give another port here"
            " and by --base_url in generate"
        )
    filled = command.replace("{model}", shlex.quote(model))
    print(f"  serving {model}: {filled}", flush=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            _guard(filled),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=(lock,),
            preexec_fn=_stop_with_parent,
        )
    try:
        with _raising_when_asked_to_stop():
            deadline = time.monotonic() + seconds
            while True:
                if process.poll() is not None:
                    raise UserError(f"server_command: ended with {process.returncode} before it answered; see {log}")
                if _answers(url):
                    break
                if time.monotonic() > deadline:
                    raise UserError(
                        f"server_command: no answer from {url} in {seconds:g} seconds (server_wait); see {log}, and"
                        " whether --base_url in generate is its address"
                    )
                time.sleep(0.5)
        yield
    finally:
        _stop(process)


@contextmanager
def _raising_when_asked_to_stop() -> Iterator[None]:
    """Raises Interrupted at SIGINT and SIGTERM."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(url: str) -> bool:
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    key = read_key()
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        # It is there, and whoever asks it says what it refuses; but some say 503 while they load.
        return error.code < 500
    except (OSError, ValueError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a guarded command to stop; the guard kills what does not."""
    process.terminate()
    try:
        process.wait(timeout=2 * SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
