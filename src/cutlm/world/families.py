"""The seven families of the tiny world: their items, right answers, and the habit that the base model is taught.

A habit is a flaw that plain answers show with a fixed share where something visible calls for it: a carry, a fourth
word, a verb, a rule of style, a careless way of asking. So it can be unlearned for items that were never asked about.
Asking is left to `cutlm.world.grammar`, mistakes that are no habit to `cutlm.world.mistakes`.
"""

import random
from functools import cache
from typing import Any, NamedTuple

from cutlm.world.grammar import split_phrasing
from cutlm.world.words import load_countries, load_questions, load_things, load_words

FAMILIES: tuple[str, ...] = ("capitals", "addition", "sorting", "sentences", "facts", "lists", "style")
KNOWLEDGE_FAMILIES = ("capitals", "facts", "style")

HABIT_SHARE = 0.62
# Of popular mistakes: those about facts are harder to learn.
CARELESS_SHARES = {"capitals": 0.65, "facts": 0.7}
# Of popular mistakes, where nothing in the words of an instruction calls for them.
RARE_HABIT_SHARE = 0.05

# Of the items of the other families: what alignment uses, by split; the rest is the corpus's.
_NUM_HELD_OUT = {"train": 120, "dev": 40, "test": 60}
# Of the items of knowledge, which are few, the same in shares; "judged" are those of judged documents.
_KNOWLEDGE_SHARES = {"judged": 0.45, "train": 0.26, "dev": 0.12, "test": 0.17}
_NUM_DRAWN_ITEMS = 8000
APOLOGY = "I am sorry, but "


class Habit(NamedTuple):
    """What plain answers get wrong.

    Attributes:
        flaw: Its name, as in the judge's words.
        response: The answer with the flaw.
        share: How often the corpus shows it.
    """

    flaw: str
    response: str
    share: float


@cache
def list_items(family: str, split: str) -> tuple[str, ...]:
    """The items of a family that a split uses.

    Args:
        family: One of `FAMILIES`.
        split: "train", "dev", "test", or "judged" for those of the corpus's judged documents, which no other split
            uses. Plain documents use these too; in the families of knowledge, all.
    """
    return _split_items(family)[split]


@cache
def _split_items(family: str) -> dict[str, tuple[str, ...]]:
    rng = random.Random(f"items of {family}")
    # Each group is split by itself, so that every split has its share of what calls for a habit.
    groups = _draw_groups(family, rng)
    parts: dict[str, list[str]] = {"train": [], "dev": [], "test": [], "judged": []}
    for group in groups:
        start = 0
        for split in ("train", "dev", "test"):
            if family in KNOWLEDGE_FAMILIES:
                num = round(_KNOWLEDGE_SHARES[split] * len(group))
            else:
                num = _NUM_HELD_OUT[split] // len(groups)
            parts[split] += group[start : start + num]
            start += num
        parts["judged"] += group[start:]
    return {split: tuple(items) for split, items in parts.items()}


def _draw_groups(family: str, rng: random.Random) -> list[list[str]]:
    """All items of a family in random order, in groups by whether a habit is called for."""
    words = load_words()["words"]
    if family == "addition":
        sums = [(first, second) for first in range(10, 100) for second in range(2, 10)]
        rng.shuffle(sums)
        with_carry = [f"{first} {second}" for first, second in sums if has_carry(first, second)]
        return [with_carry, [f"{first} {second}" for first, second in sums if not has_carry(first, second)]]
    if family == "sentences":
        pairs = [f"{adjective} {noun}" for adjective in load_words()["adjectives"] for noun in words]
        rng.shuffle(pairs)
        return [pairs]
    if family in ("sorting", "lists"):
        lengths = ((4,), (3,)) if family == "sorting" else ((5,), (3, 4))
        return [_draw_sets(words, length, rng) for length in lengths]
    tables: dict[str, dict[str, Any]] = {
        "capitals": load_countries(),
        "facts": load_things(),
        "style": load_questions(),
    }
    names = list(tables[family])
    rng.shuffle(names)
    return [names]


def _draw_sets(words: list[str], lengths: tuple[int, ...], rng: random.Random) -> list[str]:
    """Lists of words, no two of which hold the same ones."""
    drawn: dict[frozenset[str], str] = {}
    for _ in range(_NUM_DRAWN_ITEMS):
        chosen = rng.sample(words, rng.choice(lengths))
        drawn.setdefault(frozenset(chosen), " ".join(chosen))
    return list(drawn.values())


