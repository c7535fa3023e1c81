"""Settings: the paper's defaults, and every bad one named at once."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
import yaml

from cutlm.cli import main
from cutlm.errors import ConfigError
from cutlm.training.config import CUTConfig


def make(tmp_path, **settings) -> CUTConfig:
    return CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_defaults_are_the_papers(tmp_path):
    config = make(tmp_path)
    assert (config.threshold, config.unlikelihood_weight, config.gamma) == (1.1, 1.0, 1.0)
    assert (config.normalization, config.template, config.max_length) == ("token", "alpaca", 2048)
    assert config.downsample is None
    assert config.head_chunk_size is None
    assert (config.learning_rate, config.lr_scheduler_type) == (4e-4, "cosine")
    assert config.logging_steps == 10
    assert not config.remove_unused_columns
    assert not config.logging_nan_inf_filter


GOOD = [
    {"threshold": 1},
    {"threshold": 1.2, "unlikelihood_weight": 0, "gamma": 0},
    {"gamma": 2, "normalization": "record", "template": "chat"},
    {"max_length": 1, "head_chunk_size": 1, "downsample": 0},
    {"downsample": 0.25},
]


@pytest.mark.parametrize("settings", GOOD)
def test_settings_at_the_edge_are_taken(tmp_path, settings):
    config = make(tmp_path, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


BAD = [
    ("threshold", 0.9, "expected a number of at least 1 (the paper uses 1.1 or 1.2), got 0.9"),
    ("threshold", float("nan"), "expected a number of at least 1 (the paper uses 1.1 or 1.2), got nan"),
    ("unlikelihood_weight", -0.5, "expected a number of at least 0, got -0.5"),
    ("unlikelihood_weight", float("nan"), "expected a number of at least 0, got nan"),
    ("gamma", -1, "expected a number of at least 0, got -1"),
    ("normalization", "mean", "expected token or record, got 'mean'"),
    ("template", "vicuna", "expected alpaca or chat, got 'vicuna'"),
    ("max_length", 0, "expected a whole number of at least 1, got 0"),
    ("head_chunk_size", 0, "expected a whole number of at least 1, got 0"),
    ("head_chunk_size", -4, "expected a whole number of at least 1, got -4"),
    ("downsample", -0.1, "expected a number of at least 0, or none to keep all, got -0.1"),
    ("downsample", float("nan"), "expected a number of at least 0, or none to keep all, got nan"),
    ("remove_unused_columns", True, "expected false, as the collator needs every column, got true"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_setting_out_of_range_is_named(tmp_path, name, value, message):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, **{name: value})
    assert str(caught.value) == f"{name}: {message}"


def test_a_maximal_length_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match=r"^max_length: expected a whole number of at least 1, got None$"):
        make(tmp_path, max_length=None)


@pytest.mark.parametrize("name", ["max_length", "head_chunk_size"])
def test_half_a_token_is_no_length(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected a whole number of at least 1, got 1\.5$"):
        make(tmp_path, **{name: 1.5})


def test_all_problems_are_told_at_once(tmp_path):
    settings = {name: value for name, value, _ in BAD}  # the last of each name
    expected = {name: f"{name}: {message}" for name, _, message in BAD}
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, **settings)
    assert sorted(caught.value.problems) == sorted(expected.values())
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_settings_of_the_trainer_are_still_checked(tmp_path):
    with pytest.raises(ValueError, match="sometimes is not a valid SaveStrategy"):
        make(tmp_path, save_strategy="sometimes")


def dry_run(tmp_path, *options, **settings) -> int:
    """Reads settings by a file and by options."""
    path = tmp_path / "settings.yaml"
    needed = {"model_name_or_path": "model", "data": "data.jsonl", "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump(needed | settings))
    return main(["train", "--config", str(path), "--dry_run", *options])


def read_back(tmp_path, capsys) -> dict:
    """What a dry run printed, once it was read back to the same."""
    first = yaml.safe_load(capsys.readouterr().out)
    assert dry_run(tmp_path, **first) == 0
    assert yaml.safe_load(capsys.readouterr().out) == first
    return first


def test_a_list_of_choices_is_printed_and_read_back(tmp_path, capsys):
    assert dry_run(tmp_path, "--use_cpu", "--debug", "underflow_overflow") == 0
    assert read_back(tmp_path, capsys)["debug"] == ["underflow_overflow"]


def test_a_field_that_holds_a_mapping_is_read_from_json_and_from_a_file(tmp_path, capsys):
    assert dry_run(tmp_path, "--use_cpu", "--liger_kernel_config", '{"rope": true}') == 0
    assert read_back(tmp_path, capsys)["liger_kernel_config"] == {"rope": True}
    assert dry_run(tmp_path, "--use_cpu", liger_kernel_config={"rope": False}) == 0
    assert read_back(tmp_path, capsys)["liger_kernel_config"] == {"rope": False}


@pytest.mark.parametrize("text", ["rope", "[1]", '{"rope": true'])
def test_what_is_no_mapping_is_named(tmp_path, capsys, text):
    assert dry_run(tmp_path, "--use_cpu", "--liger_kernel_config", text) == 2
    message = f"""expected a JSON object such as '{{"name": true}}', got {text!r}\n"""
    assert capsys.readouterr().err.endswith(message)
    assert dry_run(tmp_path, "--use_cpu", liger_kernel_config=text) == 2
    assert capsys.readouterr().err.endswith(f"liger_kernel_config: expected a mapping, got {text!r}\n")


def test_without_the_package_of_deepspeed_what_to_install_is_said(tmp_path, capsys, monkeypatch):
    find = importlib.metadata.version

    def find_others(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "version", find_others)
    assert dry_run(tmp_path, "--use_cpu", "--deepspeed", "zero.json") == 2
    assert capsys.readouterr().err.endswith(
        "cutlm train: deepspeed: the package deepspeed is missing; install it by: pip install deepspeed\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_recipe_in_bfloat16_says_what_to_add(capsys):
    recipe = Path(__file__).parents[2] / "recipes" / "small-instruct.yaml"
    assert main(["train", "--config", str(recipe), "--dry_run"]) == 2
    assert capsys.readouterr().err.endswith(
        "cutlm train: bf16: expected a GPU that computes in bfloat16, got none; add --use_cpu true, or --bf16 false\n"
    )
    for options in (["--use_cpu", "true"], ["--bf16", "false"]):
        assert main(["train", "--config", str(recipe), "--dry_run", *options]) == 0
