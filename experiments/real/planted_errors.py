"""Planted errors: right answers in which one number, name or clause was changed, with judgments that are about it."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlm.data.records import JudgedRecord
from cutlm.prompting.spans import Span

CHANGES = ("number", "name", "clause")
# An editor quotes what is wrong and what is right, a reader says only what would be right, an assistant writes at
# length and quotes the passage, and a vague judgment says only what kind of thing is wrong.
STYLES = ("editor", "reader", "assistant", "vague")

_NUMBER = re.compile(r"(?<![\w.,:/\-])\d{1,4}(?:\.\d{1,2})?(?![\w:/\-]|[.,]\d)")
_LIST_MARKER = re.compile(r"(?m)^\s*\d+[.)]")
# Capitalized words that follow a word in lowercase: the start of a sentence or of a line is no name.
_NAME = re.compile(r"(?<=[a-z] )[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})*\b")
_CLAUSE = re.compile(
    r"\b(because|which|so that|in order to|such as|by|when|while|if|for)\b ((?:[\w'’\-]+ ){3,13}[\w'’\-]+)(?=[.,;\n]|$)"
)
_NAME_KINDS = (
    "January February March April May June July August September October November December",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "France Germany Italy Spain England Japan China India Brazil Canada Mexico Russia Egypt Greece Australia Norway",
    "Paris London Berlin Rome Madrid Tokyo Beijing Delhi Moscow Cairo Athens Sydney Boston Chicago Seattle Toronto",
    "English French German Spanish Italian Japanese Chinese Russian Arabic Greek Latin American British Indian",
    "Africa Asia Europe America Antarctica",
)


@dataclass(frozen=True)
class Change:
    """What was changed in an answer.

    Attributes:
        kind: One of `CHANGES`.
        start: Where, in characters.
        right: The text that stood there.
        wrong: The text that stands there now.
    """

    kind: str
    start: int
    right: str
    wrong: str

    @property
    def span(self) -> Span:
        """The characters of the changed answer that are wrong."""
        return self.start, self.start + len(self.wrong)

    def apply(self, answer: str) -> str:
        """Make the changed answer."""
        return answer[: self.start] + self.wrong + answer[self.start + len(self.right) :]


def list_names(answers: Sequence[str]) -> list[str]:
    """Names in answers, to put in place of others: capitalized words that are never written in lowercase."""
    lowercase = {word for answer in answers for word in re.findall(r"\b[a-z]+\b", answer)}
    found = {match[0] for answer in answers for match in _NAME.finditer(answer)}
    return sorted(name for name in found if not lowercase & {word.lower() for word in name.split()})


def list_clauses(answers: Sequence[str]) -> list[tuple[str, str]]:
    """Clauses in answers with the words that introduce them, to put in place of others."""
    return sorted({(match[1], match[2]) for answer in answers for match in _CLAUSE.finditer(answer)})


def draw_change(
    kind: str, answer: str, rng: random.Random, names: Sequence[str], clauses: Sequence[tuple[str, str]]
) -> Change | None:
    """Draw one change of an answer; None if there is nothing of this kind in it.

    Args:
        kind: One of `CHANGES`.
        answer: A right answer.
        rng: Source of random numbers.
        names: Names to choose from.
        clauses: Clauses to choose from, each after the word that introduces it.
    """
    if kind == "number":
        markers = [match.span() for match in _LIST_MARKER.finditer(answer)]
        found = [
            match
            for match in _NUMBER.finditer(answer)
            if not any(start <= match.start() < end for start, end in markers)
        ]
        if not found:
            return None
        place = rng.choice(found)
        return Change(kind, place.start(), place[0], _change_number(place[0], rng))
    if kind == "name":
        known = {name for kind_of_name in _NAME_KINDS for name in kind_of_name.split()}.union(names)
        places = [match for match in _NAME.finditer(answer) if match[0] in known]
        if not places:
            return None
        place = rng.choice(places)
        others = [name for name in _list_alternatives(place[0], names) if name not in answer]
        return Change(kind, place.start(), place[0], rng.choice(others)) if others else None
    places = list(_CLAUSE.finditer(answer))
    if not places:
        return None
    place = rng.choice(places)
    length = len(place[2].split())
    fitting = [clause for word, clause in clauses if word == place[1] and abs(len(clause.split()) - length) <= 3]
    fitting = [clause for clause in fitting if clause not in answer and clause.split()[0] != place[2].split()[0]]
    return Change(kind, place.start(2), place[2], rng.choice(fitting)) if fitting else None


def _change_number(text: str, rng: random.Random) -> str:
    """Another number of the same form and about the same size."""
    whole, dot, decimals = text.partition(".")
    value = int(whole)
    if 1000 <= value <= 2100 and not dot:
        return str(value + rng.choice([-1, 1]) * rng.randint(2, 60))
    others = [number for number in range(max(1, value // 2), 2 * value + 4) if number != value]
    return f"{rng.choice(others)}{dot}{decimals}"


def _list_alternatives(name: str, names: Sequence[str]) -> list[str]:
    """Names of the same kind, or if the kind is not known, of as many words."""
    for kind in _NAME_KINDS:
        if name in kind.split():
            return [other for other in kind.split() if other != name]
    known = {word for kind in _NAME_KINDS for word in kind.split()}
    return [other for other in names if other != name and other not in known and other.count(" ") == name.count(" ")]


def judge_change(change: Change, changed: str, style: str, rng: random.Random) -> str:
    """Write a judgment of a changed answer in a style."""
    start, end = change.span
    before = changed[:start].rsplit("\n", 1)[-1].split(" ")[-5:]
    after = changed[end:].split("\n", 1)[0].split(" ")[:4]
    passage = f"{' '.join(before)}{change.wrong}{' '.join(after)}".strip(" .,;:")
    wording = rng.choice(_WORDINGS[style])
    return wording.format(
        kind=change.kind,
        wrong=change.wrong,
        right=change.right,
        passage=passage,
        thing={"number": "number", "name": "name", "clause": "statement"}[change.kind],
    )


_WORDINGS = {
    "editor": (
        '"{wrong}" is wrong; it should be "{right}".',
        'Error: "{wrong}". Correct: "{right}".',
        "The {thing} {wrong} is incorrect. Replace it by {right}.",
    ),
    "reader": (
        "I liked it, but shouldn't it say {right} instead?",
        "As far as I know it is {right}. What you wrote there is not true.",
        "Fine except for one thing. I would have expected to read {right}.",
    ),
    "assistant": (
        "The response is mostly accurate and well organized. However, it contains a mistake where it says"
        ' "{passage}". This is not correct and would mislead the user.',
        'While the answer addresses the question, the passage "{passage}" contains an error. The correct {thing} would'
        " be: {right}.",
        'The answer is helpful overall, but the claim "{passage}" is inaccurate and should be revised.',
    ),
    "vague": (
        "One {thing} in this answer is not right.",
        "There is a mistake in it: a {thing} does not fit.",
        "Almost. Check the {thing}s again.",
    ),
}


def plant_errors(
    sources: Sequence[JudgedRecord], num_records: int, seed: int, kinds: Sequence[str] = CHANGES
) -> list[JudgedRecord]:
    """Plant one error in each of some right answers.

    Kinds of changes and styles of judgments occur equally often, as far as the answers allow it.

    Args:
        sources: Records whose responses are right.
        num_records: Number of records to make; fewer if the sources do not suffice.
        seed: Determines everything.
        kinds: Kinds of changes.

    Returns:
        Records with `wrong_spans` and the fields `change` and `style`.
    """
    rng = random.Random(f"plant {seed}")
    answers = [source.output for source in sources]
    names, clauses = list_names(answers), list_clauses(answers)
    counts = dict.fromkeys(kinds, 0)
    records: list[JudgedRecord] = []
    for source in rng.sample(list(sources), len(sources)):
        if len(records) == num_records:
            break
        drawn = (
            draw_change(kind, source.output, rng, names, clauses) for kind in sorted(kinds, key=counts.__getitem__)
        )
        change = next((change for change in drawn if change is not None), None)
        if change is None or counts[change.kind] >= -(-num_records // len(kinds)):
            continue
        style = STYLES[counts[change.kind] % len(STYLES)]
        counts[change.kind] += 1
        changed = change.apply(source.output)
        row: dict[str, Any] = {"instruction": source.instruction, "input": source.input, "output": changed}
        row |= {"judgment": judge_change(change, changed, style, rng), "wrong_spans": [change.span]}
        records.append(JudgedRecord.model_validate(row | {"change": change.kind, "style": style}))
    return records
