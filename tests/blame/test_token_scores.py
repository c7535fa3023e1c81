"""Token scores: where tokens stand, what marks mean, and files that people edit."""

import functools
import gzip
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKENIZER_KINDS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cutlm.blame.token_scores import (
    SCORE_FIELDS,
    TokenScores,
    fingerprint_template,
    fingerprint_tokenizer,
    flag_spans,
    is_token_scores,
    map_to_tokenizer,
    read_token_scores,
    strip_scores,
    write_token_scores,
)
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import DataError
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.spans import _decode_prefixes, _read_offsets

KINDS = (*TOKENIZER_KINDS, "wordpiece", "slow")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
WORDS = (
    *(" ", "  ", "\n", "\n\n", "\t", "Hello", " world", "The capital", ". ", ", ", "12 + 34", "a", ":", "x_1"),
    *(
        "é",
        "e\u0301",
        "你好",
        "🙂",
        "👩‍👩‍👧",
        " 🙂",
        "\u00a0",
        "ﬁ",
        "\u3000",
        "</s>",
        "<eos>",
        "<s>",
        "### Response:\n",
    ),
)
# A null byte is refused in records, and a lower one-eighth block is how SentencePiece writes a space.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0▁\ufffd")
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(LETTERS, max_size=4), min_size=1, max_size=8).map("".join)
RESPONSES = TEXTS.map(lambda text: text if text.strip() else f"{text}a")


