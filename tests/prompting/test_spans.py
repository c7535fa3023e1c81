"""Spans: which characters each token covers, and which tokens a marked span flags."""

import itertools
import re

import pytest
from encoders import KINDS, RESPONSES, get_encoder
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKENIZER_KINDS

from cutlm.prompting.spans import _decode_prefixes, _read_offsets, flag_spans

# ---- Characters of tokens ----


@pytest.mark.parametrize(
    ("kind", "template"),
    [*((kind, "alpaca") for kind in KINDS), *((kind, "chat") for kind in TOKENIZER_KINDS)],
)
@given(response=RESPONSES)
def test_spans_are_ordered_and_cover_all_but_white_space(kind: str, template: str, response: str) -> None:
    encoder = get_encoder(kind, template)
    ids = encoder.encode_response(response)
    spans = encoder.locate_tokens(response, ids)
    assert len(spans) == len(ids)
    assert spans[-1] == (len(response), len(response))
    assert all(0 <= start <= end <= len(response) for start, end in spans)
    starts, ends = zip(*spans, strict=True)
    assert sorted(starts) == list(starts)
    assert sorted(ends) == list(ends)
    covered = {index for start, end in spans for index in range(start, end)}
    if len(ids) > 1:
        assert {index for index, letter in enumerate(response) if not letter.isspace()} <= covered
    for start, end in spans:
        piece = response[start:end]
        assert piece == piece.strip() or not piece.strip()
    if kind in ("unigram", "wordpiece", "slow"):  # they change the text, or have bytes as tokens
        return
    for token, (start, end) in list(zip(ids, spans, strict=True))[:-1]:
        text = encoder.tokenizer.decode([token])
        if "\ufffd" not in text and text.strip():
            assert response[start:end] == text.strip()


@pytest.mark.parametrize("kind", [*TOKENIZER_KINDS, "wordpiece"])
@given(response=RESPONSES.filter(lambda text: text.isascii()))
def test_decoding_prefixes_agrees_with_the_tokenizers_offsets(kind: str, response: str) -> None:
    encoder = get_encoder(kind)
    ids = encoder.encode_response(response)
    arguments = (encoder.tokenizer, encoder._prompt_ids, response, ids[:-1])
    by_offsets = _read_offsets(encoder.tokenizer, encoder._before, *arguments[1:])
    # Decoding loses unknown characters, and BERT's loses case and spaces.
    is_plain = kind != "wordpiece" or re.fullmatch(r"[a-z]+( [a-z]+)*", response)
    is_lossy = encoder.tokenizer.unk_token_id in ids or not is_plain
    if by_offsets is None or is_lossy:
        return
    by_decoding = _decode_prefixes(*arguments)
    pieces = [[response[start:end].strip() for start, end in spans] for spans in (by_offsets, by_decoding)]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_of_an_emoji_covers_the_whole_emoji(kind: str) -> None:
    encoder = get_encoder(kind)
    response = "ab 🙂🙃 c"
    spans = encoder.locate_tokens(response, encoder.encode_response(response))
    if kind.startswith("bpe") or kind in ("llama", "slow"):
        assert set(spans) <= {(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 7)}
        assert sum(span == (4, 5) for span in spans) > 1, "the second emoji has several tokens"
    assert any(start <= 3 < end for start, end in spans)


def test_a_span_excludes_the_leading_space_of_its_token() -> None:
    encoder = get_encoder("bpe")
    ids = encoder.encode_response("Hello world")
    assert [encoder.tokenizer.decode([token]) for token in ids][-2:] == [" world", "<eos>"]
    assert encoder.locate_tokens("Hello world", ids)[-2:] == [(6, 11), (11, 11)]


def test_tokens_in_lower_case_without_spaces_are_found_in_the_text() -> None:
    encoder = get_encoder("wordpiece")
    response = "The  Capital,\nHello"
    ids = encoder.encode_response(response)
    pieces = [response[start:end] for start, end in encoder.locate_tokens(response, ids)]
    assert pieces == ["The", "Cap", "ital", ",", "Hello", ""]


# ---- Marked spans ----


@given(
    cuts=st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted),
    marks=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair))), max_size=4),
)
def test_a_token_is_flagged_if_it_shares_a_character_with_a_mark(cuts: list[int], marks: list[tuple[int, int]]) -> None:
    edges = [0, *cuts, 20]
    spans = [*itertools.pairwise(edges), (20, 20)]
    filled = [mark for mark in marks if mark[0] < mark[1]]
    marked = {index for start, end in filled for index in range(start, end)}
    flags = flag_spans(spans, filled)
    for (start, end), flag in zip(spans, flags, strict=True):
        if start < end:
            assert flag == bool(marked & set(range(start, end)))
    assert not flags[-1], "the end-of-sequence token has no character"
    empty = [mark for mark in marks if mark[0] == mark[1]]
    for (start, end), flag in zip(spans, flag_spans(spans, empty), strict=True):
        assert flag == any(start <= index < max(end, start + 1) for index, _ in empty)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], [False, False, False]),
        ([(0, 6)], [True, False, False]),  # reaches the space before the second token
        ([(4, 7)], [True, True, False]),
        ([(6, 6)], [False, True, False]),  # the token that starts there
        ([(5, 5)], [False, True, False]),  # the token after the space
        ([(8, 8)], [False, False, True]),  # the end-of-sequence token
        ([(0, 8)], [True, True, False]),
        ([(5, 6)], [False, False, False]),  # the space alone
    ],
)
def test_marks_at_edges(marks: list[tuple[int, int]], expected: list[bool]) -> None:
    # "Paris is": the space is in no span.
    assert flag_spans([(0, 5), (6, 8), (8, 8)], marks) == expected
