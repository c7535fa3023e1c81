"""Rows of chat data become records with one conversation and one response."""

import json
from pathlib import Path
from typing import Any

import pytest

from cutlm.cli import main
from cutlm.data.conversations import Conversation
from cutlm.data.files import read_rows
from cutlm.data.records import JudgedRecord, check_records
from cutlm.judges.responses import read_responses


def make_call(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]
ASK = {"role": "user", "content": "Name a city."}
ANSWER = {"role": "assistant", "content": "Sydney."}
CALL = make_call({"what": "city"})
FOUND = {"role": "tool", "name": "find", "content": "Sydney"}
HALF_CALL = '{"name": "find", "arguments": {"city": "\\ud83d"}}'
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}}
LONG = [SYSTEM, *HELLO, ASK]
PARTS = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a city."}]
PLAIN = {"instruction": "Name a city.", "output": "Sydney."}
BRIEF = {"instruction": "Name", "input": "a city.", "output": "Sydney.", "system": "Be brief."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASK, ANSWER]}, [ASK]),
        ({"messages": [*LONG, ANSWER]}, LONG),
        ({"messages": [ASK, CALL, FOUND, ANSWER], "tools": [TOOL]}, [ASK, CALL, FOUND]),
        ({"messages": [ASK, CALL | {"content": None}, FOUND, ANSWER]}, [ASK, CALL, FOUND]),
        ({"messages": [ASK, CALL | {"tool_calls": json.dumps(CALL["tool_calls"])}, FOUND, ANSWER]}, [ASK, CALL, FOUND]),
        ({"messages": [ASK, CALL | {"tool_calls": [{"id": None, **CALL["tool_calls"][0]}]}, FOUND, ANSWER]},
         [ASK, CALL, FOUND]),
        ({"messages": [HELLO[0], HELLO[1] | {"tool_calls": []}, ASK, ANSWER | {"tool_calls": ""}]}, [*HELLO, ASK]),
        ({"messages": [{**ASK, "content": PARTS}, ANSWER]}, [ASK]),
        ({"prompt": "Name a city.", "completion": "Sydney."}, [ASK]),
        ({"prompt": LONG, "completion": [ANSWER]}, LONG),
        ({**PLAIN, "system": "Be brief.", "history": [["Hello.", "Hi!"]]}, LONG),
        (BRIEF, [SYSTEM, {**ASK, "content": "Name\na city."}]),
        ({**PLAIN, "system": None, "history": []}, [ASK]),
        ({"messages": [{"from": "system", "value": "Be brief."}, *HELLO, {"from": "human", "value": "Name a city."},
                       {"from": "gpt", "value": "Sydney."}]}, LONG),
        ({"messages": [ASK, {"from": "function_call", "value": json.dumps(CALL["tool_calls"][0]["function"])},
                       {"from": "observation", "value": "Sydney", "name": "find"}, ANSWER]}, [ASK, CALL, FOUND]),
        ({"messages": [ASK, {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": {
            "what": "city"}}}, FOUND, ANSWER]}, [ASK, CALL, FOUND]),
        ({"messages": [{**ASK, "content": [{"type": "input_text", "text": "Name a city."}]},
                       {**ANSWER, "content": [{"type": "output_text", "text": "Sydney."}]}]}, [ASK]),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": {"value": "Name a city.", "annotations": []}}]},
                       ANSWER]}, [ASK]),
        ({"messages": json.dumps([*LONG, ANSWER])}, LONG),
        ({**PLAIN, "system": "Be brief.", "history": json.dumps([["Hello.", "Hi!"]])}, LONG),
        ({**PLAIN, "history": HELLO}, [*HELLO, ASK]),
        ({**PLAIN, "tools": [TOOL]}, [ASK]),
    ],
)  # fmt: skip
def test_conversations_are_read_in_every_form(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    record = JudgedRecord.model_validate(row | {"judgment": "No."})
    assert record.output == "Sydney."
    assert list(record.conversation.messages) == messages
    assert record.conversation.tools == tuple(row.get("tools", ()))
    assert record.conversation.instruction == messages[-1 if messages[-1]["role"] == "user" else -3]["content"]
    assert not any((record.model_extra or {}).values())
    # Written and read again, it is the same.
    again = JudgedRecord.model_validate(json.loads(record.model_dump_json(exclude_unset=True)))
    assert again == record


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": []}, "field 'messages'"),
        ({"messages": [ANSWER]}, "a message by the user"),
        ({"messages": [ASK]}, "the assistant at the end"),
        ({"messages": [ASK, CALL]}, "the assistant at the end"),
        ({"messages": [ASK, "Sydney."]}, "field 'messages[1]'"),
        ({"messages": [{"role": "human", "content": "Hi."}, ANSWER]}, "field 'messages[0].role'"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "field 'messages[0].content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "parts of image"),
        ({"messages": [{"role": "user", "content": "a\0b"}, ANSWER]}, "null bytes"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}, ANSWER, ASK, ANSWER]}, "half of a surrogate pair"),
        ({"messages": [ASK, {"from": "function_call", "value": HALF_CALL}, ANSWER]}, "field 'messages[1].tool_calls'"),
        *(
            ({"messages": [ASK, make_call(arguments), FOUND, ANSWER]}, "field 'messages[1].tool_calls': expected text")
            for text in ("a\0b", "a\ud83d")
            for arguments in ({"a": [text]}, {text: 1}, json.dumps({"a": text}))
        ),
        ({"messages": [ASK, CALL, FOUND | {"name": "a\0"}, ANSWER]}, "field 'messages[2].name'"),
        (
            {"messages": [ASK, ANSWER], "tools": [{"name": "find", "description": "a\0"}]},
            "field 'tools': expected text",
        ),
        ({"instruction": "a", "output": "b", "system": "a\ud83d"}, "field 'system': expected text, got half"),
        ({"instruction": "a", "output": "b", "history": [["c", "\0"]]}, "field 'history[0]': expected text without"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWER]}, "messages[0].content"),
        *(
            ({"messages": [ASK, CALL | {"tool_calls": calls}, FOUND, ANSWER]}, "field 'messages[1].tool_calls'")
            for calls in ("find()", ["find"], [{"function": None}], [{"function": "find"}], [{"name": 1}])
        ),
        ({"messages": [{"role": "user", "content": None, "tool_calls": []}, ANSWER]}, "field 'messages[0].content'"),
        ({"messages": [{"from": "narrator", "value": "Hi."}, ANSWER]}, "field 'messages[0].role'"),
        ({"messages": [ASK, {"from": "function_call", "value": "find(1)"}, ANSWER]}, "field 'messages[1].content'"),
        ({"instruction": "a", "output": "b", "history": "c"}, "field 'history'"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "field 'output'"),
        ({"messages": [ASK, ANSWER], "output": "Perth."}, "field 'output'"),
        ({"messages": [ASK, ANSWER], "tools": "find"}, "field 'tools'"),
        ({"messages": [ASK, ANSWER], "input": "x"}, "field 'input'"),
        ({"messages": [ASK, ANSWER], "system": "x"}, "field 'system'"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history[0]'"),
        ({"instruction": "a", "output": "b", "system": 1}, "field 'system'"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt'"),
    ],
)
def test_a_conversation_that_is_not_valid_is_named(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [ASK, ANSWER]}) + "\n" + json.dumps(row) + "\n")
    check = check_records(path)
    assert len(check.problems) == 1
    assert check.problems[0].startswith(f"{path}:2: ")
    assert named in check.problems[0]
    assert len(check.records) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("before", [[ASK], LONG])
