"""Shepherd (Wang et al. 2023): people's feedback on answers of models.

It consists of two files with the same answers line by line: `human_data_for_model.jsonl` has the question, the answer
and the feedback; `human_data_raw.jsonl` also has the correct answer, under `metadata`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cutlm.data.convert import Conversion, Source
from cutlm.data.files import SourceRow
from cutlm.data.records import validate_row
from cutlm.errors import DataError

FILE_NAMES = ("human_data_for_model.jsonl", "human_data_raw.jsonl")


class ModelRow(Source):
    id: Any = None
    dataset: Any = None
    question: str
    answer: str
    feedback: str


class Metadata(Source):
    context: str
    output_candidate: str
    output_correct: str | None = None


class RawRow(Source):
    metadata: Metadata


def convert(one: Sequence[SourceRow], other: Sequence[SourceRow]) -> Conversion:
    """Turn Shepherd's two files, in any order, into records with the correct answer as `i_ans`.

    Lines without an answer or feedback are left out.
    """
    if _is_raw(one) == _is_raw(other):
        expected = "one file with 'question', 'answer' and 'feedback' and one with 'metadata'"
        got = f"{_describe_file(one)} and {_describe_file(other)}"
        raise DataError(f"shepherd: expected {expected}, got {got}; name {' and '.join(FILE_NAMES)}")
    model_rows, raw_rows = (other, one) if _is_raw(one) else (one, other)
    if len(model_rows) != len(raw_rows):
        got = f"{_describe_file(model_rows)} and {_describe_file(raw_rows)}"
        raise DataError(f"shepherd: expected two files of the same length, got {got}; download them again")
    problems: list[str] = []
    conversion = Conversion()
    for model_row, raw_row in zip(model_rows, raw_rows, strict=True):
        judged = validate_row(model_row, ModelRow, problems)
        raw = validate_row(raw_row, RawRow, problems)
        if judged is None or raw is None:
            continue
        pairs = {
            ("question", "metadata.context"): (judged.question, raw.metadata.context),
            ("answer", "metadata.output_candidate"): (judged.answer, raw.metadata.output_candidate),
        }
        problems.extend(
            f"{model_row.location} and {raw_row.location}: expected {name!r} and {raw_name!r} to be the same text, got"
            " two different ones; the files must list the same answers in the same order"
            for (name, raw_name), (text, raw_text) in pairs.items()
            if text != raw_text
        )
        conversion.add(model_row.location, _make_record(judged, raw.metadata))
    if problems:
        raise DataError(problems)
    return conversion


def _make_record(judged: ModelRow, metadata: Metadata) -> dict[str, Any] | str:
    if not judged.answer.strip():
        return "empty answer"
    if not judged.feedback.strip():
        return "empty feedback"
    record = {"instruction": judged.question, "output": judged.answer, "judgment": judged.feedback}
    i_ans = metadata.output_correct if (metadata.output_correct or "").strip() else None
    further = {"i_ans": i_ans, "id": judged.id, "dataset": judged.dataset}
    return record | {name: value for name, value in further.items() if value is not None}


def _is_raw(rows: Sequence[SourceRow]) -> bool:
    return any(isinstance(row.value, Mapping) and "metadata" in row.value for row in rows)


def _describe_file(rows: Sequence[SourceRow]) -> str:
    if not rows:
        return "a file without rows"
    return f"{len(rows)} rows {'with' if _is_raw(rows) else 'without'} 'metadata' (the last is {rows[-1].location})"
