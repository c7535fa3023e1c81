"""Converters of published preference and feedback data, on rows in exactly their schemas."""

import json

import pytest

from cutlm.cli import main
from cutlm.data.convert import conversations, helpsteer, pairs, prometheus
from cutlm.data.files import SourceRow, read_rows
from cutlm.data.formats import describe_row_format
from cutlm.data.records import check_records
from cutlm.errors import DataError

USER = {"role": "user", "content": "Name a colour."}
RED = {"role": "assistant", "content": "Red."}
MORE = {"role": "user", "content": "Another one."}


def convert(module, *rows):
    return module.convert([SourceRow(f"data.jsonl:{number}", row) for number, row in enumerate(rows, start=1)])


def kept(conversion):
    return [row.value for row in conversion.rows]


def unjudged(conversion):
    return [row.value for row in conversion.unjudged]


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


# ---- Prometheus ----

FEEDBACK_COLLECTION = {
    "orig_criteria": "Is the answer short?",
    "orig_feedback": "The answer is too long.",
    "orig_instruction": "Name a colour.",
    "orig_reference_answer": "Red.",
    "orig_response": "One colour is red.",
    "orig_score": "2",
    **{f"orig_score{number}_description": "..." for number in range(1, 6)},
    "instruction": "###Task Description: ...",
    "output": "The answer is too long. [RESULT] 2",
}
PREFERENCE_COLLECTION = {
    "orig_criteria": "Is the answer short?",
    "orig_instruction": "Name a colour.",
    "orig_reference_answer": "Red.",
    "orig_response_A": "One colour is red.",
    "orig_response_B": "Red.",
    "orig_score_A": "2",
    "orig_score_B": "5",
    "orig_feedback_A": "The answer is too long.",
    "orig_feedback_B": "The answer is short.",
    "orig_feedback": "B is shorter.",
    "orig_preference": "B",
    "instruction": "###Task Description: ...",
    "input": "",
    "output": "B is shorter. [RESULT] B",
}
TOO_LONG = {
    "instruction": "Name a colour.",
    "output": "One colour is red.",
    "judgment": "The answer is too long.",
    "score": 3.25,
    "i_ans": "Red.",
    "criteria": "Is the answer short?",
}


def test_feedback_becomes_the_judgment_and_the_reference_the_better_answer():
    conversion = convert(prometheus, FEEDBACK_COLLECTION, FEEDBACK_COLLECTION | {"orig_response": " "})
    assert kept(conversion) == [TOO_LONG]
    assert conversion.left_out == {"empty response": 1}


def test_both_responses_of_a_preference_are_judged_by_their_own_feedback():
    again = PREFERENCE_COLLECTION | {"orig_response_A": "Crimson", "orig_feedback_A": None}
    conversion = convert(prometheus, PREFERENCE_COLLECTION, again)
    assert kept(conversion) == [
        TOO_LONG,
        TOO_LONG | {"output": "Red.", "judgment": "The answer is short.", "score": 10.0},
    ]
    assert conversion.left_out == {
        "no feedback on this response alone": 1,
        "the same response and feedback again": 1,
    }


# ---- HelpSteer ----

