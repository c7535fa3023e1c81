"""Which replies in chat logs are feedback: decided by rules, a model on a server, or the sensitivity test."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import ChatServer
from commands import KillPoint, list_options, start_command, write_lines
from tiny import make_tokenizer, save_tiny_model

from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.data.records import JudgedRecord, load_records
from cutlm.flagging.feedback import compute_shift, measure_shifts
from cutlm.flagging.scoring import Scored
from cutlm.judges.answers import BadAnswer
from cutlm.judges.feedback import find_feedback, read_kind
from cutlm.prompting.encoding import Encoder

OBJECTIONS = """\
No, it is Canberra.
That's not what I asked for.
You forgot the second part of my question.
That's wrong, 7*8 is 56
it doesn't compile: error on line 3
Can you make it shorter?
please rewrite the last paragraph
I asked for three examples, you only gave two
Are you sure? I think the capital is Canberra
this is too long
hmm that doesn't look right
still getting the same error
Not quite. The sum is 12.
your answer is incorrect
You misunderstood me
Thanks, but you didn't mention the price
Great, but make it more formal
Nice try
No, that's wrong
no it is incorrect
That's wrong, no?"""
APPROVALS = """\
Thanks!
Thank you so much, that helped a lot
Perfect.
That's great, thank you!
Looks good to me
ok thanks"""
OTHERS = """\
And what is the capital of Austria?
Now write a poem about the sea
yes
Tell me more about Canberra
Option 2
continue
no problem
No, thanks.
No. Thank you!
no, that's all, thanks
Thanks, but it crashes with a KeyError
ok thanks, now I get a syntax error
Looks good, except the title
I love it but it rhymes badly
good start, needs more detail
Perfect, but the title is odd
Write a function that returns the sum of two numbers"""


def say(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


LOGS = [
    say("Name the capital of Australia.", "Sydney.", "No, it is Canberra.", "Sorry, Canberra.", "Thanks!", "Bye."),
    say("Name a colour.", "Red.", "And a fruit?", "Apple."),
    say("Hello.", ""),
]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "logs.jsonl", LOGS)


def convert(logs: Path, out: Path, *further: str, **options: Any) -> int:
    return main(["convert", "conversations", str(logs), *list_options(out=out, **options), *further])


def read(path: Path) -> list[dict[str, Any]]:
    return [row.value for row in read_rows(path)[0]]


def read_left_out(out: Path) -> list[dict[str, Any]]:
    return read(Path(f"{out}.left_out.jsonl"))


@pytest.mark.parametrize(
    ("texts", "expected"), [(OBJECTIONS, {True}), (APPROVALS, {"Perfect."}), (OTHERS, {False, None})]
)
def test_the_built_in_rules(texts: str, expected: set[Any]) -> None:
    for reply in texts.split("\n"):
        assert find_feedback("Name the capital.", "Sydney.", reply) in expected, reply


def test_every_reply_counts_by_default_and_what_has_none_is_listed(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert convert(logs, out) == 0
    assert [record.judgment for record in load_records(out)] == ["No, it is Canberra.", "Thanks!", "And a fruit?"]
    (left_out,) = read_left_out(out)
    assert (left_out["location"], left_out["reason"]) == (f"{logs}:3", "empty response")
    assert "every reply counts" in capsys.readouterr().out
    write_lines(logs, LOGS[:2])
    assert convert(logs, out) == 0
    assert not Path(f"{out}.left_out.jsonl").exists()


def test_rules_keep_objections_and_approvals(logs: Path, tmp_path: Path) -> None:
    out, unjudged = tmp_path / "out.jsonl", tmp_path / "unjudged.jsonl"
    assert convert(logs, out, feedback="rules", unjudged=unjudged) == 0
    objection, approval = load_records(out)
    assert (objection.output, objection.judgment) == ("Sydney.", "No, it is Canberra.")
    assert (approval.output, approval.judgment, approval.is_satisfactory) == ("Sorry, Canberra.", None, True)
    assert [row.get("reply") for row in read(out)] == [None, "Thanks!"]
    assert [row.get("reply") for row in read_left_out(out)] == [None, "And a fruit?"]
    # What has no judgment can be judged: with a reply that is no feedback, or without one.
    assert [row.get("output") or row["messages"][-1]["content"] for row in read(unjudged)] == ["Bye.", "Apple.", "Red."]
    assert main(["judge", *list_options(responses=unjudged, judge="human", out=tmp_path / "judged.jsonl")]) == 0


def test_a_rule_of_ones_own_returns_the_judgment(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_feedback.py").write_text(
        "def find(conversation, response, reply):\n"
        "    assert 'Name' in conversation\n"
        "    return {'T': 'Perfect.', 'N': 'It is not Sydney.', 'A': None}[reply[0]]\n"
        "def fail(conversation, response, reply):\n"
        "    return 1 if reply[0] == 'T' else 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.jsonl"
    try:
        assert convert(logs, out, rules="own_feedback:find", feedback="rules") == 0
        assert [record.judgment for record in load_records(out)] == ["It is not Sydney.", None]
        assert read(out)[0]["reply"] == "No, it is Canberra."
        capsys.readouterr()
        assert convert(logs, out, rules="own_feedback:fail", feedback="rules") == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if "own_feedback:fail" in line]) == 3
    finally:
        sys.modules.pop("own_feedback", None)


