"""Plots as PNG bytes: bars with confidence intervals, learning curves, or anything drawn on matplotlib's axes.

The same input always gives the same bytes, no window opens, and text is drawn literally (no math mode). Colors are
those of Okabe and Ito, which color-blind readers can distinguish.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlm.errors import log_errors_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _PAPERS = "#0072b2", "#c3c8d0"
_MAX_NAME_LENGTH = 40

CURVES_SIZE = (1400, 860)  # pixels; meant to be shown at half of it on ordinary screens
_CURVES_DPI = 200
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#c060a0", "#a87f00", "#3fa0dc", "#85604a")
_COLORS_ON_DARK = ("#4fa8f0", "#ff8a3d", "#2fc79a", "#e493c0", "#e0bd4a", "#a3daf7", "#c9a78f")
_MARKERS = "os^Dv<>"
_LABEL_GAP = 0.058  # as a fraction of the height of the axes


def draw_plot(title: str, plot: Callable[[Any], None], *, height: float = 4.6) -> bytes:
    """Draw one plot, `height` inches high, and return the bytes of a PNG; `plot` draws on matplotlib's axes."""
    with _quiet_fonts():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, height), dpi=130, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=11, parse_math=False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        plot(axes)
        return _save(figure)


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """Silence matplotlib about building its font cache and about characters its font lacks."""
    with log_errors_only("matplotlib.font_manager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _save(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


# ---- Bars ----


@dataclass(frozen=True)
class Bar:
    """A value to draw as a bar, with its confidence interval if there is one."""

    name: str
    value: float  # at least 0
    low: float | None = None
    high: float | None = None
    is_from_paper: bool = False  # whether the value is the paper's rather than ours


def make_paper_bars(values: dict[str, float], kind: str) -> list[Bar]:
    """Make bars of the paper's values by method (from `cutlm.evaluation.paper`); `kind` is added to their names."""
    return [Bar(f"paper{kind}: {method}", value, is_from_paper=True) for method, value in values.items()]


def draw_bars(title: str, bars: Sequence[Bar], label: str) -> bytes:
    """Draw at least one bar, from top to bottom, and return the bytes of a PNG; `label` is that of the value axis."""
    return draw_plot(title, lambda axes: plot_bars(axes, bars, label), height=1.2 + 0.27 * len(bars))


def plot_bars(axes: Any, bars: Sequence[Bar], label: str) -> None:
    """Draw bars on matplotlib axes; see `draw_bars`."""
    rows = range(len(bars))
    colors = [_PAPERS if bar.is_from_paper else _OURS for bar in bars]
    axes.barh(rows, [bar.value for bar in bars], 0.7, color=colors)
    ends = [bar.value if bar.high is None else bar.high for bar in bars]
    for row, bar, end in zip(rows, bars, ends, strict=True):
        if bar.low is not None:
            error = [[bar.value - bar.low], [end - bar.value]]
            axes.errorbar(bar.value, row, xerr=error, color="black", capsize=3, linewidth=1.2)
        axes.annotate(f"{bar.value:.2f}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(rows, [_shorten(bar.name) for bar in bars], fontsize=9)
    for name in axes.get_yticklabels():
        name.set_parse_math(False)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.14 * max([*ends, 0.01]))
    axes.set_xlabel(label)


def _shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}\u2026"


# ---- Curves ----


@dataclass(frozen=True)
class Curves:
    """Shares by stage as lines, and a second share by stage as small bars next to them."""

    title: str  # of the lines
    label: str  # of the horizontal axis
    stages: Sequence[str]  # names along the horizontal axis
    lines: dict[str, Sequence[float]]  # by name, a share at each stage
    mean: Sequence[float]  # of the lines at each stage, drawn as a thick line
    bar_title: str
    bars: Sequence[float]  # a share for each of the last `len(bars)` stages


