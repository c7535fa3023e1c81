"""Plans of small online runs, and their stages' commands in this process, for the tests of the loop."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.loop.settings import read_plan

RULES = '''
"""A judge that minds the number of characters."""

def judge(instruction, response):
    return None if len(response) % 3 == 0 else f"{len(response)} characters are not a number that I like."

def raising(instruction, response):
    raise ValueError("no way")
'''


def make_workplace(folder: Path) -> Iterator[Path]:
    """A folder with a model, instructions and a judge by rules, which can be imported as long as this is not over."""
    save_tiny_model(folder / "base")
    rows = [{"instruction": f"Name a city, number {index}."} for index in range(16)]
    (folder / "instructions.json").write_text(json.dumps(rows))
    (folder / "held_out.json").write_text(
        json.dumps([{"instruction": f"Name a river, {index}."} for index in range(4)])
    )
    (folder / "characters.py").write_text(RULES)
    sys.path.insert(0, str(folder))  # as PYTHONPATH has it for the commands
    yield folder
    sys.path.remove(str(folder))


def make_settings(folder: Path, name: str, **further: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / name),
        "instructions": str(folder / "instructions.json"),
        "num_iterations": 2,
        "num_instructions": 6,
        "generate": "--max_new_tokens 6 --batch_size 4 --temperature 1 --device cpu",
        "judge": "rules --rules characters:judge",
        "eval_instructions": str(folder / "held_out.json"),
        "detector": "frozen",
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "lora_dropout": 0.2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | further


def make_plan(folder: Path, name: str, **further: Any) -> Any:
    settings = make_settings(folder, name, **further)
    options = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return read_plan(None, options)


def run_here(arguments: list[str], *, log: Path, lock: int, launcher: str | None = None) -> int:
    """A stage's command, in this process."""
    with open(log.parents[1] / "commands.txt", "a") as file:
        file.write(f"{log.parent.name} {log.stem} {arguments[0]}\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(arguments)
    if status:
        print(errors.getvalue(), file=sys.stderr)
    return status
