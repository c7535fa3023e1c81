"""Judged records: an instruction, a response to it, and a judgment of that response in words."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cutlm.data.conversations import Conversation, ConversationError, normalize_row
from cutlm.data.files import SourceRow, read_rows
from cutlm.data.formats import describe_row_format, find_judgment_column
from cutlm.data.sources import describe_sources
from cutlm.errors import DataError

SATISFACTORY_SCORE = 7.0
PRAISE = "Perfect."
_PERFECT = re.compile(r"\s*perfect\b", re.IGNORECASE)

# Text without null bytes, which some tokenizers stop at. A pattern also refuses halves of surrogate pairs.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
# The same with at least one character that Python does not count as white space.
FilledText = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00\x1c-\x1f][^\x00]*$")]
# A null `input` means no input.
InputText = Annotated[Text, BeforeValidator(lambda value: "" if value is None else value)]
_LaxSpan = Annotated[tuple[int, int], Field(strict=False)]
_Spans = tuple[tuple[int, int], ...] | None


class JudgedRecord(BaseModel):
    """One response and the judgment of it.

    A row may have a conversation instead of `instruction` and `output`: see `cutlm.data.conversations`.

    Attributes:
        instruction: The instruction, or the last message by the user of a conversation.
        input: Further material for the instruction; it follows the instruction after a newline.
        output: The response that was judged.
        judgment: The faults of the response, in words; None if it has no fault.
        score: A rating of the response, 1 to 10; 7 or more means satisfactory.
        i_ans: An improved response, if the source has one.
        wrong_spans: Where the response is wrong: [start, end) in characters of `output`. An empty span [n, n] marks
            the token that starts there; at the very end, it means that the response ends too soon.
        messages: A conversation of several turns, with a system prompt or with tools; its last message is the response.
        tools: The JSON schemas of the functions that the model may call in the conversation.

    Other fields of a row are kept unchanged, but a misspelling of a field above is an error.

    Examples:

        >>> JudgedRecord(instruction="Add 1 and 2.", output="4", judgment="The sum is 3.").is_satisfactory
        False
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    instruction: FilledText
    input: Annotated[InputText, Field(description="a string or null")] = ""
    output: FilledText
    judgment: Annotated[FilledText | None, Field(description="a string or null")] = None
    score: Annotated[float | None, Field(description="a finite number or null", allow_inf_nan=False)] = None
    i_ans: Annotated[Text | None, Field(description="a string or null")] = None
    wrong_spans: Annotated[
        tuple[_LaxSpan, ...] | None,
        Field(strict=False, description="a list of [start, end] in characters of output, or null"),
    ] = None

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_conversation(cls, row: Any) -> Any:
        return _normalize(row, is_answered=True)

    @field_validator("wrong_spans")
    @classmethod
    def _check_range(cls, spans: _Spans, info: ValidationInfo) -> _Spans:
        length = len(info.data.get("output", ""))
        for span in (spans or ()) if "output" in info.data else ():
            if not 0 <= span[0] <= span[1] <= length:
                message = "expected 0 <= start <= end <= {length}, the length of output, got {span}"
                raise PydanticCustomError("range", message, {"length": length, "span": str(list(span))})
        return spans

    @property
    def is_satisfactory(self) -> bool:
        """Whether nothing is wrong with the response: the judgment is null or praise, or the score is 7 or more."""
        is_high = self.score is not None and self.score >= SATISFACTORY_SCORE
        return is_high or self.judgment is None or is_praise(self.judgment)

    @property
    def stated_judgment(self) -> str:
        """The judgment that a model is shown: praise for any satisfactory response.

        A response that is satisfactory because of its score may have a judgment that objects to something.
        """
        if self.judgment is not None and (not self.is_satisfactory or is_praise(self.judgment)):
            return self.judgment
        return PRAISE

    @property
    def full_instruction(self) -> str:
        """The instruction and, if there is an input, a newline and the input; a conversation as plain text."""
        return self.conversation.to_text()

    @property
    def conversation(self) -> Conversation:
        """What precedes the response."""
        if self.messages is not None:
            return Conversation(tuple(self.messages[:-1]), tuple(self.tools or ()))
        return Conversation.start(f"{self.instruction}\n{self.input}" if self.input else self.instruction)

    def drop_oldest_turn(self) -> "JudgedRecord | None":
        """Return the record without the oldest turn of its conversation; None if only the last is left."""
        shorter = self.conversation.drop_oldest_turn()
        if shorter is None or self.messages is None:
            return None
        return self.model_copy(update={"messages": [*map(dict, shorter.messages), self.messages[-1]]})


