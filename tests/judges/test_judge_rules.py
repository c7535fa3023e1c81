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
import sys

def judge(instruction, response):
    return None if response == "right" else f"{instruction!r} is not {response!r}."

def stumble(instruction, response):
    return {"boom": lambda: 1 / 0, "int": lambda: 3, "empty": lambda: " ", "praise": lambda: "perfect, yes",
            "leave": lambda: sys.exit(0), "stop": stop}.get(response, lambda: None)()

def stop():
    raise KeyboardInterrupt

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    (tmp_path / "my_rules_for_tests.py").write_text(RULES)
    (tmp_path / "broken_rules.py").write_text("import no_such_module_at_all")
    (tmp_path / "leaving_rules.py").write_text("import sys\nsys.exit(0)")
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


def test_the_tiny_worlds_judge_is_an_example(folder: Path) -> None:
    from cutlm.world.tasks import list_tasks

    task = list_tasks("train")[0]
    rows = [{"instruction": task.instruction, "output": output} for output in (task.right_answers[0], "No idea.")]
    Path("in.json").write_text(json.dumps(rows))
    options = ["--judge", "rules", "--rules", "cutlm.world.judge:judge", "--out", "out.jsonl"]
    assert main(["judge", "--responses", "in.json", *options]) == 0
    first, second = read()
    assert first["judgment"] is None
    assert second["judgment"]


def test_what_rules_do_wrong_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["boom", "praise", "int", "empty", "fine"], "my_rules_for_tests:stumble") == 2
    printed = capsys.readouterr().err
    assert "in.jsonl:1: the rules raised ZeroDivisionError: division by zero; mend them" in printed
    assert "in.jsonl:3: expected the rules to return what is wrong, or None, got a number (3)" in printed
    assert "in.jsonl:4: expected the rules to return what is wrong, or None, got an empty string" in printed
    assert "3 of 5 responses could not be judged; nothing written" in printed
    assert "Traceback" not in printed
    assert not Path("out.jsonl").exists()
    assert run(["praise", "fine"], "my_rules_for_tests:stumble") == 0
    assert [row["judgment"] for row in read()] == [None, None]


def test_rules_that_leave_are_named_as_those_that_raise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fine", "leave", "leave"], "my_rules_for_tests:stumble") == 2
    printed = capsys.readouterr().err
    for line in (2, 3):
        assert f"in.jsonl:{line}: the rules raised SystemExit: 0; mend them, or leave the row out" in printed
    assert "2 of 3 responses could not be judged" in printed


def test_ctrl_c_stops_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fine", "stop"], "my_rules_for_tests:stumble") == 130
    assert "stopped" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("judge", "expected package.module:function, got 'judge'"),
        ("no_such_rules:judge", "no module 'no_such_rules' on Python's path or in "),
        ("cutlm.no_such_rules:judge", "no module 'cutlm.no_such_rules' on Python's path or in "),
        ("broken_rules:judge", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module_at_all')"),
        ("leaving_rules:judge", "--rules leaving_rules:judge: its module cannot be imported (SystemExit: 0); mend it"),
        ("my_rules_for_tests:nothing", "expected a function 'nothing' in my_rules_for_tests, got nothing of that name"),
        ("my_rules_for_tests:number", "expected a function 'number' in my_rules_for_tests, got int"),
    ],
)
def test_rules_that_cannot_be_had_are_one_sentence(
    folder: Path, name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["right"], name) == 2
    assert expected in capsys.readouterr().err


def test_no_records_of_an_earlier_run_stay_beside_failures_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["right", "left"], "my_rules_for_tests:judge") == 0
    rows = [{"instruction": "Say it.", "output": ""}] * 2
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--judge", "rules", "--rules", "my_rules_for_tests:judge", "--out", "out.jsonl", "--overwrite"]
    assert main(["judge", "--responses", "in.jsonl", *options]) == 1
    assert not Path("out.jsonl").exists()
    printed = capsys.readouterr().out
    assert "out.jsonl of an earlier run is removed" in printed
    assert "2 responses have no judgment (2 empty response)" in printed


# The outputs of an earlier run and of this one; the rules judge all but empty ones, and here to the opposite.
TWO_RUNS: dict[str, tuple[list[str], list[str]]] = {
    "other failures": (["right", "", "left"], ["", "right", "left"]),
    "failures, then none": (["right", "", ""], ["right", "left", "left"]),
    "none, then failures": (["right", "left", "left"], ["left", "", "left"]),
    "failures alone, before": (["", "", ""], ["right", "left", ""]),
    "failures alone, after": (["right", "", "left"], ["", "", ""]),
}


@pytest.mark.parametrize("name", TWO_RUNS)
def test_a_run_killed_between_its_files_leaves_none_that_are_taken_for_a_pair(
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
    while num_steps == num_killed:  # kills at one step after another, until it gets through
        write(before, "the first")
        left = iter([True] * num_killed)

        def kill(step: Any, left: Any = left) -> Any:
            def do(*arguments: Any, **named: Any) -> Any:
                if not next(left, False):
                    raise SystemExit  # nothing catches it, and nothing is written any more
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


def test_a_method_is_a_function_too(folder: Path) -> None:
    (folder / "method_rules.py").write_text("class Rules:\n    @staticmethod\n    def judge(a, b): return a + b\n")
    assert load_rules("method_rules:Rules.judge")("a", "b") == "ab"
