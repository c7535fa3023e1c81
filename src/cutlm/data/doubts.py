"""Valid records that are probably not what their author meant, named for a user to look at."""

import re
from collections.abc import Iterator, Sequence

from cutlm.data.conversations import THOUGHTS
from cutlm.data.formats import find_judgment_column
from cutlm.data.praise import objects_after_praise, reads_like_praise
from cutlm.data.records import SATISFACTORY_SCORE, JudgedRecord, is_praise

MIN_SCORE, MAX_SCORE = 1.0, 10.0
# Fields with which other tools store a part of the prompt or the conversation.
_FIELDS_OF_PROMPTS = (
    *("system_prompt", "context", "conversation", "conversations", "chat_history"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
# Punctuation without a word, or a program's placeholder for a missing judgment.
_PLACEHOLDER = re.compile(
    r"[\W_]*(?:n[\W_]*a|nan|none|null|nil|undefined|todo|tbd|error|unknown|empty)?[\W_]*", re.IGNORECASE
)


def describe_doubts(records: Sequence[JudgedRecord], locations: Sequence[str], max_locations: int) -> list[str]:
    """Return a sentence for each kind of doubt, with the number of records and the first locations.

    Example:

        >>> record = JudgedRecord(instruction="Hi.", output="Hi!", judgment=None, score=2)
        >>> describe_doubts([record], ["data.jsonl:1"], max_locations=5)
        ['1 record with a score below 7 that counts as satisfactory, ...: data.jsonl:1']
    """
    found: dict[str, list[str]] = {}
    for record, location in zip(records, locations, strict=True):
        for doubt in _find_doubts(record):
            found.setdefault(doubt, []).append(location)
    return [_name(doubt, where, max_locations) for doubt, where in found.items()]


def _name(doubt: str, locations: list[str], max_locations: int) -> str:
    shown = ", ".join(locations[:max_locations])
    num_more = len(locations) - max_locations
    more = f" and {num_more} more" if num_more > 0 else ""
    return f"{len(locations)} record{'s' * (len(locations) > 1)} with {doubt}: {shown}{more}"


def _find_doubts(record: JudgedRecord) -> Iterator[str]:
    """Yield doubts about a record, as phrases that complete "a record with"."""
    judgment, score = record.judgment, record.score
    is_empty = judgment is not None and _PLACEHOLDER.fullmatch(judgment) is not None
    praises = judgment is not None and (is_praise(judgment) or reads_like_praise(judgment))
    if is_empty:
        yield "a judgment that says nothing, such as $ERROR$ or N/A (judge the response again, or remove the record)"
    elif praises and not record.is_satisfactory:
        yield (
            'a judgment that reads like praise, but counts as an objection (start it with "Perfect.", or write null if'
            " nothing is wrong)"
        )
    elif judgment is not None and is_praise(judgment) and objects_after_praise(judgment):
        yield (
            'a judgment that starts with "Perfect" and then objects, but counts as praise (remove the word if something'
            " is wrong)"
        )
    if score is not None and not MIN_SCORE <= score <= MAX_SCORE:
        yield (
            f"a score outside {MIN_SCORE:g} to {MAX_SCORE:g} (scale the scores; {SATISFACTORY_SCORE:g} or more means"
            " satisfactory)"
        )
    elif score is not None and score < SATISFACTORY_SCORE and (judgment is None or praises or is_empty):
        yield (
            f"a score below {SATISFACTORY_SCORE:g} and no objection (write what is wrong as the judgment, or correct"
            " the score)"
        )
    elif score is not None and score >= SATISFACTORY_SCORE and not (judgment is None or praises or is_empty):
        yield (
            f"a score of {SATISFACTORY_SCORE:g} or more and an objection, which is not used (remove the score if"
            " something is wrong)"
        )
    if "judgment" not in record.model_fields_set and (column := find_judgment_column(record.model_extra or {})):
        yield (
            f"a field {column!r} and no judgment, so the response counts as satisfactory (rename it by --columns,"
            " or write null as the judgment)"
        )
    for name in _FIELDS_OF_PROMPTS:
        if (record.model_extra or {}).get(name):
            yield f"a field {name!r}, which is ignored (write what matters into the instruction)"
    if any((record.model_extra or {}).get(name) for name in THOUGHTS):
        yield "thoughts next to the response, which are not trained on (the response is the final answer alone)"
