"""Training settings: defaults, ranges, settings without effect, and reading them from files and options."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ON_CPU
from trl import ModelConfig

from cutlm.cli import main
from cutlm.errors import ConfigError
from cutlm.training.config import CUTConfig, ModelArguments, check_libraries, read_settings


def make_config(**settings: Any) -> CUTConfig:
    return CUTConfig(output_dir="unused", **ON_CPU | {"save_strategy": "no"} | settings)


def read_names(error: ConfigError) -> list[str]:
    """The settings that each problem of an error names."""
    return [problem.partition(":")[0] for problem in error.problems]


# ---- Values ----


def test_model_settings_have_the_names_of_trl() -> None:
    ours, trls = ({item.name for item in dataclasses.fields(kind)} for kind in (ModelArguments, ModelConfig))
    assert ours == trls


def test_an_option_that_may_be_none_takes_none() -> None:
    options = ["--model_name_or_path", "m", "--use_cpu", "--save_total_limit", "none", "--downsample", "NULL"]
    _, config = read_settings((ModelArguments, CUTConfig), None, options).parts
    assert (config.save_total_limit, config.downsample) == (None, None)
    with pytest.raises(ConfigError):
        read_settings((ModelArguments, CUTConfig), None, [*options, "--seed", "none"])


def test_defaults_are_those_of_the_paper() -> None:
    config = CUTConfig(use_cpu=True)
    assert (config.threshold, config.unlikelihood_weight, config.gamma) == (1.1, 1.0, 1.0)
    assert (config.normalization, config.template, config.max_length) == ("token", "alpaca", 2048)
    assert config.downsample is None
    assert config.head_chunk_size is None
    assert (config.learning_rate, config.lr_scheduler_type) == (4e-4, "cosine")
    assert config.logging_steps == 10
    assert not config.remove_unused_columns
    assert not config.logging_nan_inf_filter


@pytest.mark.parametrize(
    "settings",
    [
        # the limits of ranges
        {"threshold": 1},
        {"threshold": 1.2, "unlikelihood_weight": 0, "gamma": 0},
        {"gamma": 2, "normalization": "record", "template": "chat"},
        {"max_length": 1, "head_chunk_size": 1, "downsample": 0},
        {"downsample": 0.25},
        # settings that the objective or detector uses
        {"objective": "unlikelihood", "unlikelihood_weight": 0.5},
        {"objective": "dual_cut", "threshold": 1.2, "praise_weight": 0.5},
        {"detector": "spans", "unlikelihood_weight": 0.5},
        {"metric_for_best_model": "eval_loss_contrast"},
        {"metric_for_best_model": "flagged_share_q50"},
        {"activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}},
        {"num_train_epochs": 0, "max_steps": 1},
        {"accelerator_config": {"even_batches": True}},
    ],
)
def test_valid_settings_are_accepted(settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    for name, value in settings.items():
        if name != "accelerator_config":
            assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"metric_for_best_model": "loss"}, False),
        ({"metric_for_best_model": "eval_loss_likelihood"}, False),
        ({"metric_for_best_model": "loss_contrast"}, False),
        ({"metric_for_best_model": "loss_contrast", "greater_is_better": True}, True),
        ({"metric_for_best_model": "mean_log_ratio"}, True),
        ({}, None),
    ],
)
def test_the_best_model_has_the_least_part_of_the_loss(settings: dict[str, Any], expected: bool | None) -> None:
    assert make_config(**settings).greater_is_better is expected


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("threshold", 0.9),
    ("threshold", float("inf")),
    ("threshold", float("nan")),
    ("unlikelihood_weight", -0.5),
    ("unlikelihood_weight", float("nan")),
    ("gamma", float("inf")),
    ("gamma", -1),
    ("normalization", "mean"),
    ("template", "vicuna"),
    ("max_length", None),
    ("max_length", 1.5),
    ("max_length", 0),
    ("head_chunk_size", 1.5),
    ("head_chunk_size", 0),
    ("head_chunk_size", -4),
    ("downsample", float("nan")),
    ("downsample", -0.1),
    ("remove_unused_columns", True),
    ("detector", "guess"),
    ("praise_weight", -1),
    ("metric_for_best_model", "foo"),
    ("neftune_noise_alpha", 5.0),
    ("label_smoothing_factor", 0.5),
    ("train_sampling_strategy", "group_by_length"),
    ("per_device_train_batch_size", 0),
    ("learning_rate", float("nan")),
    ("seed", -1),
    ("dataloader_num_workers", -1),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{name: value})
    problems = [problem for problem in caught.value.problems if problem.startswith(f"{name}: expected ")]
    assert len(problems) == 1
    assert str(value).lower() in problems[0].lower()


def test_all_problems_are_reported_at_once() -> None:
    settings = dict(OUT_OF_RANGE)  # the last value of each name
    with pytest.raises(ConfigError) as caught:
        make_config(**settings)
    # Among the problems is also that the praise weight has no use here.
    assert set(read_names(caught.value)) == set(settings)
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_transformers_checks_its_own_settings() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        make_config(save_strategy="sometimes")


# ---- Settings without effect ----


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"objective": "likelihood", "threshold": 2.0}, "threshold"),
        ({"objective": "hindsight", "gamma": 0.5}, "gamma"),
        (
            {"objective": "hindsight", "detector": "frozen", "use_contrast_loss": False},
            "detector, use_contrast_loss",
        ),
        ({"objective": "dpo", "threshold": 2.0, "map_spans": True}, "threshold, map_spans"),
        ({"objective": "dpo", "downsample": 0.5, "normalization": "record"}, "downsample, normalization"),
        ({"detector": "off", "threshold": 2.0}, "threshold"),
        ({"detector": "spans", "gamma": 0.0}, "gamma"),
        ({"satisfactory_only": True}, "satisfactory_only"),
        ({"praise_weight": 2.0}, "praise_weight"),
        ({"dpo_beta": 0.3}, "dpo_beta"),
    ],
)
def test_settings_that_the_objective_ignores_are_refused(settings: dict[str, Any], unused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**settings)
    assert len(caught.value.problems) == 1
    used_by = f"objective {settings.get('objective', 'cut')}"
    assert str(caught.value).startswith(f"{unused}: not used by {used_by}")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"fp16": True}, "fp16"),
        ({"objective": "ppo"}, "objective"),
        (
            {"use_contrast_loss": False, "use_satisfactory_loss": False, "use_judged_loss": False},
            "use_contrast_loss, use_satisfactory_loss, use_judged_loss",
        ),
        ({"objective": "dpo", "dpo_beta": 0.0}, "dpo_beta"),
        ({"num_train_epochs": 0}, "num_train_epochs, max_steps"),
        ({"save_strategy": "best"}, "save_strategy"),
        ({"activation_checkpointing_kwargs": {"foo": 1}}, "activation_checkpointing_kwargs"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**settings)
    assert read_names(caught.value) == [name]


def test_liger_kernels_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        make_config(use_liger_kernel=True)
    assert read_names(caught.value) == ["use_liger_kernel"]
    assert "pip install liger-kernel" in str(caught.value)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_by_accelerate_launch_is_known_before_anything_is_loaded(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    assert not config.is_sharded
    monkeypatch.setenv(variable, "true")
    assert config.is_sharded
    with pytest.raises(ConfigError) as caught:
        make_config(max_tokens_per_batch=100)
    assert "max_tokens_per_batch" in read_names(caught.value)


# ---- Settings that only transformers and torch can judge ----

LIBRARY_SETTINGS = "optim, optim_args, adam_*, lr_scheduler_*"
COMPILE_SETTINGS = "torch_compile_backend, torch_compile_mode"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optim": "galore_adamw"}, LIBRARY_SETTINGS),
        ({"optim_args": "foo"}, LIBRARY_SETTINGS),
        ({"adam_beta1": 2.0}, LIBRARY_SETTINGS),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, LIBRARY_SETTINGS),
        ({"lr_scheduler_kwargs": {"bar": 1}}, LIBRARY_SETTINGS),
        ({"report_to": "foo"}, "report_to"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"torch_compile_backend": "foo"}, "torch_compile_backend, torch_compile_mode"),
        (
            {"torch_compile_backend": "inductor", "torch_compile_mode": "foo"},
            "torch_compile_backend, torch_compile_mode",
        ),
    ],
)
def test_settings_that_the_libraries_reject_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_libraries(make_config(**settings))
    assert read_names(caught.value) == [name]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adafactor"},
        {"optim": "sgd", "lr_scheduler_type": "constant"},
        {"optim": "rmsprop", "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        {"lr_scheduler_type": "inverse_sqrt"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
)
def test_settings_that_the_libraries_accept_pass(settings: dict[str, Any]) -> None:
    check_libraries(make_config(**settings))


# ---- Files and options ----


def dry_run(tmp_path: Path, *options: str, **settings: Any) -> int:
    """Read settings from a file and options."""
    path = tmp_path / "settings.yaml"
    needed = {"model_name_or_path": "model", "data": "data.jsonl", "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump(needed | settings))
    return main(["train", "--config", str(path), "--dry_run", *options])


def read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The settings that a dry run printed, after checking that they read back to the same."""
    first = yaml.safe_load(capsys.readouterr().out)
    assert dry_run(tmp_path, **first) == 0
    assert yaml.safe_load(capsys.readouterr().out) == first
    return first


