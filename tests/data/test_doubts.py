"""Records that are valid, but probably wrong, are named: by kind, with their number and locations."""

import pytest

from cutlm.data.doubts import describe_doubts
from cutlm.data.files import SourceRow
from cutlm.data.records import check_rows

KINDS = {
    "praise": "reads like praise",
    "taken_back": 'starts with "Perfect" and then objects',
    "empty": "says nothing",
    "range": "a score outside 1 to 10",
    "low": "a score below 7 and no objection",
    "high": "a score of 7 or more and an objection",
    "critique": "a field 'critique' and no judgment",
    "chat_history": "a field 'chat_history', which is ignored",
    "thoughts": "thoughts next to the response, which are not trained on",
}


def find_kinds(row, max_locations=5):
    check = check_rows([SourceRow("a.jsonl:1", {"instruction": "Add 1 and 2.", "output": "4"} | row)])
    sentences = describe_doubts(check.records, check.locations, max_locations)
    assert all(sentence.endswith(": a.jsonl:1") for sentence in sentences)
    return {kind for sentence in sentences for kind, text in KINDS.items() if text in sentence}


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"judgment": None}, set()),
        ({"judgment": "Perfect."}, set()),
        ({"judgment": "The sum is 3."}, set()),
        ({"judgment": "No."}, set()),
        ({"judgment": "The sum is 3.", "score": 2}, set()),
        ({"judgment": None, "score": 7}, set()),
        ({"judgment": "Perfect.", "score": 10.0}, set()),
        ({"judgment": "The response is correct.", "score": 9}, set()),
        ({"judgment": "The response is perfect."}, {"praise"}),
        ({"judgment": "Correct.", "score": 5}, {"praise", "low"}),
        ({"judgment": "Perfect, but the sum is wrong."}, {"taken_back"}),
        ({"judgment": "Perfect. However, the sum is 3."}, {"taken_back"}),
        ({"judgment": "Perfect. It is short, but complete."}, set()),
        ({"judgment": "Perfect.", "reasoning": "1 + 2"}, {"thoughts"}),
        ({"judgment": "Perfect.", "reasoning_content": "1 + 2"}, {"thoughts"}),
        ({"judgment": "Perfect.", "reasoning": None}, set()),
        ({"judgment": "$ERROR$"}, {"empty"}),
        ({"judgment": "N/A"}, {"empty"}),
        ({"judgment": "..."}, {"empty"}),
        ({"judgment": "The sum is 3.", "score": 85}, {"range"}),
        ({"judgment": None, "score": 0}, {"range"}),
        ({"judgment": None, "score": -1.5}, {"range"}),
        ({"judgment": None, "score": 1}, {"low"}),
        ({"judgment": "Perfect.", "score": 6.9}, {"low"}),
        ({"judgment": "The sum is 3.", "score": 8}, {"high"}),
        ({"judgment": None, "system": "Be brief.", "history": [["a", "b"]]}, set()),
        ({"judgment": None, "chat_history": [["a", "b"]]}, {"chat_history"}),
    ],
)
def test_each_kind_of_doubt(row, kinds):
    assert find_kinds(row) == kinds


def test_a_judgment_under_another_name_is_doubtful_even_if_others_have_one():
    plain = {"instruction": "Add 1 and 2.", "output": "4"}
    rows = [plain | {"judgment": "No."}, plain | {"critique": "The sum is 3."}, plain | {"critique": None}]
    check = check_rows(SourceRow(f"a.jsonl:{number}", row) for number, row in enumerate(rows, start=1))
    assert not check.problems
    (sentence,) = describe_doubts(check.records, check.locations, 5)
    assert KINDS["critique"] in sentence
    assert sentence.endswith(": a.jsonl:2")


def test_records_of_one_kind_share_a_sentence_that_names_the_first():
    row = {"instruction": "Add 1 and 2.", "output": "4", "score": 1}
    check = check_rows([SourceRow(f"a.jsonl:{n}", row) for n in range(1, 8)])
    (sentence,) = describe_doubts(check.records, check.locations, 2)
    assert sentence.startswith("7 records with a score below 7")
    assert sentence.endswith(": a.jsonl:1, a.jsonl:2 and 5 more")
