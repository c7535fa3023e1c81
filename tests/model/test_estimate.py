"""Memory of a training step: formulas against hand counts and measured peaks."""

import json
import os
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
TOLERANCE = 0.1
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux")
@pytest.mark.timeout(200)
def test_estimates_are_near_measured_peaks() -> None:
    worker = Path(__file__).parents[1] / "estimate_worker.py"
    # Freed blocks return to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, worker, json.dumps(CONFIG)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shape = read_shape(LlamaConfig(**CONFIG))
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    ratios = {}
    for kind, is_checkpointed, measured in lines:
        plan = replace(FULL, num_tokens=1024, is_checkpointed=is_checkpointed)
        if kind == "lora":
            plan = replace(plan, lora_r=16, lora_dropout=False)
        ratios[kind, is_checkpointed] = (estimate(shape, plan).total - 4 * shape.num_weights) / measured
    print(ratios)  # shown by pytest -s
    assert all(1 - TOLERANCE < ratio < 1 + TOLERANCE for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**CONFIG), LlamaConfig(**CONFIG, tie_word_embeddings=True), Qwen3Config(**CONFIG, head_dim=32)],
)
def test_weight_count_matches_the_model(config: object) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # The tolerance is for Qwen 3's norms of head width.
    assert read_shape(config).num_weights == pytest.approx(
        sum(weight.numel() for weight in model.parameters()), rel=1e-4
    )


def test_weight_counts_of_llama_2() -> None:
    # The counts of the released checkpoints.
    assert SHAPES["llama-2-7b"].num_weights == 6_738_415_616
    assert SHAPES["llama-2-13b"].num_weights == 13_015_864_320
    assert SHAPES["llama-2-70b"].num_weights == 68_976_648_192


def test_weights_gradients_and_optimizer_by_hand() -> None:
    # A layer: q 8x8, k and v 8x4, o 8x8, three matrices of 8x16; two embeddings of 10x8, five norms of 8.
    num_weights = 2 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 80 + 5 * 8
    memory = estimate(TINY, FULL)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * num_weights, 4 * num_weights, 8 * num_weights)
    # LoRA of rank 2 on the MLP: 2 * (8 + 16) for each of three matrices of two layers, all in float32.
    num_lora = 2 * 3 * 2 * (8 + 16)
    memory = estimate(TINY, replace(FULL, lora_r=2, weight_size=2))
    assert memory.weights == 2 * num_weights + 4 * num_lora
    assert (memory.gradients, memory.optimizer) == (4 * num_lora, 8 * num_lora)
    # 4 bits and a float32 scale per 64 weights of a matrix; embeddings and norms in float32.
    memory = estimate(TINY, replace(FULL, lora_r=2, weight_size=2, load_in=4))
    assert memory.weights == 1152 * (0.5 + 4 / 64) + 4 * 200 + 4 * num_lora


def test_sharding_divides_weights_and_gathers_two_layers() -> None:
    one, many = (
        estimate(TINY, replace(FULL, is_bf16=True, is_checkpointed=True, num_gpus=n, is_sharded=n > 1)) for n in (1, 4)
    )
    assert many.optimizer == one.optimizer / 4
    # Two layers of 576, embeddings and norms of 200, gathered in bfloat16.
    assert many.weights == 4 * (2 * 576 + 200) / 4 + 2 * (2 * 576 + 200)
    # DDP holds gradients twice, once in its buckets.
    assert estimate(TINY, replace(FULL, num_gpus=2)).gradients == 2 * estimate(TINY, FULL).gradients


def test_activation_checkpointing_saves_inputs_and_one_full_layer() -> None:
    def count_saved(num_layers: int, is_checkpointed: bool) -> float:
        return estimate(
            replace(TINY, num_layers=num_layers), replace(FULL, is_checkpointed=is_checkpointed)
        ).activations

    # Per token: inputs of two norms 2*4*8 and their normalized inputs 2*4*8; queries, keys, values and output 4*4*8 and
    # 4*2 for two heads; three inner states 3*4*16; inputs of q, k, v and of gate, up 2*4*8, of down 4*16.
    assert count_saved(3, False) - count_saved(2, False) == 64 + 64 + 128 + 8 + 192 + 64 + 64
    assert count_saved(3, True) - count_saved(2, True) == 4 * 8
    # The recomputed layer also has gradients of three inner states, its input and its output.
    plan = replace(FULL, num_tokens=1000, is_checkpointed=True)
    assert estimate(TINY, plan).work == 1000 * (64 + 64 + 128 + 8 + 192 + 64 + 64 + 3 * 4 * 16 + 2 * 4 * 8) + 4 * 8 * 16


