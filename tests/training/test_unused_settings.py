"""Settings that would have no effect, or another one than they say, are refused; what training changes is told."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, make_model, make_tokenizer, save_tiny_model

from cutlm import CUTConfig, CUTTrainer
from cutlm.cli import main
from cutlm.errors import ConfigError

ROW = {"prompt_ids": [1, 2], "judged_prompt_ids": [1, 2, 3], "response_ids": [4, 5]}


def make_config(**settings: Any) -> CUTConfig:
    return CUTConfig(**{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "likelihood", "threshold": 2.0}, "threshold: not used by objective likelihood; remove"),
        ({"objective": "hindsight", "gamma": 0.5}, "gamma: not used by objective hindsight"),
        ({"objective": "dpo", "threshold": 2.0, "map_spans": True}, "threshold, map_spans: not used by objective dpo"),
        ({"detector": "off", "threshold": 2.0}, "threshold: not used by objective cut, detector off"),
        ({"detector": "spans", "gamma": 0.0}, "gamma: not used by objective cut, detector spans"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected none, because"),
        ({"fp16": True}, "fp16: expected false on a CPU, where it would have no effect, got true; bf16 works there"),
        ({"objective": "ppo"}, r"objective: expected one of cut, .*, got 'ppo'"),
        ({"detector": "guess"}, r"detector: expected one of current, frozen, spans, off, got 'guess'"),
        (
            {"objective": "hindsight", "detector": "frozen", "use_contrast_loss": False},
            r"detector, use_contrast_loss: not used by objective hindsight",
        ),
        ({"satisfactory_only": True}, r"satisfactory_only: not used by objective cut"),
        (
            {"use_contrast_loss": False, "use_satisfactory_loss": False, "use_judged_loss": False},
            r"use_contrast_loss, use_satisfactory_loss, use_judged_loss: expected at least one",
        ),
        ({"praise_weight": -1}, r"praise_weight: expected a number of at least 0, got -1"),
        ({"praise_weight": 2.0}, r"praise_weight: not used by objective cut"),
        ({"dpo_beta": 0.3}, r"dpo_beta: not used by objective cut"),
        ({"objective": "dpo", "dpo_beta": 0.0}, r"dpo_beta: expected a number above 0, got 0"),
        ({"gamma": float("inf")}, r"gamma: expected a number of at least 0, got inf"),
        ({"threshold": float("inf")}, r"threshold: expected a number of at least 1 .*, got inf"),
        (
            {"objective": "dpo", "downsample": 0.5, "normalization": "record"},
            r"downsample, normalization: not used by objective dpo",
        ),
        ({"num_train_epochs": 0}, "num_train_epochs, max_steps: expected at least one step, got none"),
        ({"metric_for_best_model": "foo"}, r"metric_for_best_model: expected one of loss, .*, got 'foo'"),
        (
            {"activation_checkpointing_kwargs": {"foo": 1}},
            r"activation_checkpointing_kwargs: expected some of .* got foo",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config: expected dispatch_batches false, got",
        ),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: expected split_batches false, got true"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: expected even_batches true, got false"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "unlikelihood", "unlikelihood_weight": 0.5},
        {"objective": "dual_cut", "threshold": 1.2, "gamma": 0.5},
        {"detector": "spans", "unlikelihood_weight": 0.5},
        {"metric_for_best_model": "eval_loss_contrast"},
        {"metric_for_best_model": "flagged_share_q50"},
        {"activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}},
        {"num_train_epochs": 0, "max_steps": 1},
        {"accelerator_config": {"even_batches": True}},
    ],
)
def test_what_has_an_effect_is_taken(settings: dict[str, Any]) -> None:
    make_config(**settings)


def test_liger_kernels_without_their_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"use_liger_kernel: .* run: pip install liger"):
        make_config(use_liger_kernel=True)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: would never be called"):
        CUTTrainer(make_model(10), make_config(), [ROW], **{name: print})
    CUTTrainer(make_model(10), make_config(), [ROW], **{name: None})


def test_records_longer_than_the_models_context_are_refused() -> None:
    model = make_model(10, max_position_embeddings=4)
    CUTTrainer(model, make_config(), [ROW | {"judged_prompt_ids": [1, 2]}])
    message = r"^max_length: expected at most the model's context of 4 tokens, got 2048 and a record of 5"
    with pytest.raises(ConfigError, match=message):
        CUTTrainer(model, make_config(), [ROW])
    # Positions that are stretched are meant for more.
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 4}
    CUTTrainer(make_model(10, max_position_embeddings=4, rope_parameters=yarn), make_config(), [ROW])


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "base")
    rows = [
        {"instruction": f"Name {n}.", "output": f"City {n}.", "judgment": "No." if n % 2 else None} for n in range(4)
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    return tmp_path


def train(workplace: Path, *options: str) -> int:
    required = ["--model_name_or_path", workplace / "base", "--data", workplace / "records.json"]
    required += ["--output_dir", workplace / "run", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    return main(["train", *map(str, required), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim", "galore_adamw"], "optim, optim_args, adam_*, lr_scheduler_*: "),
        (["--optim_args", "foo"], "optim, optim_args, adam_*, lr_scheduler_*: "),
        (["--adam_beta1", "2"], "optim, optim_args, adam_*, lr_scheduler_*: Invalid beta parameter at index 0: 2.0"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "optim, optim_args, adam_*, lr_scheduler_*: "),
        (["--lr_scheduler_kwargs", '{"bar": 1}'], "optim, optim_args, adam_*, lr_scheduler_*: "),
        (["--eval_split", "0.5"], "eval_data, eval_split: nothing would be evaluated, as eval_strategy is no; give"),
    ],
)
def test_an_old_run_does_not_give_way_to_settings_that_cannot_be_trained_by(
    workplace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "run").mkdir()
    old = workplace / "run" / "adapter_model.safetensors"
    old.write_text("old")
    assert train(workplace, "--overwrite_output_dir", "true", "--max_steps", "1", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert old.read_text() == "old"


def test_a_warm_up_that_never_ends_is_told_of(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workplace, "--max_steps", "2", "--warmup_steps", "20") == 0
    shown = capsys.readouterr()
    assert "warmup_steps: all 2 steps are warmup" in shown.out + shown.err


def test_a_chat_template_that_gives_way_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    assert tokenizer.chat_template == CHATML
    records = [{"instruction": "Name.", "output": "City.", "judgment": None}]
    with caplog.at_level(logging.WARNING, "cutlm"):
        trainer = CUTTrainer(make_model(len(tokenizer)), make_config(), records, processing_class=tokenizer)
    assert "(template: alpaca)" in caplog.text
    assert trainer.processing_class.chat_template != CHATML
    trainer = CUTTrainer(make_model(len(tokenizer)), make_config(template="chat"), records, processing_class=tokenizer)
    assert trainer.processing_class.chat_template == CHATML
    assert not any("(template: " in notice for notice in trainer.notices)
