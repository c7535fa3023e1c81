"""Plans of small online runs, and `cutlm` commands in this process, for the tests of the loop."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import save_tiny_model

import cutlm.training.config  # noqa: F401 (so that the forks that read plans find torch imported)
from cutlm.cli import main
from cutlm.cli.align import parse_stage_options
from cutlm.loop.settings import Plan, read_plan

RULES = """
def judge(instruction, response):
    return None if len(response) % 3 == 0 else f"The response has {len(response)} characters."

def raising(instruction, response):
    raise ValueError("broken rule")
"""


def make_workplace(folder: Path) -> Iterator[Path]:
    """Makes a folder with a model, instructions and rules, which can be imported until the generator is closed."""
    save_tiny_model(folder / "base")
    rows = [{"instruction": f"Name a city, number {index}."} for index in range(16)]
    (folder / "instructions.json").write_text(json.dumps(rows))
    rows = [{"instruction": f"Name a river, {index}."} for index in range(4)]
    (folder / "held_out.json").write_text(json.dumps(rows))
    (folder / "characters.py").write_text(RULES)
    sys.path.insert(0, str(folder))
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


def make_plan(folder: Path, name: str, **further: Any) -> Plan:
    settings = make_settings(folder, name, **further)
    options = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return read_plan(None, options, parse_stage_options)


def run_in_process(arguments: list[str], *, log: Path, lock: int, launcher: str | None = None) -> int:
    """Runs a stage's command in this process, and notes it in the run folder's commands.txt."""
    with open(log.parents[1] / "commands.txt", "a") as file:
        file.write(f"{log.parent.name} {log.stem} {arguments[0]}\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(arguments)
    if status:
        print(errors.getvalue(), file=sys.stderr)
    return status
