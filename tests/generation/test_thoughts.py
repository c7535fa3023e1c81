"""Thoughts and channels of a generated answer are separated from it; an answer without an end is a failure."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, IM_END, make_scripted_model, make_tokenizer
from tokenizers import AddedToken

from cutlm import generate, judge
from cutlm.chat.local import LocalEngine
from cutlm.chat.session import Message, Session
from cutlm.cli import main
from cutlm.data.journal import Journal
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings
from cutlm.generation.files import write_answers
from cutlm.generation.local import Generated, Sampling

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
HARMONY_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OPENED = CHATML.replace("assistant\n", "assistant\n<think>")
assert OPENED != CHATML


def _save(folder: Path, script: str, template: str = CHATML, *, tokens: Any = ("<think>", "</think>"), **options: Any):
    """Save a model that answers any message of the chat template with a script, which has no token twice."""
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.add_tokens([AddedToken(token, **options) for token in tokens])
    tokenizer.chat_template = template
    chat: Any = [{"role": "user", "content": "Hi."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ids = tokenizer(script, add_special_tokens=False)["input_ids"]
    model = make_scripted_model(len(tokenizer), [prompt[-1], *ids])
    if template == HARMONY_TEMPLATE:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|return|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps([{"instruction": "Name one."}, {"instruction": "Name a city."}]))
    return folder


def _generate(folder: Path, *options: str) -> int:
    paths = ["--model", str(folder), "--prompts", str(folder / "prompts.json"), "--out", str(folder / "out.jsonl")]
    return main(["generate", *paths, "--device", "cpu", "--max_new_tokens", "40", *options])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("is_special", [True, False])
def test_thoughts_are_separated_whether_their_tokens_are_special_or_not(tmp_path: Path, is_special: bool) -> None:
    _save(tmp_path, f"<think>Hm, so</think>Canberra.{IM_END}", special=is_special)
    assert _generate(tmp_path) == 0
    rows = _read(tmp_path / "out.jsonl")
    assert [(row["output"], row["reasoning"]) for row in rows] == [("Canberra.", "Hm, so")] * 2
    records = judge(rows, rules=lambda instruction, output: None).records
    assert [record.output for record in records] == ["Canberra."] * 2


def test_a_prompt_may_open_the_thoughts(tmp_path: Path) -> None:
    _save(tmp_path, f"Hm, so</think>Canberra.{IM_END}", OPENED)
    assert _generate(tmp_path) == 0
    assert {(row["output"], row["reasoning"]) for row in _read(tmp_path / "out.jsonl")} == {("Canberra.", "Hm, so")}


def test_the_final_channel_is_the_answer(tmp_path: Path) -> None:
    script = "<|channel|>final<|message|>Canberra.<|return|>"
    _save(tmp_path, script, HARMONY_TEMPLATE, tokens=HARMONY, special=True)
    assert _generate(tmp_path) == 0
    rows = _read(tmp_path / "out.jsonl")
    assert {row["output"] for row in rows} == {"Canberra."}
    assert not any("reasoning" in row for row in rows)


def test_a_channel_without_an_end_is_no_answer(tmp_path: Path) -> None:
    _save(tmp_path, "<|channel|>analysis<|message|>Hm, so<|return|>", HARMONY_TEMPLATE, tokens=HARMONY, special=True)
    assert _generate(tmp_path) == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("script", "template"),
    [("<think>Hm, so it is yes", CHATML), ("Hm, so it is yes", OPENED), ("<think>A</think>", CHATML)],
)
def test_thoughts_that_are_cut_off_are_failures_and_never_responses(
    tmp_path: Path, script: str, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path, script, template)
    options = ["--max_new_tokens", "3"]
    assert _generate(tmp_path, *options) == 1
    assert not (tmp_path / "out.jsonl").exists()
    failures = _read(tmp_path / "out.jsonl.failures.jsonl")
    assert [row["number"] for row in failures] == [1, 2]
    assert {row["reason"] for row in failures} == {"stopped at 3 tokens, before the final answer"}
    printed = capsys.readouterr().out
    assert "2 of 2 prompts have no answer" in printed
    assert "larger --max_new_tokens" in printed
    assert "--seed" not in printed
    lines = _read(tmp_path / "out.jsonl.partial")
    assert _generate(tmp_path, *options) == 1
    assert _read(tmp_path / "out.jsonl.partial") == lines, "the failures are resumed, not generated again"
    assert _generate(tmp_path, "--max_new_tokens", "2", "--overwrite") == 1
    assert {row["reason"] for row in _read(tmp_path / "out.jsonl.failures.jsonl")} == {
        "stopped at 2 tokens, before the final answer"
    }
    with pytest.raises(UserError) as caught:
        generate(tmp_path, ["Name one.", "Name a city."], max_new_tokens=3, device="cpu")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["prompts[0]", "prompts[1]"]
    assert all("larger max_new_tokens" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("<think>Hm</think>a\0b", "the answer has null bytes or halves of surrogate pairs"),
        ("<think>Hm</think>a[INST]", "the answer contains [INST], which a server should have removed"),
        ("<think>Hm", "the answer has thoughts without an end"),
    ],
)
def test_an_answer_that_no_record_may_have_is_a_failure(
    tmp_path: Path, script: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path, f"{script}{IM_END}")
    assert _generate(tmp_path) == 1
    failures = _read(tmp_path / "out.jsonl.failures.jsonl")
    assert [row["reason"] for row in failures] == [reason] * 2
    # More tokens would give the same answer.
    printed = capsys.readouterr().out
    assert "--max_new_tokens" not in printed
    assert "another --seed" in printed
    with pytest.raises(UserError) as caught:
        generate(tmp_path, ["Name one."], device="cpu")
    (problem,) = caught.value.problems
    assert "max_new_tokens" not in problem
    assert "another seed" in problem


def test_refining_leaves_out_answers_without_an_end(tmp_path: Path) -> None:
    _save(tmp_path, "<think>Hm, so it is yes")
    record = {"instruction": "Name one.", "output": "No.", "judgment": "It is wrong."}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    paths = ["--model", str(tmp_path), "--data", str(tmp_path / "records.json"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["refine", *paths, "--template", "chat", "--device", "cpu", "--max_new_tokens", "3"]) == 1
    assert _read(tmp_path / "out.jsonl") == [record]
    (failure,) = _read(tmp_path / "out.jsonl.failures.jsonl")
    assert failure["instruction"] == "Name one."


@pytest.mark.parametrize(("rate", "is_written"), [(0.0, False), (0.4, False), (0.5, True)])
def test_answers_are_written_if_the_share_of_failures_is_small(tmp_path: Path, rate: float, is_written: bool) -> None:
    out, prompts = tmp_path / "out.jsonl", [{"instruction": "A?"}, {"instruction": "B?"}]
    generated = Generated({0: "Yes."}, {0: "Hm."}, failures={1: "stopped"})
    journal = Journal(out, {"seed": 1})
    write_answers(prompts, generated, journal, out, "tiny", "prompts", rate)
    assert out.exists() == is_written
    assert journal.path.exists() != is_written
    row = {"instruction": "A?", "output": "Yes.", "generator": "tiny", "dataset": "prompts", "reasoning": "Hm."}
    assert not is_written or _read(out) == [row]
    assert _read(tmp_path / "out.jsonl.failures.jsonl") == [{"reason": "stopped", "number": 2, "instruction": "B?"}]


def test_the_chat_shows_and_keeps_the_final_answer_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cutlm.model.loading import load_trained

    folder = _save(tmp_path, f"Hm, so it is yes</think>Canberra.{IM_END}", OPENED, special=True)
    session = Session(LocalEngine(*load_trained(folder, device="cpu"), "chat", Sampling(40), FlagSettings()))
    session.handle(Message("Hi."))
    assert [turn.answer for turn in session.conversation.turns] == ["Canberra."]
    printed = capsys.readouterr()
    assert printed.out == "Canberra.\n"
    assert "-- the model reasons before it answers\n" in printed.err
    session = Session(LocalEngine(*load_trained(folder, device="cpu"), "chat", Sampling(3), FlagSettings()))
    session.handle(Message("Hi."))
    assert not session.conversation.turns
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stopped at 3 tokens (--max_new_tokens); the answer has thoughts without an end; no answer" in printed.err
