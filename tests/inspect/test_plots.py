"""Plots and Markdown tables: every value is drawn, names are literal text, the same input gives the same bytes."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from cutlm.inspect.plots import (
    CURVES_SIZE,
    Bar,
    Curves,
    draw_bars,
    draw_curves,
    make_paper_bars,
    plot_bars,
    spread_labels,
)
from cutlm.inspect.tables import format_table

BARS = [Bar("mine $\\nosuch$", 40.0, 35.5, 44.0), Bar("x" * 99, 0.0), *make_paper_bars({"CUT": 61.06}, " (all)")]
CURVES = Curves(
    title="Correct answers",
    label="iteration",
    stages=["base", "1", "2"],
    lines={f"family {number}": [0.1 * number, 1.0, 0.0] for number in range(9)},
    mean=[0.4, 1.0, 0.0],
    bar_title="Tokens flagged",
    bars=[0.0, 0.0],
)


def test_bars_show_values_intervals_and_names():
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
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2, "ours and the paper's"


def test_bars_are_deterministic_for_any_name(recwarn):
    png = draw_bars("\u4f60 $\\nosuch$", BARS, "percent")
    assert png == draw_bars("\u4f60 $\\nosuch$", BARS, "percent")
    assert png.startswith(b"\x89PNG")
    assert not recwarn.list


def test_curves_are_deterministic_and_of_the_documented_size():
    light, dark = draw_curves(CURVES), draw_curves(CURVES, is_dark=True)
    assert light != dark
    assert draw_curves(CURVES) == light
    for png in (light, dark):
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert png[-8:-4] == b"IEND"
        assert struct.unpack(">II", png[16:24]) == CURVES_SIZE


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_spread_labels_keep_order_distance_and_bounds(heights):
    moved = spread_labels(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    ordered = [moved[index] for index in order]
    assert all(above - below > 0.1 - 1e-9 for below, above in itertools.pairwise(ordered))
    assert min(ordered) > -1e-9
    assert max(ordered) < 1 + 1e-9


def test_spread_labels_move_as_little_as_possible():
    assert spread_labels([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
    assert spread_labels([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_table_cells_are_escaped():
    assert format_table(["a|b", "c"], [["<img src=x>\n| d |", ""], ["±  2", "3"]]) == "\n".join(
        [r"| a\|b | c |", "| --- | ---: |", r"| \<img src=x> \| d \| |  |", "| ± 2 | 3 |"]
    )
