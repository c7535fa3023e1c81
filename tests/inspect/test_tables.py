"""Markdown tables: what stands in a cell is text, whatever it holds."""

from cutlm.inspect.tables import join_cells


def test_what_stands_in_a_cell_is_text():
    assert join_cells(["a|b", "c"], [["<img src=x>\n| d |", ""], ["±  2", "3"]]) == "\n".join(
        [r"| a\|b | c |", "| --- | ---: |", r"| \<img src=x> \| d \| |  |", "| ± 2 | 3 |"]
    )
