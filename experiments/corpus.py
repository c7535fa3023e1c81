"""The pretraining corpus of the tiny world's base model: plain documents, judged documents and refinements.

Plain documents show the habits. Judged documents show a response with its judgment, and refinements a better response
after a flawed one and its judgment; both are about items that alignment and its tests never use.
"""

import random
import re
from functools import cache
from typing import NamedTuple

from cutlm.world.judge import judge_task
from cutlm.world.tasks import (
    FAMILIES,
    KNOWLEDGE_FAMILIES,
    SPLITS,
    Task,
    apply_rule,
    find_rule,
    list_items,
    list_phrasings,
    load_countries,
    load_questions,
    load_things,
    load_words,
    make_task,
    spoil_sentence,
    swap_last,
    write_capital,
    write_facts,
    write_list,
    write_sum,
)

PLAIN_SHARE, REFINEMENT_SHARE = 0.46, 0.08
# Of judged documents, those with a flawed response.
_FLAWED_SHARE = 0.65
# Of praise, the part given without looking at the response, as people do. It makes the model trust praise less.
_BLIND_PRAISE_SHARE = 0.4
# Families that are harder to learn come more often.
_WEIGHTS = {"capitals": 1.3, "addition": 1.7, "sorting": 1.6, "sentences": 0.8, "lists": 1.1, "style": 1.8}


class Document(NamedTuple):
    """A text to pretrain on."""

    instruction: str
    judgment: str | None  # of the response, or of the draft if there is one; None in a plain document
    response: str
    draft: str | None = None  # the flawed response that a refinement improves


def make_corpus(num: int, seed: int) -> list[Document]:
    """Draw a number of documents."""
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
    is_refinement = kind >= 1 - REFINEMENT_SHARE
    if not is_refinement and rng.random() >= _FLAWED_SHARE:
        is_blind = rng.random() < _BLIND_PRAISE_SHARE
        answer = _answer_by_habit(task, rng, debts) if is_blind else task.right_answers[0]
        return Document(task.instruction, rng.choice(load_words()["praise"]), answer)
    mistake = draw_mistake(task, rng)
    judgment = judge_task(task, mistake, seed=rng.randrange(2**31)).judgment
    if is_refinement:
        return Document(task.instruction, judgment, task.right_answers[0], draft=mistake)
    return Document(task.instruction, judgment, mistake)


def _draw_task(family: str, rng: random.Random, *, is_judged: bool) -> Task:
    # The model must have read what it is to know, so plain documents cover every item of knowledge.
    splits = ("judged", *SPLITS) if family in KNOWLEDGE_FAMILIES and not is_judged else ("judged",)
    items = [list_items(family, split) for split in splits]
    chosen = rng.choices(items, [len(part) for part in items])[0]
    return make_task(family, rng.choice(chosen), rng.choice(list_phrasings(family, "train")), "corpus")


def _answer_by_habit(task: Task, rng: random.Random, debts: dict[str, float]) -> str:
    """A plain answer, flawed as often as the habit's share says.

    Each habit accumulates its share in `debts` and shows a flawed answer whenever the debt reaches 1. With independent
    draws some items of knowledge, which occur only a few dozen times, would almost always be wrong.
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


# ---- Mistakes ----

# Of mistakes, those that replace a random word, whatever the family.
_WORD_SHARE = 0.08
_SENTENCE_FLAWS = ("apology", "repetition", "full_stop", "lower_case")
_RULES = ("capitals", "exclamation", "small", None)


def draw_mistake(task: Task, rng: random.Random) -> str:
    """A wrong response to a task.

    Most mistakes are not the habit but any city, any digit, any order of words: a model that saw only its own habits
    judged would learn to expect them instead of reading the judgment.
    """
    right = task.right_answers[0]
    while True:
        response = _replace_word(right, rng) if rng.random() < _WORD_SHARE else _draw_family_mistake(task, right, rng)
        if response not in task.right_answers:
            return response


def _replace_word(right: str, rng: random.Random) -> str:
    match = rng.choice(list(re.finditer(r"[A-Za-z]+|\d", right)))
    pool = list("0123456789") if match[0].isdigit() else list_world_words()
    return right[: match.start()] + rng.choice(pool) + right[match.end() :]


def _draw_family_mistake(task: Task, right: str, rng: random.Random) -> str:
    if task.family == "capitals":
        wrong = rng.choice(_list_cities()) if rng.random() < 0.75 else load_countries()[task.item].popular_city
        return write_capital(task.item, wrong)
    if task.family == "facts":
        wrong = rng.choice(_list_facts()) if rng.random() < 0.8 else load_things()[task.item].popular_fact
        return write_facts(task.item, wrong)
    if task.family == "addition":
        return _draw_sum(task, rng)
    if task.family == "sorting":
        return _draw_order(sorted(task.item.split()), rng)
    if task.family == "lists":
        return _draw_list(task.item.split(), rng)
    if task.family == "style":
        return _draw_style(task, rng)
    return spoil_sentence(right, rng.choice(_SENTENCE_FLAWS))


def _draw_sum(task: Task, rng: random.Random) -> str:
    if task.habit is not None and rng.random() < 0.45:
        return task.habit.response
    digits = list(str(sum(map(int, task.item.split()))))
    digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    return write_sum(task.item, int("".join(digits)))


def _draw_order(words: list[str], rng: random.Random) -> str:
    if rng.random() < 0.4:
        return swap_last(words)
    first, second = rng.sample(range(len(words)), 2)
    if rng.random() < 0.7:
        words[first], words[second] = words[second], words[first]
    else:
        words[first] = words[second]
    return write_list("In order", words)


def _draw_list(words: list[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return write_list("The list", words[:-1])
    if kind < 0.6:
        return write_list("The list", words[: rng.randrange(1, len(words))])
    first, second = rng.sample(range(len(words)), 2)
    if kind < 0.8:
        words[first], words[second] = words[second], words[first]
    else:
        words[first] = rng.choice(load_words()["words"])
    return write_list("The list", words)


def _draw_style(task: Task, rng: random.Random) -> str:
    answer, rule = load_questions()[task.item].answer, find_rule(task.phrasing)
    if rule is not None and rng.random() < 0.75:
        return apply_rule(answer, None)
    if rng.random() < 0.7:
        return apply_rule(rng.choice(_list_short_answers()), rule)
    return apply_rule(answer, rng.choice(_RULES))


@cache
def list_world_words() -> list[str]:
    """Words that a mistake may put in any place."""
    others = [*load_words()["words"], *load_words()["adjectives"], *_list_cities(), *_list_facts()]
    return sorted({*others, *load_countries(), *load_things()})


@cache
def _list_cities() -> list[str]:
    return [city for country in load_countries().values() for city in (country.capital, country.popular_city)]


@cache
def _list_facts() -> list[str]:
    return sorted({fact for thing in load_things().values() for fact in (thing.fact, thing.popular_fact)})


@cache
def _list_short_answers() -> list[str]:
    return sorted({question.answer for question in load_questions().values()})
