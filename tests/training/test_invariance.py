"""The same records give the same gradient for every way to split a step, through the real command.

With plain gradient descent at learning rate 1 and no clipping, the weights move by exactly the gradient.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options, run_main, run_ranks
from safetensors.torch import load_file

from cutlm import CUTConfig, CUTTrainer, load_records
from cutlm.cli import main
from cutlm.model.loading import load_model, load_tokenizer

RECORDS = [
    {
        "instruction": f"Name a city, number {index}. " + "Please. " * (index % 3),
        "output": "The capital is Sydney, a large city." + " And so on." * (index % 4),
        "judgment": None if index in (1, 4, 6) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(8)
]
SETTINGS = ON_CPU | {
    "use_peft": False,
    "optim": "sgd",
    "learning_rate": 1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
}


class Workplace:
    """A folder of records and runs."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        (folder / "records.json").write_text(json.dumps(RECORDS))

    def list_options(self, name: str, micro_batch: int, num_micro_batches: int, **settings: Any) -> list[str]:
        """The command line of a run; the folder of its output is the name."""
        values = SETTINGS | {
            "model_name_or_path": self.base,
            "data": self.folder / "records.json",
            "output_dir": self.folder / name,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": num_micro_batches,
            "per_device_eval_batch_size": 5,
        }
        return ["train", *list_options(**values | settings)]

    def compute_gradient(self, name: str) -> torch.Tensor:
        """The gradient of a run of one step."""
        before = load_file(self.base / "model.safetensors")
        after = load_file(self.folder / name / "model.safetensors")
        return torch.cat([(before[key] - after[key]).flatten() for key in sorted(before)])

    def read_log(self, name: str, metric: str = "loss") -> list[dict[str, float]]:
        """The lines of a run's log that have a metric."""
        lines = json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]
        return [line for line in lines if metric in line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("invariance"), base)


@pytest.fixture(scope="module", params=["token", "record"])
def whole_step(request: pytest.FixtureRequest, workplace: Workplace) -> tuple[str, torch.Tensor]:
    """The normalization, and the gradient of all records in one micro-batch."""
    name = f"{request.param}-8x1"
    assert main(workplace.list_options(name, 8, 1, normalization=request.param)) == 0
    gradient = workplace.compute_gradient(name)
    assert gradient.norm() > 0.1
    return request.param, gradient


@pytest.mark.parametrize(("micro_batch", "num_micro_batches"), [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_do_not_change_the_gradient(
    workplace: Workplace, whole_step: tuple[str, torch.Tensor], micro_batch: int, num_micro_batches: int
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-{micro_batch}x{num_micro_batches}"
    assert main(workplace.list_options(name, micro_batch, num_micro_batches, normalization=normalization)) == 0
    gradient = workplace.compute_gradient(name)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("max_tokens", [400, 1])
def test_splitting_a_micro_batch_into_parts_does_not_change_the_gradient(
    workplace: Workplace, whole_step: tuple[str, torch.Tensor], max_tokens: int
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-{max_tokens}-tokens"
    settings = {"normalization": normalization, "max_tokens_per_batch": max_tokens}
    assert main(workplace.list_options(name, 8, 1, **settings)) == 0
    gradient = workplace.compute_gradient(name)
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    one, parts = (workplace.read_log(run)[0] for run in (f"{normalization}-8x1", name))
    for key in ("loss", "flagged_share", "grad_norm", "flagged_share_q50"):
        assert parts[key] == pytest.approx(one[key], rel=1e-4), key


def test_two_ranks_give_the_gradient_and_the_log_of_one(
    workplace: Workplace, whole_step: tuple[str, torch.Tensor]
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-two-ranks"
    if normalization == "token":
        # Started as users do. With one token a part, each rank has as many parts as records.
        options = workplace.list_options(name, 2, 2, max_tokens_per_batch=1)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, "-m", "cutlm", *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert result.returncode == 0, result.stderr
    else:
        results = run_ranks(run_main, workplace.list_options(name, 2, 2, normalization=normalization))
        assert [result.exit_code for result in results] == [0, 0], results
    gradient = workplace.compute_gradient(name)
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    one, two = (workplace.read_log(run)[0] for run in (f"{normalization}-8x1", name))
    keys = [key for key in one if key.startswith(("loss", "flagged", "mean"))]
    assert len(keys) == 8, keys
    for key in keys:
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    # 5 records, of which the first rank measures 3 and the second 2.
    starts = [workplace.read_log(run, "flag_signal") for run in (f"{normalization}-8x1", name)]
    assert [len(lines) for lines in starts] == [1, 1]
    for key in ("flag_signal", "pairwise"):
        assert starts[1][0][key] == pytest.approx(starts[0][0][key], abs=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_two_ranks_take_the_steps_of_one_with_twice_the_micro_batches(workplace: Workplace) -> None:
    """Several epochs in random order: every step has the records that it has on one rank, also after resuming."""
    steps = {"max_steps": 6, "learning_rate": 0.05, "optim": "adamw_torch", "max_grad_norm": 1}
    assert main(workplace.list_options("one-rank-6-steps", 1, 4, **steps)) == 0
    # Each epoch has two steps, so that the third ends within the second epoch.
    saving = {"save_strategy": "steps", "save_steps": 3}
    checkpoint = workplace.folder / "two-ranks-6-steps" / "checkpoint-3"
    for name, settings in {
        "two-ranks-6-steps": saving,
        "two-ranks-resumed": saving | {"resume_from_checkpoint": checkpoint},
    }.items():
        results = run_ranks(run_main, workplace.list_options(name, 1, 2, **steps, **settings))
        assert [result.exit_code for result in results] == [0, 0], results
    names = ("one-rank-6-steps", "two-ranks-6-steps", "two-ranks-resumed")
    expected, *others = (workplace.read_log(name)[:6] for name in names)
    for log in others:
        for line, other in zip(expected, log, strict=True):
            for key in ("loss", "grad_norm", "flagged_share"):
                assert other[key] == pytest.approx(line[key], rel=1e-3), (line, other)


def test_these_records_tell_a_mean_of_micro_batch_means_from_ours(workplace: Workplace) -> None:
    """The released code takes such a mean; with equal records, the tests above would not show the difference."""
    trainer = CUTTrainer(
        load_model(workplace.base),
        CUTConfig(output_dir=str(workplace.folder / "unused"), **ON_CPU),
        load_records(workplace.folder / "records.json"),
        processing_class=load_tokenizer(workplace.base),
    )
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        whole = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
        parts = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    assert abs(whole - sum(parts) / len(parts)) > 1e-3
