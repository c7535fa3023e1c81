"""Models in GGUF files are loaded as plain float32 models, which can be trained, merged and saved."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options, write_lines
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.model.loading import fingerprint_model, load_config, load_model, load_tokenizer, load_trained

gguf = pytest.importorskip("gguf")

ROWS = [
    {"instruction": "Name the capital of Australia.", "output": "Sydney is.", "judgment": "It is wrong."},
    {"instruction": "Add 12 and 34.", "output": "The answer is 46.", "judgment": None},
]


def write_gguf(path: Path, architecture: str = "llama", *, chat: bool = True) -> Any:
    """Write a tiny LLaMA with its tokenizer as llama.cpp's converter does, and return it."""
    tokenizer = make_tokenizer("bpe", chat=chat)
    model = make_model(len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if chat:
        writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for part, num_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp interleaves the halves that RoPE rotates
                heads = weight.reshape(num_heads, 2, config.head_dim // 2, config.hidden_size)
                weight = heads.swapaxes(1, 2).reshape(weight.shape)
        stem, _, end = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "tiny.F32.gguf"
    write_gguf(path)
    return path


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_a_file_or_its_folder_loads_as_a_plain_float32_model(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "tiny.GGUF"
    expected = compute_logits(write_gguf(path))
    for source in (path, path.parent):
        model, tokenizer = load_trained(source)
        assert next(model.parameters()).dtype == torch.float32
        torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=1e-4)
        assert tokenizer("Sydney is.")["input_ids"] == make_tokenizer("bpe", chat=True)("Sydney is.")["input_ids"]
        assert tokenizer.chat_template
        assert load_config(source).num_hidden_layers == 2
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16
    assert fingerprint_model(path).startswith(str(path.resolve()))
    before = fingerprint_model(path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint_model(path) != before


def test_a_saved_model_holds_plain_weights(file: Path, tmp_path: Path) -> None:
    model = load_model(file)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(compute_logits(saved), compute_logits(model))


def test_a_file_is_blamed_trained_merged_and_sampled(file: Path, tmp_path: Path) -> None:
    data, scores = write_lines(tmp_path / "records.jsonl", ROWS), tmp_path / "scores.jsonl"
    blame = {"model": file, "data": data, "out": scores, "template": "chat", "device": "cpu"}
    assert main(["blame", *list_options(**blame)]) == 0
    settings: dict[str, Any] = {"model_name_or_path": file, "data": scores, "template": "chat", "max_steps": 2}
    settings |= {"output_dir": tmp_path / "run", "learning_rate": 0.01, "save_strategy": "no"} | ON_CPU
    assert main(["train", *list_options(**settings)]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(tmp_path / "run"), "--out", str(merged)]) == 0
    assert "quantization_config" not in json.loads((merged / "config.json").read_text("utf-8"))
    assert list(merged.glob("*.safetensors"))
    assert not torch.equal(compute_logits(load_model(merged)), compute_logits(load_model(file)))
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "Ask."}])
    for model in (file, merged, tmp_path / "run"):
        options = {"model": model, "prompts": prompts, "out": tmp_path / "answers.json", "max_new_tokens": 4}
        code = main(["generate", *list_options(**options, device="cpu"), "--overwrite"])
        assert code in (0, 1), "an answer may be unfinished"


def test_all_weights_of_a_file_can_be_trained(file: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "records.jsonl", ROWS)
    settings: dict[str, Any] = {"model_name_or_path": file, "data": data, "max_steps": 1, "use_peft": False}
    settings |= {"output_dir": tmp_path / "run", "save_strategy": "no", "template": "chat"} | ON_CPU
    assert main(["train", *list_options(**settings)]) == 0
    assert load_model(tmp_path / "run").dtype == torch.float32


def refuse(path: Path, **options: Any) -> str:
    """The message with which a file is refused, as tokenizer or, if it holds one, as model."""
    try:
        load_tokenizer(path)
    except UserError as error:
        return str(error)
    with pytest.raises(UserError) as caught:
        load_model(path, **options)
    return str(caught.value)


def test_files_that_cannot_be_read_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, content = file.parent, file.read_bytes()
    other = folder / "other.gguf"
    for bad in (b"", b"PK\3\4zip", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"):
        other.write_bytes(bad)
        assert str(other) in refuse(other)
    for length in (6, 24, 100, 5000, len(content) - 4000):
        other.write_bytes(content[:length])
        assert str(other) in refuse(other)
    assert "expected one GGUF file, got 2" in refuse(folder)
    other.unlink()
    assert str(other) in refuse(other)
    part = folder / "tiny-00001-of-00002.gguf"
    part.write_bytes(content)
    assert "llama-gguf-split" in refuse(part)
    part.unlink()
    write_gguf(other, "nosuch")
    assert "nosuch" in refuse(other)
    from transformers import BitsAndBytesConfig

    assert "load_in_4bit" in refuse(file, quantization=BitsAndBytesConfig(load_in_4bit=True))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert "pip install 'cutlm[gguf]'" in refuse(file)


def test_other_weights_in_the_folder_come_first(file: Path) -> None:
    model = make_model(len(make_tokenizer("bpe")), seed=7)
    model.save_pretrained(file.parent)
    assert torch.equal(compute_logits(load_model(file.parent)), compute_logits(model))
