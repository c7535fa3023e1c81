"""The words of the tiny world: what it knows, how it asks, and how it judges, read from `words.json`.

What is made of them is left to `cutlm.world.families` (items and answers), `cutlm.world.grammar` (instructions) and
`cutlm.world.judge` (judgments).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

WORDS_FILE = Path(__file__).parent / "words.json"


class Country(NamedTuple):
    """A country, its capital, and the city that is popularly taken for it."""

    name: str
    capital: str
    popular_city: str


class Thing(NamedTuple):
    """What three sentences can be said about.

    Attributes:
        name: A word.
        group: What it is.
        middle: The middle sentence, with a place for the fact.
        fact: The right fact.
        popular_fact: The wrong one that is often told.
        ending: The last sentence.
    """

    name: str
    group: str
    middle: str
    fact: str
    popular_fact: str
    ending: str


class Question(NamedTuple):
    """A question of one word.

    Attributes:
        name: What is asked about.
        kind: 0 for its colour, 1 for its opposite.
        answer: The answer, in small letters.
    """

    name: str
    kind: int
    answer: str


@cache
def load_words() -> dict[str, Any]:
    """All of `words.json`."""
    return json.loads(WORDS_FILE.read_text("utf-8"))


@cache
def load_countries() -> dict[str, Country]:
    """The countries by name."""
    rows = (Country(*row.split()) for row in load_words()["capitals"])
    return {row.name: row for row in rows}


@cache
def load_things() -> dict[str, Thing]:
    """Animals, plants and things by name."""
    words = load_words()
    things = {}
    for kind, rows in words["facts"].items():
        for row in rows:
            name, group, fact, popular, ending = row.split()
            middle = words["fact_middles"][kind]
            things[name] = Thing(name, group, middle, fact, popular, words["fact_endings"][ending])
    return things


@cache
def load_questions() -> dict[str, Question]:
    """The questions about colours and opposites, by what they ask about."""
    words = load_words()
    questions = [Question(*_split_colour(row)) for row in words["colours"]]
    questions += [Question(name, 1, answer) for name, answer in map(str.split, words["opposites"])]
    return {question.name: question for question in questions}


def _split_colour(row: str) -> tuple[str, int, str]:
    name, _, colour = row.partition("=")
    return name, 0, colour
