"""The data of Prometheus (Kim et al. 2024): feedback of GPT-4 on responses, by a rubric, with scores from 1 to 5.

The Feedback Collection has one response per row, the Preference Collection two, A and B, with feedback on each. If a
row of the Feedback Collection has only the evaluator's prompt and answer, their parts are read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cutlm.data.convert import Conversion, Number, Source, scale_rating, validate_rows
from cutlm.data.files import SourceRow

MIN_RATING, MAX_RATING = 1.0, 5.0
_PROMPT = re.compile(
    r"###The instruction to evaluate:(?P<orig_instruction>.*?)###Response to evaluate:(?P<orig_response>.*?)"
    r"(?:###Reference Answer[^\n]*:(?P<orig_reference_answer>.*?))?###Score Rubrics?:\s*\[?(?P<orig_criteria>[^\n\]]*)",
    re.DOTALL,
)
_ANSWER = re.compile(r"\s*(?:Feedback:)?(?P<orig_feedback>.*)\[RESULT\]\s*(?P<orig_score>\d)\W*", re.DOTALL)


class Row(Source):
    orig_instruction: str
    orig_response: str | None = None
    orig_feedback: str | None = None
    orig_score: Number = None
    orig_response_A: str | None = None
    orig_feedback_A: str | None = None
    orig_score_A: Number = None
    orig_response_B: str | None = None
    orig_feedback_B: str | None = None
    orig_score_B: Number = None
    orig_reference_answer: str | None = None
    orig_criteria: str | None = None


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn each response into a record with the feedback as judgment and the reference answer as `i_ans`.

    The scores are scaled to 1 to 10, so that 4 and 5 are satisfactory. A response that occurs in several pairs is kept
    once.
    """
    conversion = Conversion("responses")
    known: set[tuple[str, ...]] = set()
    rows = (SourceRow(row.location, _read_parts(row.value)) for row in rows)
    for location, row in validate_rows(rows, Row):
        for response, feedback, score in _list_responses(row):
            fault = _find_fault(response, feedback, score)
            key = (row.orig_instruction, response or "", feedback or "")
            if fault is None and key in known:
                fault = "the same response and feedback again"
            known.add(key)
            conversion.add(location, fault or _make_record(row, response, feedback, score))
    return conversion


def _read_parts(row: Any) -> Any:
    """Return a row with the parts of the evaluator's prompt and answer, if it has only these; any other as it is."""
    if not isinstance(row, Mapping) or "orig_instruction" in row:
        return row
    prompt = _PROMPT.search(str(row.get("instruction")))
    answer = _ANSWER.fullmatch(str(row.get("output")))
    if prompt is None or answer is None:
        return row
    return {name: text.strip() for name, text in (prompt.groupdict() | answer.groupdict()).items() if text}


def _list_responses(row: Row) -> Iterator[tuple[str | None, str | None, float | None]]:
    if row.orig_response is not None or row.orig_response_A is None:
        yield row.orig_response, row.orig_feedback, row.orig_score
    else:
        yield row.orig_response_A, row.orig_feedback_A, row.orig_score_A
        yield row.orig_response_B, row.orig_feedback_B, row.orig_score_B


def _find_fault(response: str | None, feedback: str | None, score: float | None) -> str | None:
    """Return why a response makes no record, or None."""
    if not (response or "").strip():
        return "empty response"
    if not (feedback or "").strip():
        return "no feedback on this response alone"
    if score is not None and not MIN_RATING <= score <= MAX_RATING:
        return f"score outside {MIN_RATING:g} to {MAX_RATING:g}"
    return None


def _make_record(row: Row, response: str | None, feedback: str | None, score: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"instruction": row.orig_instruction, "output": response, "judgment": feedback}
    further = {
        "score": None if score is None else scale_rating(score, MIN_RATING, MAX_RATING),
        "i_ans": row.orig_reference_answer if (row.orig_reference_answer or "").strip() else None,
        "criteria": row.orig_criteria,
    }
    return record | {name: value for name, value in further.items() if value is not None}
