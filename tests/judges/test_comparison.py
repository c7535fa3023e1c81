"""Comparing responses under a teacher's prompt with plain ones: the numbers, the file, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import write_lines
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.errors import DataError
from cutlm.judges import Failure, Outcome, Response
from cutlm.judges.comparison import compare_verdicts, compute_p_value, find_interval
from cutlm.judges.paired import draw_records
from cutlm.judges.responses import EMPTY_RESPONSE
from cutlm.world.base import base_path
from cutlm.world.tasks import list_tasks


def make_pairs(plain: list[str], teacher: list[str]) -> tuple[list[Response], Outcome]:
    """Responses that are satisfactory if they contain "ok"; without a verdict if they are "?"."""
    responses = [Response(f"r:{index}", "Say it.", "", text) for index, text in enumerate([*plain, *teacher])]
    outcome = Outcome()
    for index, response in enumerate(responses):
        if not response.output:
            outcome.failures[index] = EMPTY_RESPONSE
        elif response.output == "?":
            outcome.failures[index] = Failure("no answer", "none")
        else:
            outcome.judgments[index] = None if "ok" in response.output else "It is wrong."
    return responses, outcome


def test_gain_counts_pairs() -> None:
    compared = compare_verdicts(*make_pairs(["bad", "bad", "ok", "bad", "bad"], ["ok", "ok", "bad", "bad", "bad"]))
    assert compared is not None
    assert (compared.share_plain, compared.share_teacher, compared.teacher_gain) == (0.2, 0.4, 0.2)
    low, high = compared.interval
    # (2 + 1) / 7 - (1 + 1) / 7, with the standard error sqrt((5 / 7 - 1 / 49) / 7)
    half_width = 1.959964 * ((5 / 7 - 1 / 49) / 7) ** 0.5
    assert (low, high) == pytest.approx((1 / 7 - half_width, 1 / 7 + half_width))
    assert compared.p_value == 1.0
    assert len(compared.list_warnings()) == 1


def test_clear_gain_has_no_warning() -> None:
    compared = compare_verdicts(*make_pairs(["bad"] * 20, ["ok."] * 15 + ["bad"] * 5))
    assert compared is not None
    assert compared.interval[0] > 0
    assert compared.p_value == 2 / 2**15
    assert compared.list_warnings() == []


@pytest.mark.parametrize(("length", "num_warnings"), [(29, 0), (31, 1), (14, 0), (12, 1)])
def test_changed_length_is_a_warning(length: int, num_warnings: int) -> None:
    compared = compare_verdicts(*make_pairs(["bad".ljust(20, "!")] * 20, ["ok".ljust(length, "!")] * 20))
    assert compared is not None
    assert (compared.mean_length_plain, compared.mean_length_teacher) == (20, length)
    assert len(compared.list_warnings()) == num_warnings


def test_empty_response_is_unsatisfactory_and_pair_without_verdict_is_counted() -> None:
    compared = compare_verdicts(*make_pairs(["ok", "ok", "ok"], ["", "ok", "?"]))
    assert compared is not None
    assert (compared.num_records, compared.num_missing, compared.num_empty_teacher) == (2, 1, 1)
    assert compared.teacher_gain == -0.5
    assert compare_verdicts(*make_pairs(["ok"], ["?"])) is None


def test_interval_of_equal_pairs_has_a_width() -> None:
    low, high = find_interval(0, 0, 10)
    assert low == -high < 0
    assert find_interval(3, 1, 10) == pytest.approx(tuple(-bound for bound in reversed(find_interval(1, 3, 10))))
    assert compute_p_value(0, 0) == 1.0


def test_only_unsatisfactory_records_are_drawn_by_the_seed() -> None:
    records = [
        JudgedRecord(instruction="a", output="b", judgment=None if index % 2 else "It is wrong.") for index in range(40)
    ]
    drawn = draw_records(records, 5, 1)
    assert drawn == draw_records(records, 5, 1) != draw_records(records, 5, 2)
    assert not any(index % 2 for index in drawn)
    assert len(draw_records(records, 64, 1)) == 20
    with pytest.raises(DataError):
        draw_records(records[1:2], 5, 1)


# ---- The command ----


def write_records(folder: Path, num: int = 6) -> Path:
    rows = [
        {"instruction": task.instruction, "output": "No idea.", "judgment": "This is not an answer."}
        for task in list_tasks("dev")[:num]
    ]
    return write_lines(folder / "records.jsonl", [*rows, {**rows[0], "judgment": None}])


def compare(folder: Path, *options: str) -> int:
    judge = ["--judge", "rules", "--rules", "cutlm.world.judge:judge"]
    model = ["--model", str(base_path()), "--template", "alpaca", "--device", "cpu", "--max_response_tokens", "24"]
    files = ["--responses", str(folder / "records.jsonl"), "--out", str(folder / "gain.json")]
    return main(["judge", "--compare_prompts", *judge, *model, *files, *options])


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gain.json").read_text())


def test_world_judge_compares_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path)
    assert compare(tmp_path) == 0
    found = read(tmp_path)
    assert (found["teacher_context"], found["num_records"], found["num_missing"]) == ("praise", 6, 0)
    rows = [json.loads(line) for line in (tmp_path / "gain.json.records.jsonl").read_text().splitlines()]
    assert [row["prompt_kind"] for row in rows] == ["plain"] * 6 + ["teacher"] * 6
    shares = [sum(row["judgment"] is None for row in rows[start : start + 6]) / 6 for start in (0, 6)]
    assert [found["share_plain"], found["share_teacher"]] == shares
    assert f"teacher_gain {found['teacher_gain']:+.2f}" in capsys.readouterr().out
    assert not (tmp_path / "gain.json.partial").exists()
    # The same seed gives the same responses, another context other ones under the teacher's prompt only.
    assert compare(tmp_path, "--overwrite", "--teacher_context", "advice", "--num_records", "6") == 0
    others = [json.loads(line) for line in (tmp_path / "gain.json.records.jsonl").read_text().splitlines()]
    assert [row["output"] for row in others[:6]] == [row["output"] for row in rows[:6]]
    assert [row["output"] for row in others[6:]] != [row["output"] for row in rows[6:]]


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher_sees_response"],  # without advice
        ["--num_records", "0"],
        ["--max_response_tokens", "0"],
        ["--judge", "human"],
        ["--rules", "cutlm.world.judge:no_such_function"],
    ],
)
def test_wrong_options_are_refused_before_anything_is_generated(tmp_path: Path, options: list[str]) -> None:
    write_records(tmp_path)
    assert compare(tmp_path, *options) == 2
    assert not any(tmp_path.glob("gain.json*"))


def test_options_of_comparison_need_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_records(tmp_path))
    command = ["judge", "--responses", path, "--judge", "rules", "--rules", "a:b", "--out", str(tmp_path / "out")]
    assert main([*command, "--model", "m", "--seed", "1"]) == 2
    assert "--model, --seed: expected only with --compare_prompts" in capsys.readouterr().err
    assert main([*command, "--compare_prompts"]) == 2
    assert "expected --model too" in capsys.readouterr().err


def test_satisfactory_records_only_are_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [{"instruction": "a", "output": "b", "judgment": None}])
    assert compare(tmp_path) == 2


def test_conversation_keeps_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model", chat=True)
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Yes?"))]
    turns = [*messages, {"role": "user", "content": "Name a city."}, {"role": "assistant", "content": "7"}]
    write_lines(tmp_path / "records.jsonl", [{"messages": turns, "judgment": "This is no city."}])
    (tmp_path / "always.py").write_text("def judge(instruction, response): return 'It is wrong.'")
    monkeypatch.syspath_prepend(tmp_path)
    rules = ["--rules", "always:judge", "--model", str(tmp_path / "model"), "--template", "chat"]
    assert compare(tmp_path, *rules, "--max_response_tokens", "3") == 0
    for line in (tmp_path / "gain.json.records.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["messages"][:-1] == turns[:-1]
        assert row["messages"][-1]["content"] == row["output"]