def make_wordpiece() -> Any:
    """BERT's: lower case, no spaces, continued words behind `##`."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["hello", "world", "cap", "##ital", "##ello", "the", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@functools.cache
def get_encoder(kind: str, template: str = "alpaca") -> Encoder:
    if kind == "slow":
        return Encoder(ByT5Tokenizer(), "alpaca")
    if kind == "wordpiece":
        return Encoder(make_wordpiece(), "alpaca")
    return Encoder(make_tokenizer(kind, chat=template == "chat"), template)  # type: ignore[arg-type]


def make_scores(**changes: Any) -> TokenScores:
    encoder = get_encoder("bpe")
    output = changes.pop("output", "Sydney is the capital 🙂.")
    record = JudgedRecord(instruction="Which?", output=output, judgment="It is wrong.", source="mine")  # type: ignore[call-arg]
    ids = encoder.encode_response(output)
    num_tokens = len(ids)
    flags = [place % 3 == 0 for place in range(num_tokens)]
    values: dict[str, Any] = {
        "record": record,
        "token_ids": ids,
        "tokens": [encoder.tokenizer.decode([index]) for index in ids],
        "spans": encoder.locate_tokens(output, ids),
        "logps_without": [-1.5] * num_tokens,
        "logps_with": [-0.5] * num_tokens,
        "is_flagged": flags,
        "weights": [0.5 if flag else 0.0 for flag in flags],
        "threshold": 1.1,
        "unlikelihood_weight": 0.5,
        "gamma": 1.0,
        "detector": "a model",
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": "alpaca 0123",
    }
    return TokenScores(**(values | changes))


# ---- Where tokens stand ----


@EVERY_KIND
@pytest.mark.parametrize("template", ["alpaca", "chat"])
@given(data=st.data())
def test_spans_go_forward_and_cover_all_but_white_space(kind: str, template: str, data: st.DataObject) -> None:
    response = data.draw(RESPONSES)
    encoder = get_encoder(kind, template)
    ids = encoder.encode_response(response)
    spans = encoder.locate_tokens(response, ids)
    assert len(spans) == len(ids)
    assert spans[-1] == (len(response), len(response))
    assert all(0 <= start <= end <= len(response) for start, end in spans)
    starts, ends = zip(*spans, strict=True)
    assert sorted(starts) == list(starts)
    assert sorted(ends) == list(ends)
    covered = {place for start, end in spans for place in range(start, end)}
    if len(ids) > 1:
        assert {place for place, letter in enumerate(response) if not letter.isspace()} <= covered
    for start, end in spans:
        piece = response[start:end]
        assert piece == piece.strip() or not piece.strip()


@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "bpe_unsplit", "llama", "llama_legacy"])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
@given(data=st.data())
def test_a_token_that_can_be_read_stands_where_its_text_is(kind: str, template: str, data: st.DataObject) -> None:
    response = data.draw(RESPONSES)
    encoder = get_encoder(kind, template)
    ids = encoder.encode_response(response)
    for index, (start, end) in list(zip(ids, encoder.locate_tokens(response, ids), strict=True))[:-1]:
        text = encoder.tokenizer.decode([index])
        if "\ufffd" in text or not text.strip():
            continue
        assert response[start:end] == text.strip()


@pytest.mark.parametrize("kind", [*TOKENIZER_KINDS, "wordpiece"])
@given(response=RESPONSES.filter(lambda text: text.isascii()))
def test_decoding_ever_more_tokens_finds_what_the_tokenizers_own_offsets_say(kind: str, response: str) -> None:
    encoder = get_encoder(kind)
    ids = encoder.encode_response(response)
    words = (encoder.tokenizer, encoder._tail_ids, response, ids[:-1])
    by_offsets = _read_offsets(encoder.tokenizer, encoder._tail, *words[1:])
    # What is decoded of an unknown character, and of words in one case without spaces, says less than the offsets do.
    is_unclear = encoder.tokenizer.unk_token_id in ids or (
        kind == "wordpiece" and not re.fullmatch(r"[a-z ]+", response)
    )
    if by_offsets is None or is_unclear:
        return
    pieces = [[response[start:end].strip() for start, end in spans] for spans in (by_offsets, _decode_prefixes(*words))]
    assert pieces[0] == pieces[1]


@EVERY_KIND
def test_each_token_of_an_emoji_spans_the_whole_of_it(kind: str) -> None:
    encoder = get_encoder(kind)
    response = "ab 🙂🙃 c"
    ids = encoder.encode_response(response)
    spans = encoder.locate_tokens(response, ids)
    if kind.startswith("bpe") or kind in ("llama", "slow"):
        assert set(spans) <= {(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 7)}
        assert sum(span == (4, 5) for span in spans) > 1, "the second emoji has several tokens"
    assert any(start <= 3 < end for start, end in spans)


def test_a_leading_space_is_no_part_of_a_tokens_span() -> None:
    encoder = get_encoder("bpe")
    ids = encoder.encode_response("Hello world")
    assert [encoder.tokenizer.decode([index]) for index in ids][-2:] == [" world", "<eos>"]
    assert encoder.locate_tokens("Hello world", ids)[-2:] == [(6, 11), (11, 11)]


def test_words_in_lower_case_without_spaces_are_found_in_the_text() -> None:
    encoder = get_encoder("wordpiece")
    response = "The  Capital,\nHello"
    ids = encoder.encode_response(response)
    pieces = [response[start:end] for start, end in encoder.locate_tokens(response, ids)]
    assert pieces == ["The", "Cap", "ital", ",", "Hello", ""]


# ---- What marks mean ----


@given(
    cuts=st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted),
    marks=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair))), max_size=4),
)
def test_a_token_is_flagged_if_it_shares_a_character_with_a_mark(cuts: list[int], marks: list[tuple[int, int]]) -> None:
    edges = [0, *cuts, 20]
    spans = [*itertools.pairwise(edges), (20, 20)]
    filled = [mark for mark in marks if mark[0] < mark[1]]
    marked = {place for start, end in filled for place in range(start, end)}
    flags = flag_spans(spans, filled)
    for (start, end), flag in zip(spans, flags, strict=True):
        if start < end:
            assert flag == bool(marked & set(range(start, end)))
    assert not flags[-1], "the end-of-sequence has no character"
    empty = [mark for mark in marks if mark[0] == mark[1]]
    for (start, end), flag in zip(spans, flag_spans(spans, empty), strict=True):
        assert flag == any(start <= place < max(end, start + 1) for place, _ in empty)


def test_marks_at_the_edges() -> None:
    # "Paris is": the space is in no span.
    spans = [(0, 5), (6, 8), (8, 8)]
    assert flag_spans(spans, []) == [False, False, False]
    assert flag_spans(spans, [(0, 6)]) == [True, False, False], "touched by a leading space alone"
    assert flag_spans(spans, [(4, 7)]) == [True, True, False]
    assert flag_spans(spans, [(6, 6)]) == [False, True, False], "the token that starts there"
    assert flag_spans(spans, [(5, 5)]) == [False, True, False], "the token whose space it is"
    assert flag_spans(spans, [(8, 8)]) == [False, False, True], "the end-of-sequence"
    assert flag_spans(spans, [(0, 8)]) == [True, True, False]
    assert flag_spans(spans, [(5, 6)]) == [False, False, False]


# ---- Another tokenizer ----


@pytest.mark.parametrize("target", KINDS)
@given(data=st.data())
def test_flags_carried_over_are_those_that_share_a_character(target: str, data: st.DataObject) -> None:
    output = data.draw(RESPONSES)
    source = make_scores(output=output)
    flags = data.draw(st.lists(st.booleans(), min_size=len(source.token_ids), max_size=len(source.token_ids)))
    weights = [1 / (place + 1) if flag else 0.0 for place, flag in enumerate(flags)]
    scores = make_scores(output=output, is_flagged=flags, weights=weights)
    encoder = get_encoder(target)
    mapped = map_to_tokenizer(scores, encoder)
    assert mapped.token_ids == encoder.encode_response(output)
    assert mapped.is_flagged == [weight > 0 for weight in mapped.weights]
    assert mapped.is_flagged[-1] == flags[-1]
    if target in ("bpe", "bpe_bos"):  # they differ by what goes before a text
        assert mapped is scores
        return
    assert mapped.logps_without is None
    assert mapped.tokenizer == fingerprint_tokenizer(encoder.tokenizer)
    for (start, end), weight in zip(mapped.spans, mapped.weights, strict=True):
        expected = 0.0
        for (left, right), source_weight in zip(scores.spans, scores.weights, strict=True):
            is_space = not output[left:right].strip()
            shared = range(max(start, left), min(end, right))
            if any(is_space or not output[place].isspace() for place in shared) or start == left == len(output):
                expected = max(expected, source_weight)
        if start < end or start == len(output):
            assert weight == expected


def test_a_flag_whose_span_has_spaces_in_it_is_carried_over_to_the_words() -> None:
    # As of scores that were made by something else: "is a" and " city." in one piece each.
    output, encoder = "is a city.", get_encoder("slow")
    spans = [(0, 4), (4, 10), (10, 10)]
    scores = make_scores(output=output)
    for flags, expected in (
        ([True, False, False], "is a"),
        ([False, True, False], "city."),
        ([True, True, True], output),
    ):
        weights = [0.25 if flag else 0.0 for flag in flags]
        changed = replace(scores, spans=spans, is_flagged=flags, weights=weights)
        mapped = map_to_tokenizer(changed, encoder)
        pieces = zip(mapped.spans, mapped.is_flagged, strict=True)
        assert "".join(output[slice(*span)] for span, flag in pieces if flag) == expected.replace(" ", "")
        assert mapped.is_flagged[-1] == flags[-1]


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    first, again = (fingerprint_tokenizer(make_tokenizer("bpe")) for _ in range(2))
    assert first == again
    changed = make_tokenizer("bpe")
    changed.add_tokens(["Sydney"])
    others = {fingerprint_tokenizer(get_encoder(kind).tokenizer) for kind in KINDS}
    assert fingerprint_tokenizer(get_encoder("bpe_bos").tokenizer) == first, "the same but for what goes before a text"
    assert len(others | {fingerprint_tokenizer(changed)}) == len(KINDS)


def test_a_changed_chat_template_gives_another_fingerprint() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    before = fingerprint_template(Encoder(tokenizer, "chat"))
    assert before.startswith("chat ")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>model")
    assert fingerprint_template(Encoder(tokenizer, "chat")) != before


# ---- Files ----


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scores = [make_scores(), make_scores(logps_with=None, output="Yes.\u2028é")]
    for name in ("scores.jsonl", "scores.json", "scores.jsonl.gz"):
        assert write_token_scores(tmp_path / name, scores) == 2
        assert read_token_scores(tmp_path / name) == scores
        assert is_token_scores(tmp_path / name)
    assert read_token_scores(tmp_path / "scores.jsonl")[0].record.model_extra == {"source": "mine"}


def test_every_line_stands_for_itself(tmp_path: Path) -> None:
    write_token_scores(tmp_path / "a.jsonl", [make_scores(), make_scores(output="Yes.")])
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([lines[1], lines[0], lines[1]]))
    assert [scores.record.output for scores in read_token_scores(tmp_path / "b.jsonl")] == [
        "Yes.",
        "Sydney is the capital 🙂.",
        "Yes.",
    ]
    row = json.loads(lines[0])
    assert {"instruction", "output", "judgment", "source", *SCORE_FIELDS} == set(row)
    assert row["schema_version"] == 1
    assert row["is_satisfactory"] is False
    assert row["spans"][0] == [0, 2]


def test_token_scores_are_records_too(tmp_path: Path) -> None:
    write_token_scores(tmp_path / "scores.jsonl", [make_scores()])
    (record,) = load_records(tmp_path / "scores.jsonl")
    assert strip_scores(record) == make_scores().record
    assert strip_scores(make_scores().record) == make_scores().record


def test_a_file_of_plain_records_is_no_file_of_token_scores(tmp_path: Path) -> None:
    for name, text in {
        "records.jsonl": '{"instruction": "a", "output": "b"}\n',
        "records.json": '[\n{"instruction": "a", "output": "b"}]',
        "empty": "",
        "none.json": "[]",
        "text": "hello",
        "number": "1\n",
        "nested": '{"a":' + "[" * 200_000,
    }.items():
        (tmp_path / name).write_text(text)
        assert not is_token_scores(tmp_path / name)
    (tmp_path / "packed.jsonl.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf\n" + json.dumps(make_scores().to_row()).encode())
    )
    assert is_token_scores(tmp_path / "packed.jsonl.gz")
    with pytest.raises(DataError, match=r"gone: no such file"):
        is_token_scores(tmp_path / "gone")


def test_edited_flags_and_weights_survive(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    row = make_scores().to_row()
    assert row["is_flagged"][:4] == [True, False, False, True]
    row["is_flagged"][:4] = [False, True, False, True]
    row["weights"][:4] = [0.5, 0.25, None, 1]  # what is not flagged may keep its weight, or have none
    path.write_text(json.dumps(row))
    (scores,) = read_token_scores(path)
    assert scores.is_flagged[:4] == [False, True, False, True]
    assert scores.weights[:4] == [0.0, 0.25, 0.0, 1.0]
    write_token_scores(path, [scores])
    assert read_token_scores(path) == [scores]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "flagged without a weight": (
        {"is_flagged": [True, *[False] * 99], "weights": [0.0] * 100},
        r"field 'weights\[0\]': expected a number above 0 for a flagged token, got 0.0; give it a weight"
        r" \(unlikelihood_weight is 0.5\), or set is_flagged\[0\] to false",
    ),
    "flagged with a null": (
        {"is_flagged": [True, *[False] * 99], "weights": [None] * 100},
        r"field 'weights\[0\]': expected a number above 0 for a flagged token, got null",
    ),
    "negative weight": ({"weights": [-1] * 100}, r"field 'weights\[0\]': expected numbers of at least 0, got a number"),
    "positive log-prob": ({"logps_without": [0.1] * 100}, r"field 'logps_without\[0\]': expected finite numbers of at"),
    "no number": ({"logps_with": ["x"] * 100}, r"field 'logps_with\[0\]': expected finite .* got a string"),
    "too few": ({"tokens": []}, r"field 'tokens': expected \d+ elements, one for each of token_ids, got 0"),
    "no list": ({"is_flagged": None}, r"field 'is_flagged': expected a list of true or false, got null"),
    "span outside": ({"spans": [[0, 999]] * 100}, r"field 'spans\[0\]': expected start <= end <= \d+.* got \[0, 999\]"),
    "span backwards": ({"spans": [[3, 2]] * 100}, r"field 'spans\[0\]': expected start <= end <= \d+.* got \[3, 2\]"),
    "no span": ({"spans": [[1]] * 100}, r"field 'spans\[0\]': expected pairs of whole numbers .* got \[1\]"),
    "threshold": ({"threshold": "1.1"}, r"field 'threshold': expected a number of at least 0, got a string"),
    "other judgment": (
        {"judgment": "Perfect."},
        r"field 'is_satisfactory': expected true by the row's judgment and score, got false; change the one or",
    ),
    "token beyond": (
        {"token_ids": [2**70] * 100},
        r"field 'token_ids\[0\]': expected whole numbers from 0 to 2147483647",
    ),
    "threshold beyond": ({"threshold": 10**400}, r"field 'threshold': expected a number of at least 0, got a number"),
    "no version": ({"schema_version": None}, r"field 'schema_version': expected 1, got null; make the file by cutlm"),
    "record": ({"output": 3}, r"field 'output': expected a string, got a number \(3\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_cannot_be_used_is_one_sentence(name: str, tmp_path: Path) -> None:
    changes, expected = BROKEN[name]
    row = make_scores().to_row()
    num_tokens = len(row["token_ids"])
    cut = {key: value[:num_tokens] if isinstance(value, list) else value for key, value in changes.items()}
    path = tmp_path / "scores.jsonl"
    path.write_text(f"{json.dumps(make_scores().to_row())}\n{json.dumps(row | cut)}\n")
    with pytest.raises(DataError, match=rf"scores.jsonl:2: {expected}") as error:
        read_token_scores(path)
    assert "scores.jsonl:1:" not in str(error.value)
    assert "mend them, nothing was skipped" in str(error.value)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    row = make_scores().to_row()
    lacking = {name: value for name, value in row.items() if name not in ("spans", "gamma")}
    rows = [row | {"tokens": [], "threshold": -1}, lacking, [1], {"instruction": "a", "output": "b"}]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "not json\n")
    with pytest.raises(DataError) as error:
        read_token_scores(path)
    for sentence in (
        "scores.jsonl:1: field 'tokens'",
        "scores.jsonl:1: field 'threshold'",
        "scores.jsonl:2: field 'spans' is missing",
        "scores.jsonl:2: field 'gamma' is missing",
        "scores.jsonl:3: expected an object",
        "scores.jsonl:4: field 'schema_version': expected 1, got no such field",
        "scores.jsonl:5: not JSON",
    ):
        assert sentence in str(error.value)


def test_a_later_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"schema_version": 2, "new": [1]}) + "\n")
    with pytest.raises(
        DataError, match=r"expected token scores of schema_version 1, got 2, .*; upgrade cutlm, or"
    ) as error:
        read_token_scores(path)
    assert len(error.value.problems) == 1


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no token scores; expected JSON Lines with at least one row"):
        read_token_scores(tmp_path / "empty.jsonl")
