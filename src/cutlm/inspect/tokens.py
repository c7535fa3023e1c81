"""Token scores prepared for display: split a response into pieces, pair two files of scores by record."""

import re
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from cutlm.data.records import JudgedRecord
from cutlm.flagging.token_scores import TokenScores
from cutlm.prompting.spans import flag_spans

_PIECE = re.compile(r"\w+|[^\w\s]")


class Piece(NamedTuple):
    """A part of a response that is shown as one unit.

    It covers one token, several that share a character (such as the bytes of an emoji), or none if no token claims the
    text, as in an edited file.
    """

    text: str  # "" for the end-of-sequence token
    indices: tuple[int, ...]  # of the tokens that it covers
    is_flagged: bool  # whether one of these tokens is flagged
    is_end: bool = False  # whether it is the end-of-sequence token


def split_pieces(scores: TokenScores) -> list[Piece]:
    """Split a response into pieces whose texts, joined, are exactly the response, white space included."""
    output, last = scores.record.output, len(scores.spans) - 1
    has_end = bool(scores.spans) and tuple(scores.spans[last]) == (len(output), len(output))
    texts: list[str] = []
    indices: list[list[int]] = []
    reached = 0
    for index, (_, end) in enumerate(scores.spans[: last if has_end else None]):
        if texts and end <= reached:  # another part of the same character
            indices[-1].append(index)
            continue
        texts.append(output[reached:end])
        indices.append([index])
        reached = max(reached, end)
    if reached < len(output):  # trailing white space, which spans leave out
        if texts:
            texts[-1] += output[reached:]
        else:
            texts, indices = [output], [[]]
    pieces = [
        Piece(text, tuple(group), any(scores.is_flagged[index] for index in group))
        for text, group in zip(texts, indices, strict=True)
    ]
    if has_end:
        pieces.append(Piece("", (last,), scores.is_flagged[last], is_end=True))
    return pieces


def mark_spans(record: JudgedRecord) -> TokenScores:
    """Flag the words of a record's `wrong_spans`, without a model or a tokenizer.

    The pieces are words and single other characters, and the end of the response. There are no log-probabilities.
    """
    output = record.output
    spans = [match.span() for match in _PIECE.finditer(output)] + [(len(output), len(output))]
    is_flagged = [False] * len(spans)
    if record.wrong_spans and not record.is_satisfactory:
        is_flagged = flag_spans(spans, record.wrong_spans)
    return TokenScores(
        record=record,
        token_ids=list(range(len(spans))),
        tokens=[output[start:end] for start, end in spans],
        spans=spans,
        logps_without=None,
        logps_with=None,
        is_flagged=is_flagged,
        weights=[float(flag) for flag in is_flagged],
        threshold=1.0,
        unlikelihood_weight=1.0,
        gamma=0.0,
        detector="spans",
        tokenizer="words",
        template="none",
    )


class Pairing(NamedTuple):
    """The records that two files of scores share."""

    pairs: list[tuple[int, int]]  # the places of each in both files, in the order of the first file
    num_unpaired: tuple[int, int]  # number of records that only the first and only the second file has


def pair_records(first: Sequence[JudgedRecord], second: Sequence[JudgedRecord]) -> Pairing:
    """Pair the records of two files with the same conversation, response and judgment.

    A record that occurs several times is paired as often as it occurs in both files.
    """
    waiting: defaultdict[tuple[str, str, str | None], deque[int]] = defaultdict(deque)
    for place, record in enumerate(second):
        waiting[_identify(record)].append(place)
    pairs = []
    for place, record in enumerate(first):
        if matches := waiting[_identify(record)]:
            pairs.append((place, matches.popleft()))
    return Pairing(pairs, (len(first) - len(pairs), len(second) - len(pairs)))


def has_same_tokens(first: TokenScores, second: TokenScores) -> bool:
    """Whether two scores of a response can be compared token by token."""
    return first.token_ids == second.token_ids and first.spans == second.spans


def _identify(record: JudgedRecord) -> tuple[str, str, str | None]:
    return str(record.conversation), record.output, record.judgment
