"""Published judgment data turned into records: one module per source, each with functions from rows to rows."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from cutlm.data.conversations import ConversationError, parse_messages
from cutlm.data.files import SourceRow
from cutlm.data.records import ModelT, validate_row
from cutlm.errors import DataError

MIN_SCORE, MAX_SCORE = 1.0, 10.0
# Fields that a message keeps besides its role and its text.
_KEPT = ("tool_calls", "tool_call_id", "name")


class Source(BaseModel):
    """Base of the schemas of sources: values are not coerced, and unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


@dataclass
class Conversion:
    """The result of converting a source."""

    unit: str = "rows"  # the name of the items that are counted
    rows: list[SourceRow] = field(default_factory=list)  # each with its location in the source
    unjudged: list[SourceRow] = field(default_factory=list)  # responses without a judgment in words
    left_out: Counter[str] = field(default_factory=Counter)  # number of items by reason
    listed: list[dict[str, Any]] = field(default_factory=list)  # items that are not kept, with `location` and `reason`

    @property
    def num_read(self) -> int:
        return len(self.rows) + len(self.unjudged) + self.left_out.total()

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


def _read_number(value: Any) -> float | None:
    """Read a score as the source writes it: a number, a number in a string, null or "N/A"."""
    if value is None or value == "N/A":
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise PydanticCustomError("no_number", 'a finite number, null or "N/A"')


Number = Annotated[float | None, BeforeValidator(_read_number)]


def scale_rating(rating: float, lowest: float, highest: float) -> float:
    """Scale a rating to a score from 1 to 10."""
    return MIN_SCORE + (rating - lowest) / (highest - lowest) * (MAX_SCORE - MIN_SCORE)


def read_messages(values: Any) -> list[dict[str, Any]] | None:
    """Read messages with `role` and `content`, or `from` and `value`; None if they are of another kind than text.

    Calls of tools and their results keep what belongs to them.
    """
    try:
        messages = list(parse_messages(values, "messages", allow_aliases=True))
    except ConversationError:
        return None
    return [
        {"role": message["role"], "content": message["content"]}
        | {key: message[key] for key in _KEPT if message.get(key)}
        for message in messages
    ]


def make_response(messages: Sequence[Mapping[str, Any]], response: str, tools: Any = None) -> dict[str, Any]:
    """Return a response to a conversation as a row: with `messages` unless there is one message, by the user."""
    if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
        return {"instruction": messages[0]["content"], "output": response}
    row: dict[str, Any] = {"messages": [*map(dict, messages), {"role": "assistant", "content": response}]}
    return row | ({"tools": tools} if tools else {})
