"""The same records give the same gradient however a step is cut up: through the real command, gradient and all.

With plain gradient descent at learning rate 1 and no clipping, the weights move by exactly the gradient.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_model

from cutlm.cli import main

RECORDS = [
    {
        "instruction": f"Name a city, number {index}. " + "Please. " * (index % 3),
        "output": "The capital is Sydney, a large city." + " And so on." * (index % 4),
        "judgment": None if index in (1, 4, 6) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(8)
]
SETTINGS = {
    "use_peft": False,
    "optim": "sgd",
    "learning_rate": 1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "max_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance")
    save_tiny_model(folder / "base")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    return folder


def _options(workplace: Path, name: str, micro_batch: int, num_micro_batches: int, **settings: object) -> list[str]:
    values = SETTINGS | {
        "model_name_or_path": workplace / "base",
        "data": workplace / "records.json",
        "output_dir": workplace / name,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
    }
    return [text for key, value in (values | settings).items() for text in (f"--{key}", str(value))]


def _gradient(workplace: Path, name: str) -> torch.Tensor:
    before = load_file(workplace / "base" / "model.safetensors")
    after = load_file(workplace / name / "model.safetensors")
    return torch.cat([(before[key] - after[key]).flatten() for key in sorted(before)])


@pytest.fixture(scope="module", params=["token", "record"])
def whole_step(request: pytest.FixtureRequest, workplace: Path) -> tuple[str, torch.Tensor]:
    name = f"{request.param}-8x1"
    assert main(["train", *_options(workplace, name, 8, 1, normalization=request.param)]) == 0
    return request.param, _gradient(workplace, name)


@pytest.mark.parametrize(("micro_batch", "num_micro_batches"), [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_do_not_change_the_gradient(
    workplace: Path, whole_step: tuple[str, torch.Tensor], micro_batch: int, num_micro_batches: int
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-{micro_batch}x{num_micro_batches}"
    options = _options(workplace, name, micro_batch, num_micro_batches, normalization=normalization)
    assert main(["train", *options]) == 0
    gradient = _gradient(workplace, name)
    assert expected.norm() > 0.1
    assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("max_tokens", [400, 1])
def test_parts_of_a_micro_batch_do_not_change_the_gradient(
    workplace: Path, whole_step: tuple[str, torch.Tensor], max_tokens: int
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-{max_tokens}-tokens"
    options = _options(workplace, name, 8, 1, normalization=normalization, max_tokens_per_batch=max_tokens)
    assert main(["train", *options]) == 0
    gradient = _gradient(workplace, name)
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    one, parts = (
        json.loads((workplace / run / "trainer_state.json").read_text())["log_history"][0]
        for run in (f"{normalization}-8x1", name)
    )
    for key in ("loss", "flagged_share", "grad_norm", "flagged_share_q50"):
        assert parts[key] == pytest.approx(one[key], rel=1e-4), key


def test_two_processes_give_the_gradient_and_the_log_of_one(
    workplace: Path, whole_step: tuple[str, torch.Tensor]
) -> None:
    normalization, expected = whole_step
    name = f"{normalization}-two-processes"
    # With one token a part, each rank has as many parts as records.
    further = {"max_tokens_per_batch": 1} if normalization == "token" else {}
    options = _options(workplace, name, 2, 2, normalization=normalization, **further)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "-m", "cutlm", "train", *options], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    gradient = _gradient(workplace, name)
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    one = json.loads((workplace / f"{normalization}-8x1" / "trainer_state.json").read_text())["log_history"][0]
    two = json.loads((workplace / name / "trainer_state.json").read_text())["log_history"][0]
    keys = [key for key in one if key.startswith(("loss", "flagged", "mean"))]
    assert len(keys) == 8, keys
    for key in keys:
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_two_processes_take_the_steps_of_one_with_twice_the_micro_batches(workplace: Path) -> None:
    """Several steps and passes over the data, in random order: every step has the records that it has on one."""
    steps = {"max_steps": 6, "learning_rate": 0.05, "optim": "adamw_torch", "max_grad_norm": 1, "logging_steps": 1}
    one = _options(workplace, "one-for-long", 1, 4, **steps)
    two = _options(workplace, "two-for-long", 1, 2, **steps)
    assert main(["train", *one]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "-m", "cutlm", "train", *two], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    logs = [
        json.loads((workplace / name / "trainer_state.json").read_text())["log_history"][:6]
        for name in ("one-for-long", "two-for-long")
    ]
    for line, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "flagged_share"):
            assert other[key] == pytest.approx(line[key], rel=1e-3), (line, other)


def test_a_mean_of_micro_batch_means_would_not_have_passed(workplace: Path) -> None:
    """What the released code does: the records differ enough for the difference to show."""
    from cutlm import CUTConfig, CUTTrainer, load_records
    from cutlm.model.loading import load_model, load_tokenizer

    trainer = CUTTrainer(
        load_model(workplace / "base"),
        CUTConfig(output_dir=str(workplace / "unused"), use_cpu=True),
        load_records(workplace / "records.json"),
        processing_class=load_tokenizer(workplace / "base"),
    )
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        whole = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
        parts = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    assert abs(whole - sum(parts) / len(parts)) > 1e-3
