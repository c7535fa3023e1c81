"""`cutlm train` through its front door: settings, and every bad input in one clear sentence."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from tiny import make_model, make_tokenizer, save_tiny_model

from cutlm.cli import main
from cutlm.data.records import FIELDS
from cutlm.training.config import OBJECTIVES, CUTConfig, DataArguments, ModelArguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
ROWS = [
    {
        "instruction": f"Name city {index}.",
        "output": f"City {index}.",
        "judgment": "It is wrong." if index % 2 else None,
    }
    for index in range(8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> dict[str, object]:
    (tmp_path / "records.json").write_text(json.dumps(ROWS))
    return {
        "model_name_or_path": str(base),
        "data": str(tmp_path / "records.json"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def _train(tmp_path: Path, settings: dict[str, object], *options: str) -> int:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return main(["train", "--config", str(tmp_path / "config.yaml"), *options])


def _expect_problem(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str], *patterns: str
) -> str:
    assert _train(tmp_path, settings) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
    return message


def test_a_run_says_what_it_does_and_what_to_do_next(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path, settings) == 0
    output = capsys.readouterr().out
    assert "train_dataset: 8 records encoded (4 satisfactory, 4 unsatisfactory); 0 prompts cut" in output
    assert re.search(r"training [\d,]+ of [\d,]+ parameters", output)
    assert f"cutlm merge --adapter {tmp_path / 'out'} --out {tmp_path / 'out'}-merged" in output
    saved = yaml.safe_load((tmp_path / "out" / "cutlm_train.yaml").read_text())
    assert saved["threshold"] == 1.1
    assert saved["max_steps"] == 1
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 12  # 2 layers x 3 projections x A and B


def test_full_fine_tuning_saves_a_whole_model(tmp_path: Path, settings: dict[str, object]) -> None:
    assert _train(tmp_path, settings | {"use_peft": False}) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_saved_settings_are_read_back_to_the_same(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "lora_target_modules": ["up_proj"],
        "learning_rate": "4e-4",
        "eval_strategy": "steps",
        "downsample": 0.25,
    }
    assert _train(tmp_path, settings | odd, "--dry_run", "--threshold", "1.2") == 0
    first = capsys.readouterr().out
    values = yaml.safe_load(first)
    assert values["threshold"] == 1.2
    assert values["learning_rate"] == 4e-4
    assert values["downsample"] == 0.25
    (tmp_path / "again.yaml").write_text(first)
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--dry_run"]) == 0
    assert capsys.readouterr().out == first


def test_a_dry_run_writes_nothing(tmp_path: Path, settings: dict[str, object]) -> None:
    assert _train(tmp_path, settings, "--dry_run") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "train-judge" if recipe.stem == "judge" else "train"
    assert main([command, "--config", str(recipe), "--use_cpu", "--dry_run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    defaults = vars(CUTConfig(use_cpu=True))  # those of `transformers` are left out of what is printed
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert resolved.get(key, defaults.get(key)) == value, f"{key} of {recipe.name}"


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"shepherd-13b", "online-iteration-1-13b", "small-instruct", "judge"}


def test_the_papers_recipes_hold_the_papers_settings() -> None:
    offline, online = (
        yaml.safe_load((RECIPES[0].parent / f"{name}.yaml").read_text())
        for name in ("shepherd-13b", "online-iteration-1-13b")
    )
    assert (offline["threshold"], offline["unlikelihood_weight"]) == (1.2, 0.5)
    assert (online["threshold"], online["unlikelihood_weight"], online["downsample"]) == (1.1, 1.0, 0.25)
    for recipe in (offline, online):
        assert (recipe["learning_rate"], recipe["lr_scheduler_type"], recipe["warmup_steps"]) == (4e-4, "cosine", 100)
        assert (recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"]) == (16, 16, 0.05)
        assert recipe["lora_target_modules"] == ["gate_proj", "down_proj", "up_proj"]
        assert recipe["max_length"] == 2048


def test_all_problems_of_the_settings_are_said_at_once(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"thresold": 1.2, "num_train_epochs": "many", "lora_r": [1], "template": "alpca", "bf16": "maybe"}
    assert _train(tmp_path, settings | bad, "--gama", "1") == 2
    message = capsys.readouterr().err
    for part in (
        "key 'thresold' is unknown; did you mean 'threshold'?",
        "num_train_epochs: expected a number, got 'many'",
        "lora_r: expected one value, got a list of 1",
        "template: expected one of alpaca, chat, got 'alpca'",
        "bf16: expected true or false, got 'maybe'",
        "option --gama is unknown; did you mean 'gamma'?",
    ):
        assert part in message


def test_values_out_of_range_are_said_at_once(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"threshold": 0.5, "gamma": -1, "downsample": -2, "eval_split": 2, "load_in_4bit": True, "use_peft": False}
    message = _expect_problem(tmp_path, settings | bad, capsys)
    for name in (
        "threshold: expected",
        "gamma: expected",
        "downsample: expected",
        "eval_split: expected",
        "load_in_4bit",
    ):
        assert name in message


def test_a_key_of_the_hub_is_no_setting(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_canary"
    message = _expect_problem(tmp_path, settings | {"hub_token": canary}, capsys, "set HF_TOKEN in the environment")
    assert canary not in message
    assert _train(tmp_path, settings, "--hub_token", canary) == 2
    assert canary not in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_missing_settings_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _expect_problem(
        tmp_path, {"output_dir": "x", "use_cpu": True}, capsys, "data: expected", "model_name_or_path: expected"
    )


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("- a\n- b\n", "expected a mapping of settings"),
        ("a: [1\nb: 2\n", r"config\.yaml:2: not YAML"),
        (None, "no such file; check the path after --config"),
    ],
)
def test_a_bad_settings_file_is_one_sentence(
    tmp_path: Path, content: str | None, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert re.search(pattern, capsys.readouterr().err)


def test_a_missing_data_file_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_problem(tmp_path, settings | {"data": "nowhere.json"}, capsys, r"nowhere\.json: no such file")
    _expect_problem(tmp_path, settings | {"data": str(tmp_path)}, capsys, "expected a file, got a directory")


def test_every_bad_row_of_the_data_is_named(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"output": "x"}, {"instruction": "x", "output": "y", "judgment": ["z"]}, {"instruction": "x"}]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    _expect_problem(
        tmp_path,
        settings,
        capsys,
        r"records\.json\[8\]: field 'instruction' is missing",
        r"records\.json\[9\]: field 'judgment': expected a string or null, got a list",
        r"records\.json\[10\]: field 'output' is missing",
        "3 problems",
    )
    assert not (tmp_path / "out").exists()


def test_a_data_set_where_nothing_is_left_says_why(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_problem(
        tmp_path,
        settings | {"max_length": 2},
        capsys,
        "nothing remains to train on",
        r"records\.json\[0\]: the response",
    )


def test_a_folder_that_is_no_model_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    _expect_problem(tmp_path, settings | {"model_name_or_path": str(empty)}, capsys, "expected a model folder")
    missing = str(tmp_path / "missing")
    _expect_problem(tmp_path, settings | {"model_name_or_path": missing}, capsys, "no such folder; pass a model folder")
    file = str(tmp_path / "records.json")
    _expect_problem(tmp_path, settings | {"model_name_or_path": file}, capsys, "expected a model folder, got a file")


def test_a_tokenizer_without_an_end_of_sequence_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "endless")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    _expect_problem(
        tmp_path, settings | {"model_name_or_path": str(tmp_path / "endless")}, capsys, "has no end-of-sequence token"
    )


def test_the_chat_template_must_be_there_to_be_used(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_problem(tmp_path, settings | {"template": "chat"}, capsys, "has no chat template; use template: alpaca")


def test_lora_targets_that_match_nothing_name_those_that_exist(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_problem(
        tmp_path,
        settings | {"lora_target_modules": ["c_fc", "up_proj"]},
        capsys,
        "no module is named c_fc; this model's linear layers are down_proj, gate_proj, k_proj",
    )


def test_an_adapter_is_no_model_to_start_from(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path, settings) == 0
    again = settings | {"model_name_or_path": str(tmp_path / "out"), "output_dir": str(tmp_path / "second")}
    _expect_problem(tmp_path, again, capsys, "expected a model, got an adapter; first run: cutlm merge --adapter")


def test_a_run_of_no_step_is_no_success(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = settings | {"max_steps": -1, "dataloader_drop_last": True, "per_device_train_batch_size": 16}
    _expect_problem(tmp_path, nothing, capsys, "the records fill no batch")
    nothing = settings | {"max_steps": -1, "num_train_epochs": 0, "overwrite_output_dir": True}
    _expect_problem(tmp_path, nothing, capsys, "expected at least one step, got none")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("bad", "pattern"),
    [
        ({"lora_r": 0}, "lora_r: expected a whole number of at least 1, got 0"),
        ({"lora_dropout": 2}, "lora_dropout: expected a share"),
        ({"learning_rate": "nan"}, "learning_rate: expected a number of at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected a whole number of at least 1"),
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor: expected 0"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected random or sequential"),
        ({"lora_target_modules": ["lm_head"]}, "does not support LoRA on the output head"),
        ({"eval_strategy": "steps"}, "eval"),
        ({"report_to": "foo"}, "foo"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(
    tmp_path: Path,
    settings: dict[str, object],
    bad: dict[str, object],
    pattern: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _expect_problem(tmp_path, settings | bad, capsys, pattern)


def test_a_path_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    under_a_file = settings | {"output_dir": str(tmp_path / "records.json" / "out")}
    _expect_problem(tmp_path, under_a_file, capsys, "Not a directory|is a file")


def test_an_evaluation_split_that_leaves_nothing_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"eval_split": 0.01, "eval_strategy": "epoch"}
    _expect_problem(tmp_path, settings, capsys, "eval_split: 0.01 of 8 records leaves none")


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_missing_bitsandbytes_names_the_command_that_installs_it(
    tmp_path: Path,
    settings: dict[str, object],
    key: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    _expect_problem(tmp_path, settings | {key: True}, capsys, r"pip install 'cutlm\[quantization\]'")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_is_trained_on_a_quantized_model(
    tmp_path: Path, settings: dict[str, object], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(512, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base64")
    make_tokenizer("bpe").save_pretrained(tmp_path / "base64")
    assert _train(tmp_path, settings | {key: True, "model_name_or_path": str(tmp_path / "base64")}) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(["merge", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_gradients_flow_through_a_quantized_model_even_after_an_evaluation(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from cutlm import CUTTrainer
    from cutlm.model.loading import load_model

    make_model(512, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    rows = [{"prompt_ids": [1, 5, 6], "judged_prompt_ids": [1, 5, 9, 8], "response_ids": [7, 8, 2]}]
    quantized = load_model(tmp_path / "base", quantization=BitsAndBytesConfig(load_in_4bit=True))
    plain = load_model(tmp_path / "base")
    for name, weight in quantized.named_parameters():
        if hasattr(weight, "quant_state"):
            plain.get_parameter(name).data = dequantize_4bit(weight.data, weight.quant_state)
    gradients = []
    for model in (plain, quantized):
        trainer = CUTTrainer(
            model,
            CUTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True),
            rows,
            eval_dataset=rows,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], init_lora_weights=False),
        )
        trainer.evaluate()
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).backward()
        gradients.append([value.grad for value in trainer.model.parameters() if value.requires_grad])
    for expected, got in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_help_is_quick_and_names_fields_that_exist() -> None:
    code = (
        "import sys\nfrom cutlm.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules), 'heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fields = {field.name for kind in (CUTConfig, DataArguments, ModelArguments) for field in dataclasses.fields(kind)}
    named = set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", result.stdout)) - {"nproc_per_node", "dry_run"}
    named -= {"gate_proj", "down_proj", "up_proj", *OBJECTIVES, *FIELDS}
    assert named <= fields, named - fields
    cutlms = ("objective", "detector", "threshold", "unlikelihood_weight", "gamma", "normalization", "template")
    for name in (*cutlms, *OBJECTIVES, "downsample"):
        assert name in result.stdout
