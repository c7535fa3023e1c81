"""Loading refuses incomplete, damaged or unsuitable models instead of initializing anything at random."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, Llama4TextConfig
from transformers import LlamaForSequenceClassification as Classifier
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from cutlm.errors import ConfigError, UserError
from cutlm.model.forward import check_head
from cutlm.model.loading import check_lora_targets, load_model, load_tokenizer


def test_model_without_its_head_is_refused(tmp_path: Path) -> None:
    model = make_model(40)
    for folder, headless in (("body", model.model), ("classifier", Classifier(model.config))):
        headless.save_pretrained(tmp_path / folder)
        with pytest.raises(UserError, match=r"LlamaForCausalLM, but 1 are missing .* the first lm_head\.weight;"):
            load_model(tmp_path / folder)


def test_missing_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    make_model(40).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: one for name, one in weights.items() if "layers.1." not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"9 are missing .* the first model\.layers\.1\.input_layernorm\.weight;"):
        load_model(tmp_path)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing or have another shape, the first model\.norm\.weight;"):
        load_model(tmp_path)


def test_tied_head_is_not_missing(tmp_path: Path) -> None:
    make_model(40, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got one with an encoder"):
        load_model(tmp_path)


def test_adapter_is_not_loaded_as_a_model(tmp_path: Path) -> None:
    get_peft_model(make_model(40), LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got an adapter; first run: cutlm merge"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{",
        "{}",
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "hidden_act": "x"}',
        '{"model_type": "llama", "hidden_size": 0}',
    ],
)
def test_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    make_model(40).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        load_model(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    make_model(40).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        load_model(tmp_path)
    file.unlink()
    for content in (b"", b"abc", b"PK\x03\x04"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"^{tmp_path}"):
            load_model(tmp_path)


@pytest.mark.parametrize("content", ["", "1", "{", "{}", '{"version": 3, "added_tokens": []}'])
def test_damaged_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    make_tokenizer("bpe").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("error", [TypeError("an unexpected keyword"), torch.OutOfMemoryError("CUDA out of memory")])
def test_bugs_and_lack_of_memory_are_not_reported_as_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make_model(40).save_pretrained(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_model(tmp_path)
    assert raised.value is error


def test_body_is_found_in_a_class_without_a_base_model() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": None}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts))
    assert model.base_model is model
    check_head(model)


def test_unknown_lora_target_names_the_linear_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"^lora_target_modules: .*gate_proj; .* c_attn, c_fc, c_proj$"):
        check_lora_targets(model, LoraConfig(target_modules=["gate_proj"]))


def test_lora_on_an_embedding_tied_to_the_head_is_refused() -> None:
    config = LoraConfig(target_modules=["embed_tokens", "down_proj"])
    check_lora_targets(make_model(40), config)
    with pytest.raises(ConfigError, match=r"^lora_target_modules: embed_tokens is tied"):
        check_lora_targets(make_model(40, tie_word_embeddings=True), config)
