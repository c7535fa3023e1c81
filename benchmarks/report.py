"""Update the tables and plots of docs/performance.md from benchmarks/results.

  python benchmarks/report.py            update the tables and plots
  python benchmarks/report.py --check    exit with 1 if the tables differ from the results

A table is between the lines `<!-- results/NAME.json -->` and `<!-- end -->`."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import make_table

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
_PLACE = re.compile(r"(<!-- results/(\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8a8f98", "#a87f00")
_MARKERS = "os^Dv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text("utf-8")
    after = fill_in(before)
    if args.check:
        sys.exit(None if after == before else f"{PAGE.name}: tables differ from the results; run benchmarks/report.py")
    PAGE.write_text(after, "utf-8")
    for name, draw in DRAWINGS.items():
        draw_picture(draw, read_results(name), DOCS / f"performance-{name.replace('_', '-')}.png")


def read_results(name: str) -> dict[str, Any]:
    """Read the results of a benchmark."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))


def fill_in(page: str) -> str:
    """Replace the tables of the page by those of the results."""
    return _PLACE.sub(lambda match: f"{match[1]}{describe(read_results(match[2]))}{match[3]}", page)


def describe(results: dict[str, Any]) -> str:
    """The machine and date, the table, and further figures."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl", "peft"))
    processor = machine["gpu"] or f"{machine['processor']}, {machine['num_threads']} threads"
    figures = [
        {"figure": f"`{name}`", "value": value} for name, value in results.items() if isinstance(value, int | float)
    ]
    text = f"{machine['date']}, {processor}, {versions}:\n\n{make_table(results['rows'])}\n"
    return f"{text}{make_table(figures)}\n" if figures else text


def draw_picture(draw: Callable[[Any, dict[str, Any]], None], results: dict[str, Any], out: Path) -> None:
    # On its first run, matplotlib logs that it builds a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3), dpi=160, layout="constrained")
        draw(figure, results)
        figure.savefig(out, metadata={"Software": None})


def draw_train_step(figure: Any, results: dict[str, Any]) -> None:
    """Bars of the seconds and peak memory of each variant."""
    variants = {name: known for name, known in results["results"].items() if "failed" not in known}
    names = list(variants)
    for axes, unit, divisor, title in zip(
        figure.subplots(1, 2), ("seconds", "peak"), (1, 1e9), ("Seconds", "Peak memory, GB"), strict=True
    ):
        values = [variants[name][unit] / divisor for name in names]
        colours = [_COLOURS[0] if name in ("cutlm", "frozen") else _COLOURS[3] for name in names]
        bars = axes.barh(range(len(names))[::-1], values, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
        axes.set_yticks(range(len(names))[::-1], names)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.margins(x=0.12)


def draw_head(figure: Any, results: dict[str, Any]) -> None:
    """Seconds and peak memory of each head over the size of the vocabulary."""
    kinds = list(dict.fromkeys(row["head"] for row in results["rows"]))
    for axes, unit, title in zip(figure.subplots(1, 2), ("seconds", "MB"), ("Seconds", "Memory, MB"), strict=True):
        for number, kind in enumerate(kinds):
            known = [row for row in results["rows"] if row["head"] == kind and not isinstance(row["seconds"], str)]
            _draw_line(
                axes, [int(row["vocabulary"]) / 1000 for row in known], [row[unit] for row in known], kind, number
            )
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("vocabulary, thousands of tokens")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def draw_scaling(figure: Any, results: dict[str, Any]) -> None:
    """Seconds over each size, on logarithmic axes."""
    from matplotlib.ticker import LogLocator

    growing = list(dict.fromkeys(name.split()[1] for name in results["results"]))
    for axes, name in zip(figure.subplots(1, len(growing)), growing, strict=True):
        for number, kind in enumerate(("cutlm", "floor")):
            known = {
                int(variant.split()[2]): value["seconds"]
                for variant, value in results["results"].items()
                if variant.split()[:2] == [kind, name]
            }
            _draw_line(axes, list(known), list(known.values()), kind, number)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xticks(list(known), list(map(str, known)))
        axes.set_title(f"Seconds by {name.replace('_', ' ')}", loc="left", fontweight="bold")
        axes.legend(frameon=False)


def _draw_line(axes: Any, x: list[Any], y: list[float], label: str, number: int) -> None:
    axes.plot(x, y, marker=_MARKERS[number], color=_COLOURS[number], label=label, clip_on=False)


DRAWINGS = {"train_step": draw_train_step, "head": draw_head, "scaling": draw_scaling}

if __name__ == "__main__":
    main()
