"""The tasks of the tiny world: instructions whose right answers are known.

A task combines a *family* (one of seven kinds of question), an *item* (the subject: a country, two numbers, a list of
words) and a *phrasing* (how it is asked). Items and phrasings are divided among the splits "train", "dev" and
"test". For most tasks there is also a *habit*: a flaw that the base model is taught to show in its answers. A habit
depends on something visible in the instruction (a carry, a fourth word, a verb), so it can be unlearned for items that
were never asked about.
"""

import itertools
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FAMILIES: tuple[str, ...] = ("capitals", "addition", "sorting", "sentences", "facts", "lists", "style")
# Families that need knowledge; the answers to the others follow from the instruction.
KNOWLEDGE_FAMILIES = ("capitals", "facts", "style")
SPLITS = ("train", "dev", "test")
NUM_TASKS = {"train": 120, "dev": 40, "test": 60}  # per family
SHARE_WITH_HABIT = 0.8

# How often the corpus of the base model shows a habit. Popular mistakes about facts are harder to learn.
HABIT_SHARE = 0.62
POPULAR_MISTAKE_SHARES = {"capitals": 0.65, "facts": 0.7}
# How often it shows a popular mistake after an instruction whose start does not call for one.
RARE_HABIT_SHARE = 0.05

# There are few items of knowledge, so they are divided by share; the remaining ones are for judged documents.
_KNOWLEDGE_SHARES = {"train": 0.26, "dev": 0.12, "test": 0.17}
_NUM_DRAWN_ITEMS = 8000
_PHRASING_SHARES = {"dev": 0.12, "test": 0.18}
_SEPARATOR = " | "
_QUESTION_STARTS = ("What", "Which", "How", "Can", "Do")
APOLOGY = "I am sorry, but "


# ---- Words ----


class Country(NamedTuple):
    name: str
    capital: str
    popular_city: str  # popularly mistaken for the capital


class Thing(NamedTuple):
    """The subject of three sentences."""

    name: str  # an animal, a plant or an object
    group: str  # what it is
    middle: str  # the middle sentence, with a placeholder for the fact
    fact: str
    popular_fact: str  # a popular mistake
    ending: str  # the last sentence


class Question(NamedTuple):
    """A question with a one-word answer."""

    name: str  # what it asks about
    kind: int  # 0 asks for the colour, 1 for the opposite
    answer: str  # in lower case


@cache
def load_words() -> dict[str, Any]:
    """The content of `words.json`: everything that the world knows, asks and says."""
    return json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))


@cache
def load_countries() -> dict[str, Country]:
    """Countries by name."""
    return {row.split()[0]: Country(*row.split()) for row in load_words()["capitals"]}


@cache
def load_things() -> dict[str, Thing]:
    """Things by name."""
    words = load_words()
    things = {}
    for kind, rows in words["facts"].items():
        for row in rows:
            name, group, fact, popular_fact, ending = row.split()
            middle, last = words["fact_middles"][kind], words["fact_endings"][ending]
            things[name] = Thing(name, group, middle, fact, popular_fact, last)
    return things


@cache
def load_questions() -> dict[str, Question]:
    """Questions about colours and opposites, by what they ask about."""
    colours = (row.split("=") for row in load_words()["colours"])
    opposites = (row.split() for row in load_words()["opposites"])
    questions = [Question(name, 0, answer) for name, answer in colours]
    questions += [Question(name, 1, answer) for name, answer in opposites]
    return {question.name: question for question in questions}


# ---- Items ----


@cache
def list_items(family: str, split: str) -> tuple[str, ...]:
    """The items of a family that belong to a split, or to "judged".

    The latter are the items of the corpus's judged documents. Plain documents use these too; in the knowledge families
    they use the items of all splits.
    """
    return _split_items(family)[split]


@cache
def _split_items(family: str) -> dict[str, tuple[str, ...]]:
    groups = _draw_groups(family, random.Random(f"items of {family}"))
    parts: dict[str, list[str]] = {split: [] for split in (*SPLITS, "judged")}
    # Each group is divided separately, so that every split gets its share of items that call for a habit.
    for group in groups:
        start = 0
        for split in SPLITS:
            if family in KNOWLEDGE_FAMILIES:
                num = round(_KNOWLEDGE_SHARES[split] * len(group))
            else:
                num = NUM_TASKS[split] // len(groups)
            parts[split] += group[start : start + num]
            start += num
        parts["judged"] += group[start:]
    return {split: tuple(items) for split, items in parts.items()}


def _draw_groups(family: str, rng: random.Random) -> list[list[str]]:
    """All items of a family in random order, grouped by whether they call for a habit."""
    words = load_words()["words"]
    if family == "addition":
        sums = [(first, second) for first in range(10, 100) for second in range(2, 10)]
        rng.shuffle(sums)
        return [
            [f"{first} {second}" for first, second in sums if has_carry(first, second) == is_carried]
            for is_carried in (True, False)
        ]
    if family in ("sorting", "lists"):
        lengths = ((4,), (3,)) if family == "sorting" else ((5,), (3, 4))
        return [_draw_word_lists(words, choices, rng) for choices in lengths]
    items = {
        "capitals": [*load_countries()],
        "facts": [*load_things()],
        "style": [*load_questions()],
        "sentences": [f"{adjective} {noun}" for adjective in load_words()["adjectives"] for noun in words],
    }[family]
    rng.shuffle(items)
    return [items]


