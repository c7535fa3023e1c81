"""`cutlm train`: what it reads, saves and prints, and bad input, which is reported without a traceback."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ON_CPU, list_options, write_lines
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import make_model, make_tokenizer
from transformers import BitsAndBytesConfig

from cutlm import CUTTrainer
from cutlm.cli import main
from cutlm.data.files import SourceRow
from cutlm.data.records import FIELDS
from cutlm.data.sources import describe_sources
from cutlm.flagging import token_scores
from cutlm.model.loading import load_model
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import Prompt, render_alpaca_prompt
from cutlm.training import run
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


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> dict[str, Any]:
    paths = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out")}
    return ON_CPU | paths | {"data": str(write_lines(tmp_path / "records.jsonl", ROWS)), "max_steps": 1}


def train(settings: dict[str, Any]) -> int:
    return main(["train", *list_options(**settings)])


def fail(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of a run with a bad setting, without progress bars before it."""
    assert train(settings) == 2
    return capsys.readouterr().err.partition("cutlm train: ")[2]


# ---- Runs ----


def test_a_run_reports_its_data_and_saves_adapter_and_settings(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--warmup_steps", "20"]) == 0
    output = capsys.readouterr().out
    assert "train_dataset: 8 records encoded (4 satisfactory, 4 unsatisfactory); 0 prompts truncated" in output
    assert re.search(r"training [\d,]+ of [\d,]+ parameters", output)
    assert "warmup_steps: all 1 steps are warmup" in output
    assert f"cutlm merge --adapter {tmp_path / 'out'} --out {tmp_path / 'out'}-merged" in output
    saved = yaml.safe_load((tmp_path / "out" / "cutlm_train.yaml").read_text())
    assert saved["threshold"] == 1.1
    assert saved["max_steps"] == 1
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 12  # 2 layers x 3 projections x A and B


def test_full_fine_tuning_saves_a_whole_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert train(settings | {"use_peft": False}) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["records", "records, frozen", "token scores"])
def test_a_run_reads_its_data_once_and_tokenizes_each_text_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "token scores":
        paths = {"model": settings["model_name_or_path"], "data": settings["data"], "out": tmp_path / "scores.jsonl"}
        assert main(["blame", *list_options(**paths)]) == 0
        settings |= {"data": str(tmp_path / "scores.jsonl")}
    if kind == "records, frozen":
        settings |= {"detector": "frozen"}
    num_read: Counter[str] = Counter()
    read, parse = run.read_data, token_scores._read_row

    def count_read(sources: Any, *args: Any) -> Any:
        num_read[describe_sources(sources)] += 1
        return read(sources, *args)

    def count_parsed(row: SourceRow, *args: Any) -> Any:
        num_read[row.location] += 1
        return parse(row, *args)

    monkeypatch.setattr(run, "read_data", count_read)
    monkeypatch.setattr(token_scores, "_read_row", count_parsed)
    num_encoded: Counter[str] = Counter()
    encode_prompts, encode_responses = Encoder.encode_prompts, Encoder.encode_responses

    def count_prompts(self: Encoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        num_encoded.update(prompt.text for prompt in prompts)
        return encode_prompts(self, prompts)

    def count_responses(self: Encoder, responses: Sequence[str]) -> list[list[int]]:
        num_encoded.update(responses)
        return encode_responses(self, responses)

    monkeypatch.setattr(Encoder, "encode_prompts", count_prompts)
    monkeypatch.setattr(Encoder, "encode_responses", count_responses)
    assert train(settings | {"eval_split": 0.25, "eval_strategy": "epoch"}) == 0
    # Records are read once, and each row of token scores is checked once.
    names = [settings["data"]]
    if kind == "token scores":
        names = [f"{settings['data']}:{number + 1}" for number in range(len(ROWS))]
    assert {name: num_read[name] for name in names} == dict.fromkeys(names, 1)
    for row in ROWS:
        assert num_encoded[render_alpaca_prompt(row["instruction"]).text] == 1
        assert num_encoded[row["output"]] == 1
        # Token scores come with their flags, so the judged prompt is not needed.
        num_judged = row["judgment"] is not None and kind != "token scores"
        assert num_encoded[render_alpaca_prompt(row["instruction"], "It is wrong.").text] == num_judged


@pytest.mark.parametrize("error", [TypeError, RuntimeError, ValueError, KeyError])
@pytest.mark.parametrize(
    ("function", "objective"),
    [
        ("cutlm.training.dataset.encode_records", "cut"),
        ("cutlm.training.trainer.choose_layout", "cut"),
        ("cutlm.training.pairs.encode_records_as_pairs", "dpo"),
    ],
)
def test_a_bug_while_the_trainer_is_built_keeps_its_traceback(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    objective: str,
    error: type[Exception],
) -> None:
    def raise_error(*args: Any, **kwargs: Any) -> Any:
        raise error("a bug")

    monkeypatch.setattr(function, raise_error)
    with pytest.raises(error, match="a bug"):
        train(settings | {"objective": objective})


# ---- Recipes and help ----


def test_doubtful_records_are_named_before_training(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [*ROWS, ROWS[0] | {"judgment": "The response is perfect."}])
    assert train(settings | {"data": str(data), "sensitivity_records": 0}) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert line.endswith(f"{data}:{len(ROWS) + 1}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "train-judge" if recipe.stem == "judge" else "train"
    assert main([command, "--config", str(recipe), "--use_cpu", "--dry_run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    defaults = vars(CUTConfig(use_cpu=True))  # defaults of `transformers` are not printed
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert resolved.get(key, defaults.get(key)) == value, f"{key} of {recipe.name}"


def test_the_recipes_of_the_paper_have_its_settings() -> None:
    assert {path.stem for path in RECIPES} >= {"shepherd-13b", "online-iteration-1-13b", "small-instruct", "judge"}
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


def test_help_imports_nothing_heavy_and_names_fields_that_exist() -> None:
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
    own = ("objective", "detector", "threshold", "unlikelihood_weight", "gamma", "normalization", "template")
    for name in (*own, *OBJECTIVES, "downsample"):
        assert name in result.stdout


# ---- Bad input ----


def test_a_data_file_that_cannot_be_read_is_named(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for data in ("nowhere.json", str(tmp_path / "empty")):
        assert fail(settings | {"data": data}, capsys).startswith(f"{data}: ")


def test_every_bad_row_is_named(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"output": "x"}, {"instruction": "x", "output": "y", "judgment": ["z"]}, {"instruction": "x"}]
    write_lines(tmp_path / "records.jsonl", rows)
    message = fail(settings, capsys)
    for number, name in ((9, "instruction"), (10, "judgment"), (11, "output")):
        assert f"records.jsonl:{number}: field '{name}'" in message
    assert message.count("records.jsonl:") == 3
    assert not (tmp_path / "out").exists()


def test_records_and_token_scores_in_one_file_are_refused(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"schema_version": 1, "token_ids": [1]}
    write_lines(tmp_path / "records.jsonl", [ROWS[1], ROWS[2], ROWS[3] | scores, ROWS[4] | scores])
    message = fail(settings, capsys)
    assert message.startswith(f"{tmp_path}/records.jsonl:3: ")
    assert message.count("\n") == 1


def test_records_that_are_all_too_long_are_named(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    message = fail(settings | {"max_length": 2}, capsys)
    assert message.startswith("train_dataset: ")
    assert message.count("records.jsonl:") == 8


def test_a_path_that_is_no_model_is_named(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "records.jsonl"):
        path = str(tmp_path / name)
        assert path in fail(settings | {"model_name_or_path": path}, capsys)


def test_an_adapter_must_be_merged_first(
    tmp_path: Path, base: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(tmp_path / "adapter")
    get_peft_model(load_model(base), LoraConfig(target_modules=["up_proj"])).save_pretrained(adapter)
    make_tokenizer("bpe").save_pretrained(adapter)
    assert f"cutlm merge --adapter {adapter}" in fail(settings | {"model_name_or_path": adapter}, capsys)


def test_a_tokenizer_needs_an_end_of_sequence_token(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "endless")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    message = fail(settings | {"model_name_or_path": str(tmp_path / "endless")}, capsys)
    assert "end-of-sequence token" in message


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"template": "chat"}, "template: "),
        ({"lora_target_modules": "c_fc"}, "lora_target_modules: "),
        ({"lora_target_modules": "lm_head"}, "output head"),
        ({"eval_strategy": "steps"}, "eval_strategy, eval_on_start: "),
        ({"eval_on_start": True}, "eval_strategy, eval_on_start: "),
        ({"eval_split": 0.5}, "eval_data, eval_split: "),
        ({"eval_split": 0.01, "eval_strategy": "epoch"}, "eval_split: "),
        ({"report_to": "foo"}, "report_to: "),
        ({"max_steps": -1, "dataloader_drop_last": True, "per_device_train_batch_size": 16}, "dataloader_drop_last: "),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs, max_steps: "),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tmp_path: Path, settings: dict[str, Any], bad: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fail(settings | bad, capsys)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_output_folder_that_cannot_be_made_is_named(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "records.jsonl", tmp_path / "records.jsonl" / "out"):
        assert str(tmp_path / "records.jsonl") in fail(settings | {"output_dir": str(out)}, capsys)


# ---- Quantized models ----

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantization_needs_its_package(
    settings: dict[str, Any], key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    assert "pip install 'cutlm[quantization]'" in fail(settings | {key: True}, capsys)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_is_trained_on_a_quantized_model(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    make_model(512, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base64")
    make_tokenizer("bpe").save_pretrained(tmp_path / "base64")
    assert train(settings | {key: True, "model_name_or_path": str(tmp_path / "base64")}) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(["merge", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_gradients_flow_through_a_quantized_model_even_after_an_evaluation(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

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
            CUTConfig(output_dir=str(tmp_path / "out"), **ON_CPU),
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
