"""Which characters of a response each of its tokens covers, and which tokens a person's marks flag.

A span is [start, end) in characters. It leaves out the white space around a token's own characters, so that " word"
and "word" have the same span; only a token of nothing but white space covers that. A token that is part of a character,
such as a byte of an emoji, covers the whole character. The end-of-turn token has the empty span at the very end.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Texts after which most tokenizers treat what follows as the continuation of a sentence.
CONTINUATION_ANCHORS = ("\n", ":", "a")


def locate_tokens(
    tokenizer: "PreTrainedTokenizerBase", tail: str, tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span]:
    """Find the span of each token of a text that was tokenized as the continuation of `tail`, the end of a prompt.

    `ids` exclude the end-of-turn token. Starts and ends never decrease, and every character but white space is
    covered. With a slow tokenizer, it takes time quadratic in the number of tokens.
    """
    spans = _read_offsets(tokenizer, tail, tail_ids, text, ids) if tokenizer.is_fast else None
    if spans is None:
        spans = _decode_prefixes(tokenizer, tail_ids, text, ids)
    return [_strip(text, span) for span in _close_gaps(spans, len(text))]


def flag_spans(token_spans: Sequence[Span], wrong_spans: Sequence[Span]) -> list[bool]:
    """Flags the tokens (spans from `Encoder.locate_tokens`) that overlap a span marked as wrong.

    An empty span marks the token that starts or lies there, otherwise the next one; at the very end, the
    end-of-turn token.
    """
    flags = [False] * len(token_spans)
    for left, right in wrong_spans:
        if left < right:
            hits = [start < right and end > left for start, end in token_spans]
        else:
            hits = [start <= left < max(end, start + 1) for start, end in token_spans]
            if not any(hits):  # white space that no token covers
                following = min((start for start, _ in token_spans if start >= left), default=None)
                hits = [start == following for start, _ in token_spans]
        flags = [flag or hit for flag, hit in zip(flags, hits, strict=True)]
    return flags


def _read_offsets(
    tokenizer: "PreTrainedTokenizerBase", tail: str, tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span] | None:
    """Return the tokenizer's own offsets from the first way to tokenize the text that gives these ids, or None."""
    known = {"": [], tail: list(tail_ids)}
    for lead in (tail, "", *CONTINUATION_ANCHORS):
        lead_ids = known[lead] if lead in known else tokenizer(lead, add_special_tokens=False)["input_ids"]
        # Without splitting first: the end of a chat prompt has special tokens, and few responses do.
        for is_split in (False, True):
            options: Any = {"split_special_tokens": is_split, "return_offsets_mapping": True}
            encoding = tokenizer(lead + text, add_special_tokens=False, **options)
            if encoding["input_ids"] == [*lead_ids, *ids]:
                offsets = encoding["offset_mapping"][len(lead_ids) :]
                return [(max(0, start - len(lead)), max(0, end - len(lead))) for start, end in offsets]
    return None


def _decode_prefixes(
    tokenizer: "PreTrainedTokenizerBase", tail_ids: Sequence[int], text: str, ids: Sequence[int]
) -> list[Span]:
    """Decode longer and longer prefixes and compare which characters each token adds."""

    def decode(num_tokens: int) -> str:
        return str(tokenizer.decode([*tail_ids, *ids[:num_tokens]], clean_up_tokenization_spaces=False))

    whole = decode(len(ids))
    first = num_done = _count_common(decode(0), whole)
    spans = []
    for num_tokens in range(1, len(ids) + 1):
        decoded = decode(num_tokens)
        start, num_done = num_done, max(num_done, _count_common(decoded, whole))
        # A part of a character is decoded as a replacement character, which the whole text does not have there, or as
        # nothing.
        is_part = (len(decoded) > num_done or num_done == start) and num_done < len(whole)
        spans.append((start - first, num_done + is_part - first))
    places = _align(whole[first:], text)
    return [(places[start], max(places[end - 1] + 1 if end > start else 0, places[start])) for start, end in spans]


def _count_common(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _align(decoded: str, text: str) -> list[int]:
    """Map each position of a decoded text, the end included, to the position in the text that it came from."""
    if decoded == text:
        return list(range(len(text) + 1))
    places = []
    # Case may be lost as well. Compare one character each, for some have two in lower case.
    one, other = ([letter.lower()[:1] or letter for letter in string] for string in (decoded, text))
    for kind, left, right, start, end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        last = right - left + start if kind == "equal" else max(start, end - 1)
        places += [min(start + offset, last) for offset in range(right - left)]
    return [*places, len(text)]


def _close_gaps(spans: Sequence[Span], length: int) -> list[Span]:
    """Order spans, and give characters that no token covers to the next token, or at the end to the last."""
    closed, first, num_done = [], 0, 0
    for start, end in spans:
        first = max(first, min(start, num_done))
        num_done = min(max(num_done, end), length)
        closed.append((first, num_done))
    if closed:
        closed[-1] = (closed[-1][0], length)
    return closed


def _strip(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    if not piece.strip():
        return span
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
