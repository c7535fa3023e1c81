"""Markdown tables for reports."""

import re
from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with the first column left-aligned and the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[escape_cell(cell) for cell in cells] for cells in (header, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (escaped[0], rule, *escaped[1:]))


def escape_cell(cell: str) -> str:
    """Escape text so that it neither ends its table cell or line nor starts an HTML element."""
    return re.sub(r"[|<]", r"\\\g<0>", " ".join(cell.split()))