def test_gpus_need_a_tenth_of_free_memory() -> None:
    assert choose_gpus(Memory(21.6e9, 0, 0, 0, 0)) == [24, 40, 80, 141]
    assert choose_gpus(Memory(21.7e9, 0, 0, 0, 0)) == [40, 80, 141]
    assert choose_gpus(Memory(200e9, 0, 0, 0, 0)) == []


@pytest.mark.parametrize(("config", "reason"), [(GPT2Config(), "intermediate_size"), (MixtralConfig(), "experts")])
def test_layers_unlike_llamas_are_refused(config: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_shape(config)


@pytest.mark.parametrize(
    "kind",
    [ArceeConfig, BertConfig, GPTNeoXConfig, PhiConfig, RecurrentGemmaConfig, Starcoder2Config, YoutuConfig],
)
def test_layers_with_llamas_sizes_but_other_weights_are_refused(kind: type) -> None:
    config = kind()
    with torch.device("meta"):
        num_real = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    with pytest.raises(ConfigError, match=rf"^{config.model_type}: .* {num_real:,} weights"):
        read_shape(config)


def test_invalid_config_is_refused() -> None:
    tokens = {"bos_token_id": None, "eos_token_id": None}
    with pytest.raises(ConfigError, match="num_hidden_layers: -1, vocab_size: 0"):
        read_shape(LlamaConfig(**CONFIG | {"num_hidden_layers": -1, "vocab_size": 0}, **tokens))
    with pytest.raises(ConfigError, match="KeyError: 'nothing'"):
        read_shape(LlamaConfig(**CONFIG | {"hidden_act": "nothing"}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "llama", "hidden_size": "x"}', "'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}', "number of attention heads (7)"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "division or modulo by zero"),
    ],
)
def test_unreadable_config_is_one_error_line(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["estimate", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cutlm estimate: {path}: ")
    assert reason in line


def test_command_prints_parts_and_fitting_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**CONFIG).save_pretrained(tmp_path)
    assert main(["estimate", "--config", str(tmp_path / "config.json"), "--use_peft", "false"]) == 0
    from_file = capsys.readouterr().out
    assert main(["estimate", "--model", str(tmp_path), "--use_peft", "false"]) == 0
    assert capsys.readouterr().out == from_file
    shape = read_shape(LlamaConfig(**CONFIG))
    # Adam's two moments in float32.
    assert f"optimizer {8 * shape.num_weights / 1e9:>12.2f} GB" in from_file
    assert "24, 40, 80, 141 GB" in from_file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --model, --config, --shape, --table"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--load_in_8bit"], "expected one of them, got both"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--use_peft", "false"], "expected use_peft: true, got false"),
        (["--shape", "llama-2-7b", "--load_in_4bit", "--fsdp"], "--fsdp"),
        (["--shape", "llama-2-7b", "--lora_target_modules", "c_attn"], "lora_target_modules: expected some of q_proj"),
        (["--shape", "llama-2-7b", "--lora_r", "0"], "lora_r: expected a whole number of at least 1, got 0"),
        (["--shape", "llama-2-7b", "--lora_r", "-4"], "lora_r: expected a whole number of at least 1, got -4"),
        (["--shape", "llama-2-7b", "--num_gpus", "0"], "expected whole numbers of at least 1"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
        (["--config", str(ROOT / "recipes" / "small-instruct.yaml")], "small-instruct.yaml"),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_contradictory_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *options]) == 2
    assert message in capsys.readouterr().err


def test_table_matches_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--table"]) == 0
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "scale.md").read_text()
