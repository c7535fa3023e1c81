"""Where in a response's text each of its tokens stands, and which tokens a person's marks mean.

A span is [start, end) in characters. It leaves out the white space around a token's own characters, so that " word"
and "word" stand at the same place whichever way a tokenizer splits; a token of white space alone keeps it. A token
that is part of a character, as the bytes of an emoji are, spans the whole character. The end-of-sequence token has the
empty span at the very end.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# What a text can be split behind, as a continuation: see `Encoder._continue_plain`.
_ANCHORS = ("\n", ":", "a")


def locate_tokens(
    tokenizer: "PreTrainedTokenizerBase", tail: str, tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span]:
    """Finds the characters of each token.

    Args:
        tokenizer: Any tokenizer; a slow one is asked by decoding, which takes the square of the length.
        tail: The text before `text`, as of a prompt's end.
        tail_ids: Its token ids.
        text: The text that was split as the continuation of `tail`.
        ids: Its token ids, without an end-of-sequence.

    Returns:
        A span per token. Starts and ends never go back, and every character but white space lies in a span.
    """
    spans = _read_offsets(tokenizer, tail, tail_ids, text, ids) if tokenizer.is_fast else None
    if spans is None:
        spans = _decode_prefixes(tokenizer, tail_ids, text, ids)
    return [_trim(text, span) for span in _close_gaps(spans, len(text))]


def flag_spans(token_spans: Sequence[Span], wrong_spans: Sequence[Span]) -> list[bool]:
    """Flags the tokens that stand in what was marked as wrong.

    Args:
        token_spans: As of `Encoder.locate_tokens`, end-of-sequence included.
        wrong_spans: [start, end) in the same text. An empty one means the token that starts there, or that the place
            lies in, or else the next one; at the very end, the end-of-sequence.

    Returns:
        A flag per token. Touching is not overlapping, and white space beside a token is no part of it.
    """
    flags = [False] * len(token_spans)
    for left, right in wrong_spans:
        if left < right:
            hits = [start < right and end > left for start, end in token_spans]
        else:
            hits = [start <= left < max(end, start + 1) for start, end in token_spans]
            if not any(hits):  # a space that the spans leave out
                following = min((start for start, _ in token_spans if start >= left), default=None)
                hits = [start == following for start, _ in token_spans]
        flags = [flag or hit for flag, hit in zip(flags, hits, strict=True)]
    return flags


def _read_offsets(
    tokenizer: "PreTrainedTokenizerBase", tail: str, tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span] | None:
    """The tokenizer's own offsets, of the way of splitting that gives these ids; None where none does."""
    leads = [(tail, list(tail_ids)), ("", [])]
    leads += [(anchor, tokenizer(anchor, add_special_tokens=False)["input_ids"]) for anchor in _ANCHORS]
    for lead, lead_ids in leads:
        for is_split in (True, False):
            encoding = tokenizer(
                lead + text, add_special_tokens=False, split_special_tokens=is_split, return_offsets_mapping=True
            )
            if encoding["input_ids"] == [*lead_ids, *ids]:
                offsets = encoding["offset_mapping"][len(lead_ids) :]
                return [(max(0, start - len(lead)), max(0, end - len(lead))) for start, end in offsets]
    return None


def _decode_prefixes(
    tokenizer: "PreTrainedTokenizerBase", tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span]:
    """Decodes ever more tokens and sees which characters each one adds."""

    def decode(num_tokens: int) -> str:
        return str(tokenizer.decode([*tail_ids, *ids[:num_tokens]], clean_up_tokenization_spaces=False))

    whole = decode(len(ids))
    first = reached = _count_common(decode(0), whole)
    spans = []
    for num_tokens in range(1, len(ids) + 1):
        decoded = decode(num_tokens)
        start, reached = reached, max(reached, _count_common(decoded, whole))
        # Half a character is decoded as a stand-in that the whole text does not have at that place, or as nothing.
        is_part = (len(decoded) > reached or reached == start) and reached < len(whole)
        spans.append((start - first, reached + is_part - first))
    locations = _align(whole[first:], text)
    return [
        (locations[start], max(locations[end - 1] + 1 if end > start else 0, locations[start])) for start, end in spans
    ]


def _count_common(one: str, other: str) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _align(decoded: str, text: str) -> list[int]:
    """For each place of a decoded text, the end included, the one in the text that it was made from."""
    if decoded == text:
        return list(range(len(text) + 1))
    locations = []
    # Upper case may be lost too. One character each: some have two of lower case.
    one, other = ([letter.lower()[:1] or letter for letter in string] for string in (decoded, text))
    for kind, left, right, start, end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for place in range(left, right):
            offset = place - left
            locations.append(start + offset if kind == "equal" else min(start + offset, max(start, end - 1)))
    return [*locations, len(text)]


def _close_gaps(spans: Sequence[Span], length: int) -> list[Span]:
    """Puts spans in order, and gives characters that no token claims to the next one, or at the end to the last."""
    closed: list[Span] = []
    first, reached = 0, 0
    for start, end in spans:
        first = max(first, min(start, reached))
        reached = min(max(reached, end), length)
        closed.append((first, reached))
    if closed:
        closed[-1] = (closed[-1][0], length)
    return closed


def _trim(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    if not piece.strip():
        return span
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