def test_printed_settings_read_back_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "lora_target_modules": ["up_proj"],
        "learning_rate": "4e-4",
        "eval_strategy": "steps",
        "downsample": 0.25,
        "liger_kernel_config": {"rope": False},
    }
    assert dry_run(tmp_path, "--use_cpu", "--threshold", "1.2", "--debug", "underflow_overflow", **odd) == 0
    values = read_back(tmp_path, capsys)
    expected = odd | {"threshold": 1.2, "learning_rate": 4e-4, "debug": ["underflow_overflow"]}
    expected["activation_checkpointing_kwargs"] = '{"use_reentrant": false}'  # transformers keeps it as text
    assert {name: values[name] for name in expected} == expected
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    assert dry_run(tmp_path, "--use_cpu", "--liger_kernel_config", '{"rope": true}') == 0
    assert read_back(tmp_path, capsys)["liger_kernel_config"] == {"rope": True}


@pytest.mark.parametrize("text", ["rope", "[1]", '{"rope": true'])
def test_a_mapping_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    for options, settings in ((["--liger_kernel_config", text], {}), ([], {"liger_kernel_config": text})):
        assert dry_run(tmp_path, "--use_cpu", *options, **settings) == 2
        message = capsys.readouterr().err
        assert "liger_kernel_config" in message
        assert repr(text) in message


