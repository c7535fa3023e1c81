"""Measure the CPU seconds of starting commands, and compare training with importing its libraries.

  OMP_NUM_THREADS=1 python benchmarks/startup.py --json benchmarks/results/startup.json

CPU seconds, user and system, because a busy machine changes them less than the time on the clock; the least of the
turns. *train* is `cutlm train` on the tiny world until its first step."""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from common import describe_machine, make_parser, write_results

PROGRAMS = {
    "python": "pass",
    "import cutlm": "import cutlm",
    "import torch, transformers, peft": "import torch, transformers, peft",
    "cutlm --version": "from cutlm.cli import main; main(['--version'])",
}
TRAIN = "cutlm train"
_PRINT_SECONDS = "import atexit, time; atexit.register(lambda: print('\\n', time.process_time()))\n"


class _FirstStepError(Exception):
    """Ends the command at its first step."""


def main() -> None:
    parser = make_parser(__doc__, num_repeats=5)
    args = parser.parse_args()
    if args.variant:
        _start_training(args)
    with tempfile.TemporaryDirectory() as folder:
        _write_records(Path(folder))
        programs = {name: ["-c", f"{_PRINT_SECONDS}{program}"] for name, program in PROGRAMS.items()}
        programs[TRAIN] = [__file__, "--variant", TRAIN, "--folder", folder]
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(args.repeats):
            for name, arguments in programs.items():
                seconds[name].append(_run(arguments))
                print(f"turn {turn + 1}, {name}: {seconds[name][-1]:.2f}", file=sys.stderr, flush=True)
    least = {name: min(values) for name, values in seconds.items()}
    figures: dict[str, Any] = {
        "train_over_imports": least[TRAIN] / least["import torch, transformers, peft"],
        "import_cutlm_milliseconds": 1000 * (least["import cutlm"] - least["python"]),
    }
    rows = [{"program": f"`{name}`", "CPU seconds": value} for name, value in least.items()]
    known = {"machine": describe_machine(), "options": {"repeats": args.repeats}, "results": seconds}
    write_results(rows, figures | known, args.json)


def _run(arguments: list[str]) -> float:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(done.stdout.split()[-1])


def _write_records(folder: Path) -> None:
    from cutlm.world.judge import judge
    from cutlm.world.tasks import list_tasks

    rows = []
    for task in list_tasks("train")[:64]:
        response = "The answer is wrong."
        judgment = judge(task.instruction, response)
        rows.append({"instruction": task.instruction, "output": response, "judgment": judgment})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _start_training(args: argparse.Namespace) -> NoReturn:
    from cutlm.cli import importing_libraries
    from cutlm.cli import main as run_cutlm

    with importing_libraries():  # as cutlm train does
        from cutlm.training.trainer import CUTTrainer

    def stop(*_: Any) -> NoReturn:
        raise _FirstStepError

    CUTTrainer.training_step = stop  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        options = ["--data", f"{args.folder}/records.jsonl", "--output_dir", f"{out}/run", "--max_length", "256"]
        base = str(Path(sys.modules["cutlm"].__path__[0]) / "world" / "base_model")
        options += ["--model_name_or_path", base, "--max_steps", "1", "--use_cpu", "--report_to", "none"]
        with contextlib.suppress(_FirstStepError):
            run_cutlm(["train", *options])
    print(time.process_time())
    sys.exit()


if __name__ == "__main__":
    main()
