"""Token scores: files that people edit, and flags for the tokens of another tokenizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import write_lines
from encoders import KINDS, RESPONSES, get_encoder
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer

from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import DataError
from cutlm.flagging.token_scores import (
    SCORE_FIELDS,
    TokenScores,
    fingerprint_tokenizer,
    is_token_scores_row,
    map_to_tokenizer,
    read_token_scores,
    strip_scores,
    write_token_scores,
)
from cutlm.prompting.encoding import Encoder

OUTPUT = "Sydney is the capital 🙂."


def make_scores(output: str = OUTPUT, **changes: Any) -> TokenScores:
    encoder = get_encoder("bpe")
    record = JudgedRecord(instruction="Which?", output=output, judgment="It is wrong.", source="mine")  # type: ignore[call-arg]
    ids = encoder.encode_response(output)
    num_tokens = len(ids)
    flags = [index % 3 == 0 for index in range(num_tokens)]
    values: dict[str, Any] = {
        "record": record,
        "token_ids": ids,
        "tokens": [encoder.tokenizer.decode([token]) for token in ids],
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


# ---- Another tokenizer ----


@pytest.mark.parametrize("target", KINDS)
@given(data=st.data())
def test_mapped_flags_are_those_that_share_a_character(target: str, data: st.DataObject) -> None:
    output = data.draw(RESPONSES)
    source = make_scores(output)
    flags = data.draw(st.lists(st.booleans(), min_size=len(source.token_ids), max_size=len(source.token_ids)))
    weights = [1 / (index + 1) if flag else 0.0 for index, flag in enumerate(flags)]
    scores = replace(source, is_flagged=flags, weights=weights)
    encoder = get_encoder(target)
    mapped = map_to_tokenizer(scores, encoder)
    assert mapped.token_ids == encoder.encode_response(output)
    assert mapped.is_flagged == [weight > 0 for weight in mapped.weights]
    assert mapped.is_flagged[-1] == flags[-1]
    if target in ("bpe", "bpe_bos"):  # they differ by what comes before a text only
        assert mapped is scores
        return
    assert mapped.logps_without is None
    assert mapped.tokenizer == fingerprint_tokenizer(encoder.tokenizer)
    for (start, end), weight in zip(mapped.spans, mapped.weights, strict=True):
        expected = 0.0
        for (left, right), source_weight in zip(scores.spans, scores.weights, strict=True):
            is_space = not output[left:right].strip()
            shared = range(max(start, left), min(end, right))
            if any(is_space or not output[index].isspace() for index in shared) or start == left == len(output):
                expected = max(expected, source_weight)
        if start < end or start == len(output):
            assert weight == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([True, False, False], "isa"), ([False, True, False], "city."), ([True, True, True], "isacity.")],
)
def test_flags_whose_spans_contain_spaces_are_mapped_to_the_words(flags: list[bool], expected: str) -> None:
    # Scores of another program: "is a" and " city." are one token each.
    output, encoder = "is a city.", get_encoder("slow")
    weights = [0.25 if flag else 0.0 for flag in flags]
    scores = replace(make_scores(output), spans=[(0, 4), (4, 10), (10, 10)], is_flagged=flags, weights=weights)
    mapped = map_to_tokenizer(scores, encoder)
    pieces = zip(mapped.spans, mapped.is_flagged, strict=True)
    assert "".join(output[slice(*span)] for span, flag in pieces if flag) == expected
    assert mapped.is_flagged[-1] == flags[-1]


def test_the_fingerprint_of_a_tokenizer_depends_on_what_it_does() -> None:
    first, again = (fingerprint_tokenizer(make_tokenizer("bpe")) for _ in range(2))
    assert first == again
    changed = make_tokenizer("bpe")
    changed.add_tokens(["Sydney"])
    others = {fingerprint_tokenizer(get_encoder(kind).tokenizer) for kind in KINDS}
    assert fingerprint_tokenizer(get_encoder("bpe_bos").tokenizer) == first, "they differ before a text only"
    assert len(others | {fingerprint_tokenizer(changed)}) == len(KINDS)


def test_the_fingerprint_of_a_template_depends_on_its_text() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    before = Encoder(tokenizer, "chat").fingerprint
    assert before.startswith("chat ")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>model")
    assert Encoder(tokenizer, "chat").fingerprint != before


# ---- Files ----


def test_written_scores_are_read_back(tmp_path: Path) -> None:
    scores = [make_scores(), make_scores(logps_with=None, output="Yes.\u2028é")]
    for name in ("scores.jsonl", "scores.json", "scores.jsonl.gz"):
        assert write_token_scores(tmp_path / name, scores) == 2
        assert read_token_scores(tmp_path / name) == scores
    assert read_token_scores(tmp_path / "scores.jsonl")[0].record.model_extra == {"source": "mine"}


def test_log_ratios_are_against_the_reference_of_a_contrast(tmp_path: Path) -> None:
    num_tokens = len(make_scores().token_ids)
    reference = [-0.75] * num_tokens
    scores = [
        make_scores(),
        make_scores(contrast="foreign", logps_reference=reference),
        make_scores(contrast="perfect", logps_reference=None),
    ]
    write_token_scores(tmp_path / "scores.jsonl", scores)
    assert read_token_scores(tmp_path / "scores.jsonl") == scores
    assert [one.log_ratios for one in scores] == [[1.0] * num_tokens, [0.25] * num_tokens, None]


def test_files_without_a_contrast_are_read(tmp_path: Path) -> None:
    row = make_scores().to_row()
    older = {name: value for name, value in row.items() if name not in ("contrast", "logps_reference")}
    assert read_token_scores(write_lines(tmp_path / "scores.jsonl", [older])) == [make_scores()]


def test_lines_are_independent_of_each_other(tmp_path: Path) -> None:
    write_token_scores(tmp_path / "a.jsonl", [make_scores(), make_scores("Yes.")])
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([lines[1], lines[0], lines[1]]))
    assert [scores.record.output for scores in read_token_scores(tmp_path / "b.jsonl")] == ["Yes.", OUTPUT, "Yes."]
    row = json.loads(lines[0])
    assert {"instruction", "output", "judgment", "source", *SCORE_FIELDS[:-3]} == set(row)  # without a teacher
    assert row["schema_version"] == 1
    assert row["is_satisfactory"] is False
    assert row["spans"][0] == [0, 2]


def test_lines_of_white_space_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_token_scores(path, [make_scores()])
    path.write_text(f"{path.read_text('utf-8')}\n\u00a0\n \u3000\r\n", "utf-8")
    assert read_token_scores(path) == [make_scores()]


def test_token_scores_can_be_read_as_records(tmp_path: Path) -> None:
    write_token_scores(tmp_path / "scores.jsonl", [make_scores()])
    (record,) = load_records(tmp_path / "scores.jsonl")
    assert strip_scores(record) == make_scores().record
    assert strip_scores(make_scores().record) == make_scores().record


def test_token_scores_are_told_from_plain_records() -> None:
    assert is_token_scores_row(make_scores().to_row())
    for value in ({"instruction": "a", "output": "b"}, {"token_ids": []}, {}, [], "token_ids", 1, None):
        assert not is_token_scores_row(value)


def test_edited_flags_and_weights_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    row = make_scores().to_row()
    assert row["is_flagged"][:4] == [True, False, False, True]
    row["is_flagged"][:4] = [False, True, False, True]
    row["weights"][:4] = [0.5, 0.25, None, 1]  # a token that is not flagged may have any weight, or none
    path.write_text(json.dumps(row))
    (scores,) = read_token_scores(path)
    assert scores.is_flagged[:4] == [False, True, False, True]
    assert scores.weights[:4] == [0.0, 0.25, 0.0, 1.0]
    write_token_scores(path, [scores])
    assert read_token_scores(path) == [scores]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "flagged without a weight": ({"is_flagged": [True, *[False] * 99], "weights": [0.0] * 100}, "weights[0]"),
    "flagged with a null": ({"is_flagged": [True, *[False] * 99], "weights": [None] * 100}, "weights[0]"),
    "negative weight": ({"weights": [-1] * 100}, "weights[0]"),
    "positive log-prob": ({"logps_without": [0.1] * 100}, "logps_without[0]"),
    "no number": ({"logps_with": ["x"] * 100}, "logps_with[0]"),
    "too few": ({"tokens": []}, "tokens"),
    "no list": ({"is_flagged": None}, "is_flagged"),
    "span outside": ({"spans": [[0, 999]] * 100}, "spans[0]"),
    "span backwards": ({"spans": [[3, 2]] * 100}, "spans[0]"),
    "no span": ({"spans": [[1]] * 100}, "spans[0]"),
    "text as threshold": ({"threshold": "1.1"}, "threshold"),
    "huge threshold": ({"threshold": 10**400}, "threshold"),
    "other judgment": ({"judgment": "Perfect."}, "is_satisfactory"),
    "huge token": ({"token_ids": [2**70] * 100}, "token_ids[0]"),
    "unknown contrast": ({"contrast": "none"}, "contrast"),
    "too few references": ({"contrast": "foreign", "logps_reference": [-1.0]}, "logps_reference"),
    "positive reference": ({"contrast": "perfect", "logps_reference": [0.1] * 100}, "logps_reference[0]"),
    "no version": ({"schema_version": None}, "schema_version"),
    "record": ({"output": 3}, "output"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name: str, tmp_path: Path) -> None:
    changes, field = BAD_ROWS[name]
    row = make_scores().to_row()
    num_tokens = len(row["token_ids"])
    fitted = {key: value[:num_tokens] if isinstance(value, list) else value for key, value in changes.items()}
    path = write_lines(tmp_path / "scores.jsonl", [row, row | fitted])
    with pytest.raises(DataError) as error:
        read_token_scores(path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}:2: field '{field}': expected ")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    row = make_scores().to_row()
    lacking = {name: value for name, value in row.items() if name not in ("spans", "gamma")}
    rows = [row | {"tokens": [], "threshold": -1}, lacking, [1], {"instruction": "a", "output": "b"}]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "not json\n")
    with pytest.raises(DataError) as error:
        read_token_scores(path)
    for part in (
        "scores.jsonl:1: field 'tokens'",
        "scores.jsonl:1: field 'threshold'",
        "scores.jsonl:2: field 'spans'",
        "scores.jsonl:2: field 'gamma'",
        "scores.jsonl:3: expected an object",
        "scores.jsonl:4: field 'schema_version'",
        "scores.jsonl:5: not JSON",
    ):
        assert part in str(error.value)


def test_a_later_version_is_refused_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "scores.jsonl", [{"schema_version": 3, "new": [1]}] * 3)
    with pytest.raises(DataError, match=f"^{path}: .*schema_version 2, got 3") as error:
        read_token_scores(path)
    assert len(error.value.problems) == 1


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=f"^{tmp_path}/empty.jsonl: "):
        read_token_scores(tmp_path / "empty.jsonl")