def test_deepspeed_needs_its_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.metadata.version

    def find_others(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "version", find_others)
    assert dry_run(tmp_path, "--use_cpu", "--deepspeed", "zero.json") == 2
    message = capsys.readouterr().err
    assert "deepspeed: " in message
    assert "pip install deepspeed" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bfloat16_recipe_without_a_gpu_says_what_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "small-instruct.yaml")
    assert main(["train", "--config", recipe, "--dry_run"]) == 2
    message = capsys.readouterr().err
    assert "bf16: " in message
    for options in (["--use_cpu", "true"], ["--bf16", "false"]):
        assert " ".join(["", options[0]]) in message
        assert main(["train", "--config", recipe, "--dry_run", *options]) == 0


def test_unknown_keys_and_wrong_types_are_all_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"thresold": 1.2, "num_train_epochs": "many", "lora_r": [1], "template": "alpca", "bf16": "maybe"}
    assert dry_run(tmp_path, "--gama", "1", "--model", "x", "--packing", **bad) == 2
    message = capsys.readouterr().err
    for part in (
        "key 'thresold' is unknown; did you mean 'threshold'?",
        "num_train_epochs: ",
        "lora_r: ",
        "template: ",
        "bf16: ",
        "option --gama is unknown; did you mean 'gamma'?",
        "option --model is unknown; did you mean 'model_revision' or 'model_name_or_path'?",
        "option --packing is unknown; see cutlm train --help",
    ):
        assert part in message