# ---- A model on a server ----


def decide(prompt: str) -> str:
    kind = (
        "objection"
        if "No, it is Canberra.\n[end of reply" in prompt
        else "approval"
        if "Thanks!\n[end of reply" in prompt
        else "none"
    )
    return json.dumps({"feedback": kind})


def test_a_server_decides_and_its_answers_are_cached(logs: Path, tmp_path: Path, server: ChatServer) -> None:
    server.reply = decide
    out = tmp_path / "out.jsonl"
    options = {"feedback": "http", "base_url": server.url, "judge_model": "m"}
    assert convert(logs, out, **options) == 0
    assert [record.judgment for record in load_records(out)] == ["No, it is Canberra.", None]
    assert [row["reason"].partition(",")[0] for row in read_left_out(out)] == ["empty response", "no feedback"]
    assert len(server.requests) == 3
    assert {request["response_format"]["json_schema"]["name"] for request in server.requests} == {"feedback"}
    assert convert(logs, out, **options) == 0
    assert len(server.requests) == 3


def test_an_answer_that_is_not_understood_is_listed_and_asked_again(
    logs: Path, tmp_path: Path, server: ChatServer
) -> None:
    server.reply = lambda prompt: "Maybe." if "fruit" in prompt else decide(prompt)
    out = tmp_path / "out.jsonl"
    options = {"feedback": "http", "base_url": server.url, "judge_model": "m"}
    assert convert(logs, out, **options) == 1
    assert len(load_records(out)) == 2
    assert [row["reply"] for row in read_left_out(out) if "reply" in row] == ["And a fruit?"]
    num_before = len(server.requests)
    server.reply = decide
    assert convert(logs, out, **options) == 0
    assert len(server.requests) == num_before + 1


@pytest.mark.parametrize("answer", ["", "no", '{"feedback": "maybe"}', '{"feedback": 1}', '{"a": "none"}', "[1]", "{"])
def test_unclear_answers_are_no_decision(answer: str) -> None:
    with pytest.raises(BadAnswer):
        read_kind("Is it?", answer, None)


@pytest.mark.parametrize(
    "answer", ['{"feedback": "Objection"}', "objection", '```json\n{"feedback": "objection"}\n```']
)
def test_clear_answers(answer: str) -> None:
    assert read_kind("Is it?", answer, None) == "objection"


# ---- The sensitivity test ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), chat=True)


def test_replies_that_shift_the_response_more_than_foreign_ones_are_kept(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    encoder = Encoder(tokenizer, "chat")
    records = [
        JudgedRecord(instruction=f"Name {number}.", output="Sydney is.", judgment=f"It is wrong, {number}.")
        for number in range(6)
    ]

    def score(rows: Any, done: Any) -> Any:
        """Shift the responses of even records under their own replies, and those of odd ones under foreign replies."""
        for index, row in enumerate(rows):
            prompt = tokenizer.decode(row["prompt_ids"])
            logps = torch.full((len(row["response_ids"]),), -2.0)
            is_foreign = "with the judgment of" in row["location"]
            is_even = any(f"Name {number}." in prompt for number in (0, 2, 4))
            own = logps + 1 if is_even else logps + 0.1
            foreign = logps + 0.5
            yield [
                Scored(index, foreign if is_foreign else logps, None if row["judged_prompt_ids"] is None else own, None)
            ]

    locations = [f"a:{number}" for number in range(6)]
    settings: dict[str, Any] = {"num_foreign": 3, "max_length": 500, "detector": "m", "backend": {}}
    shifts = measure_shifts(records, locations, tmp_path / "out.jsonl", encoder, score, **settings)
    assert [shifts.shifts[index].is_largest for index in range(6)] == [True, False] * 3
    assert shifts.shifts[0].own == pytest.approx(1)
    assert shifts.shifts[1].foreign == pytest.approx([0.5] * 3)
    assert not shifts.refused


def test_the_shift_counts_tokens_that_the_reply_makes_more_likely() -> None:
    assert compute_shift([-1.0, -2.0], [-1.5, -1.0]) == 0.5


def make_logs(num: int) -> list[dict[str, Any]]:
    return [say(f"Name {n}.", f"The city {n}.", f"It is wrong, {n}.", "Sorry.", "Next." * n) for n in range(1, num)]


def test_the_sensitivity_test_by_a_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"messages": [{"role": "system", "content": "Be brief."}, *say("Name.", "No.", "Perfect!")["messages"]]}
    logs = write_lines(tmp_path / "logs.jsonl", [*make_logs(6), say("Hi.", "Yes. " * 200, "Too long."), refused])
    out = tmp_path / "out.jsonl"
    assert convert(logs, out, model=model, num_foreign=3, max_length=300, device="cpu") == 0
    kept, left_out = load_records(out), read_left_out(out)
    assert len(kept) + len(left_out) == 12
    assert [record.judgment for record in kept if record.is_satisfactory] == [None]
    assert {row["reason"].partition(":")[0] for row in left_out} >= {"not tested"}
    assert all("reply" in row and "location" in row for row in left_out)
    assert not Path(f"{out}.partial").exists()
    assert "10 replies tested; about 2 " in capsys.readouterr().out
    assert convert(logs, out, model=model, num_foreign=30, device="cpu") == 2


