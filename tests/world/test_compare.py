"""The comparison of methods in experiments/: which runs it plans, what a run costs, and the files it writes."""

import json
from dataclasses import replace

import compare
import method_runs
import pytest
from compare import QUICK, TABLES, Size, choose_rates
from method_runs import Run, draw_iterations, draw_tasks, execute
from method_tables import summarize, write_results
from methods import ABLATIONS, BASES, METHODS, REMEDIES, TEACHERS, find_method

from cutlm.training.config import CUTConfig
from cutlm.world.tasks import list_tasks

SIZE = Size(seeds=(1, 2, 3), learning_rates=(1e-4, 1e-3), num_responses=(80, 160), num_iterations=2)


class FakePool:
    """Records the runs it is given, and returns made-up results."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def run_all(self, runs, what):
        self.runs += runs
        return [self.make_result(run) for run in runs]

    def make_result(self, run: Run) -> dict:
        # The higher rate is better for CUT only; the seed shows in the last digit.
        is_good = (run.learning_rate == 1e-3) == (run.method == "cut")
        accuracy = {"macro": (0.9 if is_good else 0.5) + run.seed / 1000, "capitals": 1.0, "addition": 0.0}
        costs = dict.fromkeys(("seconds", "seconds_generating"), 1.0)
        tokens = dict.fromkeys(("num_responses", "tokens_generated", "tokens_trained", "tokens_scored"), 7)
        row = {"threshold": 1.1, "family": "micro", "precision": run.seed / 10, "recall": 0.5, "f1": 0.6}
        return {"accuracy": [accuracy] * max(1, run.num_iterations), "detection": [row]} | costs | tokens


def test_learning_rates_are_chosen_on_development_tasks_with_a_separate_seed():
    pool = FakePool()
    templates = [Run(name, 0.0, 0, "test", 10) for name in ("cut", "dpo")]
    assert choose_rates(pool.run_all, templates, SIZE) == [1e-3, 1e-4]
    assert {(run.split, run.seed) for run in pool.runs} == {("dev", 0)}
    assert 0 not in Size().seeds


def test_every_method_is_tested_with_every_seed_at_its_best_rate():
    pool = FakePool()
    rows = TABLES["methods"](pool.run_all, SIZE)
    assert [row["method"] for row in rows] == [method.name for method in (*BASES, *METHODS)]
    by_name = {row["method"]: row for row in rows}
    assert by_name["cut"]["test_accuracy"] == [0.901, 0.902, 0.903]
    assert [by_name[name]["learning_rate"] for name in ("cut", "dpo", "base")] == [1e-3, 1e-4, None]
    tested = [run for run in pool.runs if run.split == "test" and run.num_steps]
    assert len(tested) == len(METHODS) * 3
    # Each rate is tried once for each method; ours gets no more tries.
    tried = [run.method for run in pool.runs if run.split == "dev"]
    assert {tried.count(name) for name in tried} == {2}


def test_iterations_and_numbers_of_responses_have_rows_of_their_own():
    iterations = TABLES["iterations"](FakePool().run_all, SIZE)
    assert [(row["method"], row["iteration"]) for row in iterations][:4] == [
        ("cut", 1),
        ("cut", 2),
        ("cut_frozen", 1),
        ("cut_frozen", 2),
    ]
    rewards = TABLES["rewards"](FakePool().run_all, SIZE)
    assert [(row["method"], row["num_responses"]) for row in rewards][:2] == [("cut", 80), ("cut", 160)]


def test_the_trained_detector_is_averaged_over_seeds():
    rows = TABLES["detection"](FakePool().run_all, SIZE)
    assert [(row["detector"], row["precision"]) for row in rows] == [("frozen", 0.0), ("current", pytest.approx(0.2))]


def test_variants_keep_the_rate_of_the_method_that_they_vary():
    rows = TABLES["teachers"](FakePool().run_all, SIZE)
    assert [row["method"] for row in rows] == [method.name for method in TEACHERS]
    assert {row["learning_rate"] for row in rows} == {1e-4}


def test_methods_of_one_name_are_the_same_in_every_table():
    for method in (*METHODS, *ABLATIONS, *TEACHERS):
        found = find_method(method.name)
        changed = (found.settings, found.data, found.is_shuffled, found.is_praised)
        assert changed == (method.settings, method.data, method.is_shuffled, method.is_praised)


def test_a_shuffled_control_learns_from_the_judgments_of_other_responses(monkeypatch):
    trained = []
    monkeypatch.setattr(method_runs, "train", lambda model, tokenizer, records, *rest: trained.append(records) or {})
    size = replace(QUICK, num_eval=7, share=0.04)
    for name in ("cut_frozen", "cut_frozen_shuffled"):
        execute(size.make_run(name, learning_rate=5e-4, seed=1))
    own, foreign = trained
    assert [record.output for record in foreign] == [record.output for record in own]
    pairs = [pair for pair in zip(own, foreign, strict=True) if not pair[0].is_satisfactory]
    assert len(pairs) > 1
    assert all(one.judgment != other.judgment and not other.is_satisfactory for one, other in pairs)
    assert {other.judgment for _, other in pairs} <= {one.judgment for one, _ in pairs}


@pytest.mark.parametrize("kind", ["foreign", "praise", "vague"])
def test_wrong_judgments_are_measured_where_a_method_reads_them(kind):
    rows = TABLES["noise"](FakePool().run_all, SIZE)
    readers = {row["method"] for row in rows if row["kind"] == kind}
    judged = {"cut", "cut_frozen", "cut_frozen_threshold_1.05", "cut_frozen_weight_16", "redirect"}
    judged |= {"self_distillation", *(method.name for method in REMEDIES)}
    assert readers == judged | ({"likelihood_satisfactory"} if kind == "praise" else set())


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_written_as_json_markdown_and_plot(tmp_path, name):
    rows = TABLES[name](FakePool().run_all, SIZE)
    write_results(tmp_path, name, rows, SIZE.seeds, "the command", "hash of the base model")
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert (content["command"], content["seeds"], content["results"]) == ("the command", [1, 2, 3], rows)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.md").read_text().count("| --- |") == 1


@pytest.mark.parametrize(("method", "num_tasks"), [("cut", 160), ("dpo", 40)])
def test_methods_get_equal_numbers_of_responses_in_the_table_of_rewards(method, num_tasks):
    run = Run(method, 1e-3, 1, "test", 10, num_responses=160, num_samples=4)
    assert [len(tasks) for tasks in draw_iterations(run)] == [num_tasks]


def test_an_online_run_never_asks_the_same_twice():
    run = Run("cut", 1e-3, 2, "test", 10, num_iterations=5)
    drawn = [task.instruction for tasks in draw_iterations(run) for task in tasks]
    assert len(drawn) == len(set(drawn)) == 5 * (len(list_tasks("train")) // 5)


def test_each_seed_draws_its_own_training_tasks():
    tasks = list_tasks("train")
    one, other = draw_tasks(tasks, 0.5, 1), draw_tasks(tasks, 0.5, 2)
    assert set(one) <= set(tasks)
    assert one == draw_tasks(tasks, 0.5, 1)
    assert set(one) != set(other)


@pytest.mark.parametrize("method", [*METHODS, *ABLATIONS, *TEACHERS, *REMEDIES], ids=lambda method: method.name)
def test_the_settings_of_every_method_are_valid(tmp_path, method):
    CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **method.settings)


def test_the_interval_is_students():
    middle, half = summarize([0.8, 0.9, 1.0])
    # t(2) = 4.303; the standard deviation is 0.1, divided by the square root of 3.
    assert middle == pytest.approx(0.9)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert summarize([0.5]) == (0.5, None)


def test_runs_of_every_kind_train_and_count_their_costs():
    size = replace(QUICK, num_steps=2, num_eval=7, share=0.04)
    base, cut, frozen, dpo, refined = (
        execute(size.make_run(name, learning_rate=5e-4, seed=1, **changes))
        for name, changes in (
            ("base_perfect", {"num_steps": 0}),
            ("cut", {"num_iterations": 2}),
            ("cut_frozen", {"num_iterations": 2}),
            ("dpo", {}),
            ("ilf_dpo", {}),
        )
    )
    assert [len(result["accuracy"]) for result in (base, cut, frozen, dpo, refined)] == [1, 2, 2, 1, 1]
    assert 0 < frozen["tokens_trained"] < cut["tokens_trained"]
    # Both score a sample of the records to report the sensitivity.
    assert frozen["tokens_scored"] > cut["tokens_scored"] > 0
    assert dpo["num_responses"] == 8 * refined["num_responses"]
    assert dpo["tokens_generated"] > 4 * refined["tokens_generated"]
    assert refined["tokens_trained"] > 0 == base["tokens_trained"]


@pytest.mark.timeout(400)
def test_the_command_reuses_the_results_of_earlier_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "QUICK", replace(QUICK, num_steps=2, num_eval=7, share=0.04))
    command = ["detection", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert compare.main(command) == 0
    content = json.loads((tmp_path / "detection.json").read_text())
    assert content["command"] == "python experiments/compare.py detection --quick"
    assert {row["detector"] for row in content["results"]} == {"frozen", "current"}
    assert (tmp_path / "detection.md").read_text("utf-8") in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / ".runs").iterdir()}
    assert len(times) == 2
    assert compare.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".runs").iterdir()} == times


@pytest.mark.parametrize("options", [["tables"], ["--seeds", "0"], ["--workers", "0"]])
def test_bad_arguments_are_usage_errors(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as error:
        compare.main(["--out", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert options[-1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
