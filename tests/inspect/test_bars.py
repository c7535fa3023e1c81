"""Bars as a picture: every figure and its interval is drawn, and a name is text."""

import pytest
from matplotlib.figure import Figure

from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars, plot_bars

BARS = [Bar("mine $\\nosuch$", 40.0, 35.5, 44.0), Bar("x" * 99, 0.0), *make_paper_bars({"CUT": 61.06}, " (all)")]


def test_the_bars_are_the_figures_and_their_intervals():
    axes = Figure().subplots()
    plot_bars(axes, BARS, "percent")
    assert [bar.get_width() for bar in axes.patches] == [40.0, 0.0, 61.06]
    ((start, end),) = axes.collections[0].get_segments()
    assert [start[0], end[0]] == pytest.approx([35.5, 44.0])
    assert [text.get_text() for text in axes.texts] == ["40.00", "0.00", "61.06"]
    assert [name.get_text() for name in axes.get_yticklabels()] == [
        "mine $\\nosuch$",
        "x" * 39 + "\N{HORIZONTAL ELLIPSIS}",
        "paper (all): CUT",
    ]
    assert axes.get_xlim()[1] > 61.06
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2, "ours and theirs"


def test_the_picture_is_the_same_each_time_whatever_a_name_holds(recwarn):
    png = draw_bars("\u4f60 $\\nosuch$", BARS, "percent")
    assert png == draw_bars("\u4f60 $\\nosuch$", BARS, "percent")
    assert png.startswith(b"\x89PNG")
    assert not recwarn.list
