"""Published judgment data turned into records: one module per source, each with functions from rows to rows."""

from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from cutlm.data.files import SourceRow


@dataclass(frozen=True)
class Conversion:
    """The result of converting a source.

    Attributes:
        rows: The converted rows, each with its location in the source.
        num_read: The number of `unit` that were read: those in `rows` and those left out.
        left_out: The number of `unit` that were left out, by reason.
        unit: What is counted.
    """

    rows: list[SourceRow]
    num_read: int
    left_out: Counter[str]
    unit: str = "rows"


class Source(BaseModel):
    """Base of the schemas of sources: values are not coerced, and unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)