def test_a_killed_sensitivity_test_resumes(model: Path, tmp_path: Path) -> None:
    logs = write_lines(tmp_path / "logs.jsonl", make_logs(8))
    settings: dict[str, Any] = {"model": model, "num_foreign": 2, "device": "cpu", "max_tokens_per_batch": 300}
    assert convert(logs, tmp_path / "whole.jsonl", **settings) == 0
    out = tmp_path / "out.jsonl"
    command = ["convert", "conversations", str(logs), *list_options(out=out, **settings)]
    killed = start_command(command, KillPoint("cutlm.data.journal:Journal", "append", 3)).wait()
    assert killed.exit_code == -9
    assert convert(logs, out, **settings) == 0
    assert read(out) == read(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"feedback": "http"},
        {"feedback": "sensitivity"},
        {"feedback": "rules", "base_url": "http://localhost/v1"},
        {"model": "m", "rules": "a:b"},
        {"model": "m", "num_foreign": 0},
    ],
)
def test_options_that_contradict_each_other_are_refused(logs: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    assert convert(logs, tmp_path / "out.jsonl", **options) == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_other_sources_have_no_replies(logs: Path, tmp_path: Path) -> None:
    assert main(["convert", "pairs", str(logs), "--out", str(tmp_path / "a"), "--feedback", "rules"]) == 2


def test_a_folder_with_the_list_is_read_without_it(logs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    assert convert(logs, folder / "out.jsonl", feedback="rules") == 0
    assert len(load_records(folder)) == 2


TOOLS = [{"type": "function", "function": {"name": "find_capital", "parameters": {"type": "object"}}}]
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find_capital", "arguments": {}}}]}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("is_sharegpt", [False, True])
def test_system_prompts_and_tools_of_logs_are_kept(tmp_path: Path, tools: Any, is_sharegpt: bool) -> None:
    user, reply = "Name the capital.", "No, it is Canberra."
    if is_sharegpt:
        texts = [("human", user), ("function_call", '{"name": "find_capital", "arguments": {}}'), ("observation", "?")]
        texts += [("gpt", "Sydney."), ("human", reply)]
        row: dict[str, Any] = {"conversations": [{"from": name, "value": text} for name, text in texts]}
        row |= {"system": "Be brief."}
    else:
        turns = [CALLS, {"role": "tool", "content": "?"}, {"role": "assistant", "content": "Sydney."}]
        row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}, *turns]}
        row["messages"].append({"role": "user", "content": reply})
    logs, out = write_lines(tmp_path / "logs.jsonl", [row | {"tools": tools}]), tmp_path / "out.jsonl"
    assert convert(logs, out) == 0
    (record,) = load_records(out)
    assert [message["role"] for message in record.messages or ()] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert record.messages[2]["tool_calls"][0]["function"]["name"] == "find_capital"  # type: ignore[index]
    assert (record.tools, record.judgment) == (TOOLS, reply)
    assert [row["reason"] for row in read_left_out(out)] == ["call of a tool instead of a response"]


def test_tools_that_are_no_list_are_an_error(tmp_path: Path) -> None:
    rows = [say("Hi.", "Hello.", "No.") | {"tools": tools} for tools in ("{", '{"a": 1}', [1])]
    assert main(["check", str(write_lines(tmp_path / "a.jsonl", rows))]) == 2
    rows = [say("Hi.", "Hello.") | {"tools": tools} for tools in ("", None, [], "[]")]
    assert main(["check", str(write_lines(tmp_path / "b.jsonl", rows))]) == 0
