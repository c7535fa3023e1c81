"""Rows that are records already, such as the published judgments of CUT's online iterations."""

from collections.abc import Mapping
from typing import Any

from cutlm.data.convert import Conversion
from cutlm.data.files import SourceRow


def convert(rows: list[SourceRow]) -> Conversion:
    """Turn a null `input` into "" and drop an empty `score` or `i_ans`; rows are not validated."""
    return Conversion(rows=[SourceRow(row.location, _convert_row(row.value)) for row in rows])


def _convert_row(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    record = {key: value for key, value in row.items() if key not in ("score", "i_ans") or value not in (None, "")}
    return record | {"input": ""} if record.get("input", "") is None else record
