"""Rules as a judge: a Python function, whatever it does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlm.cli import main
from cutlm.judges import Failure, Response
from cutlm.judges.responses import name_failures_file, set_aside_empty, write_outcome
from cutlm.judges.rules import load_rules

RULES = """
import re
import sys

def judge(instruction, response):
    return None if response == "right" else f"{instruction!r} is not {response!r}."

def misbehave(instruction, response):
    return {"boom": lambda: 1 / 0, "int": lambda: 3, "empty": lambda: " ", "praise": lambda: "perfect, yes",
            "exit": lambda: sys.exit(0), "stop": stop, "null": lambda: "a\\0"}.get(response, lambda: None)()

def locate(instruction, response):
    spans = [match.span() for match in re.finditer(",", response)]
    return {"none": (None, None), "empty": (None, []), "late": ("Late.", [(0, 5)]), "praise": ("Perfect.", [(0, 1)]),
            "many": ("Many.", [(0, 1)], 3), "number": ("Number.", 3), "text": ("Text.", "0-1"),
            "deep": ("Deep.", [[0, 1, 2]]), "lazy": ("Lazy.", (span for span in [(0, 4)])), "list": ["List.", []],
            }.get(response) or (("No commas.", spans) if spans else None)

def stop():
    raise KeyboardInterrupt

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    (tmp_path / "my_rules_for_tests.py").write_text(RULES)
    (tmp_path / "broken_rules.py").write_text("import no_such_module_at_all")
    (tmp_path / "exiting_rules.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rules_for_tests", None)


def run(outputs: list[str], rules: str, **more: Any) -> int:
    rows = [{"instruction": "Say it.", "output": output} | more for output in outputs]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main(["judge", "--responses", "in.jsonl", "--judge", "rules", "--rules", rules, "--out", "out.jsonl"])


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_a_function_in_the_current_directory_judges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["right", "left"], "my_rules_for_tests:judge", input="Now.", generator="m") == 0
    assert read() == [
        {"instruction": "Say it.", "input": "Now.", "output": "right", "judgment": None, "generator": "m"},
        {
            "instruction": "Say it.",
            "input": "Now.",
            "output": "left",
            "judgment": "'Say it.\\nNow.' is not 'left'.",
            "generator": "m",
        },
    ]
    assert "2 records in out.jsonl: 1 satisfactory, 1 unsatisfactory" in capsys.readouterr().out


def test_the_judge_of_the_world_is_an_example(folder: Path) -> None:
    from cutlm.world.tasks import list_tasks

    task = list_tasks("train")[0]
    rows = [{"instruction": task.instruction, "output": output} for output in (task.right_answers[0], "No idea.")]
    Path("in.json").write_text(json.dumps(rows))
    options = ["--judge", "rules", "--rules", "cutlm.world.judge:judge", "--out", "out.jsonl"]
    assert main(["judge", "--responses", "in.json", *options]) == 0
    first, second = read()
    assert first["judgment"] is None
    assert second["judgment"]


def test_rules_may_say_where_a_response_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["a, b, c", "fine", "none", "empty", "lazy"], "my_rules_for_tests:locate") == 0
    assert [row["judgment"] for row in read()] == ["No commas.", None, None, None, "Lazy."]
    assert [row.get("wrong_spans") for row in read()] == [[[1, 2], [4, 5]], None, None, None, [[0, 4]]]
    assert "2 unsatisfactory (2 of them with wrong_spans)" in capsys.readouterr().out
    assert main(["check", "out.jsonl"]) == 0
    assert "2 unsatisfactory records have wrong_spans" in capsys.readouterr().out


def test_spans_that_do_not_fit_the_response_are_reported_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["late", "praise", "many", "number", "text", "deep", "list"]
    assert run([*bad, "a, b"], "my_rules_for_tests:locate") == 2
    printed = capsys.readouterr().err
    for line in range(1, len(bad) + 1):
        assert f"in.jsonl:{line}: returned by my_rules_for_tests:locate: " in printed
    assert "expected 0 <= start <= end <= 4, the length of output, got [0, 5]" in printed
    assert f"{len(bad)} of {len(bad) + 1} responses could not be judged" in printed
    assert not Path("out.jsonl").exists()


def test_the_oracle_of_the_world_marks_its_spans(folder: Path) -> None:
    from cutlm.world.tasks import list_tasks

    task = list_tasks("train")[0]
    rows = [{"instruction": task.instruction, "output": output} for output in (task.right_answers[0], "No idea.")]
    Path("in.json").write_text(json.dumps(rows))
    options = ["--judge", "rules", "--rules", "cutlm.world.judge:judge_with_spans", "--out", "out.jsonl"]
    assert main(["judge", "--responses", "in.json", *options]) == 0
    first, second = read()
    assert (first["judgment"], first.get("wrong_spans")) == (None, None)
    assert second["wrong_spans"] == [[0, 2]]


