"""Train on the records: the command, and its run with the losses that it logs."""

import ast
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlm.studio.scoring import Models

DETECTORS = ("current", "frozen", "spans")
_NUM_LINES_KEPT = 30


@dataclass(frozen=True)
class Plan:
    """A training run.

    Attributes:
        arguments: Those of `cutlm`, without the program.
        folder: Where the trained model will be.
        scores: The token scores to train on; None for the records.
    """

    arguments: list[str]
    folder: Path
    scores: Path | None

    @property
    def command(self) -> str:
        """The command as a line of a shell."""
        return shlex.join(["cutlm", *self.arguments])


def plan_training(out: Path, models: "Models | None", detector: str, threshold: float, config: str | None) -> Plan:
    """Plan to train on the records in a new folder next to them.

    Args:
        out: The records.
        models: The models, of which the first is trained; None if the studio runs without one.
        detector: "current": the model flags tokens while it is trained; "frozen": the flags that the page shows,
            without those that the reviewer removed; "spans": the passages that reviewers marked.
        threshold: lambda of eq. 5.
        config: A settings file of `cutlm train`, whose settings come before the defaults of the studio.
    """
    number = 1
    while (folder := Path(f"{out}.trained-{number}")).exists():
        number += 1
    scores = Path(f"{out}.scores.jsonl") if detector == "frozen" and models is not None else None
    arguments = ["train", *(["--config", config] if config else []), "--data", str(scores or out)]
    if models is not None:
        arguments += ["--model_name_or_path", models.base_path, "--template", models.template]
        for name, value in models.training_options.items():
            arguments += [f"--{name}", str(value)]
        if not config and models.device.type == "cpu":
            arguments += ["--use_cpu", "true"]
    elif not config:
        arguments += ["--model_name_or_path", "MODEL", "--template", "chat"]
    if detector == "spans" or (detector == "frozen" and scores is None):
        arguments += ["--detector", detector]
    if detector != "spans" and scores is None:
        arguments += ["--threshold", f"{threshold:g}"]
    if not config:
        arguments += ["--per_device_train_batch_size", "8", "--num_train_epochs", "3", "--logging_steps", "1"]
        arguments += ["--report_to", "none"]
    return Plan([*arguments, "--output_dir", str(folder)], folder, scores)


class Training:
    """A run of `cutlm train` in a separate process.

    Args:
        plan: The run.
        announce: Called after each change.
    """

    def __init__(self, plan: Plan, announce: Callable[[], None]) -> None:
        self.plan, self._announce = plan, announce
        self.losses: list[tuple[float, float]] = []  # the epoch and the loss of each log line
        self.lines: deque[str] = deque(maxlen=_NUM_LINES_KEPT)
        self.exit_code: int | None = None
        self._stop_requested = False
        environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cutlm", *plan.arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def stop(self) -> None:
        """Let the run save and stop, as Ctrl-C does; stop it at once if it was asked before."""
        number = signal.SIGKILL if self._stop_requested else signal.SIGTERM
        self._stop_requested = True
        if self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """End the run with the studio: let it save and stop; a further Ctrl-C stops it at once."""
        if self._process.poll() is None:
            print("training saves and stops (press Ctrl-C to stop it at once)", flush=True)
            self.stop()
            try:
                self._process.wait()
            except KeyboardInterrupt:
                self.stop()
        self._thread.join(timeout=10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (logged := read_log_line(line)) is not None:
                self.losses.append(logged)
            elif line.strip():
                self.lines.append(line.rstrip("\n")[:500])
            self._announce()
        self.exit_code = self._process.wait()
        self._announce()

    def describe(self) -> dict[str, Any]:
        """Describe the run for the page."""
        return {
            "command": self.plan.command,
            "losses": self.losses,
            "lines": list(self.lines),
            "exit_code": self.exit_code,
            "folder": str(self.plan.folder),
        }


def read_log_line(line: str) -> tuple[float, float] | None:
    """Read the epoch and the loss from a line that the trainer logs, a dictionary; None for any other line."""
    text = line.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        values = ast.literal_eval(text)
        epoch, loss = float(values["epoch"]), float(values["loss"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return None
    return (epoch, loss) if math.isfinite(epoch) and math.isfinite(loss) else None
