"""Preference pairs: `chosen` and `rejected`, as DPO trainers read them, and single responses that are liked or not.

The prompt is `prompt`, `instruction` with `input`, or `question` with `system`, as text or as messages; or it is the
beginning that both conversations share, as in UltraFeedback binarized and HH-RLHF. Single responses have `completion`
and `label`, as for KTO.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cutlm.data.convert import (
    MAX_SCORE,
    MIN_SCORE,
    Conversion,
    Number,
    Source,
    make_response,
    read_messages,
    validate_rows,
)
from cutlm.data.files import SourceRow
from cutlm.data.records import SATISFACTORY_SCORE

_PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")
# HH-RLHF: a conversation as text.
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class Row(Source):
    prompt: str | list[Any] | None = None
    instruction: str | None = None
    input: str | None = None
    question: str | None = None
    conversations: list[Any] | None = None
    messages: list[Any] | None = None
    system: str | None = None
    chosen: str | list[Any] | dict[str, Any] | None = None
    rejected: str | list[Any] | dict[str, Any] | None = None
    score_chosen: Number = None
    score_rejected: Number = None
    chosen_score: Number = None
    rejected_score: Number = None
    completion: str | list[Any] | None = None
    label: bool | None = None


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn the preferred responses into satisfactory records; the others are unjudged, as nothing was said about them.

    Scores from 1 to 10 decide instead, if there are any: 7 or more is satisfactory, whichever response it is. One score
    outside of that range says that all have another scale, such as votes, and none is used.
    """
    conversion = Conversion("responses")
    read = validate_rows(rows, Row)
    scores = [score for _, row in read for score in _read_scores(row) if score is not None]
    has_scores = all(MIN_SCORE <= score <= MAX_SCORE for score in scores)
    for location, row in read:
        responses: list[tuple[Any, bool, float | None]] = []
        if row.chosen is not None or row.rejected is not None:
            first, second = _read_scores(row) if has_scores else (None, None)
            responses = [(row.chosen, True, first), (row.rejected, False, second)]
        elif row.completion is not None and row.label is not None:
            responses = [(row.completion, row.label, None)]
        else:
            conversion.left_out["neither chosen and rejected, nor completion and label"] += 1
        for value, is_preferred, score in responses:
            messages = _read_conversation(row, value)
            if messages is None:
                conversion.left_out["no prompt, or no response to it in text"] += 1
                continue
            response = make_response(messages[:-1], messages[-1]["content"])
            if score is None:
                is_satisfactory, further = is_preferred, {}
            else:
                is_satisfactory, further = score >= SATISFACTORY_SCORE, {"score": score}
            if is_satisfactory:
                conversion.rows.append(SourceRow(location, response | {"judgment": None} | further))
            else:
                conversion.unjudged.append(SourceRow(location, response))
    return conversion


def _read_scores(row: Row) -> tuple[float | None, float | None]:
    """Return the scores of the chosen and of the rejected response."""
    first = row.score_chosen if row.score_chosen is not None else row.chosen_score
    second = row.score_rejected if row.score_rejected is not None else row.rejected_score
    return first, second


def _read_conversation(row: Row, value: Any) -> list[dict[str, Any]] | None:
    """Return the messages of the prompt and of one response; None if there is no prompt or no text."""
    if isinstance(value, str):
        parts = _TURN.split(value)
        if len(parts) > 2 and not parts[0].strip():
            names = {"Human": "user", "Assistant": "assistant"}
            turns = zip(parts[1::2], parts[2::2], strict=True)
            response = [{"role": names[name], "content": text.strip()} for name, text in turns]
        else:
            response = [{"role": "assistant", "content": value}]
    else:
        found = read_messages([value] if isinstance(value, Mapping) else value or [])
        if not found:
            return None
        response = found
    has_prompt = any(message["role"] == "user" for message in response)
    prompt: Sequence[dict[str, Any]] | None = [] if has_prompt else _read_prompt(row)
    messages = [*(prompt or []), *response]
    if messages[0]["role"] != "system" and (row.system or "").strip():
        messages.insert(0, {"role": "system", "content": row.system})
    is_answer = messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
    is_asked = any(message["role"] == "user" and message["content"].strip() for message in messages)
    return messages if is_answer and is_asked else None


def _read_prompt(row: Row) -> list[dict[str, Any]] | None:
    value = next((item for name in _PROMPTS if (item := getattr(row, name)) is not None), None)
    if isinstance(value, str):
        return [{"role": "user", "content": f"{value}\n{row.input}" if row.input else value}]
    return None if value is None else read_messages(value)
