"""A shell command, and all that it starts, ended with whoever asked for it: `python -m cutlm.loop.guard COMMAND`.

A signal reaches one process, and a shell does not pass it on to what it has started. This process stands between: it
passes SIGINT and SIGTERM on to all of them, waits until none is left, and kills what does not go. The loop has Linux
send it SIGTERM when the loop itself is killed. Which commands there are is left to `cutlm.loop.processes`.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

SECONDS_TO_STOP = 30.0
_SECONDS_BETWEEN_LOOKS = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def main(command: str) -> int:
    """Runs a command to its end; returns its exit status, or 128 + n where signal n ended it."""
    deadline: float | None = None
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        nonlocal deadline
        deadline = time.monotonic() + SECONDS_TO_STOP
        if child is not None:
            _signal_group(child.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    if sys.platform == "linux":
        # What a shell leaves behind when it goes first is waited for here, and not by init.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(["/bin/sh", "-c", command], process_group=0)
    if deadline is not None:  # asked before there was anyone to tell
        _signal_group(child.pid, signal.SIGTERM)
    while child.poll() is None or (deadline is not None and _signal_group(child.pid, 0)):
        if deadline is not None and time.monotonic() > deadline:
            _signal_group(child.pid, signal.SIGKILL)
        if child.poll() is not None:
            _reap_others()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _signal_group(group: int, number: int) -> bool:
    """Whether there was anyone to get it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _reap_others() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
