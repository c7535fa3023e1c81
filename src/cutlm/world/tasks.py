"""The tasks of the tiny world: instructions with known right answers, in three splits.

Splits share no item and no phrasing, except that corpus and "train" share phrasings. Items and answers are left to
`cutlm.world.families`, the words of the instructions to `cutlm.world.grammar`.
"""

import itertools
import random
from dataclasses import dataclass
from functools import cache

from cutlm.world.families import FAMILIES, Habit, find_habit, list_items, write_answers
from cutlm.world.grammar import list_phrasings, write_instruction

__all__ = ["FAMILIES", "NUM_TASKS", "SPLITS", "Task", "list_tasks", "make_task"]

SPLITS = ("train", "dev", "test")
# A family.
NUM_TASKS = {"train": 120, "dev": 40, "test": 60}
_SHARE_WITH_HABIT = 0.8


@dataclass(frozen=True)
class Task:
    """An instruction whose right answers are known.

    Attributes:
        family: One of `FAMILIES`.
        item: What it asks about: a country, two numbers, a list of words.
        phrasing: The choices from the slots of the grammar.
        instruction: The text.
        split: "train", "dev" or "test"; "corpus" for those that only the base model has seen.
    """

    family: str
    item: str
    phrasing: str
    instruction: str
    split: str

    @property
    def right_answers(self) -> tuple[str, ...]:
        """What counts as right; the first is what the corpus shows."""
        return write_answers(self.family, self.item, self.phrasing)

    @property
    def habit(self) -> Habit | None:
        """The flaw that the base model was taught for such an instruction."""
        return find_habit(self.family, self.item, self.phrasing)


def make_task(family: str, item: str, phrasing: str, split: str) -> Task:
    """Puts a task into words."""
    return Task(family, item, phrasing, write_instruction(family, item, phrasing), split)


@cache
def list_tasks(split: str) -> tuple[Task, ...]:
    """The tasks of a split, in a fixed mixed order.

    Args:
        split: "train", "dev" or "test".
    """
    assert split in SPLITS, split
    tasks: list[Task] = []
    for family in FAMILIES:
        tasks += _draw_tasks(family, split)
    random.Random(f"order of {split}").shuffle(tasks)
    return tuple(tasks)


def _draw_tasks(family: str, split: str) -> list[Task]:
    """Tasks of a family, most of which call for its habit: what the base model does right anyway shows nothing."""
    rng = random.Random(f"{split} tasks of {family}")
    items, phrasings = list_items(family, split), list_phrasings(family, split)
    num_careless = round(_SHARE_WITH_HABIT * NUM_TASKS[split])
    missing = {True: num_careless, False: NUM_TASKS[split] - num_careless}
    chosen: dict[str, Task] = {}
    deck: list[str] = []
    for item in itertools.cycle(items):
        # Every item in turn, and every phrasing, so that none is rare.
        deck = deck or rng.sample(phrasings, len(phrasings))
        task = make_task(family, item, deck.pop(), split)
        is_careless = task.habit is not None and task.habit.share >= 0.5
        if missing[is_careless] and task.instruction not in chosen:
            missing[is_careless] -= 1
            chosen[task.instruction] = task
        if not any(missing.values()):
            break
    return list(chosen.values())
