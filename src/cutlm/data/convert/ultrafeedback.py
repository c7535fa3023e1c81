"""UltraFeedback (Cui et al. 2023): a model's critiques and scores of several completions per instruction.

The rows are those that its authors published (`instruction` and `completions`), not the pairs derived from them.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from cutlm.data.convert import MAX_SCORE, MIN_SCORE, Conversion, Number, Source, scale_rating, validate_rows
from cutlm.data.files import SourceRow
from cutlm.data.records import SATISFACTORY_SCORE

MIN_RATING, MAX_RATING = 1.0, 5.0


class Annotation(Source):
    Rating: Number = None  # in one aspect, 1 to 5


class Completion(Source):
    response: str | None = None  # left out by columns that have nulls
    critique: str | None = None
    overall_score: Number = None
    annotations: dict[str, Annotation | None] | None = None
    model: str | None = None

    @property
    def score(self) -> float | None:
        """The overall score, otherwise the mean rating, scaled from 1-5 to 1-10."""
        if self.overall_score is not None:
            return self.overall_score
        annotations = (self.annotations or {}).values()
        ratings = [note.Rating for note in annotations if note is not None and note.Rating is not None]
        if not ratings:
            return None
        return scale_rating(sum(ratings) / len(ratings), MIN_RATING, MAX_RATING)


class Row(Source):
    instruction: str
    completions: list[Completion]
    source: str | None = None


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn every completion into a record with the critique as judgment.

    A completion with a low score and no critique is left out: a record without a judgment would count as satisfactory.
    """
    conversion = Conversion("completions")
    for location, row in validate_rows(rows, Row):
        for completion in row.completions:
            fault = _find_fault(completion) or _find_missing_judgment(completion)
            conversion.add(location, fault or _make_record(row, completion))
    return conversion


def convert_to_pairs(rows: Iterable[SourceRow]) -> Conversion:
    """Turn all pairs of an instruction's completions into preference pairs in the format of TRL's trainers."""
    conversion = Conversion("pairs")
    for location, row in validate_rows(rows, Row):
        for one, other in combinations(row.completions, 2):
            conversion.add(location, _find_fault(one) or _find_fault(other) or _make_pair(row, one, other))
    return conversion


def _make_pair(row: Row, one: Completion, other: Completion) -> dict[str, Any] | str:
    if one.score is None or other.score is None:
        return "no score"
    if one.score == other.score:
        return "the same score"
    chosen, rejected = (one, other) if one.score > other.score else (other, one)
    pair = {"prompt": row.instruction, "chosen": chosen.response, "rejected": rejected.response}
    return pair | {"chosen_score": chosen.score, "rejected_score": rejected.score}


def _find_fault(completion: Completion) -> str | None:
    """Return why a completion cannot be used at all, or None."""
    if not (completion.response or "").strip():
        return "empty response"
    if completion.score is not None and not MIN_SCORE <= completion.score <= MAX_SCORE:
        return f"score outside {MIN_SCORE:g} to {MAX_SCORE:g}"
    return None


def _find_missing_judgment(completion: Completion) -> str | None:
    """Return why a completion without a critique makes no record, or None."""
    if (completion.critique or "").strip():
        return None
    if completion.score is None:
        return "no critique and no score"
    return None if completion.score >= SATISFACTORY_SCORE else f"no critique, but scored below {SATISFACTORY_SCORE:g}"


def _make_record(row: Row, completion: Completion) -> dict[str, Any]:
    judgment = completion.critique if (completion.critique or "").strip() else None
    record: dict[str, Any] = {"instruction": row.instruction, "output": completion.response, "judgment": judgment}
    further = {"score": completion.score, "source": row.source, "model": completion.model}
    return record | {key: value for key, value in further.items() if value is not None}
