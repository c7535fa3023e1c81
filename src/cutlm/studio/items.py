"""The responses that are read and judged: from a file of responses, or from records whose judgments are reviewed."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord, check_records, is_praise, raise_problems
from cutlm.data.sources import describe_sources
from cutlm.errors import DataError
from cutlm.flagging.token_scores import SCORE_FIELDS, TokenScores, is_token_scores_row
from cutlm.inspect.page import describe_side
from cutlm.inspect.tokens import mark_spans
from cutlm.judges.responses import Response, read_responses, set_aside_empty
from cutlm.prompting.spans import Span

# Fields of a record that a verdict replaces.
_VERDICT_FIELDS = ("judgment", "score", "wrong_spans", "i_ans", "unflagged_spans", "reviewers")


@dataclass(frozen=True)
class Draft:
    """A judgment that a person has not confirmed: of the file that is reviewed, or by a judge.

    Attributes:
        judgment: What is wrong; None if nothing is.
        wrong_spans: Where.
        i_ans: An improved response.
        source: Who wrote it.
        score: The rating in the file.
    """

    judgment: str | None
    wrong_spans: tuple[Span, ...] = ()
    i_ans: str | None = None
    source: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Item:
    """A response to read.

    Attributes:
        key: Identifies it by its conversation and text, so that journals survive a change of the file's order.
        location: Where it is from: `responses.jsonl:17`.
        row: The fields of its record, without those of a verdict.
        draft: Its judgment in the file, if records are reviewed.
    """

    key: str
    location: str
    row: dict[str, Any]
    draft: Draft | None = None

    @property
    def output(self) -> str:
        return str(self.row["output"])

    @cached_property
    def conversation(self) -> Conversation:
        """What precedes the response."""
        return JudgedRecord.model_validate(self.row).conversation

    @property
    def response(self) -> Response:
        """The response as a judge takes it."""
        return Response(self.location, self.row["instruction"], self.row.get("input") or "", self.output, self.row)


def read_items(
    responses: Sequence[str | Path] | None, data: Sequence[str | Path] | None, columns: Mapping[str, str] | None = None
) -> tuple[list[Item], int]:
    """Read files of responses, of records to review, or of both; also return the number of empty responses left out.

    Raises:
        DataError: A file cannot be read, or rows are not valid; all of them are named.
    """
    rows: list[tuple[str, dict[str, Any], Draft | None]] = []
    num_empty = 0
    if responses:
        read = read_responses(responses, columns)
        kept, _ = set_aside_empty(read)
        num_empty = len(read) - len(kept)
        rows += [(read[index].location, {**read[index].row, **read[index].fields}, None) for index in kept]
    if data:
        check = check_records(data, columns)
        raise_problems(check, describe_sources(data))
        for location, record in zip(check.locations, check.records, strict=True):
            written = Draft(record.judgment, record.wrong_spans or (), record.i_ans, "the file", record.score)
            rows.append((location, record.model_dump(mode="json", exclude_unset=True), written))
    if not rows:
        raise DataError(f"{describe_sources(responses or data or ())}: every response is empty; expected one to read")
    seen: Counter[str] = Counter()
    items = []
    for location, row, draft in rows:
        # The flags of token scores are those of the judgment that is replaced.
        removed = {*_VERDICT_FIELDS, *(SCORE_FIELDS if is_token_scores_row(row) else ())}
        row = {name: value for name, value in row.items() if name not in removed}
        parts = [row.get(name) for name in ("instruction", "input", "messages", "tools", "output")]
        digest = hashlib.sha256(json.dumps([part or None for part in parts], sort_keys=True).encode()).hexdigest()[:20]
        seen[digest] += 1
        key = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        items.append(Item(key, location, row, draft))
    return items, num_empty


def make_record(item: Item, judgment: str) -> JudgedRecord:
    """Make the record of an item with a judgment; no text or praise makes it satisfactory."""
    text = None if not judgment.strip() or is_praise(judgment) else judgment
    return JudgedRecord.model_validate(item.row | {"judgment": text})


def describe_words(item: Item) -> dict[str, Any]:
    """Describe the words of a response, which are shown where no model has split it into tokens."""
    return describe_pieces(mark_spans(make_record(item, "")))


def describe_pieces(scores: TokenScores) -> dict[str, Any]:
    """Describe the pieces of a response and their scores, for `tokens.js`."""
    side = describe_side(scores, {})
    return {name: side[name] for name in ("pieces", "sizes", "has_end", "without", "with") if name in side}
