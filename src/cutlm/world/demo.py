"""The whole of cutlm on a model so small that a CPU trains it in seconds: what `cutlm demo` does.

Online iterations on the tiny world's base model, each measured on instructions that nothing is trained on. An iteration
is left to `cutlm.world.demo_iteration`, what is shown of it to `cutlm.world.demo_report`.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from cutlm.data.files import open_atomic
from cutlm.errors import UserError
from cutlm.inspect.terminal import Terminal
from cutlm.model.loading import count_parameters, load_trained
from cutlm.world.base import base_path
from cutlm.world.demo_iteration import LEARNING_RATE, SETTINGS, Iteration, run_iteration
from cutlm.world.demo_report import (
    CURVE_FILE,
    MEAN,
    PAGE_FILE,
    HeldOut,
    choose_example,
    print_accuracy,
    print_end,
    print_example,
    print_start,
    write_report,
)
from cutlm.world.measure import answer_tasks
from cutlm.world.tasks import list_tasks

RESULT_FILE = "result.json"
NUM_ITERATIONS = 3
_IS_DEMO = "is_cutlm_demo"
_OWN_FOLDERS = (*(f"iteration-{number}" for number in range(1, NUM_ITERATIONS + 1)), "held-out")
_OWN_FILES = (CURVE_FILE, PAGE_FILE, RESULT_FILE)
_SEED = 0


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        num_tasks: Fresh instructions in each iteration.
        num_steps: Optimizer steps in each.
        num_held_out: Instructions to measure on.
        num_examples: Responses of each family on the page, at most.
    """

    num_tasks: int
    num_steps: int
    num_held_out: int
    num_examples: int


FULL = Size(num_tasks=280, num_steps=60, num_held_out=420, num_examples=5)
QUICK = Size(num_tasks=56, num_steps=6, num_held_out=70, num_examples=1)


def run_demo(out: str | Path, size: Size = FULL, base: str | Path | None = None) -> dict[str, Any]:
    """Runs the demo and prints it.

    Args:
        out: The folder to make; one of an earlier demo is replaced.
        size: How much to do.
        base: A base model of the tiny world; by default the one that comes with the package.

    Returns:
        What stands in the folder's `result.json`.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    prepare_folder(out)
    started = time.perf_counter()
    terminal = Terminal()
    with _quieten():
        result = {_IS_DEMO: True} | _run(out, size, base_path() if base is None else Path(base), terminal)
    result["seconds"] = round(time.perf_counter() - started, 1)
    _write_json(out / RESULT_FILE, result)
    print_end(terminal, out, result["seconds"])
    return result


def _run(out: Path, size: Size, base: Path, terminal: Terminal) -> dict[str, Any]:
    fresh = list_tasks("train")
    assert NUM_ITERATIONS * size.num_tasks <= len(fresh)
    held_out = HeldOut(list_tasks("test")[: size.num_held_out], [])
    num_parameters = _answer(base, held_out)
    print_start(terminal, num_parameters, NUM_ITERATIONS, size.num_tasks)
    iterations: list[Iteration] = []
    examples: list[dict[str, Any]] = []
    model_path = base
    for number in range(1, NUM_ITERATIONS + 1):
        terminal.print_heading(f"Iteration {number} of {NUM_ITERATIONS}")
        folder = out / f"iteration-{number}"
        tasks = fresh[(number - 1) * size.num_tasks : number * size.num_tasks]
        iteration = run_iteration(folder, model_path, tasks, size.num_steps, _SEED + number, terminal)
        model_path = folder / "model"
        with terminal.stage("test") as stage:
            _answer(model_path, held_out)
            before, after = held_out.accuracy[MEAN][-2:]
            stage.text = f"right on held-out instructions: {before:.0%} -> {after:.0%}"
        iteration.seconds["test"] = stage.seconds
        iterations.append(iteration)
        place = choose_example(iteration, {example["family"] for example in examples})
        if place is not None:
            task = iteration.tasks[place]
            again = HeldOut([task], [])
            _answer(model_path, again)
            examples.append(print_example(terminal, task, iteration.scores[place], again.answers[0][0]))
    print_accuracy(terminal, held_out)
    write_report(out, base, held_out, iterations, size.num_examples)
    return {
        "size": asdict(size),
        "settings": {"learning_rate": LEARNING_RATE, **asdict(SETTINGS)},
        "num_parameters": num_parameters,
        "accuracy": held_out.accuracy,
        "changes": held_out.changes,
        "iterations": [iteration.describe() for iteration in iterations],
        "examples": examples,
    }


def _answer(model_path: Path, held_out: HeldOut) -> int:
    """Adds a model's answers, and tells how many parameters it has."""
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    held_out.answers.append(answer_tasks(model, tokenizer, held_out.tasks))  # type: ignore[arg-type]
    return count_parameters(model)["all"]


@contextmanager
def _quieten() -> Iterator[None]:
    trainer = logging.getLogger("cutlm.training.trainer")
    level = trainer.level
    trainer.setLevel(logging.ERROR)  # its counts are printed by the stages
    transformers_logging.disable_progress_bar()  # loading and saving take no second here
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for it; nothing that a user could change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.enable_progress_bar()
        trainer.setLevel(level)


def prepare_folder(out: Path) -> None:
    """Makes the folder, or removes what an earlier demo, finished or not, left in it.

    Raises:
        UserError: It holds something, and not a demo.
    """
    if out.is_file():
        raise UserError(f"{out}: expected a folder to make, got a file")
    if out.is_dir() and any(out.iterdir()):
        try:
            is_demo = json.loads((out / RESULT_FILE).read_text("utf-8"))[_IS_DEMO] is True
        except (OSError, ValueError, TypeError, KeyError):
            is_demo = False
        if not is_demo:
            raise UserError(f"{out}: is not empty and holds no earlier demo; name another folder by --out")
        for name in _OWN_FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _OWN_FILES:
            (out / name).unlink(missing_ok=True)
    _write_json(out / RESULT_FILE, {_IS_DEMO: True})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open_atomic(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