def _draw_word_lists(words: list[str], lengths: tuple[int, ...], rng: random.Random) -> list[str]:
    """Lists of words, no two of them with the same set of words."""
    drawn: dict[frozenset[str], str] = {}
    for _ in range(_NUM_DRAWN_ITEMS):
        chosen = rng.sample(words, rng.choice(lengths))
        drawn.setdefault(frozenset(chosen), " ".join(chosen))
    return list(drawn.values())


def has_carry(first: int, second: int) -> bool:
    """Whether adding two numbers carries from the ones to the tens."""
    return first % 10 + second % 10 >= 10


# ---- Phrasings ----


@cache
def list_phrasings(family: str, split: str) -> tuple[str, ...]:
    """The phrasings of a family in a split; the corpus uses those of "train".

    A phrasing combines one choice from each slot of the family's grammar (a verb, an object, a preposition). Every
    single choice occurs in "train", so a held-out phrasing is a new combination of known parts.
    """
    slots = load_words()["grammar"][family]
    combinations = list(itertools.product(*slots))
    # The slot that calls for a habit. Each of its choices is divided separately, so that every split has all of them.
    slot = 2 if family == "style" else 0
    rng = random.Random(f"phrasings of {family}")
    chosen: list[str] = []
    for choice in slots[slot]:
        phrasings = [_SEPARATOR.join(choices) for choices in combinations if choices[slot] == choice]
        rng.shuffle(phrasings)
        num_dev, num_test = (round(share * len(phrasings)) for share in _PHRASING_SHARES.values())
        held_out = num_dev + num_test
        parts = {"dev": phrasings[:num_dev], "test": phrasings[num_dev:held_out], "train": phrasings[held_out:]}
        chosen += parts[split]
    return tuple(chosen)


def split_phrasing(phrasing: str) -> list[str]:
    """The choices that make up a phrasing."""
    return phrasing.split(_SEPARATOR)


def write_instruction(family: str, item: str, phrasing: str) -> str:
    """Ask about an item in the words of a phrasing."""
    first, second, third = split_phrasing(phrasing)
    mark = "?" if first.startswith(_QUESTION_STARTS) else "."
    if family in ("sorting", "lists"):
        return f"{first} {second} {third}: {item}."
    if family == "style":
        question = load_questions()[item]
        # The first slot of this family holds two templates: for a colour and for an opposite.
        template = first.split("|")[question.kind]
        return f"{template.format(item)} {second} {third}."
    if family == "sentences":
        article = "an" if item[0] in "aeiou" else "a"
        return f"{first} {second} {third} {article} {item}{mark}"
    if family == "facts":
        return f"{first} {second} {third.format(item)}{mark}"
    return f"{first} {second.format(*item.split())}{third}{mark}"


# ---- Answers ----


def write_answers(family: str, item: str, phrasing: str) -> tuple[str, ...]:
    """The right answers; the first is the one that the corpus shows."""
    if family == "capitals":
        return (write_capital(item, load_countries()[item].capital),)
    if family == "addition":
        return (write_sum(item, sum(map(int, item.split()))),)
    if family == "sorting":
        return (write_list("In order", sorted(item.split())),)
    if family == "lists":
        return (write_list("The list", item.split()),)
    if family == "facts":
        return (write_facts(item, load_things()[item].fact),)
    if family == "style":
        return (apply_rule(load_questions()[item].answer, find_rule(phrasing)),)
    adjective, noun = item.split()
    plain, strong = f"The {noun} is {adjective}.", f"The {noun} is very {adjective}."
    return (plain, strong) if "short" in phrasing or "few" in phrasing else (strong, plain)


def write_capital(country: str, city: str) -> str:
    """An answer of `capitals`."""
    return f"The capital of {country} is {city}."


def write_sum(item: str, total: int) -> str:
    """An answer of `addition`. It repeats the numbers, so they are always at the same distance from the sum."""
    first, second = item.split()
    return f"{first} plus {second} is {total}."


def write_list(start: str, words: list[str]) -> str:
    """An answer of `sorting` or `lists`. Without commas the previous word alone determines the next one."""
    return f"{start}: {' '.join(words)}."


def write_facts(item: str, fact: str) -> str:
    """An answer of `facts`."""
    thing = load_things()[item]
    article = "An" if thing.name[0] in "aeiou" else "A"
    return f"{article} {thing.name} is a {thing.group}. {thing.middle.format(fact=fact)} {thing.ending}"


