"""A reasoning judge on a server: every notation of thoughts, finish reasons, and whether JSON can be enforced."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Handler, make_completion
from judged_rows import find_failures, list_options, read_lines, write_lines, write_verdict

from cutlm.cli import main
from cutlm.data.records import load_records

INSTRUCTION = "Name the capital of Australia."
RESPONSE = "It is Sydney, the largest city."
OBJECTION = "Sydney is not the capital."
# They praise and object, so that a verdict read from them is wrong for one of the two answers.
THOUGHTS = (
    'The user asks me to judge. "Sydney" is wrong, isn\'t it?\nSatisfactory: yes\nPerfect.\n{"satisfactory": true}'
)

NOTATIONS = {
    "think": "<think>{}</think>{}",
    "think, several": "<think>Hm.</think>\n<think>{}</think>\n\n{}",
    "think, prompt opens": "{}\n</think>\n\n{}",
    "thinking": "<thinking>{}</thinking>\n\n{}",
    "thought": "<thought>{}</thought>{}",
    "reasoning": "<reasoning>{}</reasoning>{}",
    "seed": "<seed:think>{}</seed:think>{}",
    "Mistral": "[THINK]{}[/THINK]{}",
    "Harmony": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "Harmony, skipped": "analysis{}assistantfinal{}",
    "Harmony, commentary": "analysis{}assistantcommentaryHm.assistantfinal{}",
    "Gemma": "<|channel>thought\n{}<channel|>{}",
    "Cohere": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "Kimi": "◁think▷{}◁/think▷{}",
    "Granite": "Here is my thought process:\n{}\nHere is my response:\n{}",
    "Hunyuan": "<think>\n{}\n</think>\n<answer>\n{}\n</answer>",
    "GLM": "<think>{}</think><|begin_of_box|>{}<|end_of_box|>",
}


def judge(server: ChatServer, folder: Path, *options: str, num_responses: int = 1) -> tuple[int, list[dict[str, Any]]]:
    """Judge responses; return the exit code and the records."""
    rows = [{"instruction": INSTRUCTION, "output": f"{RESPONSE}{' ' * index}"} for index in range(num_responses)]
    responses, out = write_lines(folder / "in.jsonl", rows), folder / "out.jsonl"
    code = main([*list_options(server, responses, out, "--max_retries", "0"), *options])
    return code, read_lines(out) if out.exists() else []


@pytest.mark.parametrize("notation", NOTATIONS.values(), ids=NOTATIONS)
@pytest.mark.parametrize("judgment", [None, OBJECTION])
def test_a_verdict_is_read_after_the_thoughts(
    server: ChatServer, tmp_path: Path, notation: str, judgment: str | None
) -> None:
    verdict = write_verdict(judgment, *["Sydney"][: judgment is not None])
    server.reply = lambda prompt: notation.replace("{}", THOUGHTS, 1).replace("{}", verdict, 1)
    code, records = judge(server, tmp_path)
    assert (code, [record["judgment"] for record in records]) == (0, [judgment])
    assert records[0].get("wrong_spans") == (None if judgment is None else [[6, 12]])
    record = load_records(tmp_path / "out.jsonl")[0]
    assert record.is_satisfactory == (judgment is None)


@pytest.mark.parametrize(
    "text",
    [
        *(notation.partition("{}")[0] + THOUGHTS for notation in NOTATIONS.values()),
        f"assistant\n\n{write_verdict(None)}",
        f"<|im_start|>assistant\n{write_verdict(OBJECTION)}",
        "The response names Sydney, but the",
        "The response is perfect.",
        write_verdict(None, "Sydney"),
        write_verdict("The response meets all the requirements of the instruction."),
    ],
)
def test_what_is_not_understood_is_a_failure(server: ChatServer, tmp_path: Path, text: str) -> None:
    server.reply = lambda prompt: text
    assert judge(server, tmp_path) == (1, [])
    assert [row["answer"] for row in find_failures(tmp_path / "out.jsonl")] == [text]


@pytest.mark.parametrize(
    "message",
    [
        {"content": write_verdict(OBJECTION), "reasoning_content": THOUGHTS},
        {"content": write_verdict(OBJECTION), "reasoning": THOUGHTS},
        {"content": [{"type": "text", "text": write_verdict(OBJECTION)}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]},
                {"type": "text", "text": write_verdict(OBJECTION)},
            ]
        },
    ],
)
def test_thoughts_that_the_server_separates_are_no_part_of_the_answer(
    server: ChatServer, tmp_path: Path, message: dict[str, Any]
) -> None:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": "stop"}
    server.fault = lambda handler, number: handler.answer(200, {"choices": [choice]}) is None
    code, records = judge(server, tmp_path)
    assert (code, [record["judgment"] for record in records]) == (0, [OBJECTION])


def test_an_answer_that_is_all_thoughts_is_empty(server: ChatServer, tmp_path: Path) -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": write_verdict(OBJECTION)}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    server.fault = lambda handler, number: handler.answer(200, {"choices": choices}) is None
    assert judge(server, tmp_path) == (1, [])
    assert [row["kind"] for row in find_failures(tmp_path / "out.jsonl")] == ["empty answer"]


@pytest.mark.parametrize("finish_reason", ["stop", "eos", "end_turn", "eos_token", "stop_sequence", None])
def test_an_answer_with_a_good_end_is_read(server: ChatServer, tmp_path: Path, finish_reason: Any) -> None:
    answer = make_completion(write_verdict(OBJECTION), finish_reason)
    server.fault = lambda handler, number: handler.answer(200, answer) is None
    assert judge(server, tmp_path)[0] == 0


@pytest.mark.parametrize("finish_reason", ["length", "MAX_TOKENS", "error", "abort", "SAFETY", "tool_calls", "other"])
@pytest.mark.parametrize("text", ["The response names Sydney, but the", "Perfect.", write_verdict(OBJECTION)])
def test_an_answer_with_another_end_is_a_failure(
    server: ChatServer, tmp_path: Path, finish_reason: str, text: str
) -> None:
    server.fault = lambda handler, number: handler.answer(200, make_completion(text, finish_reason)) is None
    assert judge(server, tmp_path) == (1, [])
    assert [row["answer"] for row in find_failures(tmp_path / "out.jsonl")] == [text]


# ---- JSON ----


def test_a_server_that_enforces_json_is_asked_by_a_schema(server: ChatServer, tmp_path: Path, capsys: Any) -> None:
    def fault(handler: Handler, number: int) -> bool:
        schema = server.requests[number]["response_format"]["json_schema"]
        assert schema["strict"] is True
        assert schema["schema"]["additionalProperties"] is False
        values: dict[str, Any] = {"string": OBJECTION, "array": ["Sydney", "Canberra"], "boolean": False}
        answer = {name: values[field["type"]] for name, field in schema["schema"]["properties"].items()}
        handler.answer(200, make_completion(json.dumps(answer)))
        return True

    server.fault = fault
    code, records = judge(server, tmp_path)
    assert (code, len(server.requests)) == (0, 1)
    assert (records[0]["judgment"], records[0]["wrong_spans"]) == (OBJECTION, [[6, 12]])
    printed = capsys.readouterr().out
    assert "1 of 2 quotes do not occur exactly once" in printed
    assert "response_format" not in printed


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "response_format is not supported"),
        (400, "This response_format type is unavailable now"),
        (404, "No endpoints found that can handle the requested parameters."),
        (422, "Extra inputs are not permitted"),
        (400, ""),
    ],
)
def test_a_server_that_refuses_the_schema_is_asked_by_the_prompt_alone(
    server: ChatServer, tmp_path: Path, capsys: Any, status: int, message: str
) -> None:
    def refuse(handler: Handler, number: int) -> bool:
        has_field = "response_format" in server.requests[number]
        return has_field and handler.answer(status, {"error": {"message": message}}) is None

    server.fault = refuse
    server.reply = lambda prompt: f"<think>{THOUGHTS}</think>```json\n{write_verdict(OBJECTION, 'Sydney')}\n```"
    options = ("--concurrency", "1", "--overwrite")
    code, records = judge(server, tmp_path, *options, num_responses=3)
    assert (code, [record["judgment"] for record in records]) == (0, [OBJECTION] * 3)
    assert ["response_format" in request for request in server.requests] == [True, False, False, False]
    assert capsys.readouterr().out.count("the server refuses response_format") == 1
    # What was answered to the prompt alone is in the cache.
    assert judge(server, tmp_path, *options, num_responses=3)[0] == 0
    assert len(server.requests) == 4


def test_answers_to_other_requests_have_other_keys(server: ChatServer, tmp_path: Path) -> None:
    server.reply = lambda prompt: "Perfect."
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{instruction} {response}")
    options = ("--overwrite", "--prompt_file", str(prompt), "--answer_format")
    for answer_format, has_field in (("json", True), ("text", False)):
        assert judge(server, tmp_path, *options, answer_format)[0] == 0
        assert ("response_format" in server.requests[-1]) == has_field
    assert len(server.requests) == 2
    # Asked for text, the request is the one that JSON falls back to.
    assert judge(server, tmp_path, *options, "json")[0] == 0
    assert len(server.requests) == 2


def test_the_user_may_set_the_field(server: ChatServer, tmp_path: Path) -> None:
    server.reply = lambda prompt: write_verdict(None)
    assert judge(server, tmp_path, "--extra_body", '{"response_format": null}')[0] == 0
    assert (
        judge(server, tmp_path, "--overwrite", "--extra_body", '{"response_format": {"type": "json_object"}}')[0] == 0
    )
    assert [request.get("response_format") for request in server.requests] == [None, {"type": "json_object"}]


@pytest.mark.parametrize(
    ("answer", "judgment"),
    [
        ("Perfect.", None),
        ("Satisfactory: yes", None),
        ("Satisfactory: no\nEs ist Canberra.", "Es ist Canberra."),
        (OBJECTION, OBJECTION),
        (write_verdict(OBJECTION), OBJECTION),
        (f"[THINK]{THOUGHTS}[/THINK]Satisfactory: no\nIt is Canberra.", "It is Canberra."),
    ],
)
def test_a_prompt_of_the_user_is_answered_by_text(
    server: ChatServer, tmp_path: Path, answer: str, judgment: str | None
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{instruction} {response}")
    server.reply = lambda prompt: answer
    code, records = judge(server, tmp_path, "--prompt_file", str(prompt))
    assert (code, [record["judgment"] for record in records]) == (0, [judgment])
    assert "response_format" not in server.requests[0]


def test_a_trained_judge_has_its_own_format(server: ChatServer, tmp_path: Path, capsys: Any) -> None:
    assert judge(server, tmp_path, "--trained", "--answer_format", "json")[0] == 2
    assert "--answer_format, --trained: expected one" in capsys.readouterr().err


def test_answers_from_the_field(server: ChatServer, tmp_path: Path, shared_data: Path, capsys: Any) -> None:
    cases = json.loads((shared_data.parent / "cases" / "judge_answers.json").read_text("utf-8"))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{instruction} {response}")
    for number, case in enumerate(cases):
        answer = make_completion(case["answer"], case["finish_reason"])
        server.fault = lambda handler, number, answer=answer: handler.answer(200, answer) is None
        for options in ([], ["--prompt_file", str(prompt)]):
            folder = tmp_path / f"{number}-{len(options)}"
            folder.mkdir()
            code, records = judge(server, folder, *options)
            judgment = records[0]["judgment"] if records else ""
            got = "failure" if not records else "satisfactory" if judgment is None else f"objection:{judgment}"
            assert got in case["expect"] or got.partition(":")[0] in case["expect"], case
            assert code == (not records)
