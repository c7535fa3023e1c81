"""Checkpoints survive a kill at any moment, and a run that was stopped ends bit for bit like one that was not."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import save_tiny_model

from cutlm.cli import main

# Runs the command in a process that kills itself at the second checkpoint: in the middle of writing it, or when all of
# it is written but not yet in its place.
KILLED = """
import os, signal, sys
from {module} import {owner} as owner
original, num_calls = owner.{function}, 0
def killing(*args, **kwargs):
    global num_calls
    num_calls += 1
    if num_calls == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
owner.{function} = killing
from cutlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_model(folder / "base")
    rows = [
        {
            "instruction": f"Name a city, number {index}.",
            "output": f"The capital is Sydney, a large city. {index}",
            "judgment": None if index % 3 == 0 else f"Sydney is not the capital; mistake {index}.",
        }
        for index in range(20)
    ]
    (folder / "records.json").write_text(json.dumps(rows))
    assert main(["train", *_options(folder, "uninterrupted")]) == 0
    return folder


def _options(folder: Path, name: str, **settings: object) -> list[str]:
    # 20 records in steps of 4, two epochs: 10 steps, so that a resume lands within an epoch and at its border.
    values = {
        "model_name_or_path": folder / "base",
        "data": folder / "records.json",
        "output_dir": folder / name,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "lora_dropout": 0.2,
        "save_steps": 3,
        "logging_steps": 3,
        "save_total_limit": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def _assert_same_end(folder: Path, name: str) -> None:
    expected = load_file(folder / "uninterrupted" / "adapter_model.safetensors")
    got = load_file(folder / name / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    assert all(expected[key].equal(got[key]) for key in expected), "not bit for bit the same"
    assert any(value.abs().sum() > 0 for key, value in got.items() if "lora_B" in key), "nothing was trained"


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def _run_killed(folder: Path, name: str, owner: str, function: str, calls: int) -> None:
    module, _, owner = owner.rpartition(".")
    code = KILLED.format(module=module, owner=owner, function=function, calls=calls)
    result = subprocess.run(
        [sys.executable, "-c", code, "train", *_options(folder, name)], capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(
    ("name", "owner", "function", "calls"),
    [
        # Half written: the second checkpoint's adapter is there, its optimizer is not.
        ("half-written", "cutlm.training.trainer.CUTTrainer", "_save_optimizer_and_scheduler", 2),
        # All written, not in its place.
        ("not-renamed", "cutlm.training.checkpoints", "sync_tree", 2),
        # Between two checkpoints, in the middle of an optimizer step.
        ("mid-step", "cutlm.training.trainer.CUTTrainer", "_get_grad_norm", 5),
    ],
)
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    workplace: Path, name: str, owner: str, function: str, calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_killed(workplace, name, owner, function, calls)
    assert _checkpoints(workplace / name) == ["checkpoint-3"]
    assert main(["train", *_options(workplace, name, resume_from_checkpoint="last")]) == 0
    assert "checkpoint-3" in capsys.readouterr().out
    _assert_same_end(workplace, name)
    assert _checkpoints(workplace / name) == ["checkpoint-10", "checkpoint-9"], "kept more than save_total_limit"
    assert not (workplace / name / ".saving").exists(), "the half-written checkpoint was not cleared"


def test_a_kill_while_the_final_model_is_saved_leaves_no_half_model(workplace: Path) -> None:
    _run_killed(workplace, "final", "cutlm.training.checkpoints", "publish_files", 1)
    assert not (workplace / "final" / "adapter_config.json").exists()
    assert main(["train", *_options(workplace, "final", resume_from_checkpoint="last")]) == 0
    _assert_same_end(workplace, "final")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    workplace: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"stopped-{number.name}"
    options = _options(workplace, name, save_strategy="no", logging_steps=1)
    command = [sys.executable, "-u", "-m", "cutlm", "train", *options, "--overwrite_output_dir", "true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "'loss'" in line:
                process.send_signal(number)
                break
        lines += process.stdout.readlines()
    output = "".join(lines)
    assert process.returncode == 128 + number, output
    (checkpoint,) = _checkpoints(workplace / name)
    step = int(checkpoint.removeprefix("checkpoint-"))
    assert 0 < step < 10, "the run was over before the signal came"
    assert f"Stopped at step {step} of 10" in output
    assert f"  cutlm train {' '.join(options)} --resume_from_checkpoint last" in output
    assert "Traceback" not in output
    assert main(["train", *options, "--resume_from_checkpoint", "last"]) == 0
    _assert_same_end(workplace, name)


def test_a_filled_output_folder_is_refused_and_left_as_it_was(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (workplace / "uninterrupted").rglob("*"))
    assert main(["train", *_options(workplace, "uninterrupted")]) == 2
    message = capsys.readouterr().err
    assert "holds checkpoint-10; go on with --resume_from_checkpoint last" in message
    assert "--overwrite_output_dir" in message
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (workplace / "uninterrupted").rglob("*"))


def test_starting_anew_removes_the_old_runs_checkpoints(workplace: Path) -> None:
    old = workplace / "anew" / "checkpoint-999"
    old.mkdir(parents=True)
    (old / "trainer_state.json").write_text("{}")
    options = _options(workplace, "anew", overwrite_output_dir=True, max_steps=1)
    assert main(["train", *options]) == 0
    assert _checkpoints(workplace / "anew") == ["checkpoint-1"]


def test_resuming_without_a_checkpoint_is_one_sentence(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *_options(workplace, "none", resume_from_checkpoint="last")]) == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err
    missing = str(workplace / "nowhere")
    assert main(["train", *_options(workplace, "none", resume_from_checkpoint=missing)]) == 2
    assert "expected a checkpoint folder with trainer_state.json" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(workplace: Path) -> None:
    options = _options(workplace, "finished", max_steps=4, lr_scheduler_type="constant")
    assert main(["train", *options]) == 0
    before = (workplace / "finished" / "adapter_model.safetensors").read_bytes()
    assert main(["train", *options, "--resume_from_checkpoint", "last"]) == 0
    assert (workplace / "finished" / "adapter_model.safetensors").read_bytes() == before
    assert _checkpoints(workplace / "finished") == ["checkpoint-3", "checkpoint-4"]


def test_starting_anew_leaves_no_model_of_the_old_run(workplace: Path) -> None:
    assert main(["train", *_options(workplace, "twice", max_steps=1)]) == 0
    assert main(["train", *_options(workplace, "twice", max_steps=1, overwrite_output_dir=True, use_peft=False)]) == 0
    names = {path.name for path in (workplace / "twice").iterdir()}
    assert "model.safetensors" in names
    assert not any(name.startswith("adapter") for name in names)


def test_starting_anew_with_bad_input_loses_nothing(workplace: Path) -> None:
    assert main(["train", *_options(workplace, "kept", max_steps=1)]) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (workplace / "kept").rglob("*"))
    options = _options(workplace, "kept", overwrite_output_dir=True, data=workplace / "nowhere.json")
    assert main(["train", *options]) == 2
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (workplace / "kept").rglob("*"))


