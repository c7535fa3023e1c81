"""The demo: its packaged records, its world, and a quick run of the whole command."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cutlm.cli import main
from cutlm.demo_world import RECORDS_FILE, judge, list_held_out, list_subjects, make_corpus, make_records, write_records
from cutlm.records import check_records

COMMAND = [sys.executable, "-m", "cutlm", "demo", "--quick", "--out"]


def test_packaged_records_are_good_and_are_what_the_generator_makes(tmp_path):
    check = check_records(RECORDS_FILE)
    assert (check.problems, check.duplicates) == ([], [])
    assert 200 <= len(check.records) <= 400
    assert min(check.num_satisfactory, check.num_unsatisfactory) > 80
    assert [record.model_dump(exclude_unset=True) for record in check.records] == make_records()
    write_records(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == RECORDS_FILE.read_bytes()


def test_the_judge_agrees_with_the_records_on_what_is_wrong():
    subjects = {subject.ask(phrasing): subject for subject in list_subjects() for phrasing in range(7)}
    for row in make_records():
        judgment = judge(subjects[row["instruction"]], row["output"])
        assert (judgment is None) == (row["judgment"] is None), row


def test_no_held_out_instruction_and_no_judged_text_is_about_what_the_records_ask():
    asked = {row["instruction"] for row in make_records()}
    held_out = [instruction for _, instruction in list_held_out()]
    assert len(held_out) == len(set(held_out)) == 320
    assert asked.isdisjoint(held_out)
    assert asked.isdisjoint(text.instruction for text in make_corpus(2000, 0) if text.judgment is not None)


def walk(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from walk(part)
    else:
        yield value


def test_quick_demo_runs_from_end_to_end_and_replaces_its_own_folder_only(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("base/model.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (out / name).is_file()
    assert check_records(out / "records.jsonl").problems == []
    responses = json.loads((out / "responses.json").read_text("utf-8"))
    prompts = json.loads((out / "prompts.json").read_text("utf-8"))
    assert [row["instruction"] for row in responses] == [row["instruction"] for row in prompts]

    result = json.loads((out / "result.json").read_text("utf-8"))
    assert result["before"].keys() == result["after"].keys()
    assert {"loss", "loss_contrast", "loss_likelihood", "likelihood_flagged", "likelihood_others"} < result[
        "after"
    ].keys()
    assert all(math.isfinite(value) for value in walk(result))
    for part in ("before", "after"):
        assert f"{result[part]['likelihood_others']:.3f}" in done.stdout
    assert "\033[" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "cutlm train --config" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr

    from cutlm.demo import prepare_folder

    (out / "notes.txt").write_text("mine")
    prepare_folder(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "result.json"]


@pytest.mark.parametrize("name", ["notes.txt", "result.json", "base/config.json"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, capsys, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    message = f"{tmp_path}: is not empty and holds no earlier demo; name another folder by --out"
    assert (out, err) == ("", f"cutlm demo: {message}\n")
    assert file.read_text() == "{}"
