"""Published judgment data turned into records: one module per source, each with functions from rows to rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from cutlm.data.files import SourceRow
from cutlm.data.records import ModelT, validate_row
from cutlm.errors import DataError


class Source(BaseModel):
    """Base of the schemas of sources: values are not coerced, and unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


@dataclass
class Conversion:
    """The result of converting a source."""

    unit: str = "rows"  # the name of the items that are counted
    rows: list[SourceRow] = field(default_factory=list)  # each with its location in the source
    left_out: Counter[str] = field(default_factory=Counter)  # number of items by reason

    @property
    def num_read(self) -> int:
        return len(self.rows) + self.left_out.total()

    def add(self, location: str, result: dict[str, Any] | str) -> None:
        """Add a converted row, or the reason for which it is left out."""
        if isinstance(result, str):
            self.left_out[result] += 1
        else:
            self.rows.append(SourceRow(location, result))


def validate_rows(rows: Iterable[SourceRow], model: type[ModelT]) -> list[tuple[str, ModelT]]:
    """Validate the rows of a source; raise a DataError that names all problems."""
    problems: list[str] = []
    validated = [(row.location, validate_row(row, model, problems)) for row in rows]
    if problems:
        raise DataError(problems)
    return [(location, value) for location, value in validated if value is not None]
