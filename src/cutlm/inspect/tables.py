"""Markdown tables, and plots as PNG."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def join_cells(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right. What stands in a cell is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    shown = [[escape_text(cell) for cell in cells] for cells in (header, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (shown[0], rule, *shown[1:]))


def escape_text(cell: str) -> str:
    """Text that neither ends its cell or its line nor begins an element of HTML."""
    return re.sub(r"[|<]", r"\\\g<0>", " ".join(cell.split()))


def draw_plot(title: str, plot: Callable[[Any], None], *, height: float = 4.6) -> bytes:
    """Draws one plot.

    Args:
        title: Above it.
        plot: Draws on matplotlib's axes.
        height: In inches.

    Returns:
        The PNG file's bytes, the same ones each time.
    """
    # It announces on its first day on a machine that it is looking for fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    plot(axes)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name may have letters that its font lacks, and shows boxes
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
