"""The comparison of methods: what is chosen where, what is kept, and that every table is made by its command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cutlm.cli import main
from cutlm.world.compare import QUICK, Size, choose_rates, compare_iterations, compare_methods, compare_rewards
from cutlm.world.experience import draw_tasks
from cutlm.world.methods import ABLATIONS, BASES, METHODS, find_method
from cutlm.world.runs import Run, _draw
from cutlm.world.tables import summarize
from cutlm.world.tasks import list_tasks

SIZE = Size(seeds=(1, 2, 3), learning_rates=(1e-4, 1e-3), num_responses=(80, 160))
TABLES = ("methods", "ablations", "iterations", "rewards", "detection")
FAMILIES = ("capitals", "addition")


class Recorder:
    """Stands for the pool: notes what it is asked to run, and makes results up from it."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def run_all(self, runs, what):
        self.runs += runs
        return [self.make_result(run) for run in runs]

    def make_result(self, run: Run) -> dict:
        # The higher rate is better for CUT alone; the seed shows in the last digit.
        is_good = (run.learning_rate == 1e-3) == (run.method == "cut")
        accuracy = {"macro": (0.9 if is_good else 0.5) + run.seed / 1000, "capitals": 1.0, "addition": 0.0}
        costs = dict.fromkeys(("seconds", "seconds_generating"), 1.0)
        tokens = dict.fromkeys(("num_responses", "tokens_generated", "tokens_trained", "tokens_blamed"), 7)
        return {"accuracy": [accuracy] * max(1, run.num_iterations)} | costs | tokens


def test_learning_rates_are_chosen_on_development_tasks_with_a_seed_of_their_own():
    recorder = Recorder()
    templates = [Run(name, 0.0, 0, "test", 10) for name in ("cut", "dpo")]
    assert choose_rates(recorder.run_all, templates, SIZE) == [1e-3, 1e-4]
    assert {(run.split, run.seed) for run in recorder.runs} == {("dev", 0)}
    assert 0 not in Size().seeds


def test_every_method_is_tested_with_every_seed_at_its_own_rate():
    recorder = Recorder()
    rows = compare_methods(recorder.run_all, SIZE)
    assert [row["method"] for row in rows] == [method.name for method in (*BASES, *METHODS)]
    by_name = {row["method"]: row for row in rows}
    assert by_name["cut"]["test_accuracy"] == [0.901, 0.902, 0.903]
    assert by_name["cut"]["learning_rate"] == 1e-3
    assert by_name["dpo"]["learning_rate"] == 1e-4
    assert by_name["base"]["learning_rate"] is None
    tested = [run for run in recorder.runs if run.split == "test" and run.num_steps]
    assert len(tested) == len(METHODS) * 3
    # Each rate has been tried once for each method, no more often for ours.
    tried = [run.method for run in recorder.runs if run.split == "dev"]
    assert {tried.count(name) for name in tried} == {2}


def test_iterations_and_numbers_of_responses_are_rows_of_their_own():
    recorder = Recorder()
    iterations = compare_iterations(recorder.run_all, replace(SIZE, num_iterations=2))
    assert [(row["method"], row["iteration"]) for row in iterations][:4] == [
        ("cut", 1),
        ("cut", 2),
        ("cut_frozen", 1),
        ("cut_frozen", 2),
    ]
    rewards = compare_rewards(recorder.run_all, SIZE)
    assert [(row["method"], row["num_responses"]) for row in rewards][:2] == [("cut", 80), ("cut", 160)]


def test_methods_see_equal_numbers_of_responses_where_that_is_compared():
    for method, num_tasks in (("cut", 160), ("dpo", 40)):
        run = Run(method, 1e-3, 1, "test", 10, num_responses=160, num_samples=4)
        assert [len(tasks) for tasks in _draw(run, find_method(method))] == [num_tasks]


def test_an_online_run_never_asks_twice():
    run = Run("cut", 1e-3, 2, "test", 10, num_iterations=5)
    drawn = [task.instruction for tasks in _draw(run, find_method("cut")) for task in tasks]
    assert len(drawn) == len(set(drawn)) == 5 * (len(list_tasks("train")) // 5)


def test_seeds_draw_different_tasks_of_the_training_split():
    tasks = list_tasks("train")
    one, other = draw_tasks(tasks, 0.5, 1), draw_tasks(tasks, 0.5, 2)
    assert set(one) <= set(tasks)
    assert one == draw_tasks(tasks, 0.5, 1)
    assert set(one) != set(other)


def test_the_names_of_methods_are_those_of_the_settings():
    names = [method.name for method in METHODS]
    for name in ("cut", "dual_cut", "likelihood", "hindsight", "forward_prediction", "ilf_mle", "unlikelihood", "dpo"):
        assert name in names
    ours = [method.name for method in ABLATIONS if method.name not in names]
    assert all(name.startswith("cut_") for name in ours)


def test_the_interval_is_students():
    middle, half = summarize([0.8, 0.9, 1.0])
    # t(2) = 4.303; the standard deviation is 0.1, over the square root of 3.
    assert middle == pytest.approx(0.9)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert summarize([0.5]) == (0.5, None)


@pytest.mark.timeout(400)
def test_the_command_makes_every_table_and_does_nothing_twice(tmp_path):
    command = [sys.executable, "-m", "cutlm", "world", "compare", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stderr
    for name in TABLES:
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["command"] == f"cutlm world compare {name} --quick"
        assert content["seeds"] == list(QUICK.seeds)
        assert content["results"]
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.md").read_text().count("| --- |") == 1
    methods = {row["method"]: row for row in json.loads((tmp_path / "methods.json").read_text())["results"]}
    assert methods.keys() == {method.name for method in (*BASES, *METHODS)}
    for row in methods.values():
        assert len(row["test_accuracy"]) == 1
        assert 0 <= row["test_accuracy"][0] <= 1
    cut, frozen, dpo = methods["cut"], methods["cut_frozen"], methods["dpo"]
    assert frozen["tokens_trained"] < cut["tokens_trained"]
    assert frozen["tokens_blamed"] > 0 == cut["tokens_blamed"]
    assert cut["tokens_generated"] < dpo["tokens_generated"] / 6
    detection = json.loads((tmp_path / "detection.json").read_text())["results"]
    assert {row["detector"] for row in detection} == {"frozen", "current"}
    assert {"detector", "threshold", "family", "precision", "recall", "f1"} <= detection[0].keys()

    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / ".runs").iterdir()}
    assert main(["world", "compare", "methods", "--quick", "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".runs").iterdir()} == runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tables"], "TABLE: expected some of methods, ablations, iterations, rewards, detection, got tables"),
        (["--seeds", "0"], "--seeds: expected a whole number of at least 1, got 0"),
        (["--workers", "0"], "--workers: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys, options, message):
    assert main(["world", "compare", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
