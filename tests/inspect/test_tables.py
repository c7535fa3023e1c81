"""Markdown tables: what stands in a cell is text, whatever it holds."""

from cutlm.inspect.tables import format_table


def test_what_stands_in_a_cell_is_text():
    assert format_table(["a|b", "c"], [["<img src=x>\n| d |", ""], ["±  2", "3"]]) == "\n".join(
        [r"| a\|b | c |", "| --- | ---: |", r"| \<img src=x> \| d \| |  |", "| ± 2 | 3 |"]
    )