def test_thoughts_of_the_response_are_kept_next_to_it_and_named(
    name: str, before: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [*before, ANSWER | {name: "A large one?"}]}, {"prompt": before, "completion": [ANSWER]}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row | {'judgment': None})}\n" for row in rows))
    records = check_records(path).records
    assert [(record.output, (record.model_extra or {}).get("reasoning")) for record in records] == [
        ("Sydney.", "A large one?"),
        ("Sydney.", None),
    ]
    # A record that is written is read again as the same.
    assert JudgedRecord.model_validate(records[0].model_dump(exclude_unset=True)) == records[0]
    assert main(["check", str(path)]) == 0
    assert "1 record with thoughts next to the response, which are not trained on" in capsys.readouterr().out


def test_a_conversation_as_text_has_every_turn() -> None:
    conversation = Conversation((SYSTEM, *HELLO, ASK, CALL, FOUND))
    assert conversation.to_text() == (
        "System: Be brief.\n\nUser: Hello.\n\nAssistant: Hi!\n\nUser: Name a city.\n\n"
        "Assistant: [calls find({'what': 'city'})]\n\nTool: Sydney"
    )
    assert Conversation.start("Name a city.").to_text() == "Name a city."


def test_the_oldest_turn_is_dropped_with_all_its_messages() -> None:
    conversation = Conversation((SYSTEM, ASK, CALL, FOUND, ANSWER, *HELLO, ASK))
    shorter = conversation.drop_oldest_turn()
    assert shorter is not None
    assert list(shorter.messages) == [SYSTEM, *HELLO, ASK]
    shortest = shorter.drop_oldest_turn()
    assert shortest is not None
    assert list(shortest.messages) == [SYSTEM, ASK]
    assert shortest.drop_oldest_turn() is None


def test_system_messages_between_turns_stay() -> None:
    later = {"role": "system", "content": "Answer in French."}
    shorter = Conversation((SYSTEM, *HELLO, later, ASK, ANSWER, ASK)).drop_oldest_turn()
    assert shorter is not None
    assert list(shorter.messages) == [SYSTEM, later, ASK, ANSWER, ASK]
    shortest = shorter.drop_oldest_turn()
    assert shortest is not None
    assert list(shortest.messages) == [SYSTEM, later, ASK]


def test_judges_see_the_conversation_and_records_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "responses.jsonl", tmp_path / "records.jsonl"
    row = {"messages": [*LONG, ANSWER], "tools": [TOOL], "id": 7}
    path.write_text(json.dumps(row) + "\n")
    (response,) = read_responses(path)
    assert response.full_instruction.startswith("System: Be brief.\n\nUser: Hello.")
    (tmp_path / "named_rules.py").write_text(
        "def judge(instruction, response):\n    return instruction.count('User:') * 'No.'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--responses", str(path), "--out", str(out), "--judge", "rules", "--rules", "named_rules:judge"]
    assert main(["judge", *arguments]) == 0
    (judged,) = read_rows(out)[0]
    assert judged.value["judgment"] == "No.No."
    assert judged.value["id"] == 7
    (record,) = check_records(out).records
    assert list(record.conversation.messages) == LONG
    assert record.tools == [TOOL]
