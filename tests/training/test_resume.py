"""Checkpoints survive a kill at any moment, and a resumed run ends bit for bit like an uninterrupted one."""

import gzip
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ON_CPU, KillPoint, list_options, start_command
from safetensors.torch import load_file

from cutlm.cli import main

# 12 records in steps of 4, two epochs: 6 steps, with checkpoints within an epoch (2, 4) and at its end (6).
RECORDS = [
    {
        "instruction": f"Name a city, number {index}.",
        "output": f"The capital is Sydney, a large city. {index}",
        "judgment": None if index % 3 == 0 else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(12)
]
SETTINGS = ON_CPU | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "lora_dropout": 0.2,
    "save_steps": 2,
    "logging_steps": 2,
    "save_total_limit": 2,
}
TRAINER = "cutlm.training.trainer:CUTTrainer"
CHECKPOINTS = "cutlm.training.checkpoints"


class Workplace:
    """A folder of records and runs.

    Attributes:
        folder: The folder.
        run: An uninterrupted run in it, which tests do not change.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.run = folder, base, folder / "uninterrupted"
        (folder / "records.json").write_text(json.dumps(RECORDS))
        assert main(self.list_options(self.run)) == 0

    def list_options(self, out: Path, **settings: Any) -> list[str]:
        paths = {"model_name_or_path": self.base, "data": self.folder / "records.json", "output_dir": out}
        return ["train", *list_options(**SETTINGS | paths | settings)]

    def train(self, out: Path, **settings: Any) -> int:
        return main(self.list_options(out, **settings))

    def resume(self, out: Path, checkpoint: str | Path = "last", **settings: Any) -> int:
        return self.train(out, resume_from_checkpoint=checkpoint, **settings)

    def train_killed(self, out: Path, kill_at: KillPoint, **settings: Any) -> None:
        result = start_command(self.list_options(out, **settings), kill_at).wait()
        assert result.exit_code == -signal.SIGKILL, result.stderr

    def check_same_end(self, out: Path) -> None:
        """Check that a run ended bit for bit like the uninterrupted one."""
        expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (self.run, out))
        assert expected.keys() == got.keys()
        assert all(expected[key].equal(got[key]) for key in expected)
        assert any(value.abs().sum() > 0 for key, value in got.items() if "lora_B" in key), "nothing was trained"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"), base)


@pytest.fixture
def run(workplace: Workplace, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(workplace.run, tmp_path / "run"))


def list_checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def list_state(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


# ---- Kills and signals ----


@pytest.mark.parametrize(
    ("kill_at", "save_steps", "kept", "final"),
    [
        # While the second checkpoint is written: its adapter is there, its optimizer is not.
        (KillPoint(TRAINER, "_save_optimizer_and_scheduler", 2), 2, ["checkpoint-2"], ["checkpoint-4", "checkpoint-6"]),
        # The same one step after the end of an epoch.
        (
            KillPoint(TRAINER, "_save_optimizer_and_scheduler", 4),
            1,
            ["checkpoint-2", "checkpoint-3"],
            ["checkpoint-5", "checkpoint-6"],
        ),
        # When all of the checkpoint is written, but not yet renamed.
        (KillPoint(CHECKPOINTS, "sync_tree", 2), 2, ["checkpoint-2"], ["checkpoint-4", "checkpoint-6"]),
        # Between two checkpoints, in the middle of an optimizer step.
        (KillPoint(TRAINER, "_get_grad_norm", 3), 2, ["checkpoint-2"], ["checkpoint-4", "checkpoint-6"]),
    ],
    ids=["half-written", "end-of-epoch", "not-renamed", "mid-step"],
)
def test_a_killed_run_resumes_from_its_last_complete_checkpoint(
    workplace: Workplace, tmp_path: Path, kill_at: KillPoint, save_steps: int, kept: list[str], final: list[str]
) -> None:
    out = tmp_path / "out"
    workplace.train_killed(out, kill_at, save_steps=save_steps)
    assert list_checkpoints(out) == kept
    assert workplace.resume(out, save_steps=save_steps) == 0
    workplace.check_same_end(out)
    assert list_checkpoints(out) == final, "save_total_limit is 2"
    assert not (out / ".saving").exists(), "the staging folder is removed"


def test_a_kill_while_the_final_model_is_saved_leaves_no_partial_model(workplace: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    workplace.train_killed(out, KillPoint(CHECKPOINTS, "publish_files", 1))
    assert not (out / "adapter_config.json").exists()
    assert workplace.resume(out) == 0
    workplace.check_same_end(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_to_resume(
    workplace: Workplace, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    options = workplace.list_options(out, save_strategy="no", logging_steps=1)
    process = start_command([*options, "--overwrite_output_dir", "true"])
    process.wait_for_output("'loss'")
    process.send_signal(number)
    result = process.wait()
    assert result.exit_code == 128 + number, result
    (checkpoint,) = list_checkpoints(out)
    step = int(checkpoint.removeprefix("checkpoint-"))
    assert 0 < step < 6, "the run was over before the signal came"
    assert f"cutlm {' '.join(options)} --resume_from_checkpoint last" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert main([*options, "--resume_from_checkpoint", "last"]) == 0
    workplace.check_same_end(out)


# ---- Starting over ----


def test_an_output_folder_in_use_is_refused_and_not_changed(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list_state(workplace.run)
    assert workplace.train(workplace.run) == 2
    message = capsys.readouterr().err
    assert message.startswith("cutlm train: output_dir: ")
    for part in ("checkpoint-6", "--resume_from_checkpoint last", "--overwrite_output_dir"):
        assert part in message
    assert list_state(workplace.run) == before


def test_starting_over_removes_checkpoints_and_model_of_the_old_run(workplace: Workplace, run: Path) -> None:
    (run / "checkpoint-999").mkdir()
    (run / "checkpoint-999" / "trainer_state.json").write_text("{}")
    assert workplace.train(run, overwrite_output_dir=True, max_steps=1, use_peft=False) == 0
    assert list_checkpoints(run) == ["checkpoint-1"]
    names = {path.name for path in run.iterdir()}
    assert "model.safetensors" in names
    assert not any(name.startswith("adapter") for name in names)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"optim": "galore_adamw"}, "optim, "),
        ({"lora_target_modules": "query"}, "lora_target_modules"),
        ({"eval_split": 0.5}, "eval_data, eval_split"),
    ],
)
def test_starting_over_with_bad_input_loses_nothing(
    workplace: Workplace, run: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], name: str
) -> None:
    before = list_state(run)
    assert workplace.train(run, overwrite_output_dir=True, **settings) == 2
    assert f"cutlm train: {name}" in capsys.readouterr().err
    assert list_state(run) == before


# ---- Resuming ----


def test_resuming_without_a_checkpoint_is_refused(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint, named in (
        ("last", tmp_path / "out"),
        (tmp_path / "nowhere", tmp_path / "nowhere"),
        (workplace.run, workplace.run),  # a run's folder, which is no checkpoint
    ):
        assert workplace.resume(tmp_path / "out", checkpoint) == 2
        assert capsys.readouterr().err.startswith(f"cutlm train: {named}: ")


def test_resuming_a_finished_run_changes_nothing(workplace: Workplace, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "lr_scheduler_type": "constant"}
    assert workplace.train(tmp_path / "out", **settings) == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert workplace.resume(tmp_path / "out", **settings) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert list_checkpoints(tmp_path / "out") == ["checkpoint-2"]


def test_resuming_with_other_records_batches_or_processes_is_refused(
    workplace: Workplace, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(RECORDS[:8]))
    facts = json.loads((run / "cutlm_run.json").read_text())
    (run / "cutlm_run.json").write_text(json.dumps(facts | {"num_processes": 2}))
    before = list_state(run)
    # Without the last, incomplete batch an epoch has fewer steps, and without the judged context fewer records.
    others = {"dataloader_drop_last": True, "use_judged_loss": False}
    assert workplace.resume(run, data=edited, per_device_train_batch_size=4, max_length=100, **others) == 2
    problems = capsys.readouterr().err.removeprefix("cutlm train: ").splitlines()
    assert [problem.partition(":")[0] for problem in problems] == [
        "dataloader_drop_last",
        "max_length",
        "per_device_train_batch_size",
        "use_judged_loss",
        "data",
        "the run to resume has 2 processes, got 1; use as many, or start over with --overwrite_output_dir",
    ]
    assert list_state(run) == before


def test_a_run_with_damaged_or_without_facts_is_compared_by_the_name_of_its_data(
    workplace: Workplace, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copy(workplace.folder / "records.json", tmp_path / "other.json")
    (run / "cutlm_run.json").write_text("{")
    assert workplace.resume(run, data=other) == 2
    assert "cutlm_run.json: " in capsys.readouterr().err
    (run / "cutlm_run.json").unlink()
    assert workplace.resume(run, data=other) == 2
    assert capsys.readouterr().err.startswith("cutlm train: data: ")


def test_data_and_checkpoint_may_move_and_changed_settings_are_named(
    workplace: Workplace, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoint-6"
    (tmp_path / "scratch").mkdir()
    last.rename(tmp_path / "scratch" / last.name)
    last.symlink_to(tmp_path / "scratch" / last.name)
    data = tmp_path / "moved.json.gz"
    data.write_bytes(gzip.compress((workplace.folder / "records.json").read_bytes()))
    assert workplace.resume(run, data=data, threshold=1.2) == 0
    assert "threshold was 1.1 before this resume, and is 1.2 now" in capsys.readouterr().out


def test_setting_that_an_earlier_version_lacked_has_its_default(
    workplace: Workplace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "cutlm_train.yaml"
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"drop_ineffective": True}))
    assert workplace.resume(run) == 2  # other records
    assert capsys.readouterr().err.startswith("cutlm train: drop_ineffective: ")
    del settings["drop_ineffective"], settings["judgment_role"], settings["threshold"]
    path.write_text(yaml.safe_dump(settings))
    assert workplace.resume(run) == 0
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "before this resume" in line]
    assert named == ["output_dir"]  # it is a copy


def test_a_checkpoint_of_another_run_is_compared_with_that_run(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = workplace.run / "checkpoint-4"
    (tmp_path / "in-use").mkdir()
    (tmp_path / "in-use" / "README.md").write_text("mine")
    assert workplace.resume(tmp_path / "in-use", checkpoint) == 2
    assert "output_dir: " in capsys.readouterr().err
    assert (tmp_path / "in-use" / "README.md").read_text() == "mine"
    assert workplace.resume(tmp_path / "out", checkpoint, seed=7, lora_r=2) == 2
    problems = capsys.readouterr().err.removeprefix("cutlm train: ").splitlines()
    assert [problem.partition(":")[0] for problem in problems] == ["lora_r", "seed"]
    assert workplace.resume(tmp_path / "out", checkpoint) == 0
    workplace.check_same_end(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("optimizer.pt", None, "no optimizer state"),
        ("scheduler.pt", None, "no scheduler state"),
        ("rng_state.pth", None, "no random state"),
        ("adapter_model.safetensors", None, "no weights"),
        ("trainer_state.json", None, "no trainer state"),
        ("optimizer.pt", b"PK", "optimizer.pt"),
        ("adapter_model.safetensors", b"{", "adapter_model.safetensors"),
        ("trainer_state.json", b"{", "trainer_state.json"),
        ("trainer_state.json", b"{}", "trainer_state.json"),
    ],
)
def test_an_incomplete_or_damaged_checkpoint_is_refused(
    workplace: Workplace,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    expected: str,
) -> None:
    file = run / "checkpoint-6" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert workplace.resume(run) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"cutlm train: {run / 'checkpoint-6'}: ")
    assert expected in message


def test_the_best_checkpoint_is_recorded_by_its_final_name(workplace: Workplace, tmp_path: Path) -> None:
    settings = {"eval_split": 0.25, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    assert workplace.train(tmp_path / "out", **settings) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == tmp_path / "out"
    assert Path(state["best_model_checkpoint"]).is_dir()