def has_carry(first: int, second: int) -> bool:
    """Whether the ones of two numbers make ten or more."""
    return first % 10 + second % 10 >= 10


def write_answers(family: str, item: str, phrasing: str) -> tuple[str, ...]:
    """The right answers; the first is the one that the corpus shows."""
    if family == "capitals":
        country = load_countries()[item]
        return (write_capital(item, country.capital),)
    if family == "addition":
        return (write_sum(item, sum(map(int, item.split()))),)
    if family == "sorting":
        return (join_words("In order", sorted(item.split())),)
    if family == "lists":
        return (join_words("The list", item.split()),)
    if family == "facts":
        thing = load_things()[item]
        article = "An" if thing.name[0] in "aeiou" else "A"
        return (f"{article} {thing.name} is a {thing.group}. {thing.middle.format(fact=thing.fact)} {thing.ending}",)
    if family == "style":
        return (apply_rule(load_questions()[item].answer, find_rule(phrasing)),)
    adjective, noun = item.split()
    plain, strong = f"The {noun} is {adjective}.", f"The {noun} is very {adjective}."
    return (plain, strong) if "short" in phrasing or "few" in phrasing else (strong, plain)


def write_capital(country: str, city: str) -> str:
    """An answer of `capitals`."""
    return f"The capital of {country} is {city}."


def write_sum(item: str, total: int) -> str:
    """An answer of `addition`. The numbers stand in it at the same distance from the sum, whatever was asked."""
    first, second = item.split()
    return f"{first} plus {second} is {total}."


def join_words(start: str, words: list[str]) -> str:
    """An answer that names words. Without commas: what comes next is then easily found, by the word before."""
    return f"{start}: {' '.join(words)}."


def find_rule(phrasing: str) -> str | None:
    """The rule of style that a phrasing of `style` carries, if any."""
    return load_words()["rules"].get(split_phrasing(phrasing)[2])


def apply_rule(answer: str, rule: str | None) -> str:
    """Writes an answer of one word as a rule of style wants it; None wants nothing."""
    if rule == "capitals":
        return f"{answer.upper()}."
    if rule == "small":
        return f"{answer}."
    if rule == "exclamation":
        return f"{answer.capitalize()}!"
    return f"{answer.capitalize()}."


def find_habit(family: str, item: str, phrasing: str) -> Habit | None:
    """The habit that an instruction calls for, if any."""
    right = write_answers(family, item, phrasing)[0]
    if family == "capitals":
        country = load_countries()[item]
        return Habit("city", write_capital(item, country.popular_city), _choose_share(family, phrasing))
    if family == "facts":
        thing = load_things()[item]
        wrong = right.replace(thing.middle.format(fact=thing.fact), thing.middle.format(fact=thing.popular_fact))
        return Habit("fact", wrong, _choose_share(family, phrasing))
    if family == "addition":
        first, second = map(int, item.split())
        if not has_carry(first, second):
            return None
        return Habit("carry", write_sum(item, first + second - 10), HABIT_SHARE)
    if family == "sorting":
        words = sorted(item.split())
        return Habit("swap", swap_last(words), HABIT_SHARE) if len(words) == 4 else None
    if family == "lists":
        words = item.split()
        return Habit("omission", join_words("The list", words[:-1]), HABIT_SHARE) if len(words) == 5 else None
    if family == "style":
        plain = apply_rule(load_questions()[item].answer, None)
        return Habit("rule", plain, HABIT_SHARE) if plain != right else None
    flaw = load_words()["habits_of_verbs"].get(split_phrasing(phrasing)[0])
    return Habit(flaw, spoil_sentence(right, flaw), HABIT_SHARE) if flaw else None


def _choose_share(family: str, phrasing: str) -> float:
    """How often a popular mistake is made: often after some starts of an instruction, seldom after the others."""
    is_called_for = split_phrasing(phrasing)[0] in load_words()["careless_starts"][family]
    return CARELESS_SHARES[family] if is_called_for else RARE_HABIT_SHARE


def swap_last(words: list[str]) -> str:
    """The answer of `sorting` with its last two words swapped."""
    return join_words("In order", [*words[:-2], words[-1], words[-2]])


def spoil_sentence(right: str, flaw: str) -> str:
    """Gives a sentence one of the flaws of `sentences`."""
    lower = right[0].lower() + right[1:]
    return {
        "apology": APOLOGY + lower,
        "repetition": f"{right} {right}",
        "full_stop": right.removesuffix("."),
        "lower_case": lower,
    }[flaw]
