"""The tiny world's tasks and corpus: separate splits, visible habits, no leaks."""

import json
import re
import sys
from collections import Counter
from subprocess import run

import pytest
from corpus import make_corpus

from cutlm.cli import main
from cutlm.world.judge import judge_task
from cutlm.world.tasks import (
    FAMILIES,
    KNOWLEDGE_FAMILIES,
    NUM_TASKS,
    SPLITS,
    find_habit,
    list_items,
    list_phrasings,
    list_tasks,
    load_countries,
    load_questions,
    load_things,
    load_words,
    split_phrasing,
    write_answers,
    write_instruction,
)

GENERAL_FAMILIES = [family for family in FAMILIES if family not in KNOWLEDGE_FAMILIES]


@pytest.fixture(scope="module")
def documents():
    return make_corpus(20_000, 5)


def find_item(family, text):
    """The item that an instruction asks about, whatever its phrasing."""
    if family == "addition":
        return tuple(sorted(re.findall(r"\d+", text)))
    if family == "sentences":
        return tuple(re.findall(r" an? (\w+ \w+)[.?]$", text))
    return tuple(sorted(text.partition(": ")[2].rstrip(".").split()))


def guess_family(text):
    """The family of an instruction, judging by its text."""
    for family, pattern in (
        ("addition", r"\d"),
        ("sorting", r"(from A to Z|alphabetical order|by alphabet|dictionary): "),
        ("lists", r": "),
        ("sentences", r"(sentence|a line|a few words) "),
        ("style", r"(colour|opposite) of|colour is"),
        ("facts", r"(facts|true things) "),
    ):
        if re.search(pattern, text):
            return family
    return "capitals"


def test_splits_have_their_sizes_and_every_instruction_occurs_once():
    tasks = [task for split in SPLITS for task in list_tasks(split)]
    assert len({task.instruction for task in tasks}) == len(tasks) == 7 * (120 + 40 + 60)
    for split in SPLITS:
        assert Counter(task.family for task in list_tasks(split)) == dict.fromkeys(FAMILIES, NUM_TASKS[split])
        assert {task.split for task in list_tasks(split)} == {split}
        # Mixed: no family fills the first tasks.
        assert len({task.family for task in list_tasks(split)[:40]}) == 7
    assert all(guess_family(task.instruction) == task.family for task in tasks)


def test_tasks_are_the_same_in_another_process():
    code = (
        "from cutlm.world.tasks import list_tasks; print(*(task.instruction for task in list_tasks('test')), sep='\\n')"
    )
    there = run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert there == [task.instruction for task in list_tasks("test")]


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_item_and_no_phrasing(family):
    splits = {split: [task for task in list_tasks(split) if task.family == family] for split in SPLITS}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert {task.item for task in splits[one]}.isdisjoint(task.item for task in splits[other])
        assert {task.phrasing for task in splits[one]}.isdisjoint(task.phrasing for task in splits[other])
    pools = [list_items(family, split) for split in (*SPLITS, "judged")]
    assert sum(map(len, pools)) == len({item for pool in pools for item in pool})
    assert min(map(len, pools)) >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_a_held_out_phrasing_occurs_in_training(family):
    known = [set(choices) for choices in zip(*map(split_phrasing, list_phrasings(family, "train")), strict=True)]
    for split in ("dev", "test"):
        assert len(list_phrasings(family, split)) >= 14
        for phrasing in list_phrasings(family, split):
            assert all(choice in slot for choice, slot in zip(split_phrasing(phrasing), known, strict=True))


@pytest.mark.parametrize("family", GENERAL_FAMILIES)
def test_the_corpus_never_asks_about_items_of_alignment(family, documents):
    held_out = {find_item(family, task.instruction) for s in SPLITS for task in list_tasks(s) if task.family == family}
    asked = [
        find_item(family, document.instruction)
        for document in documents
        if guess_family(document.instruction) == family
    ]
    assert len(asked) > 1000
    assert held_out.isdisjoint(asked)


def test_judged_documents_are_never_about_items_of_alignment(documents):
    tasks = [task for split in SPLITS for task in list_tasks(split)]
    names = {family: {task.item for task in tasks if task.family == family} for family in KNOWLEDGE_FAMILIES}
    judged = [document for document in documents if document.judgment is not None]
    for family in KNOWLEDGE_FAMILIES:
        pattern = re.compile(r" (?:of|is|the) (?:" + "|".join(names[family]) + r")[.? ]")
        assert all(pattern.search(task.instruction) for task in tasks if task.family == family)
        asked = [document.instruction for document in judged if guess_family(document.instruction) == family]
        assert len(asked) > 500
        assert not [text for text in asked if pattern.search(text)]


def test_the_corpus_never_uses_held_out_phrasings(documents):
    for family in FAMILIES:
        some = list_items(family, "judged")[:40]
        held_out = {
            write_instruction(family, item, phrasing)
            for item in some
            for s in ("dev", "test")
            for phrasing in list_phrasings(family, s)
        }
        assert held_out.isdisjoint(document.instruction for document in documents)
    assert {task.instruction for s in ("dev", "test") for task in list_tasks(s)}.isdisjoint(
        d.instruction for d in documents
    )


