"""What benchmarks say of a model, as a result, as a table in the paper's layout and as a picture.

Its rows are those of `cutlm.evaluation.harness.measure_benchmarks`.
"""

from collections.abc import Sequence
from typing import Any

from cutlm.evaluation.paper import SOURCE, TRUTHFULQA
from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars
from cutlm.inspect.tables import format_table


def summarize_benchmarks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `result.json` holds: each benchmark's figure under its name, the mean of those in percent (None where there
    are none), and all about them."""
    figures: dict[str, Any] = {row["task"]: row["value"] for row in rows}
    shares = [row["value"] for row in rows if row["is_percent"]]
    return figures | {"mean": sum(shares) / len(shares) if shares else None, "tasks": list(rows)}


def tabulate_benchmarks(rows: Sequence[dict[str, Any]], name: str) -> str:
    """The figures as Markdown in the layout of the paper's Table 2, the paper's rows below.

    Args:
        rows: Of `measure_benchmarks`.
        name: Of the model.
    """
    header = ["model"]
    for row in rows:
        metric = "" if row["is_percent"] else f", {row['metric']}"
        header.append(f"{row['title']} ({row['num_shots']}-shot{metric})")
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
    other = "" if all(row["is_percent"] for row in rows) else ", but where another metric is named"
    note = f"In percent{other}, with standard errors. Questions: {asked}."
    if theirs:
        note += f" The paper's rows ({SOURCE}) are of LLaMA-2 13B, by the package as it was in 2023."
    return f"# Benchmarks\n\n{format_table(header, [own, *theirs])}\n\n{note}"


def draw_benchmarks(rows: Sequence[dict[str, Any]], name: str) -> bytes | None:
    """What is in percent as a picture, with standard errors, the paper's below; None where nothing is."""
    bars = []
    for row in rows:
        value, error = row["value"], row["standard_error"]
        low, high = (None, None) if error is None else (value - error, value + error)
        if row["is_percent"]:
            bars.append(Bar(f"{name}: {row['title']} ({row['num_shots']}-shot)", value, low, high))
    if any(row["task"] == "truthfulqa_mc2" for row in rows):
        bars += make_paper_bars(TRUTHFULQA, " (TruthfulQA)")
    return draw_bars("Benchmarks", bars, "percent, with standard errors") if bars else None
