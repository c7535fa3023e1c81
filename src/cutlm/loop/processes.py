"""Processes of the loop: `cutlm` commands, and the user's shell commands and server.

None of them outlives the loop for long. Each is terminated when the loop is and, on Linux, also when the loop is
killed. A shell command runs under a guard, `python -m cutlm.loop.processes COMMAND`, because a signal reaches a single
process and a shell does not pass it on: the guard signals everything that the command has started, waits for all of it
to end, and kills what does not.
"""

import contextlib
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cutlm.errors import UserError

# Constants of Linux's prctl.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GUARD = [sys.executable, "-m", "cutlm.loop.processes"]
_LOCK_TIMEOUT = 60.0
_GUARD_TIMEOUT = 30.0
_POLL_INTERVAL = 0.1


class Interrupted(Exception):
    """The loop got a signal, and the stage has stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Lock a folder and yield the file descriptor of the lock; raise UserError if another loop runs there.

    A stage inherits the lock, so if only the loop is killed, the next loop waits until the stage has stopped too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        is_waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                is_alive = _is_alive(owner)
                if is_alive or time.monotonic() > deadline:
                    who = f"another cutlm align (process {owner})" if is_alive else "a process of an earlier one"
                    raise UserError(f"{folder}: {who} is still running here; wait for it, or stop it") from None
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be locked ({error.strerror}), so two loops could run here; set an output_dir on"
                    " another file system"
                ) from None
            if not is_waiting:
                print("waiting for a stage of a killed loop to stop", flush=True)
                is_waiting = True
            time.sleep(2 * _POLL_INTERVAL)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # of another user
        return True
    except (ValueError, ProcessLookupError):
        return False
    return True


# ---- Commands ----


def run_command(arguments: Sequence[str], log: Path, lock: int, launcher: str | None = None) -> int:
    """Run `cutlm` with arguments, appending its output to a log and showing it on the terminal.

    The process inherits the folder's lock. A launcher is a command that starts Python modules on several devices.

    Returns:
        The exit status; -n for a process killed by signal n. If the loop itself gets SIGINT or SIGTERM, it raises
        Interrupted.
    """
    start = shlex.split(os.path.expandvars(launcher)) if launcher else [sys.executable]
    try:
        return _run([*start, "-m", "cutlm", *arguments], log, lock)
    except FileNotFoundError:
        raise UserError(f"launcher: no program {start[0]!r}; install it, or set another one") from None


def run_shell(command: str, log: Path, lock: int) -> int:
    """Run a shell command of the user's under a guard; otherwise like `run_command`."""
    return _run([*_GUARD, command], log, lock)


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

    with _handling_signals(forward):
        # Output goes to files rather than through pipes, so that a stage whose loop is killed can still write.
        with open(log, "a", encoding="utf-8") as out, open(errors, "wb") as err:
            out.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n")
            out.flush()
            # tqdm redraws its bars less often, because they go to a file as well.
            environment = {"TQDM_MININTERVAL": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
            process = _start(command, lock, out, err, environment)
            start = out.tell()
        if received:
            process.send_signal(received[0])
        with (
            open(log, encoding="utf-8", errors="replace") as lines,
            open(errors, encoding="utf-8", newline="", errors="replace") as said,
        ):
            lines.seek(start)
            has_ended = False
            while not has_ended:
                has_ended = process.poll() is not None  # before the files are read for the last time
                for line in lines:
                    print(f"  {line}", end="", flush=True)
                sys.stderr.write(said.read())
                sys.stderr.flush()
                if not has_ended:
                    time.sleep(_POLL_INTERVAL)
    if received:
        raise Interrupted(received[0])
    assert process.returncode is not None
    return process.returncode


def _start(
    command: Sequence[str], lock: int, out: object, err: object, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in its own group, so that Ctrl-C reaches only the loop, which forwards it once."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
    return subprocess.Popen(  # type: ignore[call-overload]
        command, **streams, env=environment, process_group=0, pass_fds=(lock,), preexec_fn=_stop_with_parent
    )


def _stop_with_parent() -> None:
    # A loop that a shell has started in the background ignores SIGINT, and its children would too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with another handler for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _append_errors(errors: Path, log: Path) -> None:
    """Move the stderr of a stage into its log, with progress bars in their final state."""
    if not errors.exists():
        return
    lines = errors.read_bytes().decode("utf-8", "replace").split("\n")
    kept = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    with open(log, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in kept if line.strip()))
    errors.unlink()


# ---- Servers ----


@contextmanager
def serve(command: str, model: str, url: str, timeout: float, log: Path, lock: int) -> Iterator[None]:
    """Run a server of the user's while the context is open.

    Args:
        command: A shell command with `{model}`.
        model: The model folder to serve.
        url: The server's address, `/v1` included; UserError if another server has it.
        timeout: Seconds to wait for its first answer; UserError after that.
        log: The file to append its output to.
        lock: The folder's lock, inherited by the server: after a kill, the next loop waits until the server has ended.
    """
    if _answers(url):
        raise UserError(
            f"server_command: a server already answers at {url}; stop it, or use another port here and in generate"
        )
    filled = command.replace("{model}", shlex.quote(model))
    print(f"  serving {model}: {filled}", flush=True)
    with open(log, "ab") as file:
        process = _start([*_GUARD, filled], lock, file, subprocess.STDOUT)

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    try:
        with _handling_signals(interrupt):
            deadline = time.monotonic() + timeout
            while True:
                if process.poll() is not None:
                    raise UserError(f"server_command: exited with {process.returncode} before it answered; see {log}")
                if _answers(url):
                    break
                if time.monotonic() > deadline:
                    raise UserError(
                        f"server_command: no answer from {url} in {timeout:g} seconds (server_timeout); see {log}, and"
                        " check the server's address in generate"
                    )
                time.sleep(2 * _POLL_INTERVAL)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=2 * _GUARD_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    import httpx2  # only here, as the client: the guard starts faster without them

    from cutlm.servers.client import read_key

    key = read_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx2.get(f"{url.rstrip('/')}/models", headers=headers, timeout=5)  # follows no redirect
    except (httpx2.RequestError, httpx2.InvalidURL, ValueError):
        return False
    # A refusal is an answer, and so is a list of models that fails, as that of `transformers serve` without a cache;
    # the command that uses the server reports what matters. 503 means that it is still loading.
    return response.status_code not in (502, 503, 504)


# ---- The guard ----


def guard(command: str, timeout: float = _GUARD_TIMEOUT) -> int:
    """Run a shell command and return its exit status, or 128 + n if it was killed by signal n.

    After SIGINT or SIGTERM, ends all processes that the command has started, and kills the rest after the timeout.
    """
    deadline: float | None = None
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        nonlocal deadline
        deadline = time.monotonic() + timeout
        if child is not None:
            _signal_group(child.pid, number)

    with _handling_signals(pass_on):
        if sys.platform == "linux":
            # Processes whose shell has ended become children of the guard, not of init, so that it can wait for them.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        child = subprocess.Popen(["/bin/sh", "-c", command], process_group=0)
        if deadline is not None:  # the signal came before the child
            _signal_group(child.pid, signal.SIGTERM)
        while child.poll() is None or (deadline is not None and _signal_group(child.pid, 0)):
            if deadline is not None and time.monotonic() > deadline:
                _signal_group(child.pid, signal.SIGKILL)
            if child.poll() is not None:
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
            time.sleep(_POLL_INTERVAL / 2)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _signal_group(group: int, number: int) -> bool:
    """Signal all processes of a group; return whether there are any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1]))