RATINGS = {"prompt": "c#", "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}


def test_responses_with_ratings_only_are_satisfactory_or_unjudged():
    rows = [RATINGS | {"response": f"r{number}", "helpfulness": number} for number in range(5)]
    conversion = convert(helpsteer, *rows, RATINGS | {"response": "x", "helpfulness": [4, 4, 4]})
    assert kept(conversion) == [
        {"instruction": "c#", "output": "r4", "score": 10.0, "judgment": None},
        {"instruction": "c#", "output": "x", "score": 10.0, "judgment": None},
    ]
    assert unjudged(conversion) == [{"instruction": "c#", "output": f"r{number}"} for number in range(4)]


def test_turns_of_a_prompt_become_messages():
    prompt = "Name a colour.\n<extra_id_1>Assistant\nRed.\n<extra_id_1>User\nAnother one."
    conversion = convert(helpsteer, RATINGS | {"prompt": prompt, "response": "Blue.", "helpfulness": 1})
    assert unjudged(conversion) == [{"messages": [USER, RED, MORE, {"role": "assistant", "content": "Blue."}]}]


PREFERENCE_2 = {
    "split": "train",
    "prompt": "Name a colour.",
    "response_1": "Red.",
    "response_2": "A horse.",
    "preference_strength": -3,
    "preference_statement": "@Response 1 is much better than @Response 2 because it names a colour.",
    "preference_elaboration": "In contrast, @Response 2 names an animal.",
    "three_most_similar_preferences": [{"statement": "x", "elaboration": "y", "strength": -3}],
    "all_preferences_unprocessed": [{"strength": -3, "justification": {"@Response 1": "x"}}],
}


def test_the_reason_of_a_preference_is_the_judgment_of_the_worse_response():
    exchanged = PREFERENCE_2 | {"response_1": "A dog.", "response_2": "Blue.", "preference_strength": 1}
    conversion = convert(helpsteer, PREFERENCE_2, exchanged, PREFERENCE_2 | {"preference_strength": 0})
    ours = [(row["output"], row["judgment"]) for row in kept(conversion)]
    assert ours == [
        (
            "A horse.",
            "The other response is much better than this response because it names a colour. In contrast, this response"
            " names an animal.",
        ),
        ("Red.", None),
        (
            "A dog.",
            "This response is much better than the other response because it names a colour. In contrast, the other"
            " response names an animal.",
        ),
        ("Blue.", None),
    ]
    assert [row["output"] for row in unjudged(conversion)] == ["Red.", "A horse."]


STEER3 = {"domain": "general", "language": "english", "context": [USER]}
PREFERENCE_3 = STEER3 | {
    "response1": "A horse.",
    "response2": "Red.",
    "overall_preference": 2,
    "individual_preference": [
        {"score": 2, "reasoning": "Response 2 is better than Response 1 because a horse is no colour."},
        {"score": -1, "reasoning": "Response 1 is funny.", "feedback1": "x", "feedback2": "y"},
        {"score": 3, "reasoning": "...", "feedback1": "It names an animal.", "feedback2": "It is right."},
    ],
}


def test_each_person_who_agrees_with_the_preference_gives_a_judgment():
    conversion = convert(helpsteer, PREFERENCE_3)
    assert kept(conversion) == [
        {
            "instruction": "Name a colour.",
            "output": "A horse.",
            "judgment": "The other response is better than this response because a horse is no colour.",
        },
        {"instruction": "Name a colour.", "output": "A horse.", "judgment": "It names an animal."},
        {"instruction": "Name a colour.", "output": "Red.", "score": 10.0, "judgment": None},
    ]


def test_feedback_of_helpsteer3_gives_a_judgment_and_a_score():
    levels = ["not", "slightly", "partially", "mostly", "perfectly"]
    row = STEER3 | {
        "response1": "A horse.",
        "response2": "Red.",
        "feedback1": [f"The response is {level} helpful. Hm." for level in levels],
        "feedback2": ["It is right.", None],
    }
    conversion = convert(helpsteer, row)
    assert [row.get("score") for row in kept(conversion)] == [1.0, 3.25, 5.5, 7.75, 10.0, None]
    assert kept(conversion)[0]["judgment"] == "The response is not helpful. Hm."
    assert len(unjudged(conversion)) == 1


@pytest.mark.parametrize("edited", ["edited_response", "good_edited_response"])
def test_an_edited_response_is_the_better_answer(edited):
    row = STEER3 | {"original_response": "A horse.", edited: "Red.", "feedback": ["The response is not helpful. Why?"]}
    row |= {"bad_edited_response": "A dog."} if edited.startswith("good") else {"change_summary": "Named a colour."}
    assert kept(convert(helpsteer, row)) == [
        {
            "instruction": "Name a colour.",
            "output": "A horse.",
            "i_ans": "Red.",
            "score": 1.0,
            "judgment": "The response is not helpful. Why?",
        }
    ]


# ---- Preference pairs ----

PROMPT = {"prompt": "Name a colour."}
RED_ROW = {"instruction": "Name a colour.", "output": "Red."}
HORSE = {"role": "assistant", "content": "A horse."}


@pytest.mark.parametrize(
    "row",
    [
        PROMPT | {"chosen": "Red.", "rejected": "A horse."},
        {"instruction": "Name", "input": "a colour.", "chosen": "Red.", "rejected": "A horse."},
        {"prompt": [USER], "chosen": [RED], "rejected": [HORSE]},
        {"chosen": [USER, RED], "rejected": [USER, HORSE]},
        PROMPT | {"prompt_id": "x", "chosen": [USER, RED], "rejected": [USER, HORSE], "messages": [USER, RED]},
        {"chosen": "\n\nHuman: Name a colour.\n\nAssistant: Red.", "rejected": "\n\nHuman: x\n\nAssistant: A horse."},
        {
            "conversations": [{"from": "human", "value": "Name a colour."}],
            "chosen": {"from": "gpt", "value": "Red."},
            "rejected": {"from": "gpt", "value": "A horse."},
        },
        {"question": "Name a colour.", "system": "", "chosen": "Red.", "rejected": "A horse."},
    ],
)
def test_the_chosen_response_is_satisfactory_and_the_other_unjudged(row):
    conversion = convert(pairs, row)
    expected = RED_ROW | {"instruction": "Name\na colour."} if "input" in row else RED_ROW
    assert kept(conversion) == [expected | {"judgment": None}]
    assert [row["output"] for row in unjudged(conversion)] == ["A horse."]


def test_scores_decide_which_responses_are_satisfactory():
    row = PROMPT | {"chosen": [USER, RED], "rejected": [USER, HORSE], "score_chosen": 6.5, "score_rejected": 6.0}
    assert (kept(convert(pairs, row)), len(unjudged(convert(pairs, row)))) == ([], 2)
    conversion = convert(pairs, row | {"score_chosen": 9.0, "score_rejected": 7.0})
    assert [row["score"] for row in kept(conversion)] == [9.0, 7.0]


@pytest.mark.parametrize("scores", [(340, 52), (4, 0), (0.9, 0.2), (-1.5, -8)])
def test_scores_of_another_scale_decide_nothing(scores):
    pair = PROMPT | {"chosen": "Red.", "rejected": "A horse."}
    rows = [pair | dict(zip(("chosen_score", "rejected_score"), values, strict=True)) for values in (scores, (9, 8))]
    conversion = convert(pairs, *rows)
    assert kept(conversion) == [RED_ROW | {"judgment": None}] * 2
    assert [row["output"] for row in unjudged(conversion)] == ["A horse."] * 2


def test_labels_decide_for_single_responses():
    rows = [PROMPT | {"completion": "Red.", "label": True}, PROMPT | {"completion": "A horse.", "label": False}]
    conversion = convert(pairs, *rows)
    assert kept(conversion) == [RED_ROW | {"judgment": None}]
    assert unjudged(conversion) == [RED_ROW | {"output": "A horse."}]


def test_system_prompts_and_several_turns_are_kept():
    row = {"system": "Be brief.", "question": "Name a colour.", "chosen": "Red.", "rejected": " "}
    conversion = convert(pairs, row)
    assert kept(conversion) == [{"messages": [{"role": "system", "content": "Be brief."}, USER, RED], "judgment": None}]
    assert conversion.left_out == {"no prompt, or no response to it in text": 1}
    many = {"chosen": [USER, RED, MORE, RED], "rejected": [USER, RED, MORE, HORSE]}
    assert unjudged(convert(pairs, many)) == [{"messages": [USER, RED, MORE, HORSE]}]


# ---- Chat logs ----


def share(*messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


LOG = [USER, RED, MORE, {"role": "assistant", "content": "Blue."}]
NODES = {
    "root": {"id": "root", "message": None, "parent": None, "children": ["0"]},
    **{
        str(number): {
            "id": str(number),
            "message": {
                "author": {"role": message["role"]},
                "content": {"content_type": "text", "parts": [message["content"]]},
            },
            "parent": str(number - 1) if number else "root",
            "children": [str(number + 1)],
        }
        for number, message in enumerate([{"role": "system", "content": ""}, *LOG])
    },
}
NODES["other"] = NODES["4"] | {"id": "other", "message": None}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": LOG},
        {"conversations": share(*LOG)},
        {"conversation": [message | {"toxic": False, "turn_identifier": 1} for message in LOG], "model": "x"},
        {"title": "Colours", "mapping": NODES, "current_node": "4"},
    ],
)
def test_what_the_user_said_next_is_the_judgment(row):
    conversion = convert(conversations, row)
    assert kept(conversion) == [RED_ROW | {"judgment": "Another one."}]
    assert unjudged(conversion) == [{"messages": LOG}]


