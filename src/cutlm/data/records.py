"""Judged records: an instruction, a response to it, and what was said about that response.

This module reads, validates and counts them. Turning them into token ids is left to `cutlm.prompting.encoding`, making
them from other formats to `cutlm.data.convert`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from cutlm.data.files import SourceRow, read_rows
from cutlm.errors import DataError

SATISFACTORY_SCORE = 7.0
PRAISE = "Perfect."
_PERFECT = re.compile(r"\s*perfect\b", re.IGNORECASE)


def _check_text(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError(
            "null_byte", "expected text without null bytes, got one at {at}", {"at": text.index("\0")}
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "surrogate", "expected text, got half of a surrogate pair at {at}", {"at": error.start}
        ) from None
    return text


def _check_filled(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "expected text, got an empty string")
    return _check_text(text)


def _check_judgment(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "expected text or null, got an empty string; write null if nothing is wrong")
    return _check_text(text)


def _check_spans(value: Any) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    is_list_of_pairs = isinstance(value, list | tuple) and all(
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(isinstance(place, int) and not isinstance(place, bool) for place in span)
        for span in value
    )
    if not is_list_of_pairs:
        raise PydanticCustomError(
            "spans", "expected a list of [start, end] in characters of output, or null, got something else"
        )
    return tuple((start, end) for start, end in value)


Text = Annotated[str, AfterValidator(_check_text)]
FilledText = Annotated[str, AfterValidator(_check_filled)]
JudgmentText = Annotated[str, AfterValidator(_check_judgment)]


class JudgedRecord(BaseModel):
    """One response and the judgment of it.

    Attributes:
        instruction: What was asked.
        input: Further material for the instruction; it follows the instruction after a newline.
        output: The response that was judged.
        judgment: What is wrong with the response, in words; None when nothing is.
        score: A rating of the response, 1 to 10; 7 or more means satisfactory.
        i_ans: An improved response, where the source has one.
        wrong_spans: Where the response is wrong: [start, end) in characters of `output`. An empty span [n, n] is the
            token that starts there; at the very end, that the response ends too soon.

    Other fields of a row are kept as they are, but one that is a misspelling of a field above is an error.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    instruction: FilledText
    input: Annotated[Text, BeforeValidator(lambda value: "" if value is None else value)] = ""
    output: FilledText
    judgment: JudgmentText | None = None
    score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    i_ans: Text | None = None
    wrong_spans: Annotated[tuple[tuple[int, int], ...] | None, BeforeValidator(_check_spans)] = None

    @field_validator("wrong_spans")
    @classmethod
    def _check_places(
        cls, spans: tuple[tuple[int, int], ...] | None, info: ValidationInfo
    ) -> tuple[tuple[int, int], ...] | None:
        length = len(info.data.get("output") or "")
        bad = [span for span in spans or () if not 0 <= span[0] <= span[1] <= length]
        if bad and "output" in info.data:
            raise PydanticCustomError(
                "spans",
                "expected 0 <= start <= end <= {length}, the length of output, got {span}",
                {"length": length, "span": str(list(bad[0]))},
            )
        return spans

    @property
    def is_satisfactory(self) -> bool:
        """True when nothing is wrong with the response, so that it may be learned as it stands.

        The judgment is null, or starts with the word "Perfect" in any letter case, or the score is 7 or more.
        """
        if self.score is not None and self.score >= SATISFACTORY_SCORE:
            return True
        return self.judgment is None or is_praise(self.judgment)

    @property
    def stated_judgment(self) -> str:
        """What a model is told of the response: the judgment of an unsatisfactory one, praise for any other.

        The judgment of a response that its score makes satisfactory may well object to something.
        """
        if not self.is_satisfactory or (self.judgment is not None and _PERFECT.match(self.judgment)):
            assert self.judgment is not None
            return self.judgment
        return PRAISE

    @property
    def full_instruction(self) -> str:
        """The instruction and, after a newline, the input where there is one."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


class InstructionRow(BaseModel):
    """An instruction to be answered; AlpacaEval's rows are such.

    Attributes:
        instruction: What is asked.
        input: Further material for the instruction.
        dataset: Where it comes from.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    instruction: FilledText
    input: Annotated[Text, BeforeValidator(lambda value: "" if value is None else value)] = ""
    dataset: Text | None = None


def is_praise(judgment: str) -> bool:
    """Whether a judgment says that nothing is wrong: it starts with the word "Perfect" in any letter case."""
    return _PERFECT.match(judgment) is not None


FIELDS = tuple(JudgedRecord.model_fields)
RowT = TypeVar("RowT", JudgedRecord, InstructionRow)


@dataclass(frozen=True)
class RecordCheck:
    """What is in a file of records: the good rows, and a sentence for everything that is wrong.

    Attributes:
        records: The rows that can be used, in the order of the file.
        locations: Where each of them stands, such as `data.jsonl:17`.
        problems: A sentence for every row and field that cannot be used.
        duplicates: A sentence for every row that repeats an earlier one word for word.
        num_rows: Rows in the file, good and bad.
    """

    records: list[JudgedRecord] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    num_rows: int = 0

    @property
    def num_satisfactory(self) -> int:
        return sum(record.is_satisfactory for record in self.records)

    @property
    def num_unsatisfactory(self) -> int:
        return len(self.records) - self.num_satisfactory


