"""Benchmarks of the package `lm-eval`: the paper's four with its numbers of examples, or any others.

Each benchmark leaves its result in task-NAME.json as soon as it is measured, so a stopped evaluation resumes with the
next one.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from cutlm.data.files import write_text
from cutlm.errors import ConfigError, UserError, log_errors_only
from cutlm.evaluation.paper import SOURCE, TRUTHFULQA
from cutlm.evaluation.shared import need_extra
from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars
from cutlm.inspect.tables import format_table

PACKAGES = ("lm-eval", "transformers", "datasets", "torch")
# Metrics of the package besides accuracies that range from 0 to 1.
_FRACTIONS = {"exact_match", "em", "f1", "likelihood", "mrr"}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark."""

    task: str  # a task or group of the package
    num_shots: int | None = None  # examples in the prompt; None for the task's own number
    metric: str | None = None  # None for the first of acc_norm, acc and any other
    title: str = ""  # in reports

    @property
    def file(self) -> str:
        """The name of its result file."""
        return "task-" + re.sub(r"[^\w.-]", "_", self.task) + ".json"


PAPERS = (
    Benchmark("arc_challenge", 25, "acc_norm", "ARC"),
    Benchmark("hellaswag", 10, "acc_norm", "HellaSwag"),
    Benchmark("mmlu", 5, "acc", "MMLU"),
    Benchmark("truthfulqa_mc2", 0, "acc", "TruthfulQA"),
)
# The package's folders with the paper's four; reading all of its folders takes 15 seconds.
_FOLDERS = ("arc", "hellaswag", "mmlu/default", "truthfulqa")


