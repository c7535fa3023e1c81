"""Reports an online run: a Markdown table, the same as JSON, and curves, all from the metrics of the stages."""

import io
import json
from pathlib import Path
from typing import Any

from cutlm.data.files import open_atomic, write_text
from cutlm.flagging.report import describe_noise
from cutlm.inspect.tables import format_table
from cutlm.judges.comparison import list_warnings

_COLORS = ("#0072b2", "#d55e00")
_PANELS_PER_ROW = 3
_COMPARISON = ("teacher_gain", "gain_low", "gain_high", "mean_length_plain", "mean_length_teacher")
_NOTE = """
Satisfactory responses and flagged tokens are counted in the responses of the iteration's model before it was trained;
flagged tokens as a share of the tokens of unsatisfactory responses. The flag signal is 1 if other records' judgments
flag nothing, and 0 if they flag as much as a record's own; pairwise is the share of records in which the largest log
ratio is larger under their own judgment. The teacher's gain is how much larger the share of satisfactory responses is
under its prompt than under the plain one, on a sample, with its 95 % interval; length is the mean number of characters
under both. The loss is the mean of the first and of the last logged steps. Held-out
metrics are of the model that the iteration ends with. Responses without a judgment are not trained on.
"""


def format_seconds(seconds: float) -> str:
    """Format a duration, such as 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def summarize(iteration: dict[str, Any]) -> dict[str, Any]:
    """Make a row of the report from an item of `cutlm.loop.loop.collect_metrics`; unknown values are None."""

    def divide(part: int | None, whole: int | None) -> float | None:
        return part / whole if part is not None and whole else None

    metrics = {stage: known["metrics"] for stage, known in iteration["stages"].items()}
    generate, judge, blame, train = (metrics.get(name, {}) for name in ("generate", "judge", "blame", "train"))
    comparison = metrics.get("compare", {})
    seconds = [known["seconds"] for known in iteration["stages"].values() if known["seconds"] is not None]
    frozen_share = divide(blame.get("num_flagged"), blame.get("num_tokens"))
    return {
        "iteration": iteration["iteration"],
        **{name: generate.get(name) for name in ("num_responses", "num_unanswered")},
        **{name: judge.get(name) for name in ("num_missing", "num_empty")},
        "share_satisfactory": divide(judge.get("num_satisfactory"), judge.get("num_judged")),
        "flagged_share": train.get("flagged_share") if frozen_share is None else frozen_share,
        **{name: (blame or train).get(name) for name in ("flag_signal", "pairwise")},
        "num_ineffective": blame.get("num_ineffective"),
        **{name: comparison.get(name) for name in _COMPARISON},
        **{name: train.get(name) for name in ("num_steps", "loss_start", "loss_end")},
        "evaluation": metrics.get("evaluate", {}),
        "seconds": sum(seconds) if seconds else None,
    }


def make_table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table of rows of `summarize`."""

    def show(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    names = _list_evaluated(rows)
    held_out = [f"held-out {_name_metric(name)}" for name in names]
    signals = [name for name in ("flag_signal", "pairwise") if any(row.get(name) is not None for row in rows)]
    start = ["iteration", "responses", "no judgment", "satisfactory", "flagged tokens", *map(_name_metric, signals)]
    has_comparison = any(row.get("teacher_gain") is not None for row in rows)
    start += ["teacher's gain", "length"] * has_comparison
    header = [*start, "loss", *held_out, "time"]
    cells = []
    for row in rows:
        missing = [count for count in (row["num_missing"], row["num_empty"]) if count is not None]
        losses = [row["loss_start"], row["loss_end"]]
        counts = [show(row["num_responses"], ","), show(sum(missing) if missing else None, ",")]
        shares = [show(row[name], ".1%") for name in ("share_satisfactory", "flagged_share")]
        shares += [show(row.get(name), ".2f") for name in signals]
        shares += _show_comparison(row) * has_comparison
        loss = " → ".join(f"{loss:.3f}" for loss in losses) if None not in losses else ""
        forms = [".1%" if name.startswith("share_") else ".4g" for name in names]
        metrics = [show(row["evaluation"].get(name), form) for name, form in zip(names, forms, strict=True)]
        seconds = "" if row["seconds"] is None else format_seconds(row["seconds"])
        cells.append([str(row["iteration"] or "before"), *counts, *shares, loss, *metrics, seconds])
    return format_table(header, cells)


def _show_comparison(row: dict[str, Any]) -> list[str]:
    """The cells of a teacher's gain with its interval, and of the lengths of responses without and with its prompt."""
    if row.get("teacher_gain") is None:
        return ["", ""]
    gain = f"{row['teacher_gain']:+.2f} ({row['gain_low']:+.2f} to {row['gain_high']:+.2f})"
    return [gain, f"{row['mean_length_plain']:.0f} → {row['mean_length_teacher']:.0f}"]


def make_summary(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table of rows of `summarize`.

    Below it are warnings, if the last flags are mostly noise, or the last teacher's prompt gains nothing.
    """
    measured = [row["flag_signal"] for row in rows if row["pairwise"] is not None]
    noise = describe_noise(measured[-1]) if measured else None
    warnings = [noise] if noise else []
    compared = [row for row in rows if row.get("teacher_gain") is not None]
    if compared:
        gain, low, high, plain, teacher = (compared[-1][name] for name in _COMPARISON)
        warnings += list_warnings(gain, (low, high), plain, teacher)
    return "\n\n".join([make_table(rows), *(f"warning: {text}" for text in warnings)])


def _list_evaluated(rows: list[dict[str, Any]]) -> list[str]:
    """List the evaluation metrics to show; counts, `num_...`, are in report.json only."""
    names = dict.fromkeys(name for row in rows for name in row["evaluation"])
    return [name for name in names if not name.startswith("num_")]


def _name_metric(name: str) -> str:
    return name.replace("_", " ").replace("share satisfactory", "satisfactory")


def make_status(iterations: list[dict[str, Any]]) -> str:
    """Make a table of the stages' states for the terminal, from `cutlm.loop.loop.collect_metrics`."""

    def show(state: str = "", seconds: float | None = None, **_: Any) -> str:
        return state if seconds is None else f"{state} {format_seconds(seconds)}"

    stages = list(dict.fromkeys(stage for iteration in iterations for stage in iteration["stages"]))
    rows = [["iteration", *stages]]
    rows += [[str(row["iteration"]), *(show(**row["stages"].get(name, {})) for name in stages)] for row in iterations]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_report(folder: Path, iterations: list[dict[str, Any]], *, draws_plots: bool) -> None:
    """Write report.md, report.json and, if `draws_plots` and there is anything to draw, report.png.

    The iterations are those of `cutlm.loop.loop.collect_metrics`.
    """
    rows = [summarize(iteration) for iteration in iterations]
    plots = draw(rows) if draws_plots else None
    image = "\n![Curves over iterations](report.png)\n" if plots is not None else ""
    text = f"# Online alignment\n\n{make_summary(rows)}\n{_NOTE}{image}"
    write_text(folder / "report.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "report.md", text)
    if plots is not None:
        with open_atomic(folder / "report.png") as file:
            file.write(plots)


def draw(rows: list[dict[str, Any]]) -> bytes | None:
    """Draw a PNG file of curves over iterations, one panel for each metric; None before anything was trained."""
    if all(row["loss_end"] is None for row in rows):
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    flat = [row | {f"held-out {name}": value for name, value in row["evaluation"].items()} for row in rows]
    # The title of each panel, and its lines: what they show and their label.
    panels: dict[str, dict[str, str]] = {
        "Satisfactory responses": {
            "share_satisfactory": "own new responses",
            "held-out share_satisfactory": "held out, after the iteration",
        },
        "Flagged tokens of unsatisfactory responses": {"flagged_share": "flagged"},
        "Loss": {"loss_start": "first steps", "loss_end": "last steps"},
    }
    for name in _list_evaluated(rows):
        if name != "share_satisfactory":
            panels[f"Evaluation: {_name_metric(name)}"] = {f"held-out {name}": name}
    num_rows = -(-len(panels) // _PANELS_PER_ROW)
    figure = Figure(figsize=(10.5, 3.4 * num_rows), dpi=160, layout="constrained")
    for index, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, _PANELS_PER_ROW, index + 1)
        for marker, color, (name, label) in zip("os", _COLORS, lines.items(), strict=False):
            points = [(row["iteration"], row[name]) for row in flat if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=label, clip_on=False)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.6, color="#e3e5e8")
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        if index < 2:
            axes.set_ylim(0, 1 if index == 0 else None)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
