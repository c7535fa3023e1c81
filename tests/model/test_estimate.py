"""Memory of a training step: formulas against hand counts, and against what trainings take."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    Starcoder2Config,
    YoutuConfig,
)

from cutlm.cli import main
from cutlm.errors import ConfigError
from cutlm.model.memory import SHAPES, Memory, Plan, Shape, choose_gpus, estimate, read_shape

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
}
TINY = Shape(num_layers=2, width=8, inner_width=16, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=10)
FULL = Plan(num_tokens=1, lora_r=None, weight_size=4, is_bf16=False, is_checkpointed=False)
TOLERANCE = 0.15


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
@pytest.mark.timeout(200)
def test_estimates_are_near_what_trainings_take() -> None:
    worker = Path(__file__).parents[1] / "estimate_worker.py"
    # Blocks go back to the system as soon as they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, worker, json.dumps(CONFIG)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shape = read_shape(LlamaConfig(**CONFIG))
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 4
    ratios = {}
    for kind, is_checkpointed, measured in lines:
        plan = replace(FULL, num_tokens=1024, is_checkpointed=is_checkpointed)
        if kind == "lora":
            plan = replace(plan, lora_r=16, lora_dropout=False)
        ratios[kind, is_checkpointed] = (estimate(shape, plan).total - 4 * shape.num_weights) / measured
    print(ratios)  # seen by pytest -s
    assert all(1 - TOLERANCE < ratio < 1 + TOLERANCE for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**CONFIG), LlamaConfig(**CONFIG, tie_word_embeddings=True), Qwen3Config(**CONFIG, head_dim=32)],
)
def test_weights_are_counted_as_the_model_has_them(config: object) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Qwen 3 has norms of a head's width as well.
    assert read_shape(config).num_weights == pytest.approx(
        sum(weight.numel() for weight in model.parameters()), rel=1e-4
    )


def test_llama_2_has_the_weights_that_its_names_say() -> None:
    # As counted in the released checkpoints.
    assert SHAPES["llama-2-7b"].num_weights == 6_738_415_616
    assert SHAPES["llama-2-13b"].num_weights == 13_015_864_320
    assert SHAPES["llama-2-70b"].num_weights == 68_976_648_192


def test_weights_gradients_and_optimizer_are_what_a_hand_counts() -> None:
    # A layer: q 8x8, k and v 8x4, o 8x8, three matrices of 8x16; two embeddings of 10x8, five norms of 8.
    num_weights = 2 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 80 + 5 * 8
    memory = estimate(TINY, FULL)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * num_weights, 4 * num_weights, 8 * num_weights)
    # LoRA of rank 2 on the MLP: 2 * (8 + 16) for each of three matrices of two layers, all in float32.
    num_lora = 2 * 3 * 2 * (8 + 16)
    memory = estimate(TINY, replace(FULL, lora_r=2, weight_size=2))
    assert memory.weights == 2 * num_weights + 4 * num_lora
    assert (memory.gradients, memory.optimizer) == (4 * num_lora, 8 * num_lora)
    # In 4 bits, a float32 scale for 64 weights of a matrix; embeddings and norms in float32.
    memory = estimate(TINY, replace(FULL, lora_r=2, weight_size=2, load_in=4))
    assert memory.weights == 1152 * (0.5 + 4 / 64) + 4 * 200 + 4 * num_lora


def test_sharing_weights_divides_them_and_gathers_two_layers() -> None:
    one, many = (
        estimate(TINY, replace(FULL, is_bf16=True, is_checkpointed=True, num_gpus=n, is_sharded=n > 1)) for n in (1, 4)
    )
    assert many.optimizer == one.optimizer / 4
    # Two layers of 576, embeddings and norms of 200, gathered in bfloat16.
    assert many.weights == 4 * (2 * 576 + 200) / 4 + 2 * (2 * 576 + 200)
    # DDP holds gradients twice, once in the buckets that are sent.
    assert estimate(TINY, replace(FULL, num_gpus=2)).gradients == 2 * estimate(TINY, FULL).gradients


def test_checkpointing_keeps_the_input_of_a_layer_and_one_layer_whole() -> None:
    def keep(num_layers: int, is_checkpointed: bool) -> float:
        return estimate(
            replace(TINY, num_layers=num_layers), replace(FULL, is_checkpointed=is_checkpointed)
        ).activations

    # For a token: inputs of two norms 2*4*8 and what their weights multiply 2*4*8; queries, keys, values and output
    # 4*4*8 and 4*2 for two heads; three inner states 3*4*16; inputs of q, k, v and of gate, up 2*4*8, of down 4*16.
    assert keep(3, False) - keep(2, False) == 64 + 64 + 128 + 8 + 192 + 64 + 64
    assert keep(3, True) - keep(2, True) == 4 * 8
    # That one layer is made again while it runs backward: with gradients of three inner states, input and output.
    plan = replace(FULL, num_tokens=1000, is_checkpointed=True)
    assert estimate(TINY, plan).work == 1000 * (64 + 64 + 128 + 8 + 192 + 64 + 64 + 3 * 4 * 16 + 2 * 4 * 8) + 4 * 8 * 16


def test_a_gpu_holds_what_fits_into_nine_tenths_of_it() -> None:
    assert choose_gpus(Memory(21.6e9, 0, 0, 0, 0)) == [24, 40, 80, 141]
    assert choose_gpus(Memory(21.7e9, 0, 0, 0, 0)) == [40, 80, 141]
    assert choose_gpus(Memory(200e9, 0, 0, 0, 0)) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "gpt2: the formulas are for layers as LLaMA has them, and it has no intermediate_size"),
        (MixtralConfig(), "mixtral: the formulas are for layers as LLaMA has them, and it has experts"),
    ],
)
def test_other_layers_are_refused(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}; measure a step instead$"):
        read_shape(config)


@pytest.mark.parametrize(
    "kind",
    [ArceeConfig, BertConfig, GPTNeoXConfig, PhiConfig, RecurrentGemmaConfig, Starcoder2Config, YoutuConfig],
)
def test_layers_that_have_llamas_sizes_but_other_weights_are_refused(kind: type) -> None:
    config = kind()
    with torch.device("meta"):
        num_real = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    with pytest.raises(ConfigError) as caught:
        read_shape(config)
    assert re.fullmatch(
        rf"{config.model_type}: the formulas are for layers as LLaMA has them, and they give [\d,]+ weights where the"
        rf" model has {num_real:,}; measure a step instead",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlamaConfig(**CONFIG | {"num_hidden_layers": -1, "vocab_size": 0}, bos_token_id=None, eos_token_id=None),
            r"^llama: expected sizes of at least 1, got num_hidden_layers: -1, vocab_size: 0; mend the config$",
        ),
        (
            LlamaConfig(**CONFIG | {"hidden_act": "nothing"}),
            r"^llama: no language model can be made of its config \(KeyError: 'nothing'\); check the values in it$",
        ),
    ],
)
def test_a_config_that_no_model_can_be_made_of_is_refused(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_shape(config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "It looks like the config file at 'PATH' is not a valid JSON file."),
        ("{}", "Unrecognized model in PATH. Should have a `model_type` key in its config.json."),
        (
            '{"model_type": "llama", "hidden_size": "x"}',
            "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str"
            " (value: 'x')",
        ),
        (
            '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}',
            "Class validation error for validator 'validate_architecture': ValueError: The hidden size (64) is not a"
            " multiple of the number of attention heads (7).",
        ),
        ('{"model_type": "llama", "num_attention_heads": 0}', "integer division or modulo by zero"),
        ('{"model_type": ["llama"]}', "unhashable type: 'list'"),
    ],
)
def test_a_config_that_cannot_be_read_is_said_in_a_sentence(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["estimate", "--config", str(path)]) == 2
    reason = reason.replace("PATH", str(path))
    assert capsys.readouterr().err.endswith(
        f"cutlm estimate: {path}: no config of a model can be read from it ({reason}); give a config that transformers"
        " reads\n"
    )


def test_a_file_of_settings_is_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "recipes" / "small-instruct.yaml"
    assert main(["estimate", "--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"cutlm estimate: {path}: expected a model's config.json, got a file of settings; give its model_name_or_path"
        " by --model\n"
    )


def test_the_command_prints_parts_and_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**CONFIG).save_pretrained(tmp_path)
    assert main(["estimate", "--config", str(tmp_path / "config.json"), "--use_peft", "false"]) == 0
    from_file = capsys.readouterr().out
    assert main(["estimate", "--model", str(tmp_path), "--use_peft", "false"]) == 0
    assert capsys.readouterr().out == from_file
    shape = read_shape(LlamaConfig(**CONFIG))
    # Adam's two moments in float32.
    assert f"optimizer {8 * shape.num_weights / 1e9:>12.2f} GB" in from_file
    assert from_file.endswith("fits into GPUs of 24, 40, 80, 141 GB (90% of each are counted on)\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --model, --config, --shape, --table"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--load_in_8bit"], "expected one of them, got both"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--use_peft", "false"], "expected use_peft: true, got false"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--fsdp"], "expected none with --fsdp"),
        (["--shape", "llama-2-7b", "--lora_target_modules", "c_attn"], "lora_target_modules: expected some of q_proj"),
        (["--shape", "llama-2-7b", "--lora_r", "0"], "lora_r: expected a whole number of at least 1, got 0"),
        (["--shape", "llama-2-7b", "--lora_r", "-4"], "lora_r: expected a whole number of at least 1, got -4"),
        (["--shape", "llama-2-7b", "--num_gpus", "0"], "expected whole numbers of at least 1"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_table_in_the_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--table"]) == 0
    table = capsys.readouterr().out
    assert table in (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