def export(*messages):
    """A conversation of ChatGPT's export: messages in a row, each with its role and content."""
    nodes = {"root": {"message": None, "parent": None}}
    for number, (role, content, *recipient) in enumerate(messages):
        message = {"author": {"role": role}, "content": content, "recipient": recipient[0] if recipient else "all"}
        nodes[str(number)] = {"message": message, "parent": str(number - 1) if number else "root"}
    return {"mapping": nodes, "current_node": str(len(messages) - 1)}


def say(text):
    return {"content_type": "text", "parts": [text]}


def test_thoughts_and_settings_of_an_export_are_no_messages():
    context = {"content_type": "user_editable_context", "user_profile": "I paint.", "user_instructions": "Be brief."}
    row = export(
        *(("system", say("")), ("user", context), ("user", say("Name a colour."))),
        *(
            ("assistant", {"content_type": "thoughts", "thoughts": []}),
            ("assistant", {"content_type": "reasoning_recap"}),
        ),
        *(("assistant", say("A horse.")), ("user", say("No."))),
    )
    system = {"role": "system", "content": "I paint.\n\nBe brief."}
    assert kept(convert(conversations, row)) == [{"messages": [system, USER, HORSE], "judgment": "No."}]


def test_what_an_export_sends_to_tools_is_no_response():
    row = export(
        *(("user", say("Name a colour.")), ("assistant", say("User likes horses."), "bio"), ("tool", say("Stored."))),
        *(("assistant", {"content_type": "code", "text": "print('Red')"}, "python"),),
        *(
            ("tool", {"content_type": "execution_output", "text": "Red"}),
            ("assistant", say("A horse.")),
            ("user", say("No.")),
        ),
    )
    conversion = convert(conversations, row)
    (record,) = kept(conversion)
    assert [message["role"] for message in record["messages"]] == ["user", *["assistant", "tool"] * 2, "assistant"]
    calls = [message["tool_calls"][0]["function"] for message in record["messages"] if "tool_calls" in message]
    assert calls == [
        {"name": "bio", "arguments": "User likes horses."},
        {"name": "python", "arguments": "print('Red')"},
    ]
    assert conversion.left_out == {"call of a tool instead of a response": 2}
    assert all("tool_calls" in item["messages"][-1] for item in conversion.listed)