def test_values_out_of_range_in_all_dataclasses_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"threshold": 0.5, "gamma": -1, "eval_split": 2, "load_in_4bit": True, "use_peft": False}
    bad |= {"lora_r": 0, "lora_dropout": 2}
    assert dry_run(tmp_path, "--use_cpu", **bad) == 2
    message = capsys.readouterr().err
    for name in ("threshold: ", "gamma: ", "eval_split: ", "load_in_4bit ", "lora_r: ", "lora_dropout: "):
        assert name in message


def test_required_settings_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("use_cpu: true\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    message = capsys.readouterr().err
    assert "model_name_or_path: " in message
    assert "data: " in message


def test_a_hub_token_is_refused_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = "hf_canary"
    assert dry_run(tmp_path, "--use_cpu", hub_token=canary) == 2
    assert dry_run(tmp_path, "--use_cpu", "--hub_token", canary) == 2
    printed = capsys.readouterr()
    assert printed.err.count("HF_TOKEN") == 2
    assert canary not in printed.out + printed.err


@pytest.mark.parametrize(
    ("content", "location"),
    [("- a\n- b\n", "config.yaml: "), ("a: [1\nb: 2\n", "config.yaml:2: "), (None, "config.yaml: no such file")],
)
def test_a_bad_settings_file_is_one_sentence(
    tmp_path: Path, content: str | None, location: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    message = capsys.readouterr().err
    assert location in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("save_strategy: no", 'quote it: "no"'),
        ("eval_strategy: off", 'quote it: "off"'),
        ("run_name: yes", 'quote it: "yes"'),
        ("run_name: true", 'quote it: "true"'),
        ("model_revision: 1_000", 'quote it: "1_000"'),
        ("model_revision: 0123", 'quote it: "0123"'),
        ("model_revision: 1.50", 'quote it: "1.50"'),
        ("lora_target_modules: [on, up_proj]", 'quote it: "on"'),
        ("seed: 010", "which YAML reads as 8"),
        ("max_steps: 1:30", "which YAML reads as 90"),
        ("seed: 1\nseed: 2", "the key occurs 2 times"),
    ],
)
def test_a_value_that_yaml_reads_as_another_is_refused(
    line: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: a\nmodel_name_or_path: b\nuse_cpu: true\n{line}\n")
    assert main(["train", "--config", str(path), "--dry_run"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"cutlm train: {path}:{4 + line.count(chr(10))}: {line.partition(':')[0]}: ")
    assert problem in message


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ('save_strategy: "no"', "save_strategy", "no"),
        ("model_revision: 1e5", "model_revision", "1e5"),
        ("model_revision: 2024-01-01", "model_revision", "2024-01-01"),
        ("model_revision: 7", "model_revision", "7"),
        ("max_length: 1_000", "max_length", 1000),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("use_rslora: on", "use_rslora", True),
        ("lora_target_modules: [up_proj]", "lora_target_modules", ["up_proj"]),
        ("<<: {seed: 1}\nseed: 2", "seed", 2),
    ],
)
def test_a_value_that_yaml_reads_as_it_is_written_is_taken(
    line: str, name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: a\nmodel_name_or_path: b\nuse_cpu: true\n{line}\n")
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out).get(name) == value
