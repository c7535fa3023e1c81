"""Writes the results of the comparison: JSON for programs, a Markdown table and a plot for people."""

import json
import math
import platform
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.evaluation.detection import plot_detection
from cutlm.inspect.plots import draw_plot
from cutlm.inspect.tables import format_table

# Quantiles of Student's t distribution at 97.5 %, by degrees of freedom.
_T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_PACKAGES = ("cutlm", "torch", "transformers", "trl")
# Distinct for colour-blind readers, too.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#882255", "#000000", "#999933", "#888888"),
)


def summarize(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval (Student's t); None for a single value."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), _T_QUANTILES.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))


def write_results(
    folder: Path, name: str, rows: Sequence[dict[str, Any]], seeds: Sequence[int], command: str, base: str
) -> None:
    """Write NAME.json, NAME.md and NAME.png.

    Args:
        folder: The output folder.
        name: Name of the table.
        rows: Its rows.
        seeds: Seeds of the test runs, in the order of the lists of results.
        command: The command that makes the table.
        base: Hash of the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "seeds": list(seeds),
        "command": command,
        "base_model": base,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {package: version(package) for package in _PACKAGES},
    }
    _write(folder / f"{name}.json", json.dumps({"results": list(rows)} | about, indent=1) + "\n")
    title, make_table, plot = _TABLES[name]
    note = f"Measured on {about['date']}: {_describe_seeds(name, seeds)}. To measure again: `{command}`."
    _write(folder / f"{name}.md", f"# {title}\n\n{make_table(rows)}\n\n{note}\n")
    with open_atomic(folder / f"{name}.png") as file:
        file.write(draw_plot(title, lambda axes: plot(axes, rows)))


def _write(path: Path, text: str) -> None:
    with open_atomic(path) as file:
        file.write(text.encode())


def _describe_seeds(name: str, seeds: Sequence[int]) -> str:
    if name == "detection":
        return f"`frozen` is a single model, `current` the mean over models of {len(seeds)} seeds"
    if len(seeds) == 1:
        return "one seed, so no intervals"
    text = f"means and 95 % confidence intervals over {len(seeds)} seeds"
    return f"{text} (none for the base model)" if name == "methods" else text


def _show(values: Sequence[float]) -> str:
    middle, half = summarize(values)
    return f"{middle:.3f} ± {half:.3f}" if half else f"{middle:.3f}"


def _tabulate_methods(rows: Sequence[dict[str, Any]]) -> str:
    families = list(rows[0]["by_family"])
    header = ["method", "test accuracy", "lr", *families, "seconds", "responses judged", "tokens generated"]
    header += ["tokens trained on", "tokens scored"]
    cells = [
        [
            f"`{row['method']}` {row['about']}",
            _show(row["test_accuracy"]),
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            *(f"{row['by_family'][family]:.2f}" for family in families),
            f"{mean(row['seconds']):.1f}",
            *(f"{row[name]:,}" for name in ("num_responses", "tokens_generated", "tokens_trained", "tokens_scored")),
        ]
        for row in rows
    ]
    return format_table(header, cells)


def _tabulate_steps(key: str, title: str) -> Callable[[Sequence[dict[str, Any]]], str]:
    def tabulate(rows: Sequence[dict[str, Any]]) -> str:
        columns = list(dict.fromkeys(row[key] for row in rows))
        names = list(dict.fromkeys(row["method"] for row in rows))
        found = {(row["method"], row[key]): row for row in rows}
        cells = [[f"`{name}`", *(_show(found[name, column]["test_accuracy"]) for column in columns)] for name in names]
        return format_table([title, *map(str, columns)], cells)

    return tabulate


def _tabulate_noise(rows: Sequence[dict[str, Any]]) -> str:
    shares = sorted({row["noise"] for row in rows})
    found = {(row["method"], row["kind"], row["noise"]): row for row in rows}
    cells = [
        [f"`{name}`", kind]
        # Without noise there is one row for all kinds.
        + [_show(found[name, kind if share else None, share]["test_accuracy"]) for share in shares]
        for name, kind in dict.fromkeys((row["method"], row["kind"]) for row in rows if row["kind"] is not None)
    ]
    return format_table(["method", "judgments replaced by", *(f"{share:.0%}" for share in shares)], cells)


def _plot_noise(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy with foreign judgments, or flipped verdicts, of the methods that were measured with them."""
    kinds = ("foreign", "flipped")
    names = {row["method"] for row in rows if row["kind"] in kinds}
    part = [row for row in rows if row["method"] in names and row["kind"] in (None, *kinds)]
    _plot_lines("noise", "share of judgments that are another response's, or of flipped verdicts")(axes, part)


def _tabulate_detection(rows: Sequence[dict[str, Any]]) -> str:
    header = ["detector, family", "threshold", "precision", "recall", "F1"]
    return format_table(
        header,
        [
            [
                f"{row['detector']}, {row['family']}",
                f"{row['threshold']:g}",
                *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")),
            ]
            for row in rows
        ],
    )


def _plot_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    ticks = range(len(rows))[::-1]
    summaries = [summarize(row["test_accuracy"]) for row in rows]
    colors = [_COLORS[0] if row["method"].startswith("cut") else "#9a9a9a" for row in rows]
    axes.barh(
        ticks,
        [middle for middle, _ in summaries],
        xerr=[half or 0 for _, half in summaries],
        color=colors,
        capsize=3,
    )
    axes.set_yticks(ticks, [row["method"] for row in rows], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy on test tasks, mean over families")


def _plot_lines(key: str, label: str, is_log: bool = False) -> Callable[[Any, Any], None]:
    def plot(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
        for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            part = [row for row in rows if row["method"] == name]
            summaries = [summarize(row["test_accuracy"]) for row in part]
            axes.errorbar(
                [row[key] for row in part],
                [middle for middle, _ in summaries],
                yerr=[half or 0 for _, half in summaries],
                marker="osD^vP*Xph"[number % 10],
                color=_COLORS[number % len(_COLORS)],
                capsize=3,
                label=name,
            )
        if is_log:
            axes.set_xscale("log", base=2)
        ticks = list(dict.fromkeys(row[key] for row in rows))
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy on test tasks")
        axes.legend(fontsize=8)

    return plot


def _plot_detection(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for number, name in enumerate(dict.fromkeys(row["detector"] for row in rows)):
        part = [row for row in rows if row["detector"] == name and row["family"] == "micro"]
        plot_detection(axes, part, name, _COLORS[number % len(_COLORS)])


_Table = tuple[str, Callable[[Sequence[dict[str, Any]]], str], Callable[[Any, Any], None]]
_TABLES: dict[str, _Table] = {
    "methods": ("Methods on the tiny world", _tabulate_methods, _plot_bars),
    "ablations": ("CUT without one of its parts", _tabulate_methods, _plot_bars),
    "teachers": ("Self-distillation and redirection: what they depend on", _tabulate_methods, _plot_bars),
    "iterations": (
        "Online iterations",
        _tabulate_steps("iteration", "after iteration"),
        _plot_lines("iteration", "iteration"),
    ),
    "rewards": (
        "Judgments against rewards",
        _tabulate_steps("num_responses", "judged responses"),
        _plot_lines("num_responses", "judged responses", is_log=True),
    ),
    "noise": ("Wrong judgments", _tabulate_noise, _plot_noise),
    "detection": ("Detection of wrong tokens", _tabulate_detection, _plot_detection),
}
