"""Judgments that praise in other words than "Perfect." are found, and objections are not taken for praise."""

import json
from pathlib import Path

import pytest

from cutlm.data.praise import reads_like_praise


@pytest.mark.parametrize(
    "judgment",
    [
        "The response is perfect.",
        "The response is perfect. It explains why the AI cannot predict the future, and instead describes trends.",
        "This answer is absolutely flawless because it covers every point.",
        "Feedback: **The AI's answer is spot on!**",
        "The response is correct. The capital is Canberra.",
        "The response is accurate and provides a detailed explanation.",
        "Correct.",
        "Great job!",
        "No issues found.",
        "No, there are no errors.",
        "There are no errors in the response.",
        "Nothing is wrong with this answer.",
        "10/10",
        "9 out of 10.",
        "Score: 10",
        "100% correct.",
        "It is well written and complete.",
    ],
)
def test_praise_is_found(judgment):
    assert reads_like_praise(judgment)


@pytest.mark.parametrize(
    "judgment",
    [
        "The response is perfect, but it includes an unnecessary explanation.",
        "The response is almost perfect.",
        "The response is not perfect because it is based on assumptions.",
        "The response is perfect in terms of describing the artwork.",
        "The response is incorrect.",
        "The response is correct in naming a capital.",
        "The response is correct for the first question.",
        "The response is correct. However, the capital is misspelled.",
        "The response is good. Use shorter sentences.",
        "The response is good. The tone needs work.",
        "The response is mostly correct.",
        "That is its largest city.",
        "The answer is Canberra.",
        "Wrong.",
        "No, that is wrong.",
        "No it's incorrect",
        "It is wrong, no?",
        "42",
        "It is 20.",
        "The answer is 42.",
        "2/10",
        "Rating: 3 out of 10",
        "The code has no error handling.",
        "Is the response perfect?",
        "The response is right-leaning.",
        "Perfection is what it lacks.",
    ],
)
def test_an_objection_is_not_taken_for_praise(judgment):
    assert not reads_like_praise(judgment)


def test_praise_in_the_published_judgments(shared_data: Path):
    objections = [
        row["judgment"]
        for number in (1, 2, 3)
        for row in json.loads((shared_data / f"judgments/iter{number}.json").read_text("utf-8"))
        if row["judgment"] and not row["judgment"].lower().startswith("perfect")
    ]
    found = [judgment for judgment in objections if reads_like_praise(judgment)]
    assert len(objections) == 760
    assert len(found) == 31
    assert all(
        judgment.startswith(("The response is perfect", "The response is correct. The GPA", "The response is accurate"))
        for judgment in found
    )