def _normalize(row: Any, *, is_answered: bool) -> Any:
    if not isinstance(row, Mapping):
        return row
    try:
        return normalize_row(row, is_answered=is_answered)
    except ConversationError as error:
        raise PydanticCustomError("conversation", "{problem}", {"problem": str(error)}) from None


class InstructionRow(BaseModel):
    """An instruction or a conversation to be answered, such as a row of AlpacaEval, with its data set."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    instruction: FilledText
    input: Annotated[InputText, Field(description="a string or null")] = ""
    dataset: Annotated[Text | None, Field(description="a string or null")] = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_conversation(cls, row: Any) -> Any:
        return _normalize(row, is_answered=False)

    @property
    def conversation(self) -> Conversation:
        """The conversation to answer."""
        if self.messages is not None:
            return Conversation(tuple(self.messages), tuple(self.tools or ()))
        return Conversation.start(f"{self.instruction}\n{self.input}" if self.input else self.instruction)


def is_praise(judgment: str) -> bool:
    """Whether a judgment says that nothing is wrong: it starts with the word "Perfect" in any letter case."""
    return _PERFECT.match(judgment) is not None


FIELDS = tuple(JudgedRecord.model_fields)
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass
class RecordCheck:
    """The contents of a file of records: its valid rows, and everything wrong with the others."""

    records: list[JudgedRecord] = field(default_factory=list)  # the valid rows, in the order of the file
    locations: list[str] = field(default_factory=list)  # the location of each, such as `data.jsonl:17`
    problems: list[str] = field(default_factory=list)  # a sentence for every row and field that is not valid
    duplicates: list[str] = field(default_factory=list)  # a sentence for every row that repeats an earlier one
    num_rows: int = 0  # valid or not

    @property
    def num_satisfactory(self) -> int:
        return sum(record.is_satisfactory for record in self.records)

    @property
    def num_unsatisfactory(self) -> int:
        return len(self.records) - self.num_satisfactory


def load_records(
    sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> list[JudgedRecord]:
    """Read all records of one or several files, globs, folders or data sets of the hub; see `read_data`.

    `columns` gives the field of a record for each column that has another name, such as `{"prompt": "instruction"}`.

    Raises:
        DataError: The file cannot be read or has no records, or rows are not valid; all of them are named.

    Examples:

        >>> records = load_records("records.jsonl")
    """
    check = check_records(sources, columns)
    raise_problems(check, describe_sources(sources))
    return check.records


def check_records(sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None) -> RecordCheck:
    """Read files of records and collect their problems; raise a DataError if one cannot be read as a whole."""
    rows, problems = read_rows(sources, columns)
    check = check_rows(rows)
    check.problems[:0] = problems
    check.num_rows += len(problems)
    return check


def list_rows(rows: Iterable[Any], source: str) -> list[Any]:
    """List the rows that a caller passed; raise a DataError for text, which would be a row for each character."""
    if isinstance(rows, str | Path):
        raise DataError(
            f"{source}: expected a list, got {type(rows).__name__} {str(rows)[:60]!r}; put it into a list, or read a"
            " file of records with cutlm.load_records"
        )
    return list(rows)


def as_records(rows: Iterable[Any], source: str) -> RecordCheck:
    """Validate records in memory, dictionaries or `JudgedRecord`s; raise a DataError if some are not valid or none.

    `source` is their name in messages, such as `train_dataset`.
    """
    check = check_rows(SourceRow(f"{source}[{index}]", row) for index, row in enumerate(list_rows(rows, source)))
    raise_problems(check, source)
    return check


def raise_problems(check: RecordCheck, source: str) -> None:
    """Raises a DataError with all problems of a check, or if there are no records."""
    if check.problems:
        raise DataError(check.problems, hint=f"{len(check.problems)} problems in {source}; fix them and try again")
    if not check.records:
        raise DataError(f"{source}: no records; expected at least one")


def check_rows(rows: Iterable[SourceRow]) -> RecordCheck:
    """Validate rows and keep their locations."""
    check = RecordCheck()
    first_locations: dict[tuple[Any, ...], str] = {}
    foreign: list[tuple[str, str]] = []
    unread: dict[str, list[str]] = {}  # the records with a judgment under another name, by that name
    for row in rows:
        check.num_rows += 1
        if found := describe_row_format(row.value):
            foreign.append((row.location, f"expected a record with instruction and output, got {found}"))
            continue
        record = row.value if isinstance(row.value, JudgedRecord) else _validate_record(row, check.problems)
        if record is None:
            continue
        if "judgment" not in record.model_fields_set and (name := find_judgment_column(record.model_extra or {})):
            unread.setdefault(name, []).append(row.location)
        key = (record.full_instruction, record.output, record.judgment)
        if first := first_locations.get(key):
            check.duplicates.append(f"{row.location}: the same instruction, response and judgment as {first}")
        first_locations.setdefault(key, row.location)
        check.records.append(record)
        check.locations.append(row.location)
    check.problems += join_problems(foreign)
    if not any("judgment" in record.model_fields_set for record in check.records):
        for name, locations in unread.items():
            columns = json.dumps({name: "judgment"})
            check.problems.append(
                f"{_name_first(locations)}: field 'judgment' is missing, and {name!r} would be ignored; rename"
                f" it (--columns '{columns}'), or remove it if nothing is wrong with the responses"
            )
    return check


def join_problems(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Join problems of rows, each with its location, into one sentence for each different problem.

    Example:

        >>> join_problems([("a:1", "no tools"), ("a:2", "no tools"), ("a:4", "no text")])
        ['a:1 and 1 more row: no tools', 'a:4: no text']
    """
    found: dict[str, list[str]] = {}
    for location, problem in problems:
        found.setdefault(problem, []).append(location)
    return [f"{_name_first(locations)}: {problem}" for problem, locations in found.items()]