def draw_curves(curves: Curves, *, is_dark: bool = False) -> bytes:
    """Draw curves for a light or a dark page and return the bytes of a PNG of `CURVES_SIZE`."""
    with _quiet_fonts():
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        text, back, rule = ("#e4e7eb", "#1b1f26", "#3a414d") if is_dark else ("#22262c", "#ffffff", "#e3e5e8")
        palette = _COLORS_ON_DARK if is_dark else _COLORS
        style: Any = {"axes.edgecolor": rule, "axes.facecolor": back, "font.size": 8.5, "grid.color": rule}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
        with rc_context(style):
            width, height = (size / _CURVES_DPI for size in CURVES_SIZE)
            figure = Figure(figsize=(width, height), dpi=_CURVES_DPI, facecolor=back)
            # The labels at the ends of the lines fill the gap between the two axes.
            _plot_lines(figure.add_axes((0.07, 0.13, 0.55, 0.75)), curves, text, palette)
            _plot_shares(figure.add_axes((0.8, 0.13, 0.185, 0.75)), curves, text, palette)
            return _save(figure)


def _prepare_axes(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.set_xlabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _plot_lines(axes: "Axes", curves: Curves, text: str, palette: Sequence[str]) -> None:
    _prepare_axes(axes, curves.title, curves.label)
    columns = range(len(curves.stages))
    ends = {}
    for number, (name, shares) in enumerate(curves.lines.items()):
        color = palette[number % len(palette)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(columns, shares, color=color, marker=marker, markersize=4, linewidth=1.2, clip_on=False)
        ends[name] = (shares[-1], color, "normal")
    axes.plot(columns, curves.mean, color=text, marker="o", markersize=5.5, linewidth=3, clip_on=False)
    ends["mean"] = (curves.mean[-1], text, "bold")
    last = len(curves.stages) - 1
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.08, last)
    axes.set_xticks(columns, curves.stages)
    heights = spread_labels([share for share, _, _ in ends.values()], _LABEL_GAP, (0.02, 0.99))
    for height, (name, (share, color, weight)) in zip(heights, ends.items(), strict=True):
        axes.plot((last + 0.05, last + 0.13), (share, height), color=color, linewidth=0.8, clip_on=False)
        axes.text(last + 0.16, height, f"{name} {share:.0%}", color=color, fontweight=weight, va="center")


def _plot_shares(axes: "Axes", curves: Curves, text: str, palette: Sequence[str]) -> None:
    _prepare_axes(axes, curves.bar_title, curves.label)
    columns = range(len(curves.bars))
    bars = axes.bar(columns, curves.bars, width=0.6, color=palette[1])
    axes.bar_label(bars, [f"{share:.1%}" for share in curves.bars], padding=2, color=text)
    axes.set_xticks(columns, curves.stages[len(curves.stages) - len(curves.bars) :])
    axes.set_ylim(0, max([0.01, *curves.bars]) * 1.15)
    axes.set_yticks([])


def spread_labels(heights: Sequence[float], gap: float, bounds: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """Move labels from their preferred heights apart by as little as possible, keeping their order.

    `gap` is the minimal distance of two labels, `bounds` are the lowest and highest allowed heights if the labels fit.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    # Labels that touch form a block: (how many, sum of the bottom heights that each of them would prefer).
    blocks: list[tuple[int, float]] = []

    def find_bottom(block: tuple[int, float]) -> float:
        num, total = block
        return max(bounds[0], min(total / num, bounds[1] - (num - 1) * gap))

    for index in order:
        blocks.append((1, heights[index]))
        while len(blocks) > 1 and find_bottom(blocks[-2]) + blocks[-2][0] * gap > find_bottom(blocks[-1]):
            num, total = blocks.pop()
            num_below, total_below = blocks.pop()
            blocks.append((num_below + num, total_below + total - num * num_below * gap))
    moved = [find_bottom(block) + step * gap for block in blocks for step in range(block[0])]
    by_index = dict(zip(order, moved, strict=True))
    return [by_index[index] for index in range(len(heights))]