def find_rule(phrasing: str) -> str | None:
    """The style rule in a phrasing of `style`, if any."""
    return load_words()["rules"].get(split_phrasing(phrasing)[2])


def apply_rule(answer: str, rule: str | None) -> str:
    """Format a one-word answer by a style rule; None is the default style."""
    if rule == "capitals":
        return f"{answer.upper()}."
    if rule == "small":
        return f"{answer}."
    return f"{answer.capitalize()}{'!' if rule == 'exclamation' else '.'}"


# ---- Habits ----


class Habit(NamedTuple):
    """A flaw that the base model is taught."""

    flaw: str  # its name, a key of "judgments" in words.json
    response: str  # the answer with the flaw
    share: float  # how often the corpus shows it


def find_habit(family: str, item: str, phrasing: str) -> Habit | None:
    """The habit that an instruction calls for, if any."""
    right = write_answers(family, item, phrasing)[0]
    if family == "capitals":
        wrong = write_capital(item, load_countries()[item].popular_city)
        return Habit("city", wrong, _find_popular_mistake_share(family, phrasing))
    if family == "facts":
        wrong = write_facts(item, load_things()[item].popular_fact)
        return Habit("fact", wrong, _find_popular_mistake_share(family, phrasing))
    if family == "addition":
        first, second = map(int, item.split())
        return Habit("carry", write_sum(item, first + second - 10), HABIT_SHARE) if has_carry(first, second) else None
    if family == "sorting":
        words = sorted(item.split())
        return Habit("swap", swap_last(words), HABIT_SHARE) if len(words) == 4 else None
    if family == "lists":
        words = item.split()
        return Habit("omission", write_list("The list", words[:-1]), HABIT_SHARE) if len(words) == 5 else None
    if family == "style":
        plain = apply_rule(load_questions()[item].answer, None)
        return Habit("rule", plain, HABIT_SHARE) if plain != right else None
    flaw = load_words()["habits_of_verbs"].get(split_phrasing(phrasing)[0])
    return Habit(flaw, spoil_sentence(right, flaw), HABIT_SHARE) if flaw else None


def _find_popular_mistake_share(family: str, phrasing: str) -> float:
    is_careless = split_phrasing(phrasing)[0] in load_words()["careless_starts"][family]
    return POPULAR_MISTAKE_SHARES[family] if is_careless else RARE_HABIT_SHARE


def swap_last(words: list[str]) -> str:
    """The answer of `sorting` with its last two words swapped."""
    return write_list("In order", [*words[:-2], words[-1], words[-2]])


def spoil_sentence(right: str, flaw: str) -> str:
    """Add a flaw to a right answer of `sentences`."""
    lower = right[0].lower() + right[1:]
    return {
        "apology": APOLOGY + lower,
        "repetition": f"{right} {right}",
        "full_stop": right.removesuffix("."),
        "lower_case": lower,
    }[flaw]


# ---- Tasks ----


@dataclass(frozen=True)
class Task:
    """An instruction whose right answers are known."""

    family: str
    item: str  # the subject: a country, two numbers, a list of words
    phrasing: str  # the choices from the slots of the grammar
    instruction: str
    split: str  # one of `SPLITS`, or "corpus" for instructions that only the base model has seen

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The right answers; the first is the one that the corpus shows."""
        return write_answers(self.family, self.item, self.phrasing)

    @property
    def habit(self) -> Habit | None:
        """The flaw that the base model was taught for such an instruction, if any."""
        return find_habit(self.family, self.item, self.phrasing)


def make_task(family: str, item: str, phrasing: str, split: str) -> Task:
    """Make a task and write its instruction."""
    return Task(family, item, phrasing, write_instruction(family, item, phrasing), split)


@cache
def list_tasks(split: str) -> tuple[Task, ...]:
    """The tasks of a split in a fixed random order: 840 of "train", 280 of "dev" or 420 of "test"."""
    tasks = [task for family in FAMILIES for task in _draw_tasks(family, split)]
    random.Random(f"order of {split}").shuffle(tasks)
    return tuple(tasks)


def _draw_tasks(family: str, split: str) -> list[Task]:
    """Draw the tasks of a family; most call for its habit, because the others are answered right anyway."""
    rng = random.Random(f"{split} tasks of {family}")
    phrasings = list_phrasings(family, split)
    num_with_habit = round(SHARE_WITH_HABIT * NUM_TASKS[split])
    missing = {True: num_with_habit, False: NUM_TASKS[split] - num_with_habit}
    chosen: dict[str, Task] = {}
    deck: list[str] = []
    # Items and phrasings are used in turn, so that none is rare.
    for item in itertools.cycle(list_items(family, split)):
        deck = deck or rng.sample(phrasings, len(phrasings))
        task = make_task(family, item, deck.pop(), split)
        is_with_habit = task.habit is not None and task.habit.share >= 0.5
        if missing[is_with_habit] and task.instruction not in chosen:
            missing[is_with_habit] -= 1
            chosen[task.instruction] = task
        if not any(missing.values()):
            break
    return list(chosen.values())