def check_records(path: str | Path) -> RecordCheck:
    """Reads a file of records and reports everything that is wrong with it.

    Raises:
        DataError: The file as a whole cannot be read, or is no list of records.
    """
    rows, problems = read_rows(path)
    check = check_rows(rows)
    return RecordCheck(
        check.records, check.locations, problems + check.problems, check.duplicates, check.num_rows + len(problems)
    )


def check_rows(rows: Iterable[SourceRow]) -> RecordCheck:
    """Validates rows, keeping their locations for messages."""
    check = RecordCheck()
    num_rows = 0
    first_places: dict[tuple[Any, ...], str] = {}
    for row in rows:
        num_rows += 1
        if isinstance(row.value, JudgedRecord):
            record: JudgedRecord | None = row.value
        else:
            record = _validate_record(row, check.problems)
        if record is None:
            continue
        key = (record.instruction, record.input, record.output, record.judgment)
        if key in first_places:
            check.duplicates.append(
                f"{row.location}: the same instruction, response and judgment as {first_places[key]}"
            )
        else:
            first_places[key] = row.location
        check.records.append(record)
        check.locations.append(row.location)
    return RecordCheck(check.records, check.locations, check.problems, check.duplicates, num_rows)


def _validate_record(row: SourceRow, problems: list[str]) -> JudgedRecord | None:
    num_before = len(problems)
    for key in row.value if isinstance(row.value, Mapping) else ():
        if key in FIELDS:
            continue
        nearest = difflib.get_close_matches(str(key).lower(), FIELDS, n=1, cutoff=0.81)
        if nearest and nearest[0] not in row.value:
            problems.append(f"{row.location}: unknown field {key!r}; did you mean {nearest[0]!r}?")
    record = validate_row(row, JudgedRecord, problems)
    return record if len(problems) == num_before else None


def validate_row(row: SourceRow, kind: type[RowT], problems: list[str]) -> RowT | None:
    """Reads a row as one of its kind; where it does not fit, adds a sentence per field to `problems`."""
    if not isinstance(row.value, Mapping):
        fields = ", ".join(kind.model_fields)
        problems.append(f"{row.location}: expected an object with the fields {fields}, got {describe_value(row.value)}")
        return None
    try:
        return kind.model_validate(dict(row.value))
    except ValidationError as error:
        problems.extend(_describe(row, detail) for detail in error.errors())
        return None


def _describe(row: SourceRow, detail: Any) -> str:
    if not detail["loc"]:
        return f"{row.location}: the row cannot be used ({detail['msg']})"
    name = detail["loc"][0]
    if detail["type"] == "missing":
        return (
            f"{row.location}: field {name!r} is missing; the row has {', '.join(map(repr, row.value)) or 'no fields'}"
        )
    if detail["type"] in ("null_byte", "surrogate", "empty", "spans"):
        return f"{row.location}: field {name!r}: {detail['msg']}"
    expected = "a finite number or null" if name == "score" else "a string"
    if name in ("judgment", "i_ans", "input", "dataset"):
        expected = "a string or null"
    return f"{row.location}: field {name!r}: expected {expected}, got {describe_value(detail['input'])}"


def describe_value(value: Any) -> str:
    """Names a JSON value by its kind, and shows a short one."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    kind = kinds.get(type(value), type(value).__name__)
    return f"{kind} ({value})" if isinstance(value, int | float) else kind


def load_records(path: str | Path) -> list[JudgedRecord]:
    """Reads a file of records (a JSON array or JSON Lines, gzip and xz too).

    Args:
        path: The file.

    Returns:
        Every record of the file, in its order.

    Raises:
        DataError: The file cannot be read, holds no record, or a row cannot be used; every such row is named.
    """
    check = check_records(path)
    raise_problems(check, str(path))
    return check.records


def raise_problems(check: RecordCheck, source: str) -> None:
    """Raises for bad rows, all at once, or for no rows at all.

    Raises:
        DataError: As said.
    """
    if check.problems:
        raise DataError(
            check.problems, hint=f"{len(check.problems)} problems in {source}; mend them, nothing was skipped"
        )
    if not check.records:
        raise DataError(f"{source}: no records; expected a JSON array or JSON Lines with at least one record")


def as_records(rows: Sequence[Any], source: str) -> RecordCheck:
    """Validates records given in memory (dictionaries or `JudgedRecord`s).

    Args:
        rows: The records.
        source: What to call them in messages, such as `train_dataset`.

    Raises:
        DataError: A row cannot be used, or there is none.
    """
    check = check_rows(SourceRow(f"{source}[{index}]", row) for index, row in enumerate(rows))
    raise_problems(check, source)
    return check
