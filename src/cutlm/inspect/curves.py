"""Curves of an online run as a PNG: a share by iteration, thin for each part and thick for the mean, and small bars.

Lines are told apart by colour, marker and a label at their end: Okabe and Ito's colours, which colour-blind readers
tell apart. Nothing is measured here, and no window is opened.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (1400, 860)  # pixels; to be shown at half of it on ordinary screens
_DPI = 200
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c060a0", "#a87f00", "#3fa0dc", "#85604a")
_COLOURS_ON_DARK = ("#4fa8f0", "#ff8a3d", "#2fc79a", "#e493c0", "#e0bd4a", "#a3daf7", "#c9a78f")
_MARKERS = "os^Dv<>"
_LABEL_GAP = 0.058  # of the height of the axes


@dataclass(frozen=True)
class Curves:
    """What is drawn.

    Attributes:
        title: Of the lines.
        label: Of the horizontal axis.
        stages: Names along it.
        lines: A share at each stage for each part, by its name.
        mean: Their mean at each stage.
        bar_title: Of the bars.
        bars: A share each; the last ones of the stages.
    """

    title: str
    label: str
    stages: Sequence[str]
    lines: dict[str, Sequence[float]]
    mean: Sequence[float]
    bar_title: str
    bars: Sequence[float]


def draw_curves(curves: Curves, *, is_dark: bool = False) -> bytes:
    """Draws curves.

    Args:
        curves: What to draw.
        is_dark: Whether for a dark page.

    Returns:
        The PNG file's bytes, the same ones each time.
    """
    # It announces on its first day on a machine that it is looking for fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text, back, rule = ("#e4e7eb", "#1b1f26", "#3a414d") if is_dark else ("#22262c", "#ffffff", "#e3e5e8")
    palette = _COLOURS_ON_DARK if is_dark else _COLOURS
    shared: Any = {"axes.edgecolor": rule, "axes.facecolor": back, "font.size": 8.5, "grid.color": rule}
    shared |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    with rc_context(shared):
        figure = Figure(figsize=(SIZE[0] / _DPI, SIZE[1] / _DPI), dpi=_DPI, facecolor=back)
        # Between the two stand the labels at the lines' ends.
        _draw_lines(figure.add_axes((0.07, 0.13, 0.55, 0.75)), curves, text, palette)
        _draw_bars(figure.add_axes((0.8, 0.13, 0.185, 0.75)), curves, text, palette)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _prepare(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.set_xlabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_lines(axes: "Axes", curves: Curves, text: str, palette: Sequence[str]) -> None:
    _prepare(axes, curves.title, curves.label)
    locations = range(len(curves.stages))
    ends = {}
    for number, (name, shares) in enumerate(curves.lines.items()):
        colour = palette[number % len(palette)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(locations, shares, color=colour, marker=marker, markersize=4, linewidth=1.2, clip_on=False)
        ends[name] = (shares[-1], colour, "normal")
    axes.plot(locations, curves.mean, color=text, marker="o", markersize=5.5, linewidth=3, clip_on=False)
    ends["mean"] = (curves.mean[-1], text, "bold")
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.08, len(curves.stages) - 1)
    axes.set_xticks(locations, curves.stages)
    last = len(curves.stages) - 1
    heights = spread([share for share, _, _ in ends.values()], _LABEL_GAP, (0.02, 0.99))
    for height, (name, (share, colour, weight)) in zip(heights, ends.items(), strict=True):
        axes.plot((last + 0.05, last + 0.13), (share, height), color=colour, linewidth=0.8, clip_on=False)
        axes.text(last + 0.16, height, f"{name} {share:.0%}", color=colour, fontweight=weight, va="center")


def _draw_bars(axes: "Axes", curves: Curves, text: str, palette: Sequence[str]) -> None:
    _prepare(axes, curves.bar_title, curves.label)
    locations = range(len(curves.bars))
    drawn = axes.bar(locations, curves.bars, width=0.6, color=palette[1])
    axes.bar_label(drawn, [f"{share:.1%}" for share in curves.bars], padding=2, color=text)
    axes.set_xticks(locations, curves.stages[len(curves.stages) - len(curves.bars) :])
    axes.set_ylim(0, max([0.01, *curves.bars]) * 1.15)
    axes.set_yticks([])


def spread(heights: Sequence[float], gap: float, bounds: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """Moves labels apart, each as little as need be, in their order.

    Args:
        heights: Where they would stand.
        gap: What must lie between two of them.
        bounds: Where the lowest and the highest may stand, if there is room enough.
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # Labels that touch form a block: how many, and the sum of where its lowest one would stand for each.
    blocks: list[tuple[int, float]] = []

    def find_bottom(block: tuple[int, float]) -> float:
        num, total = block
        return max(bounds[0], min(total / num, bounds[1] - (num - 1) * gap))

    for place in order:
        blocks.append((1, heights[place]))
        while len(blocks) > 1 and find_bottom(blocks[-2]) + blocks[-2][0] * gap > find_bottom(blocks[-1]):
            num, total = blocks.pop()
            num_below, total_below = blocks.pop()
            blocks.append((num_below + num, total_below + total - num * num_below * gap))
    spread_heights = [find_bottom(block) + step * gap for block in blocks for step in range(block[0])]
    moved = dict(zip(order, spread_heights, strict=True))
    return [moved[place] for place in range(len(heights))]
