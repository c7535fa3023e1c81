"""Whatever stops the loop, and whenever: a resumed run ends exactly like an uninterrupted one."""

import contextlib
import errno
import io
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from loop_plans import make_plan, make_settings, make_workplace, run_in_process
from safetensors.torch import load_file

from cutlm.cli import main
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.loop.loop import Manifest, StageRef, collect_metrics, list_iterations, read_stage_ref, run_loop
from cutlm.loop.processes import lock_folder
from cutlm.loop.settings import Plan
from cutlm.loop.stages import StageFailed


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("align"))


def run_in_fork(plan: Plan, prepare: Callable[[], None] = lambda: None) -> int:
    """Runs the loop in a copy of this process, after `prepare`; returns the exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare()
                run_loop(plan, run=run_in_process)
            status = 0
        except StageFailed as error:
            print(error, file=sys.stderr)
            status = error.status
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> Plan:
    plan = make_plan(workplace, "uninterrupted")
    # In this process rather than in a fork, so that the forks of the tests find all modules imported.
    assert run_loop(plan, run=run_in_process) is True
    return plan


def read_results(folder: Path) -> dict[str, Any]:
    """Reads everything that a run has made except times and paths."""
    results: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # The detector's name contains the path of the model.
        results[str(path.relative_to(folder))] = [
            {name: value for name, value in row.items() if name != "detector"} for row in rows
        ]
    for path in sorted(folder.rglob("*.safetensors")):
        results[str(path.relative_to(folder))] = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    rows = json.loads((folder / "report.json").read_text())
    return results | {"report": [{name: value for name, value in row.items() if name != "seconds"} for row in rows]}


def test_run_leaves_all_files_and_learns(workplace: Path, uninterrupted: Plan) -> None:
    folder = workplace / "uninterrupted"
    for number in (1, 2):
        names = {path.name for path in (folder / f"iteration-{number}").iterdir()}
        assert names >= {
            *("instructions.jsonl", "responses.jsonl", "records.jsonl", "scores.jsonl", "train.yaml", "config.yaml"),
            *("adapter", "model", "evaluation", "manifest.json"),
        }
        assert not any(".partial" in name or "checkpoint" in name for name in names)
    results = read_results(folder)
    adapters = [value for name, value in results.items() if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == 2
    assert all(any(row for row in rows) for name, rows in adapters[0].items() if "lora_B" in name)
    models = [json.dumps(value) for name, value in results.items() if name.endswith("model/model.safetensors")]
    assert models[0] != models[1]
    settings = yaml.safe_load((folder / "iteration-2" / "train.yaml").read_text())
    assert settings["model_name_or_path"] == str(folder / "iteration-1" / "model")
    assert [row["iteration"] for row in results["report"]] == [0, 1, 2]
    for number in (1, 2):
        facts = ModelCard.load(folder / f"iteration-{number}" / "model" / "README.md").data.cutlm
        assert (facts["kind"], facts["iteration"]["iteration"], facts["name"]) == (
            "merged",
            number,
            f"uninterrupted-iteration-{number}",
        )
        assert 0 <= facts["evaluation"]["share_satisfactory"] <= 1
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    drawn = [row["instruction"] for number in (1, 2) for row in results[f"iteration-{number}/instructions.jsonl"]]
    assert len(drawn) == len(set(drawn)) == 12


def test_killed_around_the_end_of_each_stage_it_ends_the_same(workplace: Path, uninterrupted: Plan) -> None:
    plan = make_plan(workplace, "boundaries")
    record = Manifest.record

    def kill_around_record(num_passed: int, is_before: bool) -> Callable[[], None]:
        def record_or_die(self: Manifest, *args: Any, **kwargs: Any) -> None:
            nonlocal num_passed
            num_passed -= 1
            if is_before:
                kill_this_process()
            record(self, *args, **kwargs)
            if num_passed < 0:
                kill_this_process()

        return lambda: setattr(Manifest, "record", record_or_die)

    # Killed before the 1st, 3rd, ... stage is recorded and after the 2nd, 4th, ... one is. Because an iteration has 7
    # stages, each kind of stage is killed in both ways.
    for index in range(1 + 2 * 7):
        is_before = index % 2 == 0
        assert run_in_fork(plan, kill_around_record(0 if is_before else 1, is_before)) == -signal.SIGKILL
        assert count_complete(plan) == (index if is_before else index + 1)
    assert run_in_fork(plan) == 0
    assert read_results(workplace / "boundaries") == read_results(workplace / "uninterrupted")
    # No command ran twice.
    commands = (workplace / "boundaries" / "commands.txt").read_text()
    assert commands == (workplace / "uninterrupted" / "commands.txt").read_text()


def count_complete(plan: Plan) -> int:
    return sum(len(Manifest(iteration.folder).stages) for iteration in list_iterations(plan))


def fail_writes(num_writes: int, fail: Callable[[], None]) -> Callable[[], None]:
    """Makes every fsync from the `num_writes`-th on fail, in the process in which the result is called."""
    fsync = os.fsync

    def count_down(handle: int) -> None:
        nonlocal num_writes
        num_writes -= 1
        if num_writes <= 0:
            fail()
        fsync(handle)

    return lambda: setattr(os, "fsync", count_down)


def test_killed_at_any_write_it_ends_the_same(workplace: Path, uninterrupted: Plan) -> None:
    plan = make_plan(workplace, "anywhere")
    rng = random.Random(1)
    statuses = []
    for _ in range(60):
        statuses.append(run_in_fork(plan, fail_writes(rng.randint(1, 70), kill_this_process)))
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert len(statuses) > 4, "the run was hardly ever killed"
    assert read_results(workplace / "anywhere") == read_results(workplace / "uninterrupted")


def test_killed_while_its_settings_are_written_it_starts_again(workplace: Path) -> None:
    plan = make_plan(workplace, "first")
    assert run_in_fork(plan, fail_writes(1, kill_this_process)) == -signal.SIGKILL
    assert not (workplace / "first" / "align.yaml").exists()
    assert run_loop(plan, until=StageRef(1, "sample"), run=run_in_process) is False


def test_after_a_full_disk_it_ends_the_same(workplace: Path, uninterrupted: Plan) -> None:
    plan = make_plan(workplace, "full")

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for num_writes in (25, 65):
        assert run_in_fork(plan, fail_writes(num_writes, fail)) != 0
    assert run_in_fork(plan) == 0
    assert read_results(workplace / "full") == read_results(workplace / "uninterrupted")


def test_command_survives_ctrl_c_and_kill_during_training(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    further = {"num_iterations": 1, "eval_instructions": "", "detector": "current", "use_peft": False, "max_steps": 150}
    config, folder = workplace / "command.yaml", workplace / "command"
    config.write_text(yaml.safe_dump(make_settings(workplace, "command", **further)))
    plan = make_plan(workplace, "command", **further)
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False

    def start() -> tuple[int, Any]:
        """Runs the command in a fork, which has torch imported already; training is a process of its own."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                status = main(["align", "--config", str(config)])
                sys.stdout.flush()
            finally:
                os._exit(status)
        os.close(writer)
        return pid, open(reader, encoding="utf-8")

    def wait_for_training(lines: Any) -> None:
        assert any("'loss'" in line for line in lines)

    pid, lines = start()
    with lines:
        wait_for_training(lines)
        os.kill(pid, signal.SIGINT)
        output = lines.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, output
    assert f"cutlm align --config {config}" in output
    target = folder / "iteration-1" / "model"
    assert list(target.glob("checkpoint-*"))
    assert not (target / "trainer_state.json").exists()

    pid, lines = start()
    with lines:
        wait_for_training(lines)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with lock_folder(folder):  # the stage holds the lock until it has saved and stopped too
        assert len(list(target.glob("checkpoint-*"))) == 1

    assert "--resume_from_checkpoint last" in (folder / "iteration-1" / "train.log").read_text()
    commands = (folder / "commands.txt").read_text()
    assert run_loop(plan, run=run_in_process) is True
    assert (folder / "commands.txt").read_text() == f"{commands}iteration-1 train train\n"
    by_hand = make_plan(workplace, "by-hand", **further)
    assert run_loop(by_hand, run=run_in_process) is True
    assert read_results(folder) == read_results(workplace / "by-hand")
    capsys.readouterr()
    assert main(["align", "--config", str(config), "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["iteration", "sample"], ["1", "done"]]


def test_second_loop_in_a_folder_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(UserError, match=str(os.getpid())), lock_folder(tmp_path):
        pass


def test_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(UserError, match=r"\.lock: .*No locks available"), lock_folder(tmp_path):
        pass


# ---- Changes between two starts ----


@pytest.fixture(scope="module")
def begun(workplace: Path) -> Plan:
    """A run that was stopped after its first judgments."""
    plan = make_plan(workplace, "begun")
    assert run_loop(plan, until=read_stage_ref(plan, "--until", "judge"), run=run_in_process) is False
    assert set(Manifest(workplace / "begun" / "iteration-1").stages) == {"sample", "generate", "judge"}
    return plan


def test_settings_that_change_the_results_are_refused(workplace: Path, begun: Plan, tmp_path: Path) -> None:
    others = tmp_path / "others.json"
    others.write_text(json.dumps([{"instruction": str(index)} for index in range(20)]))
    plan = make_plan(workplace, "begun", threshold=1.2, judge="rules --rules characters:raising", instructions=others)
    with pytest.raises(ConfigError) as caught:
        run_loop(plan, run=run_in_process)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["instructions", "judge", "threshold"]
    with pytest.raises(ConfigError, match=r"^num_iterations: .* 2, got 1\n"):
        run_loop(make_plan(workplace, "begun", num_iterations=1), run=run_in_process)
    # More iterations are allowed, but there are too few instructions for them.
    with pytest.raises(UserError, match="expected 18 instructions, 6 for each of 3 iterations, got 16"):
        run_loop(make_plan(workplace, "begun", num_iterations=3), run=run_in_process)


def test_settings_that_do_not_change_the_results_may_change(workplace: Path, begun: Plan) -> None:
    plan = make_plan(workplace, "begun", logging_steps=2, launcher="torchrun", max_failure_rate=0.5)
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False


def test_edited_file_is_refused_and_kept_on_request(workplace: Path) -> None:
    plan = make_plan(workplace, "edited", num_iterations=1, eval_instructions="")
    assert run_loop(plan, until=StageRef(1, "blame"), run=run_in_process) is False
    folder = workplace / "edited" / "iteration-1"
    records = folder / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[0]["judgment"] = "By hand: this is wrong."
    records.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"records\.jsonl: changed .*\n.*--from"):
        run_loop(plan, run=run_in_process)
    start = read_stage_ref(plan, "--from", "1.blame")
    assert run_loop(plan, start=start, until=start, run=run_in_process) is False
    assert "By hand: this is wrong." in (folder / "scores.jsonl").read_text()
    (row,) = collect_metrics(plan)
    states = {stage: known["state"] for stage, known in row["stages"].items()}
    assert states == {
        **{"sample": "done", "generate": "done", "judge": "edited", "blame": "done", "train": "-", "merge": "-"}
    }
    records.unlink()
    with pytest.raises(UserError, match=r"records\.jsonl: missing"):
        run_loop(plan, start=start, run=run_in_process)
    start = read_stage_ref(plan, "--from", "1.judge")
    assert run_loop(plan, start=start, until=start, run=run_in_process) is False
    assert "By hand" not in records.read_text()


def test_moved_folder_is_resumed(workplace: Path, uninterrupted: Plan) -> None:
    plan = make_plan(workplace, "before-the-move")
    assert run_loop(plan, until=read_stage_ref(plan, "--until", "1.train"), run=run_in_process) is False
    os.rename(workplace / "before-the-move", workplace / "moved")
    assert run_loop(make_plan(workplace, "moved"), run=run_in_process) is True
    assert read_results(workplace / "moved") == read_results(workplace / "uninterrupted")


def test_filled_folder_is_refused(begun: Plan, workplace: Path) -> None:
    with pytest.raises(UserError, match=r"base is not empty and has no align\.yaml"):
        run_loop(make_plan(workplace, "base"), run=run_in_process)


@pytest.mark.parametrize("text", ["3.judge", "merged", "x.judge", "0.judge", "9"])
def test_unknown_stage_is_refused(begun: Plan, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--until: expected a stage"):
        read_stage_ref(begun, "--until", text)


def test_stage_refs_are_read(begun: Plan) -> None:
    assert read_stage_ref(begun, "--until", "judge") == StageRef(1, "judge")
    assert read_stage_ref(begun, "--until", "2.judge") == StageRef(2, "judge")
    assert read_stage_ref(begun, "--until", "2") == StageRef(2, "evaluate")
    assert read_stage_ref(begun, "--from", "2") == StageRef(2, "sample")
    assert read_stage_ref(begun, "--from", "0") == StageRef(0, "evaluate")


# ---- Damaged files ----


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"stages": {"sample": {"outputs": {}}}}',
        '{"stages": {"sample": {"outputs": {"a": {}}, "versions": {}, "metrics": {}}}}',
        '{"stages": {"sample": {"outputs": {"a": 1}, "versions": {}, "metrics": {}}}}',
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        Manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "\0"])
def test_damaged_settings_are_refused(begun: Plan, tmp_path: Path, content: str) -> None:
    (tmp_path / "align.yaml").write_text(content)
    with pytest.raises(DataError, match=r"align\.yaml: not the settings of a run"):
        run_loop(replace(begun, folder=tmp_path))
