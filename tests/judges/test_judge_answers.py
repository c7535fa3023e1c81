"""Which answers of a judge are judgments, and which passages it quotes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.data.records import is_praise
from cutlm.judges import Response
from cutlm.judges.answers import AnswerFormat, BadAnswer, Verdict, locate_quotes, read_answer
from cutlm.judges.prompt import DEFAULT_PROMPT, choose_marker, fill_prompt

LONG = "The capital of Australia is Sydney, which is also the largest city of the whole country."
OBJECTION = "Sydney is not the capital."


def read(text: str | None, answer_format: AnswerFormat = "json", output: str = LONG) -> Verdict:
    response = Response("r.jsonl:1", "Name the capital of Australia.", "", output)
    return read_answer(text, "stop", response, fill_prompt(DEFAULT_PROMPT, response), answer_format)


def find_kind(text: str | None, answer_format: AnswerFormat = "json", output: str = LONG) -> str:
    with pytest.raises(BadAnswer) as error:
        read(text, answer_format, output)
    return error.value.kind


def write(is_satisfactory: object, judgment: object, *quotes: object) -> str:
    return json.dumps({"satisfactory": is_satisfactory, "judgment": judgment, "quotes": quotes})


# ---- JSON ----


@pytest.mark.parametrize("answer_format", ["json", "text"])
@pytest.mark.parametrize(
    "frame",
    [
        "{}",
        " \n{}\n",
        "```json\n{}\n```",
        "```\n{}\n```",
        "~~~JSON\n{}\n~~~",
        "`{}`",
        "json\n{}",
        "Here is my judgment:\n\n```json\n{}\n```",
        "Judgment: {}",
        "<answer>\n{}\n</answer>",
        "<think>Is it true? {} or not?</think>\n\n{}",
        "<|begin_of_box|>{}<|end_of_box|>",
        "{}<|im_end|>",
    ],
)
def test_json_is_read_in_what_models_put_around_it(frame: str, answer_format: AnswerFormat) -> None:
    verdict = read(frame.replace("{}", write(False, OBJECTION, "Sydney")), answer_format)
    assert verdict == Verdict(OBJECTION, ("Sydney",))
    assert read(frame.replace("{}", write(True, "Perfect.")), answer_format) == Verdict(None)


def test_quotes_may_be_missing_and_a_judgment_null() -> None:
    assert read('{"satisfactory": true, "judgment": "Perfect."}') == Verdict(None)
    assert read('{"satisfactory": false, "judgment": "It is Canberra."}') == Verdict("It is Canberra.")
    assert read('{"satisfactory": true, "judgment": null, "quotes": null}') == Verdict(None)
    assert read('{"satisfactory": true, "judgment": ""}') == Verdict(None)
    assert find_kind('{"satisfactory": false, "judgment": null}') == "empty judgment"


@pytest.mark.parametrize(
    "text",
    [
        f"{write(True, 'Perfect.')}\nI hope that this helps.",
        f"The response is good. {write(True, 'Perfect.')}",
        f"Perfect.\n{write(False, OBJECTION)}",
        write(True, "Perfect.") * 2,
        f"{write(True, 'Perfect.')}\n{write(False, OBJECTION)}",
        f"[{write(True, 'Perfect.')}]",
        write("true", "Perfect."),
        write(1, "Perfect."),
        write(None, "Perfect."),
        write(True, ["Perfect."]),
        write(False, OBJECTION, 1),
        write(False, OBJECTION, {"text": "Sydney"}),
        '{"satisfactory": false, "judgment": "It is Canberra.", "quotes": "Sydney"}',
        '{"satisfactory": true}',
        '{"judgment": "Perfect."}',
        '{"judgment": "Sydney is wrong.", "quotes": ["Sydney"]}',
        '{"satisfactory": true, "judgment": "Perfect.", "score": 3}',
        '{"Satisfactory": true, "Judgment": "Perfect."}',
        '{"satisfactory": true, "satisfactory": false, "judgment": "It is Canberra."}',
        '{"satisfactory": true, "judgment": "Perfect."',
        "{'satisfactory': True, 'judgment': 'Perfect.'}",
        '{"satisfactory": true, "judgment": "Perfect.",}',
        "{}",
        "[]",
        "```json\n" + write(True, "Perfect."),
        '{"type": "object", "properties": {"satisfactory": {"type": "boolean"}}}',
        write(False, "<think>Sydney is fine.</think>Sydney is wrong."),
        write(False, "assistant\n\nSydney is wrong."),
        '{"answer": ' + write(True, "Perfect.") + "}",
    ],
)
@pytest.mark.parametrize("answer_format", ["json", "text"])
def test_other_json_is_unclear(text: str, answer_format: AnswerFormat) -> None:
    assert find_kind(text, answer_format) == "unclear answer"


@pytest.mark.parametrize(
    "judgment",
    [
        "Perfect.",
        "perfect",
        "Correct.",
        "No issues found.",
        "The response names Canberra, which is the capital.",
        "The response correctly names Canberra as the capital of Australia.",
        "The response is perfect. It names the capital.",
        "I found no errors in it.",
        "It does not contain any factual errors or omissions.",
        "Nothing is missing.",
        "Die Antwort ist richtig.",
    ],
)
def test_a_decision_for_praise_is_satisfactory(judgment: str) -> None:
    assert read(write(True, judgment)) == Verdict(None)


@pytest.mark.parametrize(
    "judgment",
    [
        OBJECTION,
        "Perfect, but Sydney is wrong.",
        "The response is perfect, but long.",
        "It could be longer.",
        "The date is missing.",
        "There is no error handling.",
        "Is it not Canberra?",
        "It ignores the question.",
    ],
)
def test_a_decision_against_the_judgment_is_contradictory(judgment: str) -> None:
    assert find_kind(write(True, judgment)) == "contradictory answer"


def test_a_satisfactory_response_has_no_wrong_passages() -> None:
    assert find_kind(write(True, "Perfect.", "Sydney")) == "contradictory answer"


@pytest.mark.parametrize("quote", ["", " \n"])
def test_an_empty_quote_is_none(quote: str) -> None:
    assert read(write(True, "", quote)) == Verdict(None)
    assert read(write(False, OBJECTION, quote, "Sydney")) == Verdict(OBJECTION, ("Sydney",))


@pytest.mark.parametrize(
    "judgment",
    [
        "Perfect.",
        "Perfect grammar, but Sydney is not the capital.",
        "The response is perfect.",
        "The response correctly names Canberra as the capital of Australia.",
        "The response correctly names Canberra as the capital of Australia. Perfect.",
        "The response meets all the requirements of the instruction.",
        "I have no objections to this response.",
        "No issues found.",
        "There is nothing to improve.",
        "Nothing is wrong.",
        "Looks good to me!",
        "Well done! Accurate and complete.",
        "Correct.",
        "N/A",
        "10/10",
    ],
)
def test_a_decision_against_praise_is_contradictory(judgment: str) -> None:
    assert find_kind(write(False, judgment)) == "contradictory answer"


@pytest.mark.parametrize("judgment", ["", " \n", "...", "-"])
def test_an_objection_needs_words(judgment: str) -> None:
    assert find_kind(write(False, judgment)) == "empty judgment"


OBJECTIONS = [
    OBJECTION,
    "It is Canberra.",
    "Imperfect: the capital is Canberra.",
    "Perfectly wrong: it is Canberra.",
    "Not perfect.",
    "Die Hauptstadt ist Canberra.",
    "The response answers in French.",
    "The response is correct, but misses the date.",
    "There is no error handling.",
    "It does not correct the mistakes in the text.",
    "The year is wrong. Otherwise it is correct.",
    "The response says 'As an AI', which nobody asked.",
    "I cannot find the capital in it: Sydney is none.",
    "Sorry to say, it is wrong.",
    '"As an AI language model" is no answer to the question.',
    "I can't help but notice that Sydney is not the capital.",
    "It shows '<think>secret</think>' to the reader, which is wrong.",
    "The '</think>' at its end is no part of an answer.",
    'It ends with "<|im_end|>".',
    "The code `<|im_start|>` is wrong.",
    "Two lines:\n\n1. Sydney is wrong.\n2. It is Canberra.",
    f'"{LONG}" is wrong: the capital is Canberra, and Sydney is only the largest city.',
]


@pytest.mark.parametrize("judgment", OBJECTIONS)
def test_an_objection_is_unchanged(judgment: str) -> None:
    assert read(write(False, f"  {judgment}\n")) == Verdict(judgment)
    raw = '{"satisfactory": false, "judgment": "One\nline.\tTwo.", "quotes": []}'  # not quite JSON
    assert read(raw) == Verdict("One\nline.\tTwo.")


@given(judgment=st.text(), is_satisfactory=st.booleans())
def test_a_record_agrees_with_the_decision(judgment: str, is_satisfactory: bool) -> None:
    try:
        verdict = read(write(is_satisfactory, judgment))
    except BadAnswer:
        return
    assert (verdict.judgment is None) == is_satisfactory
    assert verdict.judgment is None or not is_praise(verdict.judgment)


@pytest.mark.parametrize(
    "text",
    [
        OBJECTION,
        "The response names Sydney, but the",
        "The response is perfect.",
        "Satisfactory: no\nIt is Canberra.",
        "Perfect. It names the largest city.",
        "[THINK]It is right.[/THINK]It is wrong.",
    ],
)
def test_text_is_unclear_if_json_was_asked_for(text: str) -> None:
    assert find_kind(text) == "unclear answer"


# ---- Text ----


@pytest.mark.parametrize("answer_format", ["json", "text"])
@pytest.mark.parametrize(
    "text",
    [
        *("Perfect.", "perfect", " PERFECT!\n", '"Perfect."', "**Perfect.**", "> Perfect.", "“Perfect.”"),
        "Judgment: Perfect.",
        "**Final answer:**\n\nPerfect.",
        "<answer>Perfect.</answer>",
        "<think>Hm.</think>Perfect.",
        "Sydney is wrong, I think.\n</think>\n\nPerfect.",
    ],
)
def test_perfect_alone_means_that_nothing_is_wrong(text: str, answer_format: AnswerFormat) -> None:
    assert read(text, answer_format) == Verdict(None)


@pytest.mark.parametrize(
    ("text", "judgment"),
    [
        ("Satisfactory: yes", None),
        ("Satisfactory: Yes\nPerfect.", None),
        ("**Satisfactory:** yes.\nThe response names the capital.", None),
        ("The response is correct.\nSATISFACTORY: TRUE", None),
        ("Satisfactory: no\nIt is Canberra.", "It is Canberra."),
        ("- Satisfactory: No\n\nJudgment: Es ist Canberra.", "Es ist Canberra."),
        ("It is Canberra.\nNot Sydney.\n\n**Satisfactory: false**", "It is Canberra.\nNot Sydney."),
        ("<think>Satisfactory: yes</think>Satisfactory: no\nIt is Canberra.", "It is Canberra."),
    ],
)
def test_a_decision_on_the_first_or_last_line_is_read(text: str, judgment: str | None) -> None:
    assert read(text, "text") == Verdict(judgment)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Satisfactory: no", "empty judgment"),
        ("Satisfactory: no\nPerfect.", "contradictory answer"),
        ("Satisfactory: no\nThe response is correct.", "contradictory answer"),
        ("Satisfactory: yes\nSydney is wrong.", "contradictory answer"),
        ("Satisfactory: yes\nSatisfactory: no\nIt is Canberra.", "several decisions"),
        ("It is Canberra.\nSatisfactory: no\nNot Sydney.", "several decisions"),
        ("Satisfactory: no, Sydney is wrong.", "unclear answer"),
        ("Satisfactory: partly\nSydney is wrong.", "unclear answer"),
        ("Sydney is wrong. Satisfactory: yes", "unclear answer"),
    ],
)
def test_other_decisions_are_failures(text: str, kind: str) -> None:
    assert find_kind(text, "text") == kind


UNCLEAR = [
    "Perfect? No: it is wrong.",
    "Perfect?",
    "Perfect grammar, but Sydney is not the capital.",
    "Perfect, Sydney.",
    "Perfect. Good.",
    "Perfect. It names the largest city.",
    "Perfect! Nothing is wrong with it.",
    "Perfect.\n\nWait, no: it is Canberra.",
    "Perfect. Sydney isn’t the capital.",
    "Perfect 👎",
    '"Perfect." Or so it says: Sydney is wrong.',
    "Perfectly fine.",
    "The response is perfect.",
    "The response correctly names Canberra as the capital of Australia. Perfect.",
    "The response correctly names Canberra. However, the date is wrong.",
    "It contains a mistake. Otherwise it is correct.\nGreat job!",
    "The response meets all the requirements of the instruction.",
    "I have no objections to this response.",
    "I could not find any mistakes; the capital is right.",
    "No issues found.",
    "No, nothing is wrong.",
    "Nothing is wrong with the response.",
    "There is no mistake in the response, and nothing is missing.",
    "There are no errors in it.",
    "All errors in the text were fixed.",
    "It avoids every mistake.",
    "It isn't wrong.",
    "I see no fault in naming Canberra.",
    "It names Sydney.",
    "It is Canberra.",
    "Die Hauptstadt ist Canberra.",
    "Is Sydney the capital?",
    "Let me know if I can help.",
    "Correct.",
    "Looks good!",
    "N/A",
    "10/10",
    "Rating: 3 out of 10",
    "Okay, so I need to judge this response.",
    "Assistant: Perfect.",
]


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_is_neither_praise_as_asked_nor_an_objection_is_unclear(text: str) -> None:
    assert find_kind(text, "text") == "unclear answer"
    assert find_kind(text) == "unclear answer"


@pytest.mark.parametrize(
    "text",
    [
        OBJECTION,
        "Sydney is not the capital; it is Canberra.",
        "Sydney is wrong. The correct answer is Canberra.",
        "The response is incorrect: the capital is Canberra.",
        "The response does not mention Canberra.",
        "It should name Canberra.",
        "It is wrong.",
        "There are errors.",
        "Not perfect.",
        "Imperfect: the capital is Canberra.",
        "The date isn’t right.",
        "The source is missing.",
        f'"{LONG}" is wrong: the capital is Canberra, and Sydney is only the largest city.',
    ],
)
def test_text_that_names_a_fault_is_an_objection(text: str) -> None:
    assert read(f"  {text}\n", "text") == Verdict(text)
    assert read(f"<think>Perfect?\nNo.</think>\n\n{text}", "text") == Verdict(text)


@given(marks=st.text(" \n\"'*_>[{.-", max_size=4), tail=st.text(max_size=30))
def test_no_text_that_records_take_for_praise_is_an_objection(marks: str, tail: str) -> None:
    for text in (f"{marks}Perfect{tail}", f" \t\u2028PERFECT{tail}"):
        try:
            judgment = read(text, "text").judgment
        except BadAnswer:
            continue
        assert judgment is None or not is_praise(judgment)


# ---- Any format ----


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, "empty answer"),
        (" \n", "empty answer"),
        ("<think>Hm.</think>", "empty answer"),
        ("Hm.</think>", "empty answer"),
        ("\n<think>It is Canberra", "unfinished thoughts"),
        ("<think>Hm.</think><think>It is Canberra", "unfinished thoughts"),
        ("<thinking>Perfect.", "unfinished thoughts"),
        ("[THINK]Perfect.", "unfinished thoughts"),
        ("<|channel|>analysis<|message|>Perfect.", "unfinished thoughts"),
        ("analysisThe user asks. It is wrong.", "unclear answer"),
        ("assistant\n\nIt is wrong.", "unclear answer"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nIt is wrong.", "unclear answer"),
        ("It is wrong.<|im_end|>\n<|im_start|>user\nIs it?", "unclear answer"),
        ("I'm sorry, I can't do that.", "refusal"),
        ("I’m sorry, but I can’t assist with this.", "refusal"),
        ("Sorry, but I will not.", "refusal"),
        ("As an AI language model, I cannot judge.", "refusal"),
        ("I cannot evaluate this response.", "refusal"),
        ("I cannot fulfill your request.", "refusal"),
        ("I won't be able to assist with that.", "refusal"),
        ("I'm just an AI, I can't judge.", "refusal"),
        ("I do not feel comfortable judging this.", "refusal"),
        ('"As an AI language model, I cannot judge."', "refusal"),
        ("I apologize, this is not possible.", "refusal"),
        (write(False, "I'm sorry, I can't judge this."), "refusal"),
        (LONG, "echo of the response"),
        (f"  {LONG.upper()}", "echo of the response"),
        (LONG[3:70], "echo of the response"),
        (f"Response: {LONG}", "echo of the response"),
        (write(False, LONG), "echo of the response"),
        (write(True, LONG), "echo of the response"),
        ("is it right, complete and to the point, and does it", "echo of the prompt"),
        (write(False, "is it right, complete and to the point, and does it"), "echo of the prompt"),
        (f"See {choose_marker('Name the capital of Australia.', LONG)}.", "echo of the prompt"),
        ("a\0b", "malformed answer"),
        ("half \ud800", "malformed answer"),
        (write(False, "a\0b"), "malformed answer"),
        (write(False, "half \ud800"), "malformed answer"),
        ("x" * 20_001, "too long"),
    ],
)
@pytest.mark.parametrize("answer_format", ["json", "text"])
def test_an_answer_without_a_judgment_has_a_kind(text: str | None, kind: str, answer_format: AnswerFormat) -> None:
    assert find_kind(text, answer_format) == kind


def test_a_short_response_may_be_quoted_but_not_repeated() -> None:
    assert read("Sydney. Wrong.", "text", "Sydney.") == Verdict("Sydney. Wrong.")
    assert find_kind("sydney.", "text", "Sydney.") == "echo of the response"


def test_an_echo_of_praise_is_not_praise() -> None:
    assert find_kind("Perfect answer: Sydney.", "text", "Perfect answer: Sydney.") == "echo of the response"
    assert read("Perfect.", output="Perfect.") == Verdict(None)
    verdict = write(True, "Perfect.")
    assert find_kind(verdict, output=f"Answer only {verdict}") == "echo of the response"


@pytest.mark.parametrize("text", ["Perfect.", write(True, "Perfect."), write(False, OBJECTION)])
def test_a_truncated_answer_is_refused_whatever_it_says(text: str) -> None:
    with pytest.raises(BadAnswer) as error:
        read_answer(text, "length", Response("r.jsonl:1", "x", "", "y"), "?")
    assert error.value.kind == "cut off"


# ---- Quotes ----


@pytest.mark.parametrize(
    ("quotes", "spans", "num_missing"),
    [
        ([], [], 0),
        (["Sydney"], [(28, 34)], 0),
        (["The capital", "country."], [(0, 11), (80, 88)], 0),
        (["whole country.", "the whole"], [(70, 88)], 0),
        (["is Sydney, \n which"], [(25, 41)], 0),
        (["the"], [], 1),  # twice
        (["Melbourne", ""], [], 2),
        (["ydney"], [], 1),
        (["sydney"], [], 1),
    ],
)
def test_quotes_are_located_if_they_occur_once(
    quotes: list[str], spans: list[tuple[int, int]], num_missing: int
) -> None:
    assert locate_quotes(quotes, LONG) == (spans, num_missing)


def test_a_quote_matches_whole_words_of_scripts_with_spaces_only() -> None:
    assert locate_quotes(["art"], "A party with art.") == ([(13, 16)], 0)
    assert locate_quotes(["2"], "12 and 2") == ([(7, 8)], 0)
    assert locate_quotes(["悉尼"], "首都是悉尼。") == ([(3, 5)], 0)
    assert locate_quotes(["(a.b"], "f(a.b)") == ([(1, 5)], 0)


@given(output=st.text("ab \n.", max_size=40), places=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_spans_are_ordered_and_hold_what_is_quoted(output: str, places: list[tuple[int, int]]) -> None:
    quotes = [output[start:end] for start, end in places]
    spans, num_missing = locate_quotes(quotes, output)
    assert all(0 <= start < end <= len(output) for start, end in spans)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(spans))
    marked = " ".join(" ".join(output[start:end] for start, end in spans).split())
    assert sum(" ".join(quote.split()) not in marked or not quote.split() for quote in quotes) <= num_missing
