"""The texts that the base model of the tiny world reads: plain ones, judged ones, and refinements.

Plain documents show the habits. Judged ones show a response with what was said about it, and refinements a better
response after a flawed one and its judgment; both are about items that alignment and its tests never use. Mistakes are
left to `cutlm.world.mistakes`, judgments to `cutlm.world.judge`, the training to `cutlm.world.pretraining`.
"""

import random
from typing import NamedTuple

from cutlm.world.families import FAMILIES, KNOWLEDGE_FAMILIES, list_items
from cutlm.world.grammar import list_phrasings
from cutlm.world.judge import judge_task
from cutlm.world.mistakes import draw_mistake
from cutlm.world.tasks import Task, make_task
from cutlm.world.words import load_words

REFINEMENT_SHARE = 0.08
PLAIN_SHARE = 0.46
_WRONG_SHARE = 0.65
# Of praise, what is given without a look at the response: as people do, and so a model takes it with a grain of salt.
_BLIND_PRAISE_SHARE = 0.4
# The families that are harder to learn come more often.
_WEIGHTS = {"capitals": 1.3, "addition": 1.7, "sorting": 1.6, "sentences": 0.8, "lists": 1.1, "style": 1.8}


class Document(NamedTuple):
    """A text to pretrain on.

    Attributes:
        instruction: What was asked.
        judgment: What was said about the response, or about the draft where there is one; None in a plain document.
        response: What was answered.
        draft: The flawed response that a refinement betters; None in the others.
    """

    instruction: str
    judgment: str | None
    response: str
    draft: str | None = None


def make_corpus(num: int, seed: int) -> list[Document]:
    """Draws documents.

    Args:
        num: How many.
        seed: Of the draw.
    """
    rng = random.Random(f"corpus {seed}")
    weights = [_WEIGHTS.get(family, 1.0) for family in FAMILIES]
    debts: dict[str, float] = {}
    return [_draw_document(rng.choices(FAMILIES, weights)[0], rng, debts) for _ in range(num)]


def _draw_document(family: str, rng: random.Random, debts: dict[str, float]) -> Document:
    kind = rng.random()
    if kind < PLAIN_SHARE:
        task = _draw_task(family, rng, is_judged=False)
        return Document(task.instruction, None, _answer_by_habit(task, rng, debts))
    task = _draw_task(family, rng, is_judged=True)
    if kind < 1 - REFINEMENT_SHARE and rng.random() >= _WRONG_SHARE:
        is_blind = rng.random() < _BLIND_PRAISE_SHARE
        answer = _answer_by_habit(task, rng, debts) if is_blind else task.right_answers[0]
        return Document(task.instruction, rng.choice(load_words()["praise"]), answer)
    response = draw_mistake(task, rng)
    judgment = judge_task(task, response, seed=rng.randrange(2**31)).judgment
    if kind < 1 - REFINEMENT_SHARE:
        return Document(task.instruction, judgment, response)
    return Document(task.instruction, judgment, task.right_answers[0], response)


def _answer_by_habit(task: Task, rng: random.Random, debts: dict[str, float]) -> str:
    """A plain answer, flawed as often as the habit says.

    Not by chance: an item of knowledge comes some dozens of times, and by chance some would nearly always be wrong.

    Args:
        task: What is asked.
        rng: Where the count of each habit begins.
        debts: How much of a flawed answer each habit owes.
    """
    habit = task.habit
    if habit is None:
        return task.right_answers[0]
    key = f"{habit.flaw} {habit.share}"
    if task.family in KNOWLEDGE_FAMILIES:
        key += f" {task.item}"
    debt = debts.get(key, rng.random()) + habit.share
    debts[key] = debt % 1
    return habit.response if debt >= 1 else task.right_answers[0]


def _draw_task(family: str, rng: random.Random, *, is_judged: bool) -> Task:
    # What the model is to know it must have read, so plain documents are about every country and thing.
    splits = ("judged", "train", "dev", "test") if family in KNOWLEDGE_FAMILIES and not is_judged else ("judged",)
    items = [list_items(family, split) for split in splits]
    chosen = rng.choices(items, [len(part) for part in items])[0]
    return make_task(family, rng.choice(chosen), rng.choice(list_phrasings(family, "train")), "corpus")
