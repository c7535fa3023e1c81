"""The online loop: whatever stops it, and whenever, it ends as if nothing had."""

import contextlib
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loop_plans import make_plan, make_settings, make_workplace, run_here
from safetensors.torch import load_file

from cutlm.errors import ConfigError, UserError
from cutlm.loop.loop import Mark, collect_figures, list_places, read_mark, run_loop
from cutlm.loop.manifest import Manifest
from cutlm.loop.processes import lock_folder
from cutlm.loop.runner import StageFailed


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("align"))


def _run_in_a_fork(plan: Any, prepare: Callable[[], None]) -> int:
    """Runs the loop in a copy of this process, in which `prepare` has laid a trap; returns the exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare()
                run_loop(plan, run=run_here)
            status = 0
        except StageFailed as error:
            print(error, file=sys.stderr)
            status = error.status
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> Any:
    plan = make_plan(workplace, "uninterrupted")
    assert _run_in_a_fork(plan, lambda: None) == 0
    return plan


def _read_results(folder: Path) -> dict[str, Any]:
    """All that a run has made, but for times and locations."""
    results: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # The fingerprint of a model says where it is.
        results[str(path.relative_to(folder))] = [
            {name: value for name, value in row.items() if name != "detector"} for row in rows
        ]
    for path in sorted(folder.rglob("*.safetensors")):
        results[str(path.relative_to(folder))] = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    rows = json.loads((folder / "report.json").read_text())
    return results | {"report": [{name: value for name, value in row.items() if name != "seconds"} for row in rows]}


def test_a_run_leaves_every_file_and_learns(workplace: Path, uninterrupted: Any) -> None:
    folder = workplace / "uninterrupted"
    for number in (1, 2):
        names = {path.name for path in (folder / f"iteration-{number}").iterdir()}
        assert names >= {
            *("instructions.jsonl", "responses.jsonl", "records.jsonl", "scores.jsonl", "train.yaml", "config.yaml"),
            *("adapter", "model", "evaluation", "manifest.json"),
        }
        assert not any(".partial" in name or "checkpoint" in name for name in names)
    results = _read_results(folder)
    adapters = [value for name, value in results.items() if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == 2
    assert all(any(row for row in rows) for name, rows in adapters[0].items() if "lora_B" in name), (
        "nothing was learned"
    )
    models = [json.dumps(value) for name, value in results.items() if name.endswith("model/model.safetensors")]
    assert models[0] != models[1]
    # The second round begins with what came of the first.
    settings = yaml.safe_load((folder / "iteration-2" / "train.yaml").read_text())
    assert settings["model_name_or_path"] == str(folder / "iteration-1" / "model")
    assert [row["iteration"] for row in results["report"]] == [0, 1, 2]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_instruction_comes_twice(workplace: Path, uninterrupted: Any) -> None:
    drawn = [
        row["instruction"]
        for number in (1, 2)
        for row in map(json.loads, (workplace / "uninterrupted" / f"iteration-{number}" / "instructions.jsonl").open())
    ]
    assert len(drawn) == len(set(drawn)) == 12


def test_killed_before_and_after_each_stage_is_noted_it_ends_the_same(workplace: Path, uninterrupted: Any) -> None:
    plan = make_plan(workplace, "boundaries")
    record = Manifest.record

    def trap(when: str) -> Callable[[], None]:
        def killing(self: Manifest, *args: Any, **kwargs: Any) -> None:
            if when == "before":
                _kill()
            record(self, *args, **kwargs)
            _kill()

        return lambda: setattr(Manifest, "record", killing)

    num_stages = 1 + 2 * 7
    for number in range(num_stages):
        assert _run_in_a_fork(plan, trap("before")) == -signal.SIGKILL
        assert _count_complete(plan) == number
        assert _run_in_a_fork(plan, trap("after")) == -signal.SIGKILL
        assert _count_complete(plan) == number + 1
    assert _run_in_a_fork(plan, lambda: None) == 0
    assert _read_results(workplace / "boundaries") == _read_results(workplace / "uninterrupted")
    # What a stage had made before it was killed was not made again.
    commands = (workplace / "boundaries" / "commands.txt").read_text()
    assert commands == (workplace / "uninterrupted" / "commands.txt").read_text()


def _count_complete(plan: Any) -> int:
    return sum(len(Manifest(place.folder).stages) for place in list_places(plan))


def test_killed_at_any_write_to_the_disk_it_ends_the_same(workplace: Path, uninterrupted: Any) -> None:
    plan = make_plan(workplace, "anywhere")
    fsync, rng = os.fsync, random.Random(1)

    def trap(num_writes: int) -> Callable[[], None]:
        def killing(handle: int) -> None:
            nonlocal num_writes
            num_writes -= 1
            if num_writes == 0:
                _kill()
            fsync(handle)

        return lambda: setattr(os, "fsync", killing)

    statuses = []
    for _ in range(60):
        statuses.append(_run_in_a_fork(plan, trap(rng.randint(1, 40))))
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert len(statuses) > 8, "it was hardly ever killed"
    assert _read_results(workplace / "anywhere") == _read_results(workplace / "uninterrupted")


def test_a_full_disk_costs_nothing_that_was_done(workplace: Path, uninterrupted: Any) -> None:
    plan = make_plan(workplace, "full")
    fsync = os.fsync

    def trap(num_writes: int) -> Callable[[], None]:
        def failing(handle: int) -> None:
            nonlocal num_writes
            num_writes -= 1
            if num_writes <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        return lambda: setattr(os, "fsync", failing)

    for num_writes in (25, 45, 65):
        assert _run_in_a_fork(plan, trap(num_writes)) != 0
    assert _run_in_a_fork(plan, lambda: None) == 0
    assert _read_results(workplace / "full") == _read_results(workplace / "uninterrupted")


def test_the_command_itself_survives_ctrl_c_and_a_kill(workplace: Path) -> None:
    folder = workplace / "command"
    config = workplace / "command.yaml"
    settings = make_settings(
        workplace, "command", num_iterations=1, eval_instructions=None, detector=None, max_steps=150
    )
    config.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    command = [sys.executable, "-m", "cutlm", "align", "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(workplace), os.environ.get("PYTHONPATH", "")])}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )

    with start() as run:
        assert run.stdout is not None
        for line in run.stdout:  # Ctrl-C while it trains: what was trained is saved first
            if "'loss'" in line:
                run.send_signal(signal.SIGINT)
                break
        output = run.stdout.read()
    assert run.returncode == 130, output
    assert f"cutlm align --config {config}" in output
    assert not (folder / "iteration-1" / "adapter" / "trainer_state.json").exists()
    with start() as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "'loss'" in line:
                run.kill()
                break
        run.wait()
    with lock_folder(folder):  # which its stage holds until it has saved and stopped too
        assert len(list((folder / "iteration-1" / "adapter").glob("checkpoint-*"))) == 1
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert "iteration 1, judge" not in result.stdout, "what was complete was run again"
    plan = make_plan(workplace, "by-hand", num_iterations=1, eval_instructions="", detector="current", max_steps=150)
    assert _run_in_a_fork(plan, lambda: None) == 0
    ours, expected = _read_results(folder), _read_results(workplace / "by-hand")
    assert ours == expected
    status = subprocess.run([*command, "--status"], env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in status.stdout.splitlines()[:2]] == [["iteration", "sample"], ["1", "done"]]


def test_a_second_loop_in_the_folder_is_refused(tmp_path: Path) -> None:
    message = rf"another cutlm align is at work here \(process {os.getpid()}\); wait for it, or stop it"
    with lock_folder(tmp_path), pytest.raises(UserError, match=message), lock_folder(tmp_path):
        pass


# What a user changes between one start and the next.


@pytest.fixture(scope="module")
def begun(workplace: Path) -> Any:
    """A run that was stopped after the first judgments."""
    plan = make_plan(workplace, "begun")
    assert run_loop(plan, until=read_mark(plan, "--until", "judge"), run=run_here) is False
    assert set(Manifest(workplace / "begun" / "iteration-1").stages) == {"sample", "generate", "judge"}
    return plan


def test_other_settings_are_refused_and_named(workplace: Path, begun: Any, tmp_path: Path) -> None:
    others = tmp_path / "others.json"
    others.write_text(json.dumps([{"instruction": str(index)} for index in range(20)]))
    plan = make_plan(workplace, "begun", threshold=1.2, judge="rules --rules characters:raising", instructions=others)
    with pytest.raises(ConfigError) as caught:
        run_loop(plan, run=run_here)
    assert caught.value.problems == [
        "instructions: this folder was begun with a file that held something else",
        "judge: this folder was begun with 'rules --rules characters:judge', got 'rules --rules characters:raising'",
        "threshold: this folder was begun with 1.1, got 1.2",
    ]
    assert "to go on, or name another output_dir to begin anew" in str(caught.value)


def test_what_decides_nothing_may_change(workplace: Path, begun: Any) -> None:
    plan = make_plan(workplace, "begun", logging_steps=2, launcher="torchrun", max_failure_rate=0.5)
    assert run_loop(plan, until=Mark(1, "judge"), run=run_here) is False


def test_more_iterations_may_be_asked_for_but_not_fewer(workplace: Path, begun: Any) -> None:
    with pytest.raises(ConfigError, match=r"^num_iterations: this folder was begun with 2, got 1\n"):
        run_loop(make_plan(workplace, "begun", num_iterations=1), run=run_here)
    with pytest.raises(UserError, match="expected 18 instructions, 6 for each of 3 iterations, got 16"):
        run_loop(make_plan(workplace, "begun", num_iterations=3), run=run_here)


def test_spending_caps_and_speed_of_a_judge_may_change() -> None:
    from cutlm.loop.settings import find_differences

    before = "http --base_url http://a/v1 --judge_model m --max_requests 5"
    after = "http --judge_model m --base_url http://a/v1 --max_requests 50 --concurrency 2"
    assert find_differences({"judge": before}, {"judge": after}) == []
    other = after.replace("m ", "n ", 1)
    assert len(find_differences({"judge": before}, {"judge": other})) == 1


def test_an_edited_file_is_refused_and_kept_on_request(workplace: Path) -> None:
    plan = make_plan(workplace, "edited", num_iterations=1, eval_instructions="")
    assert run_loop(plan, run=run_here) is True
    records = workplace / "edited" / "iteration-1" / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[0]["judgment"] = "By hand: this is wrong."
    records.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"records\.jsonl: changed since it was made") as caught:
        run_loop(plan, run=run_here)
    assert "--from the stage that comes next" in str(caught.value)
    assert run_loop(plan, start=read_mark(plan, "--from", "1.blame"), run=run_here) is True
    scores = (workplace / "edited" / "iteration-1" / "scores.jsonl").read_text()
    assert "By hand: this is wrong." in scores
    (row,) = collect_figures(plan)
    assert row["stages"]["judge"]["state"] == "edited"
    assert row["stages"]["train"]["state"] == "done"
    records.unlink()
    with pytest.raises(UserError, match=r"records\.jsonl: made by this run, and not there any more"):
        run_loop(plan, start=read_mark(plan, "--from", "1.blame"), run=run_here)
    assert run_loop(plan, start=read_mark(plan, "--from", "1.judge"), run=run_here) is True
    assert "By hand" not in records.read_text()


def test_a_moved_folder_goes_on(workplace: Path, uninterrupted: Any) -> None:
    plan = make_plan(workplace, "before-the-move")
    assert run_loop(plan, until=read_mark(plan, "--until", "1.train"), run=run_here) is False
    os.rename(workplace / "before-the-move", workplace / "moved")
    assert run_loop(make_plan(workplace, "moved"), run=run_here) is True
    assert _read_results(workplace / "moved") == _read_results(workplace / "uninterrupted")


@pytest.mark.parametrize("text", ["3.judge", "merged", "x.judge", "0.judge", "9"])
def test_a_stage_that_is_none_is_refused(workplace: Path, begun: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--until: expected a stage, such as judge, or one of an iteration"):
        read_mark(begun, "--until", text)


def test_stages_are_named_by_themselves_with_their_iteration_or_by_it_alone(begun: Any) -> None:
    assert read_mark(begun, "--until", "judge") == Mark(1, "judge")
    assert read_mark(begun, "--until", "2.judge") == Mark(2, "judge")
    assert read_mark(begun, "--until", "2") == Mark(2, "evaluate")
    assert read_mark(begun, "--from", "2") == Mark(2, "sample")
    assert read_mark(begun, "--from", "0") == Mark(0, "evaluate")
