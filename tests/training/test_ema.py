"""`teacher: ema`: the teacher is a moving average of the trained weights, and is asked in every step."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options, write_lines
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import TrainerCallback

from cutlm import CUTConfig, CUTTrainer
from cutlm.cli import main
from cutlm.errors import ConfigError
from cutlm.training.ema import EMA_FILE, AveragedWeights

RECORDS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {index}. " + "Please. " * (index % 3),
        "output": "The capital is Sydney, a large city." + " And so on." * (index % 4),
        "judgment": None if index in (1, 4) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(6)
]
OBJECTIVES: list[dict[str, Any]] = [
    {"objective": "self_distillation"},
    {"objective": "self_distillation", "distillation": "sampled", "importance_clip": 2.0},
    {"objective": "redirect", "threshold": 1.0, "teacher_context": "advice"},
]
TOKENIZER = make_tokenizer("bpe")
STEPS = ON_CPU | {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2}
STEPS |= {"per_device_train_batch_size": 3, "lr_scheduler_type": "constant", "max_tokens_per_batch": 200}


def make_trainer(model: Any = None, has_adapter: bool = False, **settings: Any) -> Any:
    args = CUTConfig(**STEPS | {"objective": "self_distillation"} | settings)
    adapter = LoraConfig(target_modules=["up_proj", "q_proj"], lora_dropout=0.0) if has_adapter else None
    model = make_model(len(TOKENIZER)) if model is None else model
    return CUTTrainer(model=model, args=args, train_dataset=RECORDS, processing_class=TOKENIZER, peft_config=adapter)


def list_losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("settings", OBJECTIVES, ids=["topk", "sampled", "redirect"])
def test_rate_0_is_the_frozen_teacher(settings: dict[str, Any], has_adapter: bool) -> None:
    trainers = [make_trainer(has_adapter=has_adapter, **settings)]
    trainers.append(make_trainer(has_adapter=has_adapter, teacher="ema", teacher_ema_rate=0.0, **settings))
    trainers.append(make_trainer(has_adapter=has_adapter, teacher="ema", teacher_ema_rate=0.5, **settings))
    frozen, still, moving = ([trainer.train(), list_losses(trainer)][1] for trainer in trainers)
    assert frozen[-1] != pytest.approx(frozen[0], rel=1e-2)
    assert still == pytest.approx(frozen, rel=1e-4)
    assert moving[0] == pytest.approx(frozen[0], rel=1e-4)
    assert abs(moving[-1] - frozen[-1]) > 10 * abs(still[-1] - frozen[-1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_tokens_outside_of_the_support_of_a_guided_teacher_count(divergence: str) -> None:
    losses = []
    for settings in ({}, {"teacher": "ema", "teacher_ema_rate": 0.0}):
        model: Any = make_model(len(TOKENIZER))
        model.lm_head.weight.data *= 6  # so that the teacher supports less than 20 tokens
        trainer = make_trainer(model, divergence=divergence, max_steps=1, **settings)
        trainer.train()
        losses += list_losses(trainer)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


class _Recorder(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen = [self.read()]

    def read(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: weight.detach().double().clone() for name, weight in named if weight.requires_grad}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.read())


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_average_after_some_steps_is_that_of_a_naive_twin(has_adapter: bool) -> None:
    trainer = make_trainer(has_adapter=has_adapter, teacher="ema")
    recorder = _Recorder(trainer.model)
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.seen) == 5
    assert set(trainer.averaged.weights) == set(recorder.seen[0])
    for name, found in trainer.averaged.weights.items():
        expected = recorder.seen[0][name]
        for weights in recorder.seen[1:]:
            expected = 0.95 * expected + 0.05 * weights[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    # The model itself has its own weights.
    for name, weight in recorder.read().items():
        torch.testing.assert_close(weight, recorder.seen[-1][name], rtol=0, atol=0)


def test_teacher_is_the_averaged_model() -> None:
    trainer = make_trainer(teacher="ema", teacher_ema_rate=0.3, max_tokens_per_batch=None)
    trainer.train()
    averaged = copy.deepcopy(trainer.model)
    averaged.load_state_dict({name: weight.clone() for name, weight in trainer.averaged.weights.items()})
    expected = make_trainer(averaged)
    before = make_trainer()
    batch, wanted, earlier = (one.data_collator(list(one.train_dataset)) for one in (trainer, expected, before))
    asked = trainer._ask_teacher(trainer.model, batch)
    probabilities = [
        torch.zeros(len(ids), len(TOKENIZER)).scatter(1, ids, logps.exp())
        for ids, logps in ((one["teacher_ids"], one["teacher_logps"]) for one in (asked, earlier))
    ]
    taught = torch.zeros_like(probabilities[0])
    # Padding repeats a token with probability 0.
    taught.scatter_add_(1, wanted["teacher_ids"], wanted["teacher_logps"].exp())
    torch.testing.assert_close(probabilities[0], taught, rtol=1e-3, atol=1e-4)
    assert (probabilities[1] - taught).abs().max() > 0.01


def test_average_of_low_precision_weights_is_in_float32() -> None:
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    averaged = AveragedWeights(layer, 0.001)
    layer.weight.data.fill_(2.0)
    for _ in range(3):  # each step is below the resolution of bfloat16
        averaged.update(layer)
    assert averaged.weights["weight"].item() == pytest.approx(2 - 0.999**3, rel=1e-6)
    with averaged.applied(layer):
        assert (layer.weight.item(), layer.weight.dtype) == (1.0, torch.bfloat16)
    assert layer.weight.item() == 2


def test_teacher_has_no_dropout() -> None:
    model: Any = make_model(len(TOKENIZER))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(model, teacher="ema")
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    first, second = (trainer._ask_teacher(trainer.model, batch)["teacher_logps"] for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.model.training


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="teacher: expected frozen"):
        CUTConfig(objective="redirect", teacher="ema")


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "ema"},
        {"objective": "redirect", "teacher_ema_rate": 0.1},
        {"objective": "redirect", "teacher": "ema", "teacher_ema_rate": 1.5},
        {"objective": "redirect", "teacher": "mean"},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="teacher"):
        CUTConfig(**settings)


def test_resumed_run_has_the_averaged_weights_of_its_checkpoint(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole, resumed = write_lines(tmp_path / "data.jsonl", RECORDS), tmp_path / "whole", tmp_path / "resumed"

    def train(out: Path, **further: Any) -> int:
        settings = STEPS | {"objective": "self_distillation", "teacher": "ema", "save_strategy": "steps"}
        settings |= {"save_steps": 2, "model_name_or_path": base, "data": data, "output_dir": out} | further
        return main(["train", *list_options(**settings)])

    assert train(whole) == 0
    assert not (whole / EMA_FILE).exists()  # a part of checkpoints only
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    assert train(resumed, resume_from_checkpoint="last") == 0
    for name in (EMA_FILE, "adapter_model.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / name) for folder in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, resumed)]
    assert [line.get("loss") for line in losses[0]] == [line.get("loss") for line in losses[1]]
    shutil.rmtree(resumed / "checkpoint-4")
    for name, expected in ((EMA_FILE, EMA_FILE), ("adapter_model.safetensors", "found no weights")):
        path = resumed / "checkpoint-2" / name
        path.rename(tmp_path / name)
        capsys.readouterr()
        assert train(resumed, resume_from_checkpoint="last") == 2
        assert expected in capsys.readouterr().err
        (tmp_path / name).rename(path)
