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

import yaml
from jinja2 import TemplateError

from cutlm.errors import ConfigError, UserError
from cutlm.evaluation.folder import need_extra, write_text

PACKAGES = ("lm-eval", "transformers", "datasets", "torch")
# Metrics of the package that are from 0 to 1, beside accuracies of all kinds.
_FRACTIONS = {"exact_match", "em", "f1", "likelihood", "mrr"}


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
        UserError: The package is missing, or there is no task of some name, or it has no figure of its own.
    """
    tasks = need_extra("lm_eval.tasks")
    if include_path is not None:
        _check_files(Path(include_path))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [] if include_path is None else [include_path]
    base = Path(tasks.__file__).parent
    manager = tasks.TaskManager(include_path=[*(base / name for name in _FOLDERS), *own], include_defaults=False)
    if any(benchmark.task not in manager.task_index for benchmark in benchmarks):
        manager = tasks.TaskManager(include_path=own or None)
    unknown = [benchmark.task for benchmark in benchmarks if benchmark.task not in manager.task_index]
    problems = []
    if unknown:
        problems.append(
            f"--tasks: no task {', '.join(unknown)} in lm-eval"
            + (f" or {include_path}" if include_path else "")
            + "; list them by: lm_eval ls tasks; name a folder of your own by --include_path"
        )
    for benchmark in benchmarks:
        if members := _list_members(manager.task_index.get(benchmark.task)):
            problems.append(
                f"--tasks {benchmark.task}: it stands for several tasks and has no figure of its own; name them:"
                f" {','.join(members)}"
            )
    if problems:
        raise UserError(problems)
    return manager


def _check_files(folder: Path) -> None:
    """Refuses YAML files that the package would pass over, and with them the tasks in them."""
    problems = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
        except (OSError, yaml.YAMLError) as error:
            problems.append(f"--include_path: {file} is no YAML ({' '.join(str(error).split())}); mend it")
    if problems:
        raise UserError(problems)


def _list_members(entry: Any) -> list[str]:
    """The tasks of a tag, or of a group without a figure of its own; of all else none."""
    if entry is None or entry.kind.name not in ("TAG", "GROUP"):
        return []
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.cfg.get("aggregate_metric_list"):
        return []
    members = entry.cfg.get("task")
    members = members if isinstance(members, list) else [members]
    return [str(member if not isinstance(member, dict) else member.get("task", member)) for member in members]


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
    tasks = _load_tasks([benchmark for benchmark in benchmarks if not (folder / benchmark.file).exists()], manager)
    for benchmark in benchmarks:
        file = folder / benchmark.file
        if benchmark.task in tasks:
            model = load() if model is None else model
            try:
                found = evaluate(
                    model=model,
                    tasks=[tasks[benchmark.task]],
                    num_fewshot=benchmark.num_shots,
                    task_manager=manager,
                    apply_chat_template=uses_chat_template,
                    fewshot_as_multiturn=False,
                    limit=limit,
                    log_samples=False,
                )
            except TemplateError as error:
                raise UserError(_explain_failure(benchmark, error)) from None
            write_text(file, json.dumps(_pick_figures(benchmark, found), indent=1) + "\n")
        else:
            print(f"{file} is there already")
        rows.append(json.loads(file.read_text("utf-8")))
    return rows


def _load_tasks(benchmarks: Sequence[Benchmark], manager: Any) -> dict[str, Any]:
    """The package's tasks and groups by name, their data loaded.

    Raises:
        UserError: Some cannot be loaded, or do not have the metric; all of them are named.
    """
    tasks, problems = {}, []
    for benchmark in benchmarks:
        try:
            loaded = manager.load([benchmark.task])
        except Exception as error:  # whatever is wrong with a task's files comes out as itself
            problems.append(_explain_failure(benchmark, error))
            continue
        group = loaded["groups"].get(benchmark.task)
        tasks[benchmark.task] = loaded["tasks"][benchmark.task] if group is None else group
        metrics = {name for task in loaded["tasks"].values() for name in task.aggregation()}
        if group is not None:
            metrics &= {setting.metric for setting in group.aggregate_metric_list}
        if not metrics or benchmark.metric not in (None, *metrics):
            wanted = f"the metric {benchmark.metric}" if benchmark.metric else "a metric"
            got = ", ".join(sorted(metrics)) or "none"
            problems.append(f"--tasks {benchmark.task}: expected {wanted}, got {got}; mend it, or leave it out")
    if problems:
        raise UserError(problems)
    return tasks


def _explain_failure(benchmark: Benchmark, error: Exception) -> str:
    # A failure to read a file of data says in its cause what is wrong with it.
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    return (
        f"--tasks {benchmark.task}: its data cannot be loaded, or do not fit it ({type(error).__name__}: {reason});"
        " connect to the hub, or name a folder with a task on local files by --include_path"
    )


def _pick_figures(benchmark: Benchmark, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of all that the package says; fractions in percent, and all else as it is."""
    # "acc,none": a metric and the filter of answers that it was taken behind.
    own = {name: value for name, value in found["results"][benchmark.task].items() if "," in name}
    metrics = [name for name in own if "_stderr," not in name]
    order = [benchmark.metric] if benchmark.metric else ["acc_norm", "acc", *(name.split(",")[0] for name in metrics)]
    chosen = next(name for wanted in order for name in metrics if name.split(",")[0] == wanted)
    metric, _, behind = chosen.partition(",")
    error = own.get(f"{metric}_stderr,{behind}")
    is_percent = metric in _FRACTIONS or metric.startswith("acc") or metric.endswith("_acc")
    scale = 100 if is_percent else 1
    shots = {int(number or 0) for number in found["n-shot"].values() if isinstance(number, int)}
    return {
        "task": benchmark.task,
        "title": benchmark.title,
        "num_shots": max(shots, default=benchmark.num_shots),
        "metric": metric,
        "is_percent": is_percent,
        "value": scale * own[chosen],
        "standard_error": scale * error if isinstance(error, float) and math.isfinite(error) else None,
        "num_questions": sum(count["effective"] for count in found["n-samples"].values()),
        "versions": found["versions"],
    }