def read_benchmarks(text: str | None) -> list[Benchmark]:
    """Read a list such as "arc_challenge,my_task:5", with the number of examples; None for the paper's four."""
    if text is None:
        return list(PAPERS)
    known = {benchmark.task: benchmark for benchmark in PAPERS}
    benchmarks = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        if not name or (colon and not number.isdecimal()):
            raise ConfigError(f"--tasks: expected names such as arc_challenge:25,hellaswag, got {text!r}")
        default = known.get(name, Benchmark(name))
        shots = int(number) if colon else default.num_shots
        benchmarks.append(Benchmark(name, shots, default.metric, default.title or name))
    names = [benchmark.task for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks: expected each task once, got {', '.join(repeated)} again; remove it")
    return benchmarks


def find_tasks(benchmarks: Sequence[Benchmark], include_path: str | None) -> Any:
    """Make a task manager of the package that knows the benchmarks; UserError if it cannot measure one of them.

    `include_path` is a folder with further tasks, which take precedence over the package's.
    """
    tasks = need_extra("lm_eval.tasks")
    if include_path is not None:
        _check_yaml(Path(include_path))
    own = [] if include_path is None else [include_path]
    base = Path(tasks.__file__).parent
    with log_errors_only("lm_eval"):
        manager = tasks.TaskManager(include_path=[*(base / name for name in _FOLDERS), *own], include_defaults=False)
        if any(benchmark.task not in manager.task_index for benchmark in benchmarks):
            manager = tasks.TaskManager(include_path=own or None)
    unknown = [benchmark.task for benchmark in benchmarks if benchmark.task not in manager.task_index]
    problems = []
    if unknown:
        where = f"lm-eval or {include_path}" if include_path else "lm-eval"
        problems.append(
            f"--tasks: no task {', '.join(unknown)} in {where}; list them with: lm_eval ls tasks; add a folder of your"
            " own with --include_path"
        )
    for task in (benchmark.task for benchmark in benchmarks):
        if members := ",".join(_list_members(manager.task_index.get(task))):
            problems.append(f"--tasks {task}: a group of tasks without a group metric; name the tasks: {members}")
    if problems:
        raise UserError(problems)
    return manager


def _check_yaml(folder: Path) -> None:
    """Refuse invalid YAML files, which the package would silently skip together with their tasks."""
    problems = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
        except (OSError, yaml.YAMLError) as error:
            problems.append(f"--include_path: {file} is not YAML ({' '.join(str(error).split())}); fix it")
    if problems:
        raise UserError(problems)


def _list_members(entry: Any) -> list[str]:
    """List the tasks of a tag, or of a group without a group metric; nothing for anything else."""
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
    """Measure each benchmark whose result is not in the folder yet, and return a row for each benchmark.

    Args:
        benchmarks: What to measure; UserError if a task's data cannot be loaded or do not fit the task.
        load: Makes the package's model; called only if it is needed.
        manager: The result of `find_tasks`.
        folder: Where the results go.
        uses_chat_template: Whether prompts, all examples in one message, are wrapped in the model's chat template.
        limit: Number of questions per task, for a quick test.
    """
    evaluate = need_extra("lm_eval").simple_evaluate
    rows, model = [], None
    with log_errors_only("lm_eval"):
        tasks = _load_tasks([benchmark for benchmark in benchmarks if not (folder / benchmark.file).exists()], manager)
        for benchmark in benchmarks:
            file = folder / benchmark.file
            if benchmark.task in tasks:
                model = load() if model is None else model
                try:
                    results = evaluate(
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
                write_text(file, json.dumps(_pick_metric(benchmark, results), indent=1) + "\n")
            else:
                print(f"{file} exists already")
            rows.append(json.loads(file.read_text("utf-8")))
    return rows


def _load_tasks(benchmarks: Sequence[Benchmark], manager: Any) -> dict[str, Any]:
    """Load the package's tasks and group with their data; raise UserError with all that fail."""
    tasks, problems = {}, []
    for benchmark in benchmarks:
        try:
            loaded = manager.load([benchmark.task])
        except Exception as error:  # a task runs its author's code and templates, which can raise anything
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
            problems.append(f"--tasks {benchmark.task}: expected {wanted}, got {got}; fix the task, or remove it")
    if problems:
        raise UserError(problems)
    return tasks


def _explain_failure(benchmark: Benchmark, error: Exception) -> str:
    # For data files, the reason is in the cause.
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    return (
        f"--tasks {benchmark.task}: its data cannot be loaded, or do not fit the task ({type(error).__name__}:"
        f" {reason}); connect to the hub, or add a task on local files with --include_path"
    )


def _pick_metric(benchmark: Benchmark, results: dict[str, Any]) -> dict[str, Any]:
    """Make a benchmark's row from the package's results: one metric, in percent if it is a fraction."""
    # The package's names are such as "acc,none": a metric, and the filter that the answers went through.
    values = {name: value for name, value in results["results"][benchmark.task].items() if "," in name}
    metrics = [name for name in values if "_stderr," not in name]
    order = [benchmark.metric] if benchmark.metric else ["acc_norm", "acc", *(name.split(",")[0] for name in metrics)]
    chosen = next(name for wanted in order for name in metrics if name.split(",")[0] == wanted)
    metric, _, filter_name = chosen.partition(",")
    error = values.get(f"{metric}_stderr,{filter_name}")
    is_percent = metric in _FRACTIONS or metric.startswith("acc") or metric.endswith("_acc")
    scale = 100 if is_percent else 1
    shots = {int(number or 0) for number in results["n-shot"].values() if isinstance(number, int)}
    return {
        "task": benchmark.task,
        "title": benchmark.title,
        "num_shots": max(shots, default=benchmark.num_shots),
        "metric": metric,
        "is_percent": is_percent,
        "value": scale * values[chosen],
        "standard_error": scale * error if isinstance(error, float) and math.isfinite(error) else None,
        "num_questions": sum(count["effective"] for count in results["n-samples"].values()),
        "versions": results["versions"],
    }


# ---- Reports of the rows ----


def summarize_benchmarks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the content of result.json: each task's value, the mean of those in percent (or None), and all rows."""
    values: dict[str, Any] = {row["task"]: row["value"] for row in rows}
    percents = [row["value"] for row in rows if row["is_percent"]]
    return values | {"mean": sum(percents) / len(percents) if percents else None, "tasks": list(rows)}


def tabulate_benchmarks(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Report the model `name` as Markdown in the layout of the paper's Table 2, with the paper's values below."""
    header, own = ["model"], [name]
    for row in rows:
        metric = "" if row["is_percent"] else f", {row['metric']}"
        header.append(f"{row['title']} ({row['num_shots']}-shot{metric})")
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.2f}"
        own.append(f"{row['value']:.2f}{error}")
    is_truthful = [row["task"] == "truthfulqa_mc2" for row in rows]
    known = TRUTHFULQA if any(is_truthful) else {}
    papers = [
        [f"paper: {name}", *(f"{known[name]:.2f}" if is_known else "" for is_known in is_truthful)] for name in known
    ]
    asked = ", ".join(f"{row['title']} {row['num_questions']:,} by {row['metric']}" for row in rows)
    other = "" if all(row["is_percent"] for row in rows) else " unless another metric is named"
    note = f"In percent{other}, with standard errors. Questions: {asked}."
    if papers:
        note += f" The paper's values ({SOURCE}) are for LLaMA-2 13B, with the package's version of 2023."
    return f"# Benchmarks\n\n{format_table(header, [own, *papers])}\n\n{note}"


def draw_benchmarks(rows: Sequence[dict[str, Any]], name: str) -> bytes | None:
    """Draw the values in percent with standard errors, with the paper's below; None without values."""
    bars = []
    for row in rows:
        value, error = row["value"], row["standard_error"]
        low, high = (None, None) if error is None else (value - error, value + error)
        if row["is_percent"]:
            bars.append(Bar(f"{name}: {row['title']} ({row['num_shots']}-shot)", value, low, high))
    if any(row["task"] == "truthfulqa_mc2" for row in rows):
        bars += make_paper_bars(TRUTHFULQA, " (TruthfulQA)")
    return draw_bars("Benchmarks", bars, "percent, with standard errors") if bars else None