def test_resuming_with_other_records_or_batches_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *_options(workplace, "other", max_steps=3)]) == 0
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "max_length": 100}
    assert main(["train", *_options(workplace, "other", **settings, resume_from_checkpoint="last")]) == 2
    message = capsys.readouterr().err
    assert "per_device_train_batch_size: the run to go on with has 2, got 4; give the same, or start anew" in message
    assert "max_length: the run to go on with has 2048, got 100" in message


def test_resuming_on_data_that_were_edited_or_in_other_processes_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((workplace / "records.json").read_text())
    data = workplace / "edited.json"
    data.write_text(json.dumps(rows))
    assert main(["train", *_options(workplace, "edited", data=data, max_steps=3)]) == 0
    data.write_text(json.dumps(rows[:12]))
    run = workplace / "edited" / "cutlm_run.json"
    run.write_text(run.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    resumed = _options(workplace, "edited", data=data, max_steps=6, resume_from_checkpoint="last")
    assert main(["train", *resumed]) == 2
    message = capsys.readouterr().err
    assert f"data: {data} holds something else than when the run began; restore it, or start anew" in message
    assert "the run to go on with has 2 processes, got 1; start as many, or start anew" in message
    assert len(_checkpoints(workplace / "edited")) == 1


def test_the_files_of_a_run_that_are_damaged_or_older_are_no_leave_to_go_on(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workplace / "uninterrupted", tmp_path / "run")
    run, other = tmp_path / "run" / "cutlm_run.json", tmp_path / "other.json"
    other.write_bytes((workplace / "records.json").read_bytes())
    options = {"resume_from_checkpoint": "last", "model_name_or_path": workplace / "base"}
    run.write_text("{")
    assert main(["train", *_options(tmp_path, "run", **options, data=other)]) == 2
    assert "cutlm_run.json: damaged, so the run cannot be gone on with; restore them" in capsys.readouterr().err
    run.unlink()  # as before there was such a file: the name is all that is known of the data
    assert main(["train", *_options(tmp_path, "run", **options, data=other)]) == 2
    assert "data: the run to go on with has " in capsys.readouterr().err


def test_data_may_move_and_a_checkpoint_may_stand_elsewhere(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "uninterrupted", tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-10"
    (tmp_path / "scratch").mkdir()
    last.rename(tmp_path / "scratch" / last.name)
    last.symlink_to(tmp_path / "scratch" / last.name)
    data = tmp_path / "moved.json.gz"
    data.write_bytes(gzip.compress((workplace / "records.json").read_bytes()))
    options = {"resume_from_checkpoint": "last", "model_name_or_path": workplace / "base", "data": data}
    assert main(["train", *_options(tmp_path, "run", **options)]) == 0


def test_what_another_run_left_is_compared_with_and_nothing_of_a_third_is_overwritten(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = workplace / "uninterrupted" / _checkpoints(workplace / "uninterrupted")[0]
    folder = workplace / "third"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    assert main(["train", *_options(workplace, "third", resume_from_checkpoint=checkpoint)]) == 2
    assert "third is not empty" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    other = _options(workplace, "fourth", seed=7, lora_r=2, use_peft=True, resume_from_checkpoint=checkpoint)
    assert main(["train", *other]) == 2
    message = capsys.readouterr().err
    assert "seed: the run to go on with has " in message
    assert "lora_r: the run to go on with has " in message
    assert main(["train", *_options(workplace, "fourth", resume_from_checkpoint=checkpoint)]) == 0
    want, got = (load_file(workplace / name / "adapter_model.safetensors") for name in ("uninterrupted", "fourth"))
    assert all((want[name] == got[name]).all() for name in want)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.pt", None, "found no state of the optimizer (save_only_model saves none); go on from another, or"),
        ("scheduler.pt", None, "found no state of the schedule"),
        ("rng_state.pth", None, "found no state of random numbers"),
        ("adapter_model.safetensors", None, "found no weights"),
        ("optimizer.pt", b"PK", "optimizer.pt cannot be read; restore it, or go on from another checkpoint"),
        ("adapter_model.safetensors", b"{", "adapter_model.safetensors cannot be read"),
        ("trainer_state.json", None, "found no state of the trainer"),
        ("trainer_state.json", b"{", "trainer_state.json cannot be read"),
        ("trainer_state.json", b"{}", "trainer_state.json cannot be read"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(workplace / "uninterrupted", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-10" / name
    file.unlink() if content is None else file.write_bytes(content)
    assert main(["train", *_options(tmp_path, "run", resume_from_checkpoint="last")]) == 2
    assert message in capsys.readouterr().err


def test_a_run_folder_is_no_checkpoint(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(workplace / "uninterrupted")
    assert main(["train", *_options(workplace, "from-run", resume_from_checkpoint=folder)]) == 2
    assert "expected a whole checkpoint, found no state of the optimizer" in capsys.readouterr().err


def test_resuming_with_other_settings_names_them(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *_options(workplace, "changed", max_steps=3)]) == 0
    options = _options(workplace, "changed", max_steps=4, threshold=1.2, resume_from_checkpoint="last")
    assert main(["train", *options]) == 0
    output = capsys.readouterr().out
    assert "threshold was 1.1 before this resume, and is 1.2 now" in output
    assert "max_steps was 3 before this resume, and is 4 now" in output


def test_the_best_checkpoint_is_known_by_its_lasting_name(workplace: Path) -> None:
    settings = {"eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    options = _options(
        workplace, "best", **settings, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1
    )
    assert main(["train", *options]) == 0
    state = json.loads((workplace / "best" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == workplace / "best"
    assert Path(state["best_model_checkpoint"]).is_dir()
