"""What came of an online run: a Markdown table, the same as JSON, and curves.

Nothing is measured here; the figures are those that the stages left.
"""

import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.data.files import open_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 160
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_PANELS_IN_A_ROW = 3


def describe_seconds(seconds: float) -> str:
    """A duration, such as 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def summarize(iteration: dict[str, Any]) -> dict[str, Any]:
    """The figures of an iteration that its row shows; None where there is none.

    Args:
        iteration: As of `cutlm.loop.loop.collect_figures`.
    """
    figures = {stage: known["figures"] for stage, known in iteration["stages"].items()}
    judged, trained = figures.get("judge", {}), figures.get("train", {})
    blamed, evaluated = figures.get("blame", {}), figures.get("evaluate", {})
    seconds = [known["seconds"] for known in iteration["stages"].values() if known["seconds"] is not None]
    flagged_share = _divide(blamed.get("num_flagged"), blamed.get("num_tokens"))
    return {
        "iteration": iteration["iteration"],
        "num_responses": figures.get("generate", {}).get("num_responses"),
        "num_unanswered": figures.get("generate", {}).get("num_unanswered"),
        "num_missing": judged.get("num_missing"),
        "num_empty": judged.get("num_empty"),
        "share_satisfactory": _divide(judged.get("num_satisfactory"), judged.get("num_judged")),
        # By the frozen detector where there is one, else by the model as it was trained.
        "flagged_share": trained.get("flagged_share") if flagged_share is None else flagged_share,
        "num_steps": trained.get("num_steps"),
        "loss_start": trained.get("loss_start"),
        "loss_end": trained.get("loss_end"),
        "evaluation": evaluated,
        "seconds": sum(seconds) if seconds else None,
    }


def _divide(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def make_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of what `summarize` gives, a row an iteration."""
    evaluations = _list_evaluations(rows)
    named = [f"held-out {_name_figure(name)}" for name in evaluations]
    header = ["iteration", "responses", "no judgment", "satisfactory", "flagged tokens", "loss", *named, "time"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for row in rows:
        losses = [row["loss_start"], row["loss_end"]]
        cells = [
            str(row["iteration"]) if row["iteration"] else "before",
            _show(row["num_responses"]),
            _show(_add(row["num_missing"], row["num_empty"])),
            _show_share(row["share_satisfactory"]),
            _show_share(row["flagged_share"]),
            " → ".join(f"{loss:.3f}" for loss in losses) if None not in losses else "",
            *(_show_figure(name, row["evaluation"].get(name)) for name in evaluations),
            describe_seconds(row["seconds"]) if row["seconds"] is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _list_evaluations(rows: list[dict[str, Any]]) -> list[str]:
    """The figures of evaluations to be shown; counts, `num_...`, stand in `report.json` alone."""
    names = dict.fromkeys(name for row in rows for name in row["evaluation"])
    return [name for name in names if not name.startswith("num_")]


def _add(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _show(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _show_share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _name_figure(name: str) -> str:
    return name.replace("_", " ").replace("share satisfactory", "satisfactory")


def _show_figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return _show_share(value) if name.startswith("share_") else f"{value:.4g}"


_NOTE = """
Satisfactory and flagged tokens are of the responses that the iteration's model gave before it was trained: flagged is
the share of the tokens of unsatisfactory responses. The loss is the mean of the first and of the last logged lines.
Held-out figures are of the model that came of the iteration. Responses without a judgment are not trained on.
"""


def write_report(folder: Path, iterations: list[dict[str, Any]], *, is_drawing: bool) -> None:
    """Writes `report.md` and `report.json`, and `report.png` where that is asked for and there is anything to draw.

    Args:
        folder: The run's.
        iterations: As of `cutlm.loop.loop.collect_figures`.
        is_drawing: Whether to draw.
    """
    rows = [summarize(iteration) for iteration in iterations]
    picture = draw(rows) if is_drawing else None
    image = "\n![Curves over iterations](report.png)\n" if picture is not None else ""
    text = f"# Online alignment\n\n{make_table(rows)}\n{_NOTE}{image}"
    for name, content in (
        ("report.json", (json.dumps(rows, indent=2) + "\n").encode()),
        ("report.png", picture),
        ("report.md", text.encode()),
    ):
        if content is not None:
            with open_atomic(folder / name) as file:
                file.write(content)


def draw(rows: list[dict[str, Any]]) -> bytes | None:
    """Draws shares, flagged tokens, losses and what a command of the user's measured over iterations.

    Returns:
        A PNG file's bytes; None where there is nothing to draw.
    """
    trained = [row for row in rows if row["loss_end"] is not None]
    if not trained:
        return None
    measured = [name for name in _list_evaluations(rows) if name != "share_satisfactory"]
    # It announces on its first day on a machine that it is looking for fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_lines = 1 + -(-len(measured) // _PANELS_IN_A_ROW)
    figure = Figure(figsize=(10.5, 3.4 * num_lines), dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(num_lines, _PANELS_IN_A_ROW).flat)
    for unused in panels[3 + len(measured) :]:
        unused.remove()
    satisfactory, flagged, losses = panels[:3]
    _plot(satisfactory, trained, "share_satisfactory", "own fresh responses", 0)
    held_out = [
        {"iteration": row["iteration"], "share": row["evaluation"]["share_satisfactory"]}
        for row in rows
        if "share_satisfactory" in row["evaluation"]
    ]
    _plot(satisfactory, held_out, "share", "held out, after the iteration", 1)
    _plot(flagged, trained, "flagged_share", "flagged", 0)
    _plot(losses, trained, "loss_start", "first steps", 0)
    _plot(losses, trained, "loss_end", "last steps", 1)
    for axes, name in zip(panels[3:], measured, strict=False):
        known = [{"iteration": row["iteration"], "value": row["evaluation"].get(name)} for row in rows]
        _plot(axes, known, "value", name, 0)
    titles = ["Satisfactory responses", "Flagged tokens of unsatisfactory ones", "Loss"]
    titles += [f"Evaluation: {_name_figure(name)}" for name in measured]
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.6, color="#e3e5e8")
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    satisfactory.set_ylim(0, 1)
    flagged.set_ylim(bottom=0)
    for axes in (satisfactory, flagged):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _plot(axes: "Axes", rows: list[dict[str, Any]], name: str, label: str, number: int) -> None:
    points = [(row["iteration"], row[name]) for row in rows if row[name] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="os^"[number], color=_COLOURS[number], label=label, clip_on=False)


def make_status(iterations: list[dict[str, Any]]) -> str:
    """A table of which stages are done, fit for a terminal."""
    stages = list(dict.fromkeys(stage for iteration in iterations for stage in iteration["stages"]))
    rows = [["iteration", *stages]]
    for iteration in iterations:
        cells = [str(iteration["iteration"])]
        for stage in stages:
            known = iteration["stages"].get(stage)
            cell = "" if known is None else known["state"]
            if known is not None and known["seconds"] is not None:
                cell += f" {describe_seconds(known['seconds'])}"
            cells.append(cell)
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