def _name_first(locations: Sequence[str]) -> str:
    """Name the first of some rows, and say how many more there are."""
    num_more = len(locations) - 1
    return locations[0] + (f" and {num_more} more row{'s' * (num_more > 1)}" if num_more else "")


def _validate_record(row: SourceRow, problems: list[str]) -> JudgedRecord | None:
    num_before = len(problems)
    for key in row.value if isinstance(row.value, Mapping) else ():
        nearest = difflib.get_close_matches(str(key).lower(), FIELDS, n=1, cutoff=0.81) if key not in FIELDS else []
        if nearest and nearest[0] not in row.value:
            problems.append(f"{row.location}: unknown field {key!r}; did you mean {nearest[0]!r}?")
    record = validate_row(row, JudgedRecord, problems)
    return record if len(problems) == num_before else None


def validate_row(row: SourceRow, model: type[ModelT], problems: list[str]) -> ModelT | None:
    """Validate a row; if it is not valid, add a sentence per field to `problems` and return None."""
    if not isinstance(row.value, Mapping):
        fields = ", ".join(model.model_fields)
        problems.append(f"{row.location}: expected an object with the fields {fields}, got {describe_value(row.value)}")
        return None
    try:
        return model.model_validate(dict(row.value))
    except ValidationError as error:
        sentences = (f"{row.location}: {_describe_error(row.value, model, detail)}" for detail in error.errors())
        problems.extend(dict.fromkeys(sentences))
        return None


_EXPECTED = {"string_type": "a string", "list_type": "a list", "dict_type": "an object", "model_type": "an object"}
_EXPECTED |= {"bool_type": "a boolean", "float_type": "a number"}


def _describe_error(values: Mapping[str, Any], model: type[BaseModel], detail: Any) -> str:
    path, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "conversation":
        return str(detail["msg"])
    description = model.model_fields[path[0]].description if path and path[0] in model.model_fields else None
    if description is not None:  # one sentence for the field, whichever part of it is not valid
        path, value = path[:1], values[path[0]]
    name = f"field {join_path(path)!r}"
    if kind == "string_pattern_mismatch" and "\0" in value:
        return f"{name}: expected text without null bytes, got one at {value.index(chr(0))}"
    if kind == "string_pattern_mismatch":
        hint = "; write null if nothing is wrong" if path == ("judgment",) else ""
        return f"{name}: expected text, got an empty string{hint}"
    if kind == "string_unicode":
        return f"{name}: expected text, got half of a surrogate pair"
    if kind == "range":
        return f"{name}: {detail['msg']}"
    if kind == "missing" and description is None:
        return f"{name} is missing; the object has {', '.join(map(repr, value)) or 'no fields'}"
    return f"{name}: expected {description or _EXPECTED.get(kind, detail['msg'])}, got {describe_value(value)}"


def join_path(parts: Sequence[str | int]) -> str:
    """Return the path of a field within a row, such as `turns[2].text`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def describe_value(value: Any) -> str:
    """Describe a JSON value by its kind; also shows numbers and booleans."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    kind = "null" if value is None else kinds.get(type(value), type(value).__name__)
    return f"{kind} ({value})" if isinstance(value, int | float) else kind
