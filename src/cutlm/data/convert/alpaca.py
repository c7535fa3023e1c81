"""Rows that are records already, such as the published judgments of CUT's online iterations.

A row has `instruction`, `input`, `output`, `judgment` and whatever else; it is kept as it is, save that a null
`input` becomes "" and an empty `score` or `i_ans` goes.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cutlm.data.convert import Conversion
from cutlm.data.files import SourceRow


def convert(rows: list[SourceRow]) -> Conversion:
    """Turns alpaca rows into records; none is left out, and bad ones are for the check of the records to name."""
    kept = [SourceRow(row.location, _convert_row(row.value)) for row in rows]
    return Conversion(kept, len(rows), Counter())


def _convert_row(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    record = {key: value for key, value in row.items() if key not in ("score", "i_ans") or value not in (None, "")}
    if "input" in record and record["input"] is None:
        record["input"] = ""
    return record
