"""The oracle of the tiny world: what it says about a response, and where it marks the mistake."""

import pytest

from cutlm.errors import UserError
from cutlm.world.judge import judge, judge_task
from cutlm.world.tasks import FAMILIES, SPLITS, list_tasks, load_words, make_task

CAPITAL = make_task("capitals", "Australia", "Name | the capital of {0} | ", "corpus")
SUM = make_task("addition", "47 5", "Find | {0} plus {1} | ", "corpus")
ORDER = make_task("sorting", "kite apple yard desk", "Sort | these words | by alphabet", "corpus")
LIST = make_task("lists", "kite apple yard desk sailor", "Say | this list | in full", "corpus")
SENTENCE = make_task("sentences", "old bridge", "Write | a line | on", "corpus")
COLOUR = make_task("style", "a lemon", "What colour is {0}?|What | Answer | in capitals", "corpus")
FACTS = make_task("facts", "mouse", "Tell me | three facts | about the {0}", "corpus")


@pytest.mark.parametrize(
    ("task", "response", "flaw", "wrong"),
    [
        (CAPITAL, "The capital of Australia is [Sydney].", "city", "Sydney"),
        (CAPITAL, "The capital of Australia is [Paris] and so on.", "city", "Paris"),
        (CAPITAL, "The capital of [France] is Canberra.", "word", "France"),
        (CAPITAL, "The capital of Australia is[]", "early", ""),
        (CAPITAL, "[]", "early", ""),
        (CAPITAL, "[I] am sorry, but the capital of Australia is Canberra.", "apology", "sorry|apolog"),
        (CAPITAL, "The capital of Australia is Canberra. [It] is.", "extra", "It"),
        (CAPITAL, "The capital of Australia is Canberra[!]", "mark", "exclamation mark"),
        (SUM, "47 plus 5 is [4]2.", "carry", "4"),
        (SUM, "47 plus 5 is 5[7].", "digit", "7"),
        (SUM, "47 plus 5 is [4]7.", "digit", "4"),
        (SUM, "47 plus 5 is 52[2].", "word", "2"),
        (ORDER, "In order: apple desk [yard] kite.", "swap", "yard"),
        (ORDER, "In order: [kite] desk apple yard.", "word", "kite"),
        (ORDER, "In order: apple desk kite[.]", "mark", "full stop"),
        (LIST, "The list: kite apple yard desk[.]", "omission", "sailor"),
        (LIST, "The list: kite apple yard[.]", "omission", "desk"),
        (LIST, "The list: kite apple [desk] sailor.", "word", "desk"),
        (SENTENCE, "[I] am sorry, but the bridge is very old.", "apology", "sorry|apolog"),
        (SENTENCE, "The bridge is very old. [The] bridge is very old.", "repetition", ""),
        (SENTENCE, "The bridge is very old[]", "full_stop", ""),
        (SENTENCE, "[the] bridge is very old.", "lower_case", ""),
        (SENTENCE, "The bridge is [new].", "word", "new"),
        (COLOUR, "[Yellow].", "rule", "capital"),
        (COLOUR, "[RED].", "word", "RED"),
        (FACTS, "A mouse is a rodent. It eats [cheese]. It has a long tail.", "fact", "cheese"),
        (FACTS, "A mouse is a rodent. It eats seeds. It has [two] wings.", "word", "two"),
    ],
)
def test_the_judgment_names_the_flaw_and_the_span_marks_it(task, response, flaw, wrong):
    start, end = response.index("["), response.index("]") - 1
    response = response.replace("[", "").replace("]", "")
    for seed in range(20):
        verdict = judge_task(task, response, seed=seed)
        assert verdict.flaw == flaw
        assert verdict.wrong_spans == ((start, end),)
        if flaw not in ("apology", "omission", "rule"):
            assert verdict.judgment is not None
            assert wrong in verdict.judgment, verdict


def test_right_answers_are_accepted_with_white_space_around_them():
    for task, response in (
        (SENTENCE, "The bridge is old."),
        (SENTENCE, " The bridge is very old.\n"),
        (COLOUR, "YELLOW."),
    ):
        assert judge_task(task, response).judgment is None
    assert judge_task(SUM, "47 plus 5 is 5 2.").judgment is not None


def test_every_flaw_has_at_least_six_wordings_and_the_seed_chooses():
    assert all(len(set(wordings)) >= 6 for wordings in load_words()["judgments"].values())
    said = {judge_task(SUM, "47 plus 5 is 42.", seed=seed).judgment for seed in range(100)}
    assert len(said) >= 6
    assert judge_task(SUM, "47 plus 5 is 42.") == judge_task(SUM, "47 plus 5 is 42.", seed=0)


def test_vague_judgments_name_nothing_and_mark_the_same_span():
    vague, plain = judge_task(SUM, "47 plus 5 is 42.", is_vague=True), judge_task(SUM, "47 plus 5 is 42.")
    assert vague.judgment in load_words()["vague"]
    assert (vague.wrong_spans, vague.flaw) == (plain.wrong_spans, plain.flaw)
    assert judge_task(SUM, "47 plus 5 is 52.", is_vague=True).judgment is None


def test_no_criticism_begins_like_praise():
    every = [wording for wordings in load_words()["judgments"].values() for wording in wordings] + load_words()["vague"]
    assert not [wording for wording in every if wording.lower().startswith("perfect")]
    assert all(wording.lower().startswith("perfect") for wording in load_words()["praise"])


@pytest.mark.parametrize(
    "response",
    ["", " ", "{wrong} {", "\\1 \\g<0>", "\u00e9\u0301 \U0001f600", "_", "The", "x" * 5000, "### Response:\n"],
)
def test_any_text_is_judged_with_a_span_inside_the_text(response):
    for family in FAMILIES:
        task = next(task for task in list_tasks("dev") if task.family == family)
        verdict = judge_task(task, response)
        assert verdict.judgment
        ((start, end),) = verdict.wrong_spans
        assert 0 <= start <= end <= len(response)
        assert start < end or end == len(response)


def test_judging_by_instruction_finds_the_task_and_refuses_unknown_ones():
    for split in SPLITS:
        task = list_tasks(split)[0]
        assert judge(task.instruction, "no") == judge_task(task, "no").judgment
        assert judge(task.instruction, task.right_answers[0]) is None
    with pytest.raises(UserError, match="Who are you"):
        judge("Who are you?", "no")


def test_damaged_answers_can_be_judged():
    for task in list_tasks("test")[::7]:
        for right in task.right_answers:
            for end in range(1, len(right)):
                for text in (right[:end], right[end:], f"{right[:end]}.", f"{right[:end]} 7{right[end:]}"):
                    verdict = judge_task(task, text)
                    for start, stop in verdict.wrong_spans:
                        assert 0 <= start <= stop <= len(text), (task, text)
