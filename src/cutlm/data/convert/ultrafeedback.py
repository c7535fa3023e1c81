"""UltraFeedback (Cui et al. 2023): a model's critiques and scores of several completions per instruction.

The rows are those that its authors published (`instruction` and `completions`), not the pairs others made of them.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from cutlm.data.convert import Conversion, Source, parse_row
from cutlm.data.files import SourceRow
from cutlm.data.records import SATISFACTORY_SCORE
from cutlm.errors import DataError

MIN_SCORE, MAX_SCORE = 1.0, 10.0
MIN_RATING, MAX_RATING = 1.0, 5.0


def _read_number(value: Any) -> float | None:
    """Reads a score as the source writes it: a number, a number in a string, or null or "N/A" where there is none."""
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


class Annotation(Source):
    """The rating of a completion in one aspect, 1 to 5."""

    Rating: Number = None


class Completion(Source):
    """A response and what was said about it."""

    response: str | None
    critique: str | None = None
    overall_score: Number = None
    annotations: dict[str, Annotation | None] | None = None
    model: str | None = None

    @property
    def score(self) -> float | None:
        """The overall score; where it is missing the mean rating, stretched so that 1 stays 1 and 5 becomes 10."""
        if self.overall_score is not None:
            return self.overall_score
        annotations = (self.annotations or {}).values()
        ratings = [note.Rating for note in annotations if note is not None and note.Rating is not None]
        if not ratings:
            return None
        share = (sum(ratings) / len(ratings) - MIN_RATING) / (MAX_RATING - MIN_RATING)
        return MIN_SCORE + share * (MAX_SCORE - MIN_SCORE)


class Row(Source):
    """An instruction and its completions."""

    instruction: str
    completions: list[Completion]
    source: str | None = None


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turns every completion into a record, the critique as judgment.

    Args:
        rows: The rows of the files.

    Returns:
        A record per completion that is kept. A low score without a critique is left out: a record without a
        judgment would count as satisfactory.

    Raises:
        DataError: Rows that are bad, all of them named.
    """
    kept: list[SourceRow] = []
    left_out: Counter[str] = Counter()
    num_read = 0
    for where, row in _parse(rows):
        for completion in row.completions:
            num_read += 1
            reason = _find_fault(completion) or _find_missing_judgment(completion)
            if reason:
                left_out[reason] += 1
            else:
                kept.append(SourceRow(where, _make_record(row, completion)))
    return Conversion(kept, num_read, left_out, unit="completions")


def convert_to_pairs(rows: Iterable[SourceRow]) -> Conversion:
    """Turns the completions of each instruction into preference pairs, the better-scored one as chosen.

    Args:
        rows: The rows of the files.

    Returns:
        Every pair of completions whose scores differ, as TRL's trainers read them: `prompt`, `chosen`, `rejected`,
        and the two scores.

    Raises:
        DataError: Rows that are bad, all of them named.
    """
    kept: list[SourceRow] = []
    left_out: Counter[str] = Counter()
    num_read = 0
    for where, row in _parse(rows):
        for one, other in combinations(row.completions, 2):
            num_read += 1
            reason = _find_fault(one) or _find_fault(other)
            if reason is None and (one.score is None or other.score is None):
                reason = "no score"
            if reason is None and one.score == other.score:
                reason = "the same score"
            if reason:
                left_out[reason] += 1
                continue
            chosen, rejected = sorted((one, other), key=lambda completion: completion.score or 0.0, reverse=True)
            pair = {
                "prompt": row.instruction,
                "chosen": chosen.response,
                "rejected": rejected.response,
                "chosen_score": chosen.score,
                "rejected_score": rejected.score,
            }
            kept.append(SourceRow(where, pair))
    return Conversion(kept, num_read, left_out, unit="pairs")


def _parse(rows: Iterable[SourceRow]) -> list[tuple[str, Row]]:
    problems: list[str] = []
    parsed = [(row.location, parse_row(Row, row, problems)) for row in rows]
    if problems:
        raise DataError(problems)
    return [(where, row) for where, row in parsed if row is not None]


def _find_fault(completion: Completion) -> str | None:
    """Says why a completion is of no use at all, or None when it is."""
    if not (completion.response or "").strip():
        return "empty response"
    if completion.score is not None and not MIN_SCORE <= completion.score <= MAX_SCORE:
        return f"score outside {MIN_SCORE:g} to {MAX_SCORE:g}"
    return None


def _find_missing_judgment(completion: Completion) -> str | None:
    """Says why a completion without a critique makes no record, or None when it does."""
    if (completion.critique or "").strip():
        return None
    if completion.score is None:
        return "no critique and no score"
    return None if completion.score >= SATISFACTORY_SCORE else f"no critique, but scored below {SATISFACTORY_SCORE:g}"


def _make_record(row: Row, completion: Completion) -> dict[str, Any]:
    critique = completion.critique or ""
    record: dict[str, Any] = {
        "instruction": row.instruction,
        "output": completion.response,
        "judgment": critique if critique.strip() else None,
    }
    further = {"score": completion.score, "source": row.source, "model": completion.model}
    return record | {key: value for key, value in further.items() if value is not None}
