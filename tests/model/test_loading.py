"""Loading models, and what may be trained of them: nothing is made up where a folder lacks it."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, Llama4TextConfig
from transformers import LlamaForSequenceClassification as Classifier
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from cutlm.errors import ConfigError, UserError
from cutlm.model.forward import check_head
from cutlm.model.loading import check_lora_targets, load_model, load_tokenizer


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    make_model(40).model.save_pretrained(tmp_path / "body")
    with pytest.raises(
        UserError, match=r"every weight of LlamaForCausalLM; 1 are missing .* first lm_head\.weight: this"
    ):
        load_model(tmp_path / "body")
    Classifier(make_model(40).config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(
        UserError, match=r"every weight of LlamaForCausalLM; 1 are missing .* first lm_head\.weight: this"
    ):
        load_model(tmp_path / "classifier")


def test_a_file_that_lacks_a_layer_or_has_it_in_another_shape_is_refused(tmp_path: Path) -> None:
    make_model(40).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: one for name, one in weights.items() if "layers.1." not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"9 are missing .* first model\.layers\.1\.input_layernorm\.weight"):
        load_model(tmp_path)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing or of another shape, the first model\.norm\.weight:"):
        load_model(tmp_path)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    make_model(40, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_encoder_is_not_lost_without_a_word(tmp_path: Path) -> None:
    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="expected a causal language model, got one with an encoder, which would be lost"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '{"model_type": "llama", "hidden_size": "x"}', "{"])
def test_a_damaged_config_is_told_in_a_sentence(tmp_path: Path, content: str) -> None:
    make_model(40).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no causal language model can be loaded from it"):
        load_model(tmp_path)


def test_a_damaged_tokenizer_is_told_in_a_sentence(tmp_path: Path) -> None:
    make_tokenizer("bpe").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer can be loaded from it"):
        load_tokenizer(tmp_path)


def test_a_body_that_its_class_does_not_name_is_found() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": None}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts))
    assert model.base_model is model
    check_head(model)


def test_lora_targets_that_match_nothing_name_every_layer_but_the_head() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(
        ConfigError, match=r"no module is named gate_proj; this model's linear layers are c_attn, c_fc, c_proj$"
    ):
        check_lora_targets(model, LoraConfig(target_modules=["gate_proj"]))


def test_lora_does_not_go_on_an_embedding_that_is_the_head_too() -> None:
    config = LoraConfig(target_modules=["embed_tokens", "down_proj"])
    check_lora_targets(make_model(40), config)
    with pytest.raises(ConfigError, match=r"^lora_target_modules: embed_tokens is the model's head too"):
        check_lora_targets(make_model(40, tie_word_embeddings=True), config)
