"""The private methods of the libraries' trainers that are overridden; trying to save; which checkpoints are kept."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from commands import ON_CPU
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import TrainerCallback

from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.training.checkpoints import TRAINER_OVERRIDES, CheckpointingTrainer
from cutlm.training.config import CUTConfig
from cutlm.training.pairs import PairTrainer
from cutlm.training.trainer import CUTTrainer

LIBRARIES = {"DPOTrainer": trl.DPOTrainer, "Trainer": transformers.Trainer}


def test_every_overridden_private_method_is_listed() -> None:
    overridden = {
        f"{library.__name__}.{name}"
        for trainer in (CheckpointingTrainer, CUTTrainer, PairTrainer)
        for library in LIBRARIES.values()
        for name, value in vars(trainer).items()
        if callable(value) and name.startswith("_") and not name.startswith("__") and name in vars(library)
    }
    assert overridden == set(TRAINER_OVERRIDES)


def test_the_overridden_methods_are_those_that_were_checked() -> None:
    changed = {}
    for name, expected in TRAINER_OVERRIDES.items():
        library, _, method = name.partition(".")
        source = inspect.getsource(vars(LIBRARIES[library])[method])
        found = hashlib.sha256(source.encode()).hexdigest()[:12]
        if found != expected:
            changed[name] = found
    assert not changed, (
        f"transformers {transformers.__version__}, trl {trl.__version__} changed these methods: {sorted(changed)}; read"
        f" their source, adapt the overrides, then update TRAINER_OVERRIDES: {changed}"
    )


# ---- What can fail at saving fails before training ----


def make_base(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """Save a tiny model with other files."""
    save_tiny_model(folder)
    if not generation:  # old models have these fields in config.json
        (folder / "generation_config.json").unlink()
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values:
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | values))
    return folder


def train_fully(base: Path, out: Path) -> int:
    data = out.with_name("records.jsonl")
    data.write_text(json.dumps({"instruction": "Hi.", "output": "Hello.", "judgment": None}) + "\n")
    options = [f"--model_name_or_path={base}", f"--data={data}", f"--output_dir={out}", "--use_peft=false", "--use_cpu"]
    return main(["train", *options, "--max_steps=1", "--report_to=none", "--save_strategy=no"])


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"temperature": 0.6, "top_k": 20, "max_new_tokens": 100}, {}),
        ({}, {"temperature": 0.6, "do_sample": True}),
        ({}, {"top_p": 0.9}),
    ],
)
def test_a_model_with_defaults_for_sampling_is_saved(
    generation: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", generation, **config)
    assert train_fully(base, tmp_path / "out") == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    expected = generation | config | {"do_sample": True}
    assert {name: saved.get(name) for name in expected} == expected
    assert not list((tmp_path / "out").glob(".*"))


def test_weights_that_share_memory_are_refused_before_training(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    model = make_model(len(tokenizer))
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    trainer = CUTTrainer(
        model=model,
        args=CUTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1),
        train_dataset=[{"instruction": "Hi.", "output": "Hello.", "judgment": None}],
        processing_class=tokenizer,
    )
    with pytest.raises(UserError, match="nothing was trained"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no vocabulary file")

    base = save_tiny_model(tmp_path / "base")
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", refuse)
    assert train_fully(base, tmp_path / "out") == 2
    assert "no vocabulary file" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


# ---- Which checkpoints are kept ----


class _StopAt(TrainerCallback):
    """Asks a trainer to stop while it runs the step after a given one."""

    def __init__(self, trainer: CUTTrainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.trainer.request_stop()


@pytest.mark.parametrize("save_strategy", ["best", "steps"])
def test_a_stopped_run_keeps_its_last_checkpoint_next_to_the_best(tmp_path: Path, save_strategy: str) -> None:
    rows = [{"prompt_ids": [1, 5], "judged_prompt_ids": None, "response_ids": [7, 2]}] * 4
    settings = ON_CPU | {"max_steps": 4, "save_strategy": save_strategy, "save_steps": 1, "save_total_limit": 1}
    # The loss falls, so this takes the first checkpoint for the best one.
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = CUTTrainer(make_model(32), CUTConfig(output_dir=str(tmp_path), **settings), rows, rows)
    trainer.add_callback(_StopAt(trainer, 2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_the_best_of_the_saved_models_is_loaded_if_a_better_one_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt_ids": [1, 5], "judged_prompt_ids": None, "response_ids": [7, 2]}] * 4
    settings = ON_CPU | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = CUTTrainer(make_model(32), CUTConfig(output_dir=str(tmp_path), **settings), rows, rows)
    losses, evaluate = iter([9.0, 3.0, 8.0, 7.0, 2.0, 6.0]), trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda **options: evaluate(**options) | {"eval_loss": next(losses)})
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(weight.equal(weights[name]) for name, weight in trainer.model.state_dict().items() if name in weights)
