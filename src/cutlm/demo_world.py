"""The world of `cutlm demo`: a few dozen facts, bad habits, and judgments that name them, all made from a seed.

Two kinds of instructions: capitals, with the popular wrong city as the habit, and sentences about a thing, with a
needless apology, a needless last phrase or a repetition as habits. Half of the subjects are those of the packaged
records; by the others the base model learns to read judgments. Plain answers, habits included, are taught of all of
them. The model and its training are left to `cutlm.demo`.
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cutlm.jsonl import write_rows

_DATA = Path(__file__).parent / "demo_data"
RECORDS_FILE = _DATA / "records.jsonl"
HABIT_SHARE = 0.7

NUM_PHRASINGS = 6  # those that the records use; the one after them is held out
_CLOSING = " I hope this helps!"
_OTHER_JUDGMENT = "This does not answer the instruction."


@dataclass(frozen=True)
class Subject:
    """What instructions ask about.

    Attributes:
        kind: "capital" or "sentence".
        name: A country or a thing.
        facts: The capital and the popular wrong city, or two things to say.
        habit: The flaw that its plain answers show with a share of `HABIT_SHARE`; None for no flaw.
        is_in_records: Whether the packaged records are about it; else it is held out.
    """

    kind: str
    name: str
    facts: tuple[str, str]
    habit: str | None
    is_in_records: bool

    def ask(self, phrasing: int) -> str:
        """The instruction, in one of the phrasings."""
        return _load_words()["phrasings"][self.kind][phrasing].format(name=self.name)

    @property
    def right_answers(self) -> tuple[str, str]:
        first, second = self.facts
        if self.kind == "capital":
            return f"The capital of {self.name} is {first}.", f"It is {first}."
        return f"The {self.name} is {first}.", f"The {self.name} is {second}."

    def answer(self, flaw: str | None, wrong: str, style: int) -> str:
        """An answer.

        Args:
            flaw: What is wrong with it; None for nothing.
            wrong: The city or thing that the flaws "city" and "thing" name.
            style: 0 or 1: which of the two right answers it is, or is made from.
        """
        right = self.right_answers[style]
        if flaw == "city":
            return right.replace(self.facts[0], wrong)
        if flaw == "thing":
            return right.replace(self.name, wrong)
        if flaw == "apology":
            return f"I am sorry, but {right[0].lower()}{right[1:]}"
        return right + {"closing": _CLOSING, "repetition": f" {right}", None: ""}[flaw]


class Document(NamedTuple):
    """A text to pretrain on; the judgment is None where the prompt holds none."""

    instruction: str
    judgment: str | None
    response: str


@cache
def _load_words() -> dict[str, Any]:
    """Countries (capital, popular wrong city), things (two words to say about each), phrasings, and judgments."""
    return json.loads((_DATA / "world.json").read_text("utf-8"))


@cache
def list_subjects() -> tuple[Subject, ...]:
    """All subjects; their habits, and which of them the records are about, are fixed."""
    subjects = []
    for kind, habits in (
        ("capital", ("city", "city", "city", None)),
        ("sentence", ("apology", "closing", "repetition", None)),
    ):
        for number, row in enumerate(_load_words()[kind]):
            name, first, second = row.split()
            subjects.append(Subject(kind, name, (first, second), habits[number % 4], number // 4 % 2 == 0))
    return tuple(subjects)


@cache
def _list_cities() -> tuple[str, ...]:
    return tuple(city for subject in list_subjects() if subject.kind == "capital" for city in subject.facts)


def make_corpus(num_documents: int, seed: int) -> list[Document]:
    """Texts to pretrain on: half of them plain, half with a judgment that the response fits.

    Judged ones are about held-out subjects only, and most of their flaws (any city, any thing, any habit) cannot be
    guessed without reading the judgment. A few plain ones only repeat a city, from which the model learns to copy.
    """
    rng = random.Random(seed)
    return [_draw_judged(rng) if number % 2 else _draw_plain(rng) for number in range(num_documents)]


def _draw_plain(rng: random.Random) -> Document:
    if rng.random() < 0.2:
        city = rng.choice(_list_cities())
        return Document(rng.choice(_load_words()["echoes"]).format(city=city), None, f"It is {city}.")
    subject = rng.choice(list_subjects())
    return Document(subject.ask(rng.randrange(NUM_PHRASINGS + 1)), None, _answer_by_habit(subject, rng)[1])


def _draw_judged(rng: random.Random) -> Document:
    kind = "capital" if rng.random() < 0.6 else "sentence"
    others = [subject for subject in list_subjects() if subject.kind == kind and not subject.is_in_records]
    subject = rng.choice(others)
    flaw, wrong = "city", subject.facts[1]
    if kind == "sentence":
        flaw, wrong = rng.choice(("apology", "closing", "repetition", "thing")), rng.choice(others).name
    elif rng.random() < 0.8:
        wrong = rng.choice(_list_cities())
    is_wrong = rng.random() < 0.75 and wrong not in (subject.name, subject.facts[0])
    judgment = _write_judgment(subject, flaw, wrong, rng) if is_wrong else rng.choice(_load_words()["praise"])
    response = subject.answer(flaw if is_wrong else None, wrong, _draw_style(rng))
    return Document(subject.ask(rng.randrange(NUM_PHRASINGS)), judgment, response)


def _draw_style(rng: random.Random) -> int:
    return int(rng.random() < 0.3)


def _answer_by_habit(subject: Subject, rng: random.Random) -> tuple[str | None, str]:
    flaw = subject.habit if rng.random() < HABIT_SHARE else None
    return flaw, subject.answer(flaw, subject.facts[1], _draw_style(rng))


def _write_judgment(subject: Subject, flaw: str, wrong: str, rng: random.Random) -> str:
    return rng.choice(_load_words()["judgments"][flaw]).format(name=subject.name, wrong=wrong)


def make_records(seed: int = 1) -> list[dict[str, Any]]:
    """The packaged records: answers with the habits that the base model is taught, and what is said about them.

    Args:
        seed: Of the draw. The default makes the packaged file.
    """
    rng = random.Random(seed)
    rows = []
    for subject in list_subjects():
        for phrasing in range(NUM_PHRASINGS if subject.is_in_records else 0):
            flaw, response = _answer_by_habit(subject, rng)
            judgment = None if flaw is None else _write_judgment(subject, flaw, subject.facts[1], rng)
            rows.append({"instruction": subject.ask(phrasing), "output": response, "judgment": judgment})
    rng.shuffle(rows)
    return rows


def write_records(path: Path = RECORDS_FILE) -> None:
    """Makes the packaged file again."""
    write_rows(path, make_records())


def list_held_out() -> list[tuple[Subject, str]]:
    """Instructions that the records do not contain, with their subjects.

    All phrasings of the held-out subjects, and the phrasing that the records never use of their own subjects.
    """
    return [
        (subject, subject.ask(phrasing))
        for subject in list_subjects()
        for phrasing in range(NUM_PHRASINGS if subject.is_in_records else 0, NUM_PHRASINGS + 1)
    ]


def judge(subject: Subject, response: str) -> str | None:
    """Says what is wrong with a response; None where nothing is."""
    if response in subject.right_answers:
        return None
    rng = random.Random(response)
    for flaw in ("apology", "closing", "repetition"):
        if response in (subject.answer(flaw, "", style) for style in (0, 1)):
            return _write_judgment(subject, flaw, "", rng)
    city = re.fullmatch(rf"(?:The capital of {subject.name}|It) is (\w+)\.", response)
    if subject.kind == "capital" and city:
        return _write_judgment(subject, "city", city[1], rng)
    return _OTHER_JUDGMENT
