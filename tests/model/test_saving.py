"""Merging gives the trained model, for every initialization of the adapter; generation configs can be saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cutlm import CUTConfig, CUTTrainer
from cutlm.errors import ConfigError, UserError
from cutlm.model.merge import merge_adapter
from cutlm.model.saving import PROBE_FILE, read_probe, repair_generation_config

RECORDS = [
    {"instruction": "Add 1 and 2.", "output": "4", "judgment": "The sum is 3."},
    {"instruction": "Name the capital of Australia.", "output": "Canberra.", "judgment": None},
]
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def make_trainer(base: Path, out: Path, dtype: str = "float32", **settings: Any) -> CUTTrainer:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "q_proj"], "task_type": "CAUSAL_LM"} | settings
    return CUTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        args=CUTConfig(
            output_dir=str(out), max_steps=2, learning_rate=0.05, use_cpu=True, report_to="none", save_steps=1
        ),
        train_dataset=RECORDS,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(**config),
    )


@torch.no_grad()
def compute_logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa_niter_2", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 2}},
        {"init_lora_weights": "olora", "use_dora": True},
        {"init_lora_weights": "pissa_niter_2", "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
        {"use_dora": True, "use_rslora": True},
    ],
    ids=str,
)
def test_the_merged_model_is_the_trained_one(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path / "out", **settings)
    trainer.train()
    trainer.save_model()
    trained = compute_logits(trainer.model)
    torch.manual_seed(123)  # a randomized initialization differs when the adapter is loaded
    merge = merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert merge.is_recorded
    assert merge.difference < 1e-5
    merged = compute_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - trained).abs().max() < 1e-4 * trained.abs().max()
    plain = compute_logits(AutoModelForCausalLM.from_pretrained(base))
    assert (merged - plain).abs().max() > 1e-2 * plain.abs().max(), "training must change the logits"


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}],
    ids=str,
)
def test_a_merged_model_with_tied_embeddings_is_the_trained_one(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "base", tmp_path / "out", **settings)
    trainer.train()
    trainer.save_model()
    trained = compute_logits(trainer.model)
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    merged = compute_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - trained).abs().max() < 1e-4 * trained.abs().max()


def test_an_adapter_in_bfloat16_is_merged_within_its_tolerance(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path / "out", "bfloat16", init_lora_weights="pissa")
    trainer.train()
    trainer.save_model()
    assert merge_adapter(tmp_path / "out", tmp_path / "merged").difference < 0.1


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_an_initialization_whose_change_of_the_base_is_not_saved_is_refused(
    init: str, base: Path, tmp_path: Path
) -> None:
    config = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with pytest.raises(ConfigError, match=f"init_lora_weights: {init}"):
        make_trainer(base, tmp_path / "out", init_lora_weights=init, **config)


def test_an_adapter_that_already_changed_its_base_is_refused(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(init_lora_weights="pissa", target_modules=["down_proj"], r=4)
    with pytest.raises(ConfigError, match="pass the unchanged base model"):
        CUTTrainer(
            model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), config),
            args=CUTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none"),
            train_dataset=RECORDS,
            processing_class=AutoTokenizer.from_pretrained(base),
        )


def test_a_checkpoint_resumes_and_is_merged_or_refused_but_never_merged_wrongly(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path / "out", init_lora_weights="pissa_niter_2")
    trainer.train()
    first = compute_logits(trainer.model)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    torch.manual_seed(123)
    with pytest.raises(UserError, match="differ from those of the trained one"):
        merge_adapter(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    resumed = make_trainer(base, tmp_path / "out", init_lora_weights="pissa_niter_2")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (compute_logits(resumed.model) - first).abs().max() < 1e-4


def test_another_base_model_is_noticed(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="differ from those of the trained one"):
        merge_adapter(tmp_path / "out", tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()
    (tmp_path / "out" / PROBE_FILE).unlink()
    assert not merge_adapter(tmp_path / "out", tmp_path / "merged", base=str(tmp_path / "other")).is_recorded


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"token_ids": [1], "logprobs": [0], "dtype": "x"}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / PROBE_FILE).write_text(content)
    with pytest.raises(UserError, match=PROBE_FILE):
        read_probe(tmp_path)


class Model:
    def __init__(self, **fields: Any) -> None:
        self.generation_config = GenerationConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 2]}, {"do_sample": True, "eos_token_id": [1, 2]}),
        ({"do_sample": True, "temperature": 0.6, "early_stopping": True}, {"do_sample": True, "temperature": 0.6}),
        ({"do_sample": False, "length_penalty": 2.0}, {"do_sample": False, "length_penalty": None}),
        ({"pad_token_id": -1, "do_sample": True}, {"do_sample": True, "pad_token_id": None}),
        ({"temperature": 0.6, "do_sample": True, "top_k": 20}, {"do_sample": True, "temperature": 0.6, "top_k": 20}),
    ],
    ids=str,
)
def test_a_generation_config_is_made_valid(fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    model = Model(**fields)
    repair_generation_config(model)
    model.generation_config.validate(strict=True)
    model.generation_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in expected} == expected
