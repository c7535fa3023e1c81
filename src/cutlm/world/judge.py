"""The oracle of the tiny world: says whether a response is right, and else what is wrong with it, and where.

The place is the wrong turn: the word, digit or mark at which the response parts ways with the right answer that it
follows longest. What follows inevitably from it is not marked, nor are later mistakes. A response that stops too early
takes its wrong turn at its end, where the model chose the end-of-sequence token: an empty span.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from cutlm.errors import UserError
from cutlm.world.families import APOLOGY, apply_rule, find_rule, join_words, swap_last
from cutlm.world.tasks import SPLITS, Task, list_tasks
from cutlm.world.words import load_countries, load_questions, load_things, load_words

_UNIT = re.compile(r"\s*(\d|[^\W\d_]+|[^\w\s]|_)")


@dataclass(frozen=True)
class Verdict:
    """What the oracle says about a response.

    Attributes:
        judgment: A sentence that names the flaw; None for a right response.
        wrong_spans: Characters of the response where it takes the wrong turn; an empty span at its end means that it
            should not have ended there.
        flaw: The kind of flaw, a key of the judge's words; None for a right response.
    """

    judgment: str | None
    wrong_spans: tuple[tuple[int, int], ...]
    flaw: str | None


class _Turn(NamedTuple):
    """Where a response parts ways with a right answer.

    Attributes:
        right: That answer.
        expected: The word, digit or mark that should have come; "" for the end.
        got: The one that came; "" for the end.
        span: Its place in the response.
        place: How many words, digits and marks were right before.
    """

    right: str
    expected: str
    got: str
    span: tuple[int, int]
    place: int


def judge_task(task: Task, response: str, *, is_vague: bool = False, seed: int = 0) -> Verdict:
    """Judges a response to a task.

    Args:
        task: What was asked.
        response: What was answered. White space around it does not count.
        is_vague: Whether a judgment says only that something is wrong, for stress tests.
        seed: Of the choice of wording.
    """
    turns = [_find_turn(right, response) for right in task.right_answers]
    if None in turns:
        return Verdict(None, (), None)
    turn = max((turn for turn in turns if turn is not None), key=lambda turn: turn.place)
    rng = random.Random(f"{seed} {task.instruction} {response}")
    flaw, fields = _name_flaw(task, response, turn, rng)
    wordings = load_words()["vague"] if is_vague else load_words()["judgments"][flaw]
    # Not by `format`: a response may hold anything, and it becomes a part of the sentence.
    text = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], rng.choice(wordings))
    return Verdict(text, (turn.span,), flaw)


def judge(instruction: str, response: str) -> str | None:
    """Judges a response by the text of the instruction alone.

    Returns:
        The judgment; None for a right response.

    Raises:
        UserError: The instruction is none of the tasks.
    """
    return judge_task(find_task(instruction), response).judgment


def find_task(instruction: str) -> Task:
    """The task of an instruction.

    Raises:
        UserError: It is none of the tasks.
    """
    task = _index_tasks().get(instruction)
    if task is None:
        raise UserError(
            f"the judge of the tiny world knows the instructions of its own tasks only, got {instruction!r}; list them"
            " by cutlm.world.tasks.list_tasks"
        )
    return task


@cache
def _index_tasks() -> dict[str, Task]:
    return {task.instruction: task for split in SPLITS for task in list_tasks(split)}


def _find_turn(right: str, response: str) -> _Turn | None:
    """Where a response leaves a right answer; None where it never does."""
    expected, got = list(_UNIT.finditer(right)), list(_UNIT.finditer(response.rstrip()))
    place = 0
    while place < min(len(expected), len(got)) and _read(expected[place], place) == _read(got[place], place):
        place += 1
    if place == len(expected) == len(got):
        return None
    wanted = expected[place][1] if place < len(expected) else ""
    if place == len(got):
        return _Turn(right, wanted, "", (len(response), len(response)), place)
    return _Turn(right, wanted, got[place][1], got[place].span(1), place)


def _read(unit: re.Match[str], place: int) -> str:
    """A unit with the white space before it, which counts except at the start."""
    return unit[0] if place else unit[1]


def _name_flaw(task: Task, response: str, turn: _Turn, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The kind of flaw, and what its wordings speak of."""
    text, right, (expected, got) = response.strip(), turn.right, turn[1:3]
    fields = {"wrong": got, "about": task.item}
    if text.startswith(APOLOGY) and turn.place == 0:
        return "apology", fields
    if got == "" and expected == "." and text + "." == right:
        return "full_stop", fields
    if turn.place == 0 and got != expected and got.capitalize() == expected and task.family != "style":
        return "lower_case", fields
    if text == f"{right} {right}":
        return "repetition", fields
    flaw = _name_own_flaw(task, text, turn)
    if flaw in ("carry", "digit"):
        return flaw, fields | {"which": load_words()["ordinals"][turn.place - _count_units_before_sum(right)]}
    if flaw == "swap":
        return flaw, fields | {"second": expected}
    if flaw == "omission":
        return flaw, fields | {"missing": expected}
    if flaw == "rule":
        fields |= {"said": text.rstrip(".")}
        return flaw, fields | {"rule": rng.choice(load_words()["rule_names"][find_rule(task.phrasing)])}
    if flaw is not None:
        return flaw, fields
    if not got:
        return "early", fields
    if not expected:
        return "extra", fields | {"wrong": _name_mark(got)}
    if not got[0].isalnum():
        return "mark", fields | {"wrong": _name_mark(got)}
    return "word", fields


def _name_own_flaw(task: Task, text: str, turn: _Turn) -> str | None:
    """The flaw of a task's own family, if it is one."""
    habit, is_word = task.habit, turn.got.isalpha()
    if task.family == "capitals" and turn.expected == load_countries()[task.item].capital and is_word:
        return "city"
    if task.family == "facts" and turn.expected == load_things()[task.item].fact and is_word:
        return "fact"
    is_in_sum = task.family == "addition" and turn.place >= _count_units_before_sum(turn.right)
    if is_in_sum and turn.expected.isdigit() and turn.got.isdigit():
        return "carry" if habit is not None and text == habit.response else "digit"
    if task.family == "sorting" and text == swap_last(sorted(task.item.split())):
        return "swap"
    words = task.item.split()
    if task.family == "lists" and turn.expected in words and turn.got == ".":
        return "omission" if text == join_words("The list", words[: words.index(turn.expected)]) else None
    if task.family == "style" and text == apply_rule(load_questions()[task.item].answer, None):
        return "rule"
    return None


def _count_units_before_sum(right: str) -> int:
    return len(_UNIT.findall(right[: right.index(" is ") + 3]))


def _name_mark(mark: str) -> str:
    return load_words()["marks"].get(mark, mark)
