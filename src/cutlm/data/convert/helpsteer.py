"""HelpSteer, HelpSteer2 and HelpSteer3 (NVIDIA): ratings, preferences, feedback and edits of people.

- HelpSteer and HelpSteer2: `prompt`, `response` and five ratings from 0 to 4; no words.
- HelpSteer2, preference: `response_1`, `response_2`, and a statement of which one is better, and why.
- HelpSteer3, preference: `context`, `response1`, `response2`, and individual preferences with their reasons.
- HelpSteer3, feedback: the same with `feedback1` and `feedback2`, which begin with "The response is ... helpful."
- HelpSteer3, edit and edit_quality: `original_response`, `feedback` on it, and an edited response.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from cutlm.data.convert import (
    MAX_SCORE,
    MIN_SCORE,
    Conversion,
    Number,
    Source,
    make_response,
    read_messages,
    scale_rating,
    validate_rows,
)
from cutlm.data.files import SourceRow
from cutlm.data.records import SATISFACTORY_SCORE

_LARGEST_RATING = 4.0
# HelpSteer3: how a person's feedback begins.
_LEVELS = ("not", "slightly", "partially", "mostly", "perfectly")
_LEVEL = re.compile(rf"\s*the response is ({'|'.join(_LEVELS)}) helpful\b", re.IGNORECASE)
# HelpSteer and HelpSteer2: what separates the turns of a prompt.
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _average(value: Any) -> Any:
    """Return the mean of the ratings of several people, as the subset `disagreements` has them."""
    is_list = isinstance(value, list) and value and all(isinstance(item, int | float) for item in value)
    return sum(value) / len(value) if is_list else value


class Opinion(Source):
    score: Number = None
    reasoning: str | None = None
    feedback1: str | None = None
    feedback2: str | None = None


class Row(Source):
    prompt: str | None = None
    context: list[dict[str, Any]] | None = None
    # HelpSteer and HelpSteer2
    response: str | None = None
    helpfulness: Annotated[Number, BeforeValidator(_average)] = None
    response_1: str | None = None
    response_2: str | None = None
    preference_strength: Number = None
    preference_statement: str | None = None
    preference_elaboration: str | None = None
    # HelpSteer3
    response1: str | None = None
    response2: str | None = None
    overall_preference: Number = None
    individual_preference: list[Opinion] | None = None
    feedback1: list[str | None] | None = None
    feedback2: list[str | None] | None = None
    original_response: str | None = None
    edited_response: str | None = None
    good_edited_response: str | None = None
    feedback: list[str | None] | None = None


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn each response into a record per judgment of it.

    The feedback on a response is its judgment, with a score derived from "The response is ... helpful."; the reason for
    a preference is the judgment of the worse response, and the better one is satisfactory. A response with ratings only
    is satisfactory if it has the highest helpfulness, and otherwise unjudged.
    """
    conversion = Conversion("judgments and responses")
    for location, row in validate_rows(rows, Row):
        messages = _read_prompt(row)
        if messages is None:
            conversion.left_out["a prompt that is not text or messages of text"] += 1
            continue
        for response, judgment, further in _list_judged(row):
            if not (response or "").strip():
                conversion.left_out["empty response"] += 1
                continue
            record = make_response(messages, response or "") | further
            if judgment is not None and judgment.strip():
                conversion.rows.append(SourceRow(location, record | {"judgment": judgment.strip()}))
            elif further.get("score", MIN_SCORE) >= SATISFACTORY_SCORE:
                conversion.rows.append(SourceRow(location, record | {"judgment": None}))
            else:
                conversion.unjudged.append(SourceRow(location, make_response(messages, response or "")))
    return conversion


def _read_prompt(row: Row) -> Sequence[Mapping[str, Any]] | None:
    if row.context is not None:
        return read_messages(row.context)
    if row.prompt is None:
        return None
    first, *rest = _TURN.split(row.prompt)
    messages = [{"role": "user", "content": first}]
    messages += [{"role": role.lower(), "content": text} for role, text in zip(rest[::2], rest[1::2], strict=True)]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()  # the mark before the response
    return messages


def _list_judged(row: Row) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
    """Yield each response, a judgment of it or None, and further fields of its record."""
    if row.original_response is not None:
        edited = row.good_edited_response or row.edited_response
        further = {"i_ans": edited} if (edited or "").strip() else {}
        for text in row.feedback or [None]:
            yield row.original_response, text, further | _read_level(text)
    elif row.feedback1 is not None or row.feedback2 is not None:
        for response, texts in ((row.response1, row.feedback1), (row.response2, row.feedback2)):
            for text in texts or [None]:
                yield response, text, _read_level(text)
    elif row.overall_preference is not None:
        yield from _compare(row.response1, row.response2, row.overall_preference, _list_reasons(row))
    elif row.preference_strength is not None:
        said = " ".join(filter(None, (row.preference_statement, row.preference_elaboration)))
        yield from _compare(row.response_1, row.response_2, row.preference_strength, [said])
    else:
        rating = row.helpfulness
        score = None if rating is None or not 0 <= rating <= _LARGEST_RATING else rating
        is_best = score == _LARGEST_RATING
        yield row.response, None, {"score": MAX_SCORE} if is_best else {}


def _compare(
    one: str | None, other: str | None, preference: float, reasons: Sequence[str]
) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
    """Yield the worse response with each reason, and the better one; both unjudged if neither is better."""
    if preference == 0:
        yield one, None, {}
        yield other, None, {}
        return
    worse, number = (other, 2) if preference < 0 else (one, 1)
    for reason in reasons or [""]:
        yield worse, _name_responses(reason, number), {}
    yield (one if preference < 0 else other), None, {"score": MAX_SCORE}


def _list_reasons(row: Row) -> list[str]:
    """Return why people who agree with the overall preference find the worse response worse."""
    is_first_better = (row.overall_preference or 0) < 0
    reasons = []
    for opinion in row.individual_preference or []:
        if opinion.score and (opinion.score < 0) == is_first_better:
            own = opinion.feedback2 if is_first_better else opinion.feedback1
            reasons.append(own if (own or "").strip() else opinion.reasoning)
    return [reason for reason in reasons if reason]


def _name_responses(text: str, number: int) -> str:
    """Replace the numbers of the responses by "this response" and "the other response"."""

    def name(found: re.Match[str]) -> str:
        words = "this response" if int(found[1]) == number else "the other response"
        starts_sentence = not text[: found.start()].strip() or text[: found.start()].rstrip()[-1] in ".!?\n"
        return words.capitalize() if starts_sentence else words

    return re.sub(r"@?\bresponse ([12])\b", name, text, flags=re.IGNORECASE)


def _read_level(text: str | None) -> dict[str, Any]:
    found = _LEVEL.match(text or "")
    if found is None:
        return {}
    return {"score": scale_rating(_LEVELS.index(found[1].lower()), 0, len(_LEVELS) - 1)}
