"""Saved models carry the tokens that end a turn, so that transformers stops there by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHATML, IM_END, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlm import CUTConfig, CUTTrainer
from cutlm.cli import main
from cutlm.model.generation_config import list_end_ids

RECORD: dict[str, Any] = {"instruction": "Name a city.", "output": "Canberra is.", "judgment": None}


def make_chatml_tokenizer() -> Any:
    """Make a tokenizer whose turns end with <|im_end|>, although its eos_token is <eos>, like Qwen's base models."""
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.eos_token = "<eos>"
    assert tokenizer.chat_template == CHATML
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = make_chatml_tokenizer()
    model = make_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "records.json").write_text(json.dumps([RECORD]))
    return tmp_path


def _train(folder: Path, *options: str) -> None:
    settings = ["--model_name_or_path", str(folder / "base"), "--data", str(folder / "records.json")]
    settings += ["--output_dir", str(folder / "run"), "--template", "chat", "--use_cpu", "--max_steps", "40"]
    settings += ["--learning_rate", "0.02", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
    assert main(["train", *settings, "--gradient_accumulation_steps", "1", "--seed", "1", *options]) == 0


def _generate_plainly(folder: Path, **options: Any) -> tuple[Any, list[int], list[int]]:
    """Answer with transformers alone; return the tokenizer, the answer's ids and the model's end tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    chat: Any = [{"role": "user", "content": "Name a city."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, **options)
    return tokenizer, output[0, inputs["input_ids"].shape[1] :].tolist(), model.generation_config.eos_token_id


def test_a_merged_model_stops_at_its_end_of_turn_token(folder: Path) -> None:
    _train(folder, "--use_peft", "--lora_r", "16", "--lora_target_modules", "all-linear")
    assert main(["merge", "--adapter", str(folder / "run"), "--out", str(folder / "merged")]) == 0
    tokenizer, ids, end_ids = _generate_plainly(folder / "merged")
    assert set(end_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)}
    assert tokenizer.decode(ids) == f"Canberra is.{IM_END}"
    config = json.loads((folder / "merged" / "generation_config.json").read_text())
    assert config["temperature"] == 0.7, "other fields stay"


def test_a_fully_trained_model_and_its_checkpoints_stop_there(folder: Path) -> None:
    _train(folder, "--no_use_peft", "--learning_rate", "0.005", "--save_strategy", "steps", "--save_steps", "40")
    for saved in (folder / "run", folder / "run" / "checkpoint-40"):
        tokenizer, ids, end_ids = _generate_plainly(saved)
        assert set(end_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)}
        assert tokenizer.decode(ids) == f"Canberra is.{IM_END}"


@pytest.mark.parametrize("num_ends", [1, 2])
def test_encoded_rows_name_the_end_of_turn_token_by_their_last_token(tmp_path: Path, num_ends: int) -> None:
    model = make_model(64, eos_token_id=2)
    rows = [
        {"prompt_ids": [5, 6], "judged_prompt_ids": None, "response_ids": [7, 8, 9 + index % num_ends]}
        for index in range(4)
    ]
    args = CUTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = CUTTrainer(model=model, args=args, train_dataset=rows)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list_end_ids(saved) == ([2, 9] if num_ends == 1 else [2])
    assert model.generation_config.eos_token_id == 2, "the caller's model stays as it was"
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
