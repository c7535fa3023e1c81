"""The oracle of the tiny world: says whether a response is right, and if not, what is wrong with it and where.

The *wrong span* is the first word, digit or punctuation mark at which the response diverges from a right answer (if
there are several, from the one that it follows longest). Inevitable consequences and later mistakes are not marked. A
response that ends too early is wrong at its end, where the model chose the end-of-sequence token: the span is empty.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from cutlm.errors import UserError
from cutlm.world.tasks import (
    APOLOGY,
    FAMILIES,
    SPLITS,
    Task,
    apply_rule,
    find_rule,
    list_tasks,
    load_countries,
    load_questions,
    load_things,
    load_words,
    swap_last,
    write_list,
)

# A digit, a word or a punctuation mark, with the white space before it.
_UNIT = re.compile(r"\s*(\d|[^\W\d_]+|[^\w\s]|_)")


@dataclass(frozen=True)
class Verdict:
    """The oracle's verdict on a response; judgment and flaw are None if it is right."""

    judgment: str | None  # a sentence that names the flaw
    wrong_spans: tuple[tuple[int, int], ...]  # [start, end) in characters of the response
    flaw: str | None  # the kind of flaw, a key of "judgments" in words.json


class _Divergence(NamedTuple):
    """Where a response diverges from a right answer."""

    right: str
    expected: str  # the right answer's next word, digit or mark; "" for the end
    got: str  # that of the response; "" for the end
    span: tuple[int, int]  # the characters of `got` in the response
    num_right: int  # how many words, digits and marks before are right


def judge(instruction: str, response: str) -> str | None:
    """The judgment of a response to one of the world's instructions; None if it is right.

    Raises:
        UserError: The instruction does not belong to a task.
    """
    return judge_task(find_task(instruction), response).judgment


def judge_with_spans(instruction: str, response: str) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """The judgment of a response, as by `judge`, and its wrong spans; none if it is right.

    Raises:
        UserError: The instruction does not belong to a task.
    """
    verdict = judge_task(find_task(instruction), response)
    return verdict.judgment, verdict.wrong_spans


def rate_answers(tasks: Sequence[Task], responses: Sequence[str]) -> dict[str, float]:
    """The share of right responses by family, and the mean over families as "macro"."""
    verdicts: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for task, response in zip(tasks, responses, strict=True):
        verdicts[task.family].append(judge_task(task, response).judgment is None)
    shares = {family: sum(part) / max(1, len(part)) for family, part in verdicts.items()}
    return shares | {"macro": sum(shares.values()) / len(shares)}


def find_task(instruction: str) -> Task:
    """The task of an instruction; an instruction that no task has raises a UserError."""
    task = _index_tasks().get(instruction)
    if task is None:
        raise UserError(
            f"the tiny world's judge knows only its own instructions, got {instruction!r}; write them to a file with:"
            " cutlm world tasks"
        )
    return task


@cache
def _index_tasks() -> dict[str, Task]:
    return {task.instruction: task for split in SPLITS for task in list_tasks(split)}


def judge_task(task: Task, response: str, *, is_vague: bool = False, seed: int = 0) -> Verdict:
    """Judge a response, ignoring white space around it. The seed chooses among wordings.

    A vague judgment says only that something is wrong. It is for stress tests.
    """
    divergences = []
    for right in task.right_answers:
        divergence = _find_divergence(right, response)
        if divergence is None:
            return Verdict(None, (), None)
        divergences.append(divergence)
    latest = max(divergences, key=lambda divergence: divergence.num_right)
    rng = random.Random(f"{seed} {task.instruction} {response}")
    flaw, fields = _name_flaw(task, response, latest, rng)
    wordings = load_words()["vague"] if is_vague else load_words()["judgments"][flaw]
    # Not str.format: the fields quote the response, which may contain braces.
    judgment = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], rng.choice(wordings))
    return Verdict(judgment, (latest.span,), flaw)


def _find_divergence(right: str, response: str) -> _Divergence | None:
    expected, got = list(_UNIT.finditer(right)), list(_UNIT.finditer(response.rstrip()))
    index = 0
    while index < min(len(expected), len(got)) and _read(expected[index], index) == _read(got[index], index):
        index += 1
    if index == len(expected) == len(got):
        return None
    next_expected = expected[index][1] if index < len(expected) else ""
    if index == len(got):
        return _Divergence(right, next_expected, "", (len(response), len(response)), index)
    return _Divergence(right, next_expected, got[index][1], got[index].span(1), index)


def _read(unit: re.Match[str], index: int) -> str:
    """A unit with the white space before it, which counts except at the start."""
    return unit[0] if index else unit[1]


def _name_flaw(task: Task, response: str, divergence: _Divergence, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The kind of flaw, and the values of the placeholders in its wordings."""
    text, right, expected, got = response.strip(), divergence.right, divergence.expected, divergence.got
    is_at_start = divergence.num_right == 0
    fields = {"wrong": got, "about": task.item, "second": expected, "missing": expected, "said": text.rstrip(".")}
    # Flaws that occur in all families.
    if text.startswith(APOLOGY) and is_at_start:
        return "apology", fields
    if got == "" and expected == "." and text + "." == right:
        return "full_stop", fields
    if is_at_start and got != expected and got.capitalize() == expected and task.family != "style":
        return "lower_case", fields
    if text == f"{right} {right}":
        return "repetition", fields
    flaw = _name_family_flaw(task, text, divergence)
    if flaw in ("carry", "digit"):
        fields["which"] = load_words()["ordinals"][divergence.num_right - _count_before_sum(right)]
    elif flaw == "rule":
        fields["rule"] = rng.choice(load_words()["rule_names"][find_rule(task.phrasing)])
    if flaw is not None:
        return flaw, fields
    # Anything else.
    if not got:
        return "early", fields
    if expected and got[0].isalnum():
        return "word", fields
    fields["wrong"] = load_words()["marks"].get(got, got)
    return "mark" if expected else "extra", fields


def _name_family_flaw(task: Task, text: str, divergence: _Divergence) -> str | None:
    """The flaw, if it is one of the task's own family."""
    expected, got = divergence.expected, divergence.got
    if task.family == "capitals":
        return "city" if expected == load_countries()[task.item].capital and got.isalpha() else None
    if task.family == "facts":
        return "fact" if expected == load_things()[task.item].fact and got.isalpha() else None
    if task.family == "addition":
        is_in_sum = divergence.num_right >= _count_before_sum(divergence.right)
        if not (is_in_sum and expected.isdigit() and got.isdigit()):
            return None
        return "carry" if task.habit is not None and text == task.habit.response else "digit"
    if task.family == "sorting":
        return "swap" if text == swap_last(sorted(task.item.split())) else None
    if task.family == "lists":
        words = task.item.split()
        is_cut_short = expected in words and text == write_list("The list", words[: words.index(expected)])
        return "omission" if is_cut_short else None
    if task.family == "style":
        return "rule" if text == apply_rule(load_questions()[task.item].answer, None) else None
    return None


def _count_before_sum(right: str) -> int:
    """How many words and digits precede the sum."""
    return len(_UNIT.findall(right[: right.index(" is ") + 3]))
