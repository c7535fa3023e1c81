"""The demo: a quick run of the whole command, what it prints and writes, and which folders it refuses."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from report_scores import make_scores, read_page_data

from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.data.records import check_records
from cutlm.flagging.token_scores import read_token_scores
from cutlm.inspect.plots import CURVES_SIZE
from cutlm.world.base import answer_tasks, load_base
from cutlm.world.demo import QUICK, prepare_folder
from cutlm.world.demo_report import HeldOut, choose_example, choose_wrong
from cutlm.world.judge import judge, rate_answers
from cutlm.world.tasks import FAMILIES, list_tasks

ITERATIONS = ("iteration-1", "iteration-2", "iteration-3")


class Demo(NamedTuple):
    out: Path
    printed: str
    errors: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    # What an interrupted demo leaves behind, and a file that does not belong to it.
    prepare_folder(folder / "out")
    (folder / "out" / "iteration-1").mkdir()
    for name in ("iteration-1/responses.json.partial", "page.html"):
        (folder / "out" / name).write_text("old")
    (folder / "out" / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "cutlm", "demo", "--quick", "--out", "out"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text("utf-8"))
    return Demo(folder / "out", done.stdout, done.stderr, result)


def test_an_earlier_demo_is_replaced_and_other_files_are_kept(demo):
    names = {"notes.txt", "result.json", "curve.png", "page.html", "held-out", *ITERATIONS}
    assert {path.name for path in demo.out.iterdir()} == names
    assert (demo.out / "notes.txt").read_text() == "mine"
    assert not list(demo.out.rglob("*.partial"))


def test_each_stage_reads_the_files_of_the_stage_before(demo):
    asked: list[str] = []
    for name in ITERATIONS:
        folder = demo.out / name
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (folder / "model" / "model.safetensors").is_file()
        responses = [row.value for row in read_rows(folder / "responses.json")[0]]
        check = check_records(folder / "records.jsonl")
        assert (check.problems, check.duplicates) == ([], [])
        answered = [(row["instruction"], row["output"]) for row in responses if row["output"].strip()]
        assert [(record.instruction, record.output) for record in check.records] == answered
        for record in check.records:
            assert (record.judgment is None) == (judge(record.instruction, record.output) is None)
        scores = read_token_scores(folder / "scores.jsonl")
        assert [score.record for score in scores] == check.records
        asked += [row["instruction"] for row in responses]
    for name, base in zip(ITERATIONS[1:], ITERATIONS, strict=False):
        config = json.loads((demo.out / name / "adapter" / "adapter_config.json").read_text("utf-8"))
        assert config["base_model_name_or_path"] == str(demo.out / base / "model")
    assert len(asked) == len(set(asked)) == 3 * QUICK.num_tasks
    assert set(asked) <= {task.instruction for task in list_tasks("train")}


def test_the_result_matches_the_files_and_the_models(demo):
    for name, figures in zip(ITERATIONS, demo.result["iterations"], strict=True):
        check = check_records(demo.out / name / "records.jsonl")
        assert figures["num_responses"] == QUICK.num_tasks == len(check.records) + figures["num_empty"]
        assert figures["num_satisfactory"] == check.num_satisfactory
        scores = read_token_scores(demo.out / name / "scores.jsonl")
        assert figures["num_tokens"] == sum(len(score.tokens) for score in scores)
        assert figures["num_flagged"] == sum(sum(score.is_flagged) for score in scores)
        assert figures["num_steps"] == QUICK.num_steps
    tasks = list_tasks("test")[: QUICK.num_held_out]
    for number, path in ((0, None), (3, demo.out / "iteration-3" / "model")):
        shares = rate_answers(tasks, answer_tasks(*load_base(path), tasks))
        shares["mean"] = shares.pop("macro")
        assert shares == {name: values[number] for name, values in demo.result["accuracy"].items()}
    changes = demo.result["changes"]
    assert sum(changes.values()) == QUICK.num_held_out
    assert all(math.isfinite(value) for value in walk(demo.result))


def walk(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from walk(part)
    elif isinstance(value, float | int):
        yield value


def test_the_printed_numbers_are_those_of_the_result(demo):
    for name, shares in demo.result["accuracy"].items():
        cells = [re.escape(f"{share:.0%}") for share in shares]
        assert re.search(rf"^  {name} +{' +'.join(cells)}$", demo.printed, re.MULTILINE), name
    assert list(demo.result["accuracy"]) == [*FAMILIES, "mean"]
    for figures in demo.result["iterations"]:
        assert f"loss {figures['loss_start']:.3f} -> {figures['loss_end']:.3f}" in demo.printed
        assert f"{figures['num_flagged']} of {figures['num_tokens']} tokens" in demo.printed
    for example in demo.result["examples"]:
        assert judge(example["instruction"], example["response"]) is not None
        assert judge(example["instruction"], example["after"]) == example["after_judgment"]
    words = " ".join(demo.printed.split())
    for example in demo.result["examples"]:
        for name in ("instruction", "judgment", "after"):
            assert " ".join(example[name].split()) in words


def test_output_to_a_pipe_is_plain_and_stderr_is_empty(demo):
    assert demo.errors == ""
    assert "\033" not in demo.printed
    assert "\r" not in demo.printed
    assert max(map(len, demo.printed.splitlines())) <= 80
    assert "cutlm train --config" in demo.printed
    assert "out/page.html" in demo.printed


def test_the_page_contains_the_curve_and_the_table(demo):
    from PIL import Image

    with Image.open(demo.out / "curve.png") as picture:
        picture.verify()
        assert picture.size == CURVES_SIZE
    table, picture = read_page_data(demo.out / "page.html")["sections"]
    assert picture["light"].startswith("data:image/png;base64,")
    assert picture["dark"] != picture["light"]
    assert table["rows"] == [
        [name, *(f"{share:.0%}" for share in shares)] for name, shares in demo.result["accuracy"].items()
    ]


def test_the_page_shows_held_out_answers_that_were_wrong(demo):
    records = read_page_data(demo.out / "page.html")["records"]
    scores = read_token_scores(demo.out / "held-out" / "scores.jsonl")
    rows = {row.value["instruction"]: row.value for row in read_rows(demo.out / "held-out" / "answers.jsonl")[0]}
    assert len(records) == len(scores) > 0
    for record, score in zip(records, scores, strict=True):
        row = rows[score.record.instruction]
        assert not score.record.is_satisfactory
        assert "".join(record["sides"][0]["pieces"]) == score.record.output == row["answers"][0]
        assert (record["group"], record["answer"]["text"]) == (row["family"], row["answers"][-1])


@pytest.mark.parametrize("name", ["notes.txt", "result.json", "iteration-1/model/config.json"])
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, capsys, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path) in err
    assert file.read_text() == "{}"


def test_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "got a file" in capsys.readouterr().err


def test_the_page_shows_the_first_wrong_answers_and_one_that_stayed_wrong():
    tasks = [task for task in list_tasks("test") if task.family in ("addition", "lists")][:40]
    wrong = ["no"] * len(tasks)
    right = [task.right_answers[0] for task in tasks]
    additions = [index for index, task in enumerate(tasks) if task.family == "addition"]
    lists = [index for index, task in enumerate(tasks) if task.family == "lists"]
    after = list(right)
    after[additions[-1]] = "no"
    assert choose_wrong(HeldOut(tasks, [wrong, right]), 3) == additions[:3] + lists[:3]
    assert choose_wrong(HeldOut(tasks, [wrong, after]), 3) == [*additions[:2], additions[-1], *lists[:3]]
    assert choose_wrong(HeldOut(tasks, [right, wrong]), 3) == []
    changes = HeldOut(tasks, [wrong, after]).changes
    assert (changes["num_wrong_then_right"], changes["num_wrong_then_wrong"]) == (39, 1)
    assert sum(changes.values()) == 40


def test_an_example_has_a_flagged_token_and_prefers_a_new_family():
    addition, lists = (
        next(task for task in list_tasks("train") if task.family == name) for name in ("addition", "lists")
    )
    flagged = make_scores("x y", is_flagged=[True] * len(make_scores("x y").tokens))
    plain = make_scores("x y", None)
    tasks, scores = [lists, addition, lists], [plain, flagged, flagged]
    assert choose_example(tasks, scores, set()) == 1
    assert choose_example(tasks, scores, {"addition"}) == 2
    assert choose_example(tasks, scores, {"addition", "lists"}) == 1
    assert choose_example([lists], [plain], set()) is None
