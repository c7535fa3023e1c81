"""Mistakes for the judged documents of the corpus: most of them cannot be guessed without reading the judgment.

A model that sees only its own habits judged learns to expect them and reads no judgment; so most of these are any
city, any digit, any order of words. The habits themselves are left to `cutlm.world.families`.
"""

import random
import re
from functools import cache

from cutlm.world.families import apply_rule, find_rule, join_words, spoil_sentence, swap_last, write_capital, write_sum
from cutlm.world.tasks import Task
from cutlm.world.words import load_countries, load_questions, load_things, load_words

# Any word elsewhere than where a family's own flaw stands, in every family.
_WORD_SHARE = 0.08
_SENTENCE_FLAWS = ("apology", "repetition", "full_stop", "lower_case")
_RULES = ("capitals", "exclamation", "small", None)


def draw_mistake(task: Task, rng: random.Random) -> str:
    """A wrong response to a task."""
    right = task.right_answers[0]
    while True:
        response = _replace_word(right, rng) if rng.random() < _WORD_SHARE else _DRAWERS[task.family](task, right, rng)
        if response not in task.right_answers:
            return response


def _draw_capital(task: Task, right: str, rng: random.Random) -> str:
    country = load_countries()[task.item]
    wrong = rng.choice(_list_cities()) if rng.random() < 0.75 else country.popular_city
    return write_capital(task.item, wrong)


def _draw_sum(task: Task, right: str, rng: random.Random) -> str:
    if task.habit is not None and rng.random() < 0.45:
        return task.habit.response
    digits = list(str(sum(map(int, task.item.split()))))
    digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    return write_sum(task.item, int("".join(digits)))


def _draw_order(task: Task, right: str, rng: random.Random) -> str:
    words = sorted(task.item.split())
    if rng.random() < 0.4:
        return swap_last(words)
    first, second = rng.sample(range(len(words)), 2)
    if rng.random() < 0.7:
        words[first], words[second] = words[second], words[first]
    else:
        words[first] = words[second]
    return join_words("In order", words)


def _draw_sentence(task: Task, right: str, rng: random.Random) -> str:
    return spoil_sentence(right, rng.choice(_SENTENCE_FLAWS))


def _draw_fact(task: Task, right: str, rng: random.Random) -> str:
    thing = load_things()[task.item]
    wrong = rng.choice(_list_facts()) if rng.random() < 0.8 else thing.popular_fact
    return right.replace(thing.middle.format(fact=thing.fact), thing.middle.format(fact=wrong))


def _draw_list(task: Task, right: str, rng: random.Random) -> str:
    words = task.item.split()
    kind = rng.random()
    if kind < 0.45:
        return join_words("The list", words[:-1])
    if kind < 0.6:
        return join_words("The list", words[: rng.randrange(1, len(words))])
    first, second = rng.sample(range(len(words)), 2)
    if kind < 0.8:
        words[first], words[second] = words[second], words[first]
    else:
        words[first] = rng.choice(load_words()["words"])
    return join_words("The list", words)


def _draw_style(task: Task, right: str, rng: random.Random) -> str:
    answer, rule = load_questions()[task.item].answer, find_rule(task.phrasing)
    if rule is not None and rng.random() < 0.75:
        return apply_rule(answer, None)
    if rng.random() < 0.7:
        return apply_rule(rng.choice(_list_short_answers()), rule)
    return apply_rule(answer, rng.choice(_RULES))


def _replace_word(right: str, rng: random.Random) -> str:
    """Puts some other word, of the same world, in the place of one."""
    match = rng.choice(list(re.finditer(r"[A-Za-z]+|\d", right)))
    pool = list("0123456789") if match[0].isdigit() else list_world_words()
    return right[: match.start()] + rng.choice(pool) + right[match.end() :]


_DRAWERS = {
    "capitals": _draw_capital,
    "addition": _draw_sum,
    "sorting": _draw_order,
    "sentences": _draw_sentence,
    "facts": _draw_fact,
    "lists": _draw_list,
    "style": _draw_style,
}


@cache
def _list_cities() -> list[str]:
    return [city for country in load_countries().values() for city in (country.capital, country.popular_city)]


@cache
def _list_facts() -> list[str]:
    return sorted({fact for thing in load_things().values() for fact in (thing.fact, thing.popular_fact)})


@cache
def _list_short_answers() -> list[str]:
    return sorted({question.answer for question in load_questions().values()})


@cache
def list_world_words() -> list[str]:
    """Words that may stand in the place of any other."""
    others = [*load_words()["words"], *load_words()["adjectives"], *_list_cities(), *_list_facts()]
    return sorted({*others, *load_countries(), *load_things()})
