"""Benchmarks by the package `lm-eval`: the paper's four with its numbers of examples, or any others.

A benchmark is measured once in a folder and leaves task-NAME.json there at once, so that a stopped evaluation goes on
with the next one. What a benchmark asks, and how it scores, is the package's affair.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlm.errors import ConfigError, UserError
from cutlm.evaluation.folder import need_extra, write_text
from cutlm.evaluation.paper import SOURCE, TRUTHFULQA
from cutlm.report.tables import join_cells

PACKAGES = ("lm-eval", "transformers", "datasets", "torch")


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
        task: A task or a group of the package.
        num_shots: Examples in the prompt; None for the task's own number.
        metric: Which of the task's; None for the first there is of acc_norm, acc and any other.
        title: For people.
    """

    task: str
    num_shots: int | None = None
    metric: str | None = None
    title: str = ""

    @property
    def file(self) -> str:
        """Where its figures are kept."""
        return "task-" + re.sub(r"[^\w.-]", "_", self.task) + ".json"


PAPERS = (
    Benchmark("arc_challenge", 25, "acc_norm", "ARC"),
    Benchmark("hellaswag", 10, "acc_norm", "HellaSwag"),
    Benchmark("mmlu", 5, "acc", "MMLU"),
    Benchmark("truthfulqa_mc2", 0, "acc", "TruthfulQA"),
)
# Folders of the package that hold the paper's four; to look through all of it takes a quarter of a minute.
_FOLDERS = ("arc", "hellaswag", "mmlu/default", "truthfulqa")


def read_benchmarks(text: str | None) -> list[Benchmark]:
    """Reads a list such as "arc_challenge,my_task:5", a number of examples after the colon.

    Args:
        text: None for the paper's four.

    Raises:
        ConfigError: It is no such list.
    """
    if text is None:
        return list(PAPERS)
    known = {benchmark.task: benchmark for benchmark in PAPERS}
    benchmarks = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        if not name or (colon and not number.isdecimal()):
            raise ConfigError(f"--tasks: expected names such as arc_challenge:25,hellaswag, got {text!r}")
        own = known.get(name, Benchmark(name))
        shots = int(number) if colon else own.num_shots
        benchmarks.append(Benchmark(name, shots, own.metric, own.title or name))
    names = [benchmark.task for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks: expected each task once, got {', '.join(repeated)} again; leave it out")
    return benchmarks


def find_tasks(benchmarks: Sequence[Benchmark], include_path: str | None) -> Any:
    """A task manager of the package that knows the benchmarks.

    Args:
        benchmarks: What it should know.
        include_path: A folder with further tasks, which go before the package's.

    Raises:
        UserError: The package is missing, or there is no task of some name.
    """
    tasks = need_extra("lm_eval.tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [] if include_path is None else [include_path]
    base = Path(tasks.__file__).parent
    manager = tasks.TaskManager(include_path=[*(base / name for name in _FOLDERS), *own], include_defaults=False)
    if any(benchmark.task not in manager.task_index for benchmark in benchmarks):
        manager = tasks.TaskManager(include_path=own or None)
    unknown = [benchmark.task for benchmark in benchmarks if benchmark.task not in manager.task_index]
    if unknown:
        raise UserError(
            f"--tasks: no task {', '.join(unknown)} in lm-eval"
            + (f" or {include_path}" if include_path else "")
            + "; list them by: lm_eval ls tasks; name a folder of your own by --include_path"
        )
    return manager


def measure_benchmarks(
    benchmarks: Sequence[Benchmark],
    load: Callable[[], Any],
    manager: Any,
    folder: Path,
    *,
    uses_chat_template: bool = False,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Measures each benchmark that the folder does not hold yet.

    Args:
        benchmarks: What to measure.
        load: Makes the package's model; called when it is needed.
        manager: Of `find_tasks`.
        folder: Where figures go as they come.
        uses_chat_template: Whether prompts, all examples in one message, are wrapped by the model's chat template.
        limit: So many questions of each task, to try that everything runs.

    Returns:
        A row for each benchmark.

    Raises:
        UserError: A task's data cannot be had.
    """
    evaluate = need_extra("lm_eval").simple_evaluate
    rows, model = [], None
    for benchmark in benchmarks:
        file = folder / benchmark.file
        if not file.exists():
            model = load() if model is None else model
            try:
                found = evaluate(
                    model=model,
                    tasks=[benchmark.task],
                    num_fewshot=benchmark.num_shots,
                    task_manager=manager,
                    apply_chat_template=uses_chat_template,
                    fewshot_as_multiturn=False,
                    limit=limit,
                    log_samples=False,
                )
            except OSError as error:
                reason = str(error).strip().split("\n")[0]
                raise UserError(
                    f"--tasks {benchmark.task}: its data cannot be loaded ({reason}); connect to the hub, or name a"
                    " folder with a task on local files by --include_path"
                ) from None
            write_text(file, json.dumps(_pick_figures(benchmark, found), indent=1) + "\n")
        else:
            print(f"{file} is there already")
        rows.append(json.loads(file.read_text("utf-8")))
    return rows


def _pick_figures(benchmark: Benchmark, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of all that the package says."""
    # "acc,none": a metric and the filter of answers that it was taken behind.
    own = {name: value for name, value in found["results"][benchmark.task].items() if "," in name}
    metrics = [name for name in own if "_stderr," not in name]
    order = [benchmark.metric] if benchmark.metric else ["acc_norm", "acc", *(name.split(",")[0] for name in metrics)]
    chosen = next(name for wanted in order for name in metrics if name.split(",")[0] == wanted)
    metric, _, behind = chosen.partition(",")
    error = own.get(f"{metric}_stderr,{behind}")
    shots = {int(number or 0) for number in found["n-shot"].values() if isinstance(number, int)}
    return {
        "task": benchmark.task,
        "title": benchmark.title,
        "num_shots": max(shots, default=benchmark.num_shots),
        "metric": metric,
        "value": 100 * own[chosen],
        "standard_error": 100 * error if isinstance(error, float) and math.isfinite(error) else None,
        "num_questions": sum(count["effective"] for count in found["n-samples"].values()),
        "versions": found["versions"],
    }


def summarize_benchmarks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `result.json` holds: each benchmark's figure in percent under its name, their mean, and all about them."""
    figures: dict[str, Any] = {row["task"]: row["value"] for row in rows}
    return figures | {"mean": sum(figures.values()) / len(figures), "tasks": list(rows)}


def tabulate_benchmarks(rows: Sequence[dict[str, Any]], name: str) -> str:
    """The figures as Markdown in the layout of the paper's Table 2, the paper's rows below.

    Args:
        rows: Of `measure_benchmarks`.
        name: Of the model.
    """
    header = ["model", *(f"{row['title']} ({row['num_shots']}-shot)" for row in rows)]
    own = [name]
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.2f}"
        own.append(f"{row['value']:.2f}{error}")
    is_truthful = [row["task"] == "truthfulqa_mc2" for row in rows]
    theirs = [
        [f"paper: {method}", *(f"{value:.2f}" if has_value else "" for has_value in is_truthful)]
        for method, value in (TRUTHFULQA.items() if any(is_truthful) else ())
    ]
    asked = ", ".join(f"{row['title']} {row['num_questions']:,} by {row['metric']}" for row in rows)
    note = f"In percent, with standard errors. Questions: {asked}."
    if theirs:
        note += f" The paper's rows ({SOURCE}) are of LLaMA-2 13B, by the package as it was in 2023."
    return f"# Benchmarks\n\n{join_cells(header, [own, *theirs])}\n\n{note}"
