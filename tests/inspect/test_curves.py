"""The curves as a picture: a PNG of the promised size, the same each time, whose labels do not overlap."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.inspect.plots import CURVES_SIZE, Curves, draw_curves, spread_labels

CURVES = Curves(
    title="Right answers",
    label="iteration",
    stages=["base", "1", "2"],
    lines={f"family {number}": [0.1 * number, 1.0, 0.0] for number in range(9)},
    mean=[0.4, 1.0, 0.0],
    bar_title="Tokens blamed",
    bars=[0.0, 0.0],
)


def read_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("is_dark", [False, True])
def test_the_picture_is_a_png_of_the_promised_size_and_the_same_each_time(is_dark):
    png = draw_curves(CURVES, is_dark=is_dark)
    assert read_size(png) == CURVES_SIZE
    assert draw_curves(CURVES, is_dark=is_dark) == png


def test_light_and_dark_pictures_differ():
    assert draw_curves(CURVES) != draw_curves(CURVES, is_dark=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_labels_stand_apart_in_their_order_and_inside(heights):
    moved = spread_labels(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    stood = [moved[place] for place in order]
    assert all(above - below > 0.1 - 1e-9 for below, above in itertools.pairwise(stood))
    assert min(stood) > -1e-9
    assert max(stood) < 1 + 1e-9


def test_labels_that_are_apart_stay_where_they_are():
    assert spread_labels([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
    assert spread_labels([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
