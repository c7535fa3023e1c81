"""Published judgment data turned into records: one module per source, each a function from rows to rows.

Reading the files, checking the records and writing them is left to the command line (`cutlm.cli.convert`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cutlm.data.files import SourceRow
from cutlm.data.records import describe_value

_KINDS = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "a boolean",
    "float_type": "a number",
}


@dataclass(frozen=True)
class Conversion:
    """What a source became.

    Attributes:
        rows: The converted rows, each with the place in the source that it comes from.
        num_read: How many of `unit` were read: those in `rows` and those left out.
        left_out: How many of them were left out, by reason.
        unit: What the source was counted in.
    """

    rows: list[SourceRow]
    num_read: int
    left_out: Counter[str]
    unit: str = "rows"


class Source(BaseModel):
    """Base of the descriptions of a source's rows: nothing is turned into another type, further fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


SourceT = TypeVar("SourceT", bound=Source)


def parse_row(model: type[SourceT], row: SourceRow, problems: list[str]) -> SourceT | None:
    """Reads a row of a source; where it does not fit, appends a sentence per field to `problems` and returns None."""
    try:
        return model.model_validate(row.value)
    except ValidationError as error:
        problems.extend(_describe(row, detail) for detail in error.errors())
        return None


def _describe(row: SourceRow, detail: Any) -> str:
    kind = detail["type"]
    if not detail["loc"]:
        return f"{row.location}: expected an object, got {describe_value(detail['input'])}"
    where = f"{row.location}: field {_join_path(detail['loc'])!r}"
    if kind == "missing":
        return f"{where} is missing; the object around it has {', '.join(map(repr, detail['input'])) or 'no fields'}"
    return f"{where}: expected {_KINDS.get(kind, detail['msg'])}, got {describe_value(detail['input'])}"


def _join_path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
