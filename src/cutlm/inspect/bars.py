"""Figures of a model as bars with intervals, the paper's below them, as a PNG.

Ours and theirs are told apart by name and by shade, and every figure stands at the end of its bar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlm.inspect.tables import draw_plot

_OURS, _THEIRS = "#0072b2", "#c3c8d0"
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Bar:
    """A figure.

    Attributes:
        name: What it is of.
        value: At least 0.
        low: Where its interval begins; None where it has none.
        high: Where it ends.
        is_theirs: Whether it is the paper's.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    is_theirs: bool = False


def list_theirs(figures: dict[str, float], kind: str) -> list[Bar]:
    """Figures of the paper by method.

    Args:
        figures: Of `cutlm.evaluation.paper`.
        kind: What they are of, for the names.
    """
    return [Bar(f"paper{kind}: {method}", value, is_theirs=True) for method, value in figures.items()]


def draw_bars(title: str, bars: Sequence[Bar], label: str) -> bytes:
    """Draws bars, from above to below.

    Args:
        title: Above them.
        bars: At least one.
        label: Of the axis.

    Returns:
        The PNG file's bytes, the same ones each time.
    """
    return draw_plot(title, lambda axes: plot_bars(axes, bars, label), height=1.2 + 0.27 * len(bars))


def plot_bars(axes: Any, bars: Sequence[Bar], label: str) -> None:
    """Draws on matplotlib's axes; see `draw_bars`."""
    locations = range(len(bars))
    axes.barh(locations, [bar.value for bar in bars], 0.7, color=[_THEIRS if bar.is_theirs else _OURS for bar in bars])
    ends = [bar.value if bar.high is None else bar.high for bar in bars]
    for place, bar, end in zip(locations, bars, ends, strict=True):
        if bar.low is not None:
            reach = [[bar.value - bar.low], [end - bar.value]]
            axes.errorbar(bar.value, place, xerr=reach, color="black", capsize=3, linewidth=1.2)
        axes.annotate(f"{bar.value:.2f}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(locations, [_shorten(bar.name) for bar in bars], fontsize=9)
    for name in axes.get_yticklabels():
        name.set_parse_math(False)  # a name is text, dollar signs too
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.14 * max([*ends, 0.01]))
    axes.set_xlabel(label)


def _shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"