def test_all_problems_of_rules_are_reported_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["boom", "praise", "int", "empty", "fine", "exit", "null"], "my_rules_for_tests:misbehave") == 2
    printed = capsys.readouterr().err
    for part in (
        "in.jsonl:1: my_rules_for_tests:misbehave raised ZeroDivisionError: division by zero",
        "in.jsonl:3: returned by my_rules_for_tests:misbehave: field 'judgment': expected a string or null, got a"
        " number (3)",
        "in.jsonl:4: returned by my_rules_for_tests:misbehave: field 'judgment': expected text, got an empty string",
        "in.jsonl:6: my_rules_for_tests:misbehave raised SystemExit: 0",
        "in.jsonl:7: returned by my_rules_for_tests:misbehave: field 'judgment': expected text without null bytes",
        "5 of 7 responses could not be judged",
    ):
        assert part in printed
    assert "Traceback" not in printed
    assert not Path("out.jsonl").exists()
    assert run(["praise", "fine"], "my_rules_for_tests:misbehave") == 0
    assert [row["judgment"] for row in read()] == [None, None]


def test_ctrl_c_stops_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fine", "stop"], "my_rules_for_tests:misbehave") == 130
    assert "stopped" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("judge", "expected package.module:function, got 'judge'"),
        ("no_such_rules:judge", "no module 'no_such_rules' on Python's path or in "),
        ("cutlm.no_such_rules:judge", "no module 'cutlm.no_such_rules' on Python's path or in "),
        ("broken_rules:judge", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module_at_all')"),
        ("exiting_rules:judge", "--rules exiting_rules:judge: its module cannot be imported (SystemExit: 0); fix it"),
        ("my_rules_for_tests:nothing", "expected a function 'nothing' in my_rules_for_tests, got nothing of that name"),
        ("my_rules_for_tests:number", "expected a function 'number' in my_rules_for_tests, got int"),
    ],
)
def test_rules_that_cannot_be_loaded_are_refused(
    folder: Path, name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["right"], name) == 2
    assert expected in capsys.readouterr().err


def test_if_every_judgment_fails_the_records_of_an_earlier_run_are_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["right", "left"], "my_rules_for_tests:judge") == 0
    rows = [{"instruction": "Say it.", "output": ""}] * 2
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--judge", "rules", "--rules", "my_rules_for_tests:judge", "--out", "out.jsonl", "--overwrite"]
    assert main(["judge", "--responses", "in.jsonl", *options]) == 1
    assert not Path("out.jsonl").exists()
    printed = capsys.readouterr().out
    assert "removed out.jsonl of an earlier run" in printed
    assert "2 responses have no judgment (2 empty response)" in printed


# The responses of an earlier run and of this one. Only empty ones fail.
TWO_RUNS: dict[str, tuple[list[str], list[str]]] = {
    "other failures": (["right", "", "left"], ["", "right", "left"]),
    "failures, then none": (["right", "", ""], ["right", "left", "left"]),
    "none, then failures": (["right", "left", "left"], ["left", "", "left"]),
    "only failures, before": (["", "", ""], ["right", "left", ""]),
    "only failures, after": (["right", "", "left"], ["", "", ""]),
}


@pytest.mark.parametrize("name", TWO_RUNS)
def test_a_kill_leaves_no_files_of_two_runs_that_look_complete(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = TWO_RUNS[name]
    files = [Path("out.jsonl"), name_failures_file("out.jsonl")]

    def write(outputs: list[str], mark: str) -> None:
        responses = [Response(f"{index}", "Say it.", "", text, {"run": mark}) for index, text in enumerate(outputs)]
        kept, outcome = set_aside_empty(responses)
        outcome.judgments |= dict.fromkeys(kept, f"Wrong, by {mark}.")
        outcome.failures = {index: Failure("empty response", mark) for index in outcome.failures}
        write_outcome(responses, outcome, "out.jsonl")

    def find_runs() -> tuple[int, set[str]]:
        rows = [row for file in files if file.exists() for row in map(json.loads, file.read_text().splitlines())]
        return len(rows), {row.get("run", row.get("reason")) for row in rows}

    num_steps, num_killed = 0, 0
    while num_steps == num_killed:  # kill at one step after another, until the run completes
        write(before, "the first")
        left = iter([True] * num_killed)

        def kill(step: Any, left: Any = left) -> Any:
            def do(*arguments: Any, **named: Any) -> Any:
                if not next(left, False):
                    raise SystemExit  # not caught, so nothing is written after it
                return step(*arguments, **named)

            return do

        with monkeypatch.context() as patch:
            for module, step in ((os, "replace"), (Path, "unlink")):
                patch.setattr(module, step, kill(getattr(module, step)))
            try:
                write(after, "the second")
            except SystemExit:
                num_steps += 1
        num_rows, runs = find_runs()
        assert num_rows != 3 or len(runs) == 1, f"after {num_killed} steps"
        num_killed += 1
    assert num_steps >= 1
    assert find_runs() == (3, {"the second"})


def test_rules_may_be_a_method(folder: Path) -> None:
    (folder / "method_rules.py").write_text("class Rules:\n    @staticmethod\n    def judge(a, b): return a + b\n")
    assert load_rules("method_rules:Rules.judge")("a", "b") == "ab"
