"""The final answer is separated from thoughts and channels, and text about such markup is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.prompting.reasoning import SplitAnswer, split_reasoning

THOUGHTS = 'The user asks for "the capital".\nIt isn\'t `Sydney`.\n\nSo: is it right?'
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"
SKIPPED = "analysis{}assistantfinal{}"

# Each has the thoughts and the answer.
NOTATIONS = [
    "<think>{}</think>{}",
    "\n<think>\n{}\n</think>\n\n{}",
    "<THINK >{}</ THINK>{}",
    "<think>Hm.</think>\n<think>{}</think>{}",
    "<think:opensource>{}</think:opensource>{}",
    "<thinking>{}</thinking>\n\n{}",
    '<thinking mode="deep">{}</thinking>{}',
    "<thought>{}</thought>{}",
    "<Thoughts>{}</Thoughts>{}",
    "<reasoning>{}</reasoning>{}",
    "<reason>{}</reason>{}",
    "<scratchpad>{}</scratchpad>{}",
    "<seed:think>{}</seed:think>{}",
    '<details type="reasoning" done="true">{}</details>{}',
    "[THINK]{}[/THINK]{}",
    "◁think▷{}◁/think▷{}",
    HARMONY,
    HARMONY + "<|return|>",
    "<|start|>assistant" + HARMONY,
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|><|start|>"
    "assistant<|channel|>final<|message|>{}",
    "<|channel|>analysis<|message|>{}<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
    "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}<|call|><|channel|>final<|message|>{}",
    "{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    SKIPPED,
    "analysis{}assistantcommentaryI look it up.assistantfinal{}",
    "commentary to=functions.look json{}assistantfinal{}",
    " to=self<|message|>{}<|eom|><|start|>assistant to=user<|message|>{}<|eot|>",
    " to=self{}assistant to=user{}",
    "<|channel>thought\n{}\n<channel|>{}<turn|>",
    "<unused94>thought\n{}<unused95>{}",
    "<|inner_prefix|>{}<|inner_suffix|>{}",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "<|begin_of_thought|>{}<|end_of_thought|>\n\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|think_start|>{}<|think_end|>{}",
    "<|think|>{}<|end|><|begin|>assistant<|content|>{}<|end|>",
    "<think>\n{}\n</think>\n<answer>\n{}\n</answer>",
    "<think>\n{}\n</think>\n\n<response>\n{}\n</response>\n",
    "<think>{}</think><|begin_of_box|>{}<|end_of_box|>",
    "Here is my thought process:\n{}\nHere is my response:\n{}",
    "Here are my reasoning steps:\n{}\n[BEGIN FINAL RESPONSE]\n{}\n[END FINAL RESPONSE]",
    "Thinking...\n{}\n...done thinking.\n\n{}",
    "{}</think>{}",
    "{}\n</think>\n\n{}<|im_end|>",
    "{}[/THINK]{}",
    "{}<|END_THINKING|>{}",
    "{}<channel|>{}",
]


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("answer", ["Perfect.", "It is Canberra.\n\nNot Sydney.", '{"satisfactory": true}'])
def test_thoughts_in_every_notation_are_separated(notation: str, answer: str) -> None:
    split = split_reasoning(notation.replace("{}", THOUGHTS, 1).replace("{}", answer, 1))
    assert split.problem is None
    assert split.output == answer
    assert split.reasoning is not None
    assert THOUGHTS in split.reasoning


PLAIN = st.text(st.characters(exclude_characters="<>[]◁▷|`\"'“”‘’«»", exclude_categories=("Cs",)), max_size=60)


@pytest.mark.parametrize("notation", [notation for notation in NOTATIONS if not notation.startswith("{}")])
@given(thoughts=PLAIN, answer=PLAIN)
def test_any_thoughts_and_any_answer_are_separated(notation: str, thoughts: str, answer: str) -> None:
    thoughts, answer = f"The {thoughts}", f"The {answer.strip()} end."
    before, between, after = notation.split("{}")
    split = split_reasoning(before + thoughts + between + answer + after)
    assert (split.output, split.problem) == (answer, None)
    assert thoughts.strip() in (split.reasoning or "")


@given(text=PLAIN)
def test_text_without_markup_is_unchanged(text: str) -> None:
    text = f"The {text}"
    assert split_reasoning(text) == SplitAnswer(text)


_PIECES = [*"a \n\"'`.{", "<think>", "</think>", "[/THINK]", "<|end|>", "<channel|>", "analysis", "assistantfinal"]


@given(parts=st.lists(st.sampled_from(_PIECES)))
def test_no_markup_outside_quotations_is_left_without_a_problem(parts: list[str]) -> None:
    split = split_reasoning("".join(parts))
    if split.problem is None and not set(split.output) & set("\"'`"):
        assert not any(mark in split.output for mark in ("<think>", "</think>", "[/THINK]", "<|end|>", "<channel|>"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Perfect.",
        "  The response\n\n  is wrong. \n",
        "analysis of the response shows that Sydney is wrong.",
        "analysis: Sydney is wrong.",
        "Analysis\n\nThe poem has four lines.",
        "commentary on the match is missing.",
        "assistant is the role that answers.",
        "assistant",
        "Assistant\n\nAn assistant helps.",
        "final answer: 3",
        "finalScore = 3",
        "analysisResult = run()",
        "thoughtful, but wrong.",
        "I told the user\nthat the model\nis an assistant.",
        "The final\nassistantfinal is not a word.",
        "The response shows '<think>secret</think>' to the reader.",
        "The '</think>' at its end is no part of an answer.",
        'It ends with "<|im_end|>", which the reader sees.',
        "Write `<|im_start|>user` first.\n\n```\n<|im_start|>user\nHi<|im_end|>\n```\nThen stop.",
        '{"satisfactory": false, "judgment": "It ends with </think> and <|im_end|>."}',
        "<answer>42</answer>",
        "<p>Thinking</p> is <b>bold</b>.",
        "Use f <| g |> h, a[i], [x] and x<y.",
        "<s>Sydney</s> Canberra is <s>not</s>",
        "Here is my thought process: Sydney is large.",
    ],
)
def test_an_answer_without_thoughts_is_unchanged(text: str) -> None:
    assert split_reasoning(text) == SplitAnswer(text)


@pytest.mark.parametrize(
    "text",
    [
        "<think>It is",
        "\n<thinking>\nIt is Canberra. Perfect.",
        "<think>Hm.</think><think>It is",
        "<think>Hm.</thinking>Perfect.",
        "[THINK]It is",
        "◁think▷It is",
        "<|START_THINKING|>It is",
        "<|channel>thought\nIt is",
        "<|channel|>analysis<|message|>It is",
        "<|channel|>analysis<|message|>It is<|end|>",
        "<|channel|>analysis<|message|>It is<|end|><|start|>assistant<|channel|>final<|message|>A<|end|><|start|>"
        "assistant<|channel|>final<|message|>B",
        "<|channel|>final<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B",
        "<|channel|>analysis Perfect.",
        "analysisThe user asks me to judge.",
        "analysisIt is A.assistantfinalA.assistantfinalB.",
        "commentaryThe user asks me to judge.",
        "The user asks me to judge.assistantfinalPerfect.",
        "finalPerfect.",
        "<think>One <think>two</think> three</think>Perfect.",
        "<think>Hm.</think>It shows <think>secret</think> to the reader.",
        "Well. <think>Hm.</think>Perfect.",
        "It ends with </think>, which is wrong.",
        "It ends with </think> in the middle.",
        "One.</think>Two.</think>Perfect.",
        "assistant\n\nPerfect.",
        "assistant\nPerfect.",
        "model\nPerfect.",
        "thought\nIt is Canberra.\nPerfect.",
        "<|start_header_id|>assistant<|end_header_id|>\n\nPerfect.",
        "<|im_start|>assistant\nPerfect.",
        "<start_of_turn>model\nPerfect.",
        "Perfect.<|im_end|>\n<|im_start|>user\nName it.",
        "Perfect.\nuser\nName it.\nassistant\nCanberra.",
        "Perfect.assistant\n\nPerfect.",
        "Perfect. [/INST] It is",
        "<|begin_of_box|>Perfect.",
        "Perfect.<｜tool▁calls▁begin｜>",
    ],
)
def test_what_is_not_certain_is_a_problem(text: str) -> None:
    assert split_reasoning(text).problem is not None


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|eot_id|>\n", "</s>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|user|>"]
)
def test_tokens_that_end_the_turn_are_dropped(end: str) -> None:
    assert split_reasoning(f"Perfect.{end}") == SplitAnswer("Perfect.")


def test_boxes_inside_an_answer_are_opened() -> None:
    assert split_reasoning("It is <|begin_of_box|>42<|end_of_box|>.") == SplitAnswer("It is 42.")


def test_thoughts_without_an_answer_leave_nothing() -> None:
    assert split_reasoning("<think>Hm.</think>\n") == SplitAnswer("", "Hm.")
    assert split_reasoning("<think>\n</think>\n\nPerfect.") == SplitAnswer("Perfect.")
