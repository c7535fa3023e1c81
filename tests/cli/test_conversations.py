"""Conversations of several turns with tools through every command."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer
from commands import ON_CPU, list_options, write_lines
from tiny import save_tiny_model
from transformers import AutoConfig, AutoTokenizer

from cutlm.cli import main
from cutlm.cli.eval_alpaca import _read_references
from cutlm.data.files import read_rows
from cutlm.data.records import JudgedRecord, load_records
from cutlm.evaluation.rouge import list_references, make_prompt_row
from cutlm.generation import files
from cutlm.inspect.tokens import pair_records
from cutlm.judges.responses import Response
from cutlm.loop.stages import _identify

TOOL = {"type": "function", "function": {"name": "find_capital", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find_capital", "arguments": {"country": "Australia"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "My country is Australia."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "Name its capital."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Canberra"},
]
SHOWN = ("Be brief.", "My country is Australia.", "Noted.", "Name its capital.", "Canberra")


def answer(text: str) -> list[dict[str, Any]]:
    return [*TURNS, {"role": "assistant", "content": text}]


RECORDS: list[dict[str, Any]] = [
    {"messages": answer("It is Sydney."), "tools": [TOOL], "judgment": "It is not Sydney.", "wrong_spans": [[6, 12]]},
    {"messages": answer("It is Perth."), "tools": [TOOL], "judgment": "It is not Perth.", "i_ans": "It is Canberra."},
    {"messages": answer("Canberra."), "tools": [TOOL], "judgment": None},
]
RESPONSES = [{"messages": row["messages"], "tools": [TOOL]} for row in RECORDS]
PROMPTS = [{"messages": TURNS, "tools": [TOOL]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "records.jsonl", RECORDS)


def read(path: Path) -> list[dict[str, Any]]:
    return [row.value for row in read_rows(path)[0]]


def test_check_preview_and_train(
    model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(records)]) == 0
    settings = ON_CPU | {"model_name_or_path": model, "data": records, "output_dir": tmp_path / "out"}
    settings |= {"template": "chat", "max_steps": 1}
    capsys.readouterr()
    assert main(["preview", *list_options(**settings)]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in SHOWN)
    assert main(["train", *list_options(**settings)]) == 0


def test_blame_inspect_and_eval_detection(model: Path, records: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = list_options(model=model, data=records, out=tmp_path / f"{name}.jsonl", template="chat", device="cpu")
        assert main(["blame", *options]) == 0
    scores = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    assert main(["inspect", *list_options(scores=scores[0], out=tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert all(text in page for text in SHOWN)
    command = ["eval", "detection", "--scores", *map(str, scores), "--out", str(tmp_path / "detection")]
    assert main(command) == 0
    assert json.loads((tmp_path / "detection" / "result.json").read_text())["num_records"] == 2


def test_scores_are_paired_by_the_whole_conversation() -> None:
    other = [TURNS[0], {"role": "user", "content": "My country is Austria."}, *RECORDS[0]["messages"][2:]]
    both = [JudgedRecord.model_validate(row) for row in (RECORDS[0], RECORDS[0] | {"messages": other})]
    assert pair_records(both, both[::-1]) == ([(0, 1), (1, 0)], (0, 0))


def test_the_judge_on_a_server_sees_all_turns(tmp_path: Path, server: ChatServer) -> None:
    server.reply = lambda prompt: json.dumps({"judgment": "It is wrong.", "quotes": [], "satisfactory": False})
    responses, out = write_lines(tmp_path / "responses.jsonl", RESPONSES), tmp_path / "judged.jsonl"
    options = list_options(responses=responses, judge="http", base_url=server.url, judge_model="m", out=out)
    assert main(["judge", *options]) == 0
    assert all(text in prompt for prompt in server.prompts for text in SHOWN)
    judged = load_records(out)
    assert [record.messages for record in judged] == [row["messages"] for row in RESPONSES]
    assert judged[0].tools == [TOOL]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_person_sees_all_turns(tmp_path: Path, suffix: str) -> None:
    responses, out = write_lines(tmp_path / "responses.jsonl", RESPONSES), tmp_path / "judged.jsonl"
    options = list_options(responses=responses, judge="human", out=out)
    assert main(["judge", *options]) == 0
    todo = Path(f"{out}.todo.{suffix}")
    text = todo.read_text("utf-8-sig")
    assert all(shown in text for shown in SHOWN)
    if suffix == "csv":
        todo.write_text(text.replace("Sydney.,,", 'Sydney.,"It is not Sydney.",').replace(".,,\n", ".,Perfect.,\n"))
    else:
        write_lines(todo, [row | {"judgment": "Perfect."} for row in read(todo)])
    assert main(["judge", *options, "--labels", str(todo)]) == 0
    assert [record.messages for record in load_records(out)] == [row["messages"] for row in RESPONSES]


def test_a_trained_judge_is_measured_on_all_turns() -> None:
    record = JudgedRecord.model_validate(RECORDS[0])
    assert Response.from_record("a:1", record).full_instruction == record.full_instruction
    assert all(text in record.full_instruction for text in SHOWN)


def test_refine_and_generate(model: Path, records: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": model, "device": "cpu", "max_new_tokens": 3}
    refined, out = tmp_path / "refined.jsonl", tmp_path / "out.jsonl"
    assert main(["refine", *list_options(**options, template="chat", data=records, out=refined)]) == 0
    assert [record.messages for record in load_records(refined)] == [row["messages"] for row in RECORDS]
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    assert main(["generate", *list_options(**options, prompts=prompts, out=out)]) == 0
    ((first, *_),) = (read(out),)
    assert first["messages"][:-1] == TURNS
    assert first["tools"] == [TOOL]
    assert first["instruction"] == "Name its capital."


@pytest.mark.parametrize("command", ["generate", "refine"])
def test_prompts_beyond_the_context_lose_whole_turns(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    generate = files.generate_with_journal

    def watch(model: Any, tokenizer: Any, encoder: Any, prompts: Any, *others: Any) -> Any:
        asked.extend(prompts)
        return generate(model, tokenizer, encoder, prompts, *others)

    monkeypatch.setattr(files, "generate_with_journal", watch)
    limit = AutoConfig.from_pretrained(model).max_position_embeddings
    turn = [{"role": role, "content": "word " * 20} for role in ("user", "assistant")]
    history = turn * (limit // 30)
    row = {"messages": [TURNS[0], *history, TURNS[3]]}
    record = {"messages": [*row["messages"], {"role": "assistant", "content": "Sydney."}], "judgment": "It is not."}
    data = write_lines(tmp_path / "data.jsonl", [row if command == "generate" else record])
    name = {"generate": "prompts", "refine": "data"}[command]
    options = {name: data, "model": model, "template": "chat", "device": "cpu", "max_new_tokens": 3}
    assert main([command, *list_options(**options, out=tmp_path / "out.jsonl")]) == 0
    assert "1 prompts were truncated" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model)
    (text,) = (tokenizer.decode(ids) for ids in asked)
    assert len(asked[0]) <= limit - 3
    assert text.startswith(tokenizer.apply_chat_template(TURNS[:1], tokenize=False))
    assert 0 < text.count("word") < limit
    assert text.count("word") % 40 == 0  # whole turns


def test_eval_rouge_asks_with_the_whole_conversation(model: Path, tmp_path: Path) -> None:
    names = {"messages": "chat", "judgment": "critique"}
    renamed = [{names.get(name, name): value for name, value in row.items()} for row in RECORDS]
    files = [write_lines(tmp_path / f"{number}.jsonl", [row]) for number, row in enumerate(renamed)]
    columns = json.dumps({theirs: ours for ours, theirs in names.items()})
    options = list_options(model=model, out=tmp_path / "out", columns=columns, max_new_tokens=3, device="cpu")
    assert main(["eval", "rouge", "--references", *map(str, files), *options]) == 0
    outputs = json.loads((tmp_path / "out" / "outputs.json").read_text())
    assert [row["messages"][:-1] for row in outputs] == [TURNS] * 2
    assert json.loads((tmp_path / "out" / "result.json").read_text())["num_pairs"] == 2
    references = list_references([JudgedRecord.model_validate(row) for row in RECORDS], ["a:1", "a:2", "a:3"])
    assert make_prompt_row(references[0]) == PROMPTS[0]


def test_eval_alpaca_takes_the_last_message_as_the_reference(tmp_path: Path) -> None:
    rows = [{"chat": answer("It is Canberra."), "tools": [TOOL]}, {"question": "Name a colour.", "output": "Red."}]
    files = [write_lines(tmp_path / f"{number}.jsonl", [row]) for number, row in enumerate(rows)]
    columns = {"chat": "messages", "question": "instruction"}
    args = argparse.Namespace(reference=None, prompts=[str(file) for file in files], columns=columns)
    first, second = _read_references(args)
    assert (first.output, second.output) == ("It is Canberra.", "Red.")
    assert first.full_instruction == JudgedRecord.model_validate(RECORDS[0]).full_instruction


def test_the_loop_tells_conversations_with_the_same_last_message_apart() -> None:
    other = {"messages": [{"role": "user", "content": "My country is Austria."}, *TURNS[2:4]]}
    assert len({_identify(row) for row in (*PROMPTS, other, {"messages": TURNS}, {"prompt": "Hi."}, PROMPTS[0])}) == 4
