"""Judged records: which ones are satisfactory, which rows are refused, and the messages."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cutlm.data.files import SourceRow
from cutlm.data.records import FIELDS, JudgedRecord, as_records, check_records, check_rows, load_records
from cutlm.errors import MAX_PROBLEMS_SHOWN, DataError

GOOD = {"instruction": "Add 1 and 2.", "output": "4", "judgment": "The sum is 3."}

texts = st.one_of(st.sampled_from(["Perfect.", "PERFECT", "Not perfect.", " Perfect"]), st.text(min_size=1)).filter(
    lambda text: text.strip() and "\0" not in text
)


def check_one(row):
    return check_rows([SourceRow("data.jsonl:1", row)])


@pytest.mark.parametrize(
    ("judgment", "score", "expected"),
    [
        (None, None, True),
        ("Perfect.", None, True),
        (" perfect, nothing is wrong", None, True),
        ("Perfectly wrong: the sum is 5.", None, False),
        ("PERFECT", None, True),
        ("Not perfect.", None, False),
        ("The sum is 3.", None, False),
        ("The sum is 3.", 6.99, False),
        ("The sum is 3.", 7, True),
        ("The sum is 3.", 10.0, True),
        ("Perfect.", 1, True),
        (None, 1, True),
    ],
)
def test_a_record_is_satisfactory_without_judgment_by_praise_or_by_score(judgment, score, expected):
    record = JudgedRecord(instruction="x", output="y", judgment=judgment, score=score)
    assert record.is_satisfactory is expected


@settings(max_examples=30)
@given(judgment=texts, score=st.none() | st.floats(1, 10))
def test_praise_is_recognized_in_any_letter_case(judgment, score):
    record = JudgedRecord(instruction="x", output="y", judgment=judgment, score=score)
    first_word = re.split(r"\W", judgment.strip(), maxsplit=1)[0]
    assert record.is_satisfactory is (first_word.lower() == "perfect" or (score is not None and score >= 7))
    if judgment.isascii():
        assert record.model_copy(update={"judgment": judgment.upper()}).is_satisfactory is record.is_satisfactory


@pytest.mark.parametrize(
    ("judgment", "score", "stated"),
    [("Bad.", None, "Bad."), ("Perfect: so.", 2, "Perfect: so."), (None, 2, "Perfect."), ("Bad.", 8, "Perfect.")],
)
def test_a_satisfactory_response_is_never_stated_to_be_wrong(judgment, score, stated):
    assert JudgedRecord(instruction="x", output="y", judgment=judgment, score=score).stated_judgment == stated


@settings(max_examples=30)
@given(instruction=texts, material=st.none() | st.just("") | texts, output=texts, judgment=st.none() | texts)
def test_a_valid_row_is_kept_unchanged(instruction, material, output, judgment):
    row = {"instruction": instruction, "input": material, "output": output, "judgment": judgment}
    (record,) = check_one(row).records
    assert (record.instruction, record.input, record.output) == (instruction, material or "", output)
    assert record.judgment == judgment
    assert record.full_instruction == (f"{instruction}\n{material}" if material else instruction)


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        JudgedRecord(**GOOD).output = "3"


def test_other_fields_of_a_row_are_kept():
    row = GOOD | {"id": 7, "source": "mine", "model": None, "scope": [1]}
    (record,) = check_one(row).records
    assert record.model_extra == {"id": 7, "source": "mine", "model": None, "scope": [1]}


def without(*names):
    return {key: value for key, value in GOOD.items() if key not in names}


@pytest.mark.parametrize(
    ("row", "problems"),
    [
        (without("output"), ["field 'output' is missing; the object has 'instruction', 'judgment'"]),
        ({}, [f"field {name!r} is missing; the object has no fields" for name in ("instruction", "output")]),
        (GOOD | {"judgment": ["x"]}, ["field 'judgment': expected a string or null, got a list"]),
        (GOOD | {"judgment": {"text": "x"}}, ["field 'judgment': expected a string or null, got an object"]),
        (
            GOOD | {"judgment": " "},
            ["field 'judgment': expected text, got an empty string; write null if nothing is wrong"],
        ),
        (GOOD | {"output": None}, ["field 'output': expected a string, got null"]),
        (GOOD | {"output": "\n"}, ["field 'output': expected text, got an empty string"]),
        (GOOD | {"instruction": 5}, ["field 'instruction': expected a string, got a number (5)"]),
        (GOOD | {"input": 1.5}, ["field 'input': expected a string or null, got a number (1.5)"]),
        (GOOD | {"i_ans": False}, ["field 'i_ans': expected a string or null, got a boolean (False)"]),
        (GOOD | {"score": "7"}, ["field 'score': expected a finite number or null, got a string"]),
        (GOOD | {"score": True}, ["field 'score': expected a finite number or null, got a boolean (True)"]),
        (GOOD | {"score": float("inf")}, ["field 'score': expected a finite number or null, got a number (inf)"]),
        (GOOD | {"output": "a\0"}, ["field 'output': expected text without null bytes, got one at 1"]),
        (GOOD | {"input": "a\0"}, ["field 'input': expected text without null bytes, got one at 1"]),
        (GOOD | {"judgment": "ab\ud800"}, ["field 'judgment': expected text, got half of a surrogate pair"]),
        (without("judgment") | {"judgement": "x"}, ["unknown field 'judgement'; did you mean 'judgment'?"]),
        (without("judgment") | {"Judgment": "x"}, ["unknown field 'Judgment'; did you mean 'judgment'?"]),
        (GOOD | {"scores": 7, "inputs": "x"}, [
            "unknown field 'scores'; did you mean 'score'?",
            "unknown field 'inputs'; did you mean 'input'?",
        ]),
        (["x"], [f"expected an object with the fields {', '.join(FIELDS)}, got a list"]),
        (None, [f"expected an object with the fields {', '.join(FIELDS)}, got null"]),
        ("x", [f"expected an object with the fields {', '.join(FIELDS)}, got a string"]),
    ],
)  # fmt: skip
def test_an_invalid_row_is_named_with_its_location_and_everything_wrong_with_it(row, problems):
    check = check_one(row)
    assert check.problems == [f"data.jsonl:1: {problem}" for problem in problems]
    assert (check.records, check.num_rows) == ([], 1)


@pytest.mark.parametrize(
    ("spans", "got"),
    [
        ("ab", "null, got a string"),
        ([[0], [0, True], [0, 1, 1]], "null, got a list"),
        ([[0, 1], [1, 0]], "got [1, 0]"),
        ([[0, 2]], "expected 0 <= start <= end <= 1, the length of output, got [0, 2]"),
        ([[-1, 0]], "got [-1, 0]"),
    ],
)
def test_wrong_spans_must_lie_in_the_output(spans, got):
    (problem,) = check_one(GOOD | {"wrong_spans": spans}).problems
    assert problem.startswith("data.jsonl:1: field 'wrong_spans': expected ")
    assert problem.endswith(got)
    assert check_one(GOOD | {"wrong_spans": [[0, 1], [1, 1]]}).records[0].wrong_spans == ((0, 1), (1, 1))


def test_a_field_that_resembles_one_of_the_row_is_not_a_misspelling():
    assert check_one(GOOD | {"judgement": "x", "instruction_id": 1}).problems == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), x),
        max_leaves=8,
    )
)
def test_a_row_of_any_shape_is_either_valid_or_explained(value):
    check = check_one(value)
    assert len(check.records) + bool(check.problems) == 1


def test_a_duplicate_is_named_and_kept():
    rows = [GOOD, GOOD | {"judgment": None}, GOOD | {"input": "x"}, GOOD | {"id": 1, "input": None}]
    check = check_rows(SourceRow(f"d:{n}", row) for n, row in enumerate(rows, start=1))
    assert check.duplicates == ["d:4: the same instruction, response and judgment as d:1"]
    assert len(check.records) == 4
    assert check.locations == ["d:1", "d:2", "d:3", "d:4"]
    assert (check.num_satisfactory, check.num_unsatisfactory) == (1, 3)


def test_a_file_may_be_an_array_or_lines_compressed_or_not(tmp_path):
    rows = [GOOD, GOOD | {"judgment": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    expected = [JudgedRecord(**row) for row in rows]
    for name in ("a.json", "a.jsonl", "a.gz"):
        assert load_records(tmp_path / name) == expected


def test_loading_names_all_invalid_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", json.dumps(GOOD), json.dumps(GOOD | {"output": 1})]))
    with pytest.raises(DataError) as error:
        load_records(path)
    first, second = error.value.problems
    assert first.startswith(f"{path}:1: not JSON")
    assert second.startswith(f"{path}:3: field 'output'")
    assert str(error.value).splitlines()[-1].startswith(f"2 problems in {path}")
    assert check_records(path).num_rows == 3


def test_a_file_without_records_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"a\.json: no records; expected at least one"):
        load_records(tmp_path / "a.json")


def test_only_the_first_of_many_problems_are_shown():
    with pytest.raises(DataError) as error:
        as_records([{}] * MAX_PROBLEMS_SHOWN, "train_dataset")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("train_dataset[0]: field 'instruction' is missing")
    assert lines[-2] == "... and 50 more problems"
    assert lines[-1].startswith("100 problems in train_dataset")
    assert len(lines) == MAX_PROBLEMS_SHOWN + 2
    assert len(error.value.problems) == 2 * MAX_PROBLEMS_SHOWN


def test_records_in_memory_may_be_dictionaries_or_records():
    record = JudgedRecord(**GOOD)
    check = as_records([GOOD, record], "train_dataset")
    assert check.records == [record, record]
    assert check.duplicates == ["train_dataset[1]: the same instruction, response and judgment as train_dataset[0]"]
    with pytest.raises(DataError, match="train_dataset: no records"):
        as_records([], "train_dataset")


@pytest.mark.parametrize(("name", "num_unsatisfactory"), [("iter1", 287), ("iter2", 231), ("iter3", 242)])
def test_the_published_judgments_are_valid(name, num_unsatisfactory, shared_data):
    check = check_records(shared_data / "judgments" / f"{name}.json")
    assert (check.num_rows, check.problems, check.duplicates) == (1000, [], [])
    assert check.num_unsatisfactory == num_unsatisfactory


def test_a_repeated_key_is_an_error(tmp_path):
    # The second value would win, and the model would learn a wrong response.
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "judgment": "It is wrong.", "judgment": null}\n')
    with pytest.raises(
        DataError, match=r"records\.jsonl:1: not JSON \(the key 'judgment' occurs twice in one object\)"
    ):
        load_records(path)


def test_the_reasons_are_given_even_if_every_row_is_invalid(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "a", "score": NaN}\n{"instruction": "a"\n')
    with pytest.raises(DataError) as caught:
        load_records(path)
    assert "records.jsonl:1: not JSON (NaN is not JSON)" in str(caught.value)
    assert "records.jsonl:2: not JSON" in str(caught.value)


def test_a_key_with_half_a_surrogate_pair_is_one_problem(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "\\ud800x": 1}\n')
    assert len(check_records(path).problems) == 1