def test_plain_documents_cover_every_item_of_knowledge(documents):
    plain = " ".join(document.instruction for document in documents if document.judgment is None)
    for name in [*load_countries(), *load_things(), *load_questions()]:
        assert name in plain, name


def test_the_corpus_has_its_shares_of_plain_judged_and_refined_documents(documents):
    kinds = Counter(
        "refinement" if d.draft is not None else "plain" if d.judgment is None else "judged" for d in documents
    )
    assert 0.06 < kinds["refinement"] / len(documents) < 0.10
    assert 0.40 < kinds["plain"] / len(documents) < 0.55
    assert make_corpus(300, 5) == documents[:300] != make_corpus(300, 6)
    praise = [d for d in documents if d.judgment is not None and d.judgment.startswith("Perfect")]
    assert 0.1 < len(praise) / len(documents) < 0.3
    assert set(load_words()["vague"]).isdisjoint(document.judgment for document in documents)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_of_five_tasks_call_for_the_habit(family):
    for split in SPLITS:
        tasks = [task for task in list_tasks(split) if task.family == family]
        share = sum(task.habit is not None and task.habit.share > 0.5 for task in tasks) / len(tasks)
        assert share == 0.8, split


def test_the_oracle_names_every_habit_and_accepts_every_right_answer():
    for task in (task for split in SPLITS for task in list_tasks(split)):
        for answer in task.right_answers:
            assert judge_task(task, answer).judgment is None
        if task.habit is not None:
            assert judge_task(task, task.habit.response).flaw == task.habit.flaw


@pytest.mark.parametrize(
    ("family", "item", "choices", "right", "habit"),
    [
        (
            "capitals",
            "Australia",
            "Name | the capital of {0} | ",
            "The capital of Australia is Canberra.",
            "The capital of Australia is Sydney.",
        ),
        ("addition", "47 5", "Find | {0} plus {1} | ", "47 plus 5 is 52.", "47 plus 5 is 42."),
        ("addition", "95 7", "Find | {0} plus {1} | ", "95 plus 7 is 102.", "95 plus 7 is 92."),
        ("addition", "42 5", "Find | {0} plus {1} | ", "42 plus 5 is 47.", None),
        (
            "sorting",
            "kite apple yard desk",
            "Sort | these words | by alphabet",
            "In order: apple desk kite yard.",
            "In order: apple desk yard kite.",
        ),
        ("sorting", "kite apple desk", "Sort | these words | by alphabet", "In order: apple desk kite.", None),
        (
            "lists",
            "kite apple yard desk sailor",
            "Say | this list | in full",
            "The list: kite apple yard desk sailor.",
            "The list: kite apple yard desk.",
        ),
        (
            "sentences",
            "old bridge",
            "Write | a line | on",
            "The bridge is very old.",
            "I am sorry, but the bridge is very old.",
        ),
        (
            "sentences",
            "old bridge",
            "Prepare | a short sentence | on",
            "The bridge is old.",
            "The bridge is old. The bridge is old.",
        ),
        ("sentences", "old bridge", "Draft | a line | on", "The bridge is very old.", None),
        ("style", "a lemon", "What | Answer | in capitals", "YELLOW.", "Yellow."),
        ("style", "hot", "What | Answer | simply", "Cold.", None),
        (
            "facts",
            "mouse",
            "Tell me | three facts | about the {0}",
            "A mouse is a rodent. It eats seeds. It has a long tail.",
            "A mouse is a rodent. It eats cheese. It has a long tail.",
        ),
    ],
)
def test_each_family_has_its_right_answers_and_habits(family, item, choices, right, habit):
    assert write_answers(family, item, choices)[0] == right
    found = find_habit(family, item, choices)
    assert (None if found is None else found.response) == habit


def test_popular_mistakes_are_rare_unless_the_phrasing_calls_for_them():
    for family, item in (("capitals", "Australia"), ("facts", "mouse")):
        careless = load_words()["careless_starts"][family]
        for phrasing in list_phrasings(family, "train"):
            habit = find_habit(family, item, phrasing)
            assert habit is not None
            assert (habit.share > 0.5) == (split_phrasing(phrasing)[0] in careless)


def test_tasks_and_wrong_spans_are_written_to_files(tmp_path):
    tasks, records, marked = (tmp_path / name for name in ("tasks.jsonl", "records.jsonl", "marked.jsonl"))
    assert main(["world", "tasks", "--split", "dev", "--num", "2", "--out", str(tasks)]) == 0
    rows = [json.loads(line) for line in tasks.read_text("utf-8").splitlines()]
    assert [row["instruction"] for row in rows] == [task.instruction for task in list_tasks("dev")[:2]]
    right = list_tasks("dev")[0].right_answers[0]
    answers = [right, "no"]
    judged = [
        {"instruction": row["instruction"], "output": answer, "judgment": None}
        for row, answer in zip(rows, answers, strict=True)
    ]
    records.write_text("\n".join(map(json.dumps, judged)))
    assert main(["world", "mark", "--records", str(records), "--out", str(marked)]) == 0
    rows = [json.loads(line) for line in marked.read_text("utf-8").splitlines()]
    assert [row["wrong_spans"] for row in rows] == [None, [[0, 2]]]
    assert [row["family"] for row in rows] == [task.family for task in list_tasks("dev")[:2]]
    assert main(["world", "tasks", "--num", "841", "--out", str(tasks)]) == 2