def test_parts_of_text_and_other_names_of_roles_are_read():
    parts = [USER | {"content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]}, HORSE]
    reply = {"role": "human", "content": "No."}
    assert kept(convert(conversations, {"messages": [*parts, reply]})) == [
        RED_ROW | {"output": "A horse.", "judgment": "No."}
    ]


def test_a_conversation_with_a_judgment_is_not_taken_for_a_log():
    with pytest.raises(DataError) as error:
        convert(conversations, {"messages": LOG}, {"conversations": share(*LOG), "judgment": "No."})
    assert [problem.split(": ")[0] for problem in error.value.problems] == ["data.jsonl:2"]


def test_the_parts_of_an_evaluators_prompt_are_read():
    prompt = (
        "###Task Description:\nAn instruction is given.\n\n###The instruction to evaluate:\nName a colour.\n\n"
        "###Response to evaluate:\nA horse.\n\n###Reference Answer (Score 5):\nRed.\n\n###Score Rubrics:\n"
        "[Is it a colour?]\nScore 1: No.\n\n###Feedback: "
    )
    row = {"instruction": prompt, "output": "Feedback: It is no colour. [RESULT] 1"}
    assert kept(convert(prometheus, row)) == [
        {
            **{"instruction": "Name a colour.", "output": "A horse.", "judgment": "It is no colour.", "score": 1.0},
            **{"i_ans": "Red.", "criteria": "Is it a colour?"},
        }
    ]
    assert "cutlm convert prometheus" in describe_row_format(row)


def test_what_is_no_conversation_is_counted_or_named():
    image = [{"role": "user", "content": [{"type": "image"}]}, RED, MORE]
    conversion = convert(conversations, {"messages": image}, {"messages": [RED, MORE]})
    assert conversion.left_out == {
        "conversations with messages of another kind than text": 1,
        "no message by the user before the response": 1,
    }
    with pytest.raises(DataError, match=r"data\.jsonl:1: expected a conversation in messages, .* got 'a'"):
        convert(conversations, {"a": 1})


# ---- The command ----


@pytest.mark.parametrize(
    ("source", "row", "num_kept", "num_unjudged"),
    [
        ("prometheus", FEEDBACK_COLLECTION, 1, 0),
        ("prometheus", PREFERENCE_COLLECTION, 2, 0),
        ("helpsteer", PREFERENCE_2, 2, 0),
        ("helpsteer", PREFERENCE_3, 3, 0),
        ("pairs", PROMPT | {"chosen": "Red.", "rejected": "A horse."}, 1, 1),
        ("pairs", {"chosen": [USER, RED, MORE, RED], "rejected": [USER, RED, MORE, HORSE]}, 1, 1),
        ("conversations", {"conversations": share(USER, RED, MORE)}, 1, 0),
        ("conversations", {"conversations": share(*LOG, USER)}, 2, 0),
    ],
)
def test_records_and_unjudged_responses_are_written(source, row, num_kept, num_unjudged, tmp_path, capsys):
    out, rest = tmp_path / "records.jsonl", tmp_path / "responses.jsonl"
    file = write(tmp_path / "in.jsonl", row)
    # A file of such rows is not taken for records; the message names the converter.
    assert main(["check", file]) == 2
    assert f"cutlm convert {source}" in capsys.readouterr().err
    assert main(["convert", source, file, "--out", str(out), "--unjudged", str(rest)]) == 0
    check = check_records(out)
    assert (len(check.records), check.problems) == (num_kept, [])
    assert len(read_rows(rest)[0]) == num_unjudged


def test_unjudged_responses_alone_are_written_without_records(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", RATINGS | {"response": "x", "helpfulness": 1})
    out, rest = tmp_path / "records.jsonl", tmp_path / "responses.jsonl"
    assert main(["convert", "helpsteer", file, "--out", str(out)]) == 2
    assert "1 responses have no judgment; --unjudged FILE" in capsys.readouterr().err
    assert main(["convert", "helpsteer", file, "--out", str(out), "--unjudged", str(rest)]) == 0
    assert not out.exists()
    assert [row.value for row in read_rows(rest)[0]] == [{"instruction": "c#", "output": "x"}]
    for same in (out, out.parent / ".." / out.parent.name / out.name):
        assert main(["convert", "helpsteer", file, "--out", str(out), "--unjudged", str(same)]) == 2
