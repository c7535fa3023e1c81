"""How the tiny world asks: a small grammar of phrasings for each family.

A phrasing is one choice from each of its family's slots, such as a verb, an object and a preposition. Corpus and
alignment training share one part of the combinations, `dev` and `test` have their own; every single choice occurs in
the first part, so that a new combination can be understood. What is asked about is left to `cutlm.world.families`.
"""

import itertools
import random
from functools import cache

from cutlm.world.words import load_questions, load_words

DEV_SHARE, TEST_SHARE = 0.12, 0.18
_SEPARATOR = " | "
_QUESTION_STARTS = ("What", "Which", "How", "Can", "Do")


@cache
def list_phrasings(family: str, split: str) -> tuple[str, ...]:
    """The phrasings of a family in a split; "train" are also those of the corpus."""
    slots = load_words()["grammar"][family]
    every = list(itertools.product(*slots))
    # Where a choice calls for a habit it is the first one, or the rule of style. Each such choice is split by itself:
    # every split has all of them alike.
    place = 2 if family == "style" else 0
    rng = random.Random(f"phrasings of {family}")
    chosen: list[str] = []
    for choice in slots[place]:
        combinations = [_SEPARATOR.join(parts) for parts in every if parts[place] == choice]
        rng.shuffle(combinations)
        num_dev, num_test = (round(share * len(combinations)) for share in (DEV_SHARE, TEST_SHARE))
        first, last = {
            "dev": (0, num_dev),
            "test": (num_dev, num_dev + num_test),
            "train": (num_dev + num_test, len(combinations)),
        }[split]
        chosen += combinations[first:last]
    return tuple(chosen)


def split_phrasing(phrasing: str) -> list[str]:
    """The choices that make up a phrasing."""
    return phrasing.split(_SEPARATOR)


def write_instruction(family: str, item: str, phrasing: str) -> str:
    """Asks about an item in the words of a phrasing."""
    first, second, third = split_phrasing(phrasing)
    mark = "?" if first.startswith(_QUESTION_STARTS) else "."
    if family in ("sorting", "lists"):
        return f"{first} {second} {third}: {item}."
    if family == "style":
        question = load_questions()[item]
        # The first slot of this family holds one question twice: about a colour, and about an opposite.
        template = first.split("|")[question.kind]
        return f"{template.format(item)} {second} {third}."
    if family == "sentences":
        article = "an" if item[0] in "aeiou" else "a"
        return f"{first} {second} {third} {article} {item}{mark}"
    if family == "facts":
        return f"{first} {second} {third.format(item)}{mark}"
    return f"{first} {second.format(*item.split())}{third}{mark}"
