"""Loading refuses incomplete, damaged or unsuitable models instead of initializing anything at random."""

import json
import platform
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, Llama4TextConfig
from transformers import LlamaForSequenceClassification as Classifier
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from cutlm.errors import ConfigError, UserError
from cutlm.model import loading
from cutlm.model.forward import check_head
from cutlm.model.loading import check_lora_targets, load_model, load_tokenizer, load_trained


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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_slow_cpu_computes_16_bit_models_in_float32_and_says_so_once(
    slow_cpu: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: torch.dtype
) -> None:
    make_model(40).to(stored).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "cutlm"):
        assert load_model(tmp_path).dtype == torch.float32
        make_tokenizer().save_pretrained(tmp_path)
        assert load_trained(tmp_path, device="cpu")[0].dtype == torch.float32
    assert len([record for record in caplog.records if "float32" in record.getMessage()]) == 1
    for weight in load_file(tmp_path / "model.safetensors").values():
        assert weight.dtype == stored, "loading changes no files"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", torch.bfloat16])
def test_slow_cpu_computes_in_the_dtype_that_is_asked_for(
    slow_cpu: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str | torch.dtype
) -> None:
    make_model(40).bfloat16().save_pretrained(tmp_path)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    with caplog.at_level("WARNING", "cutlm"):
        assert load_model(tmp_path, dtype=dtype).dtype == expected
    assert not caplog.records


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_slow_cpu_keeps_wider_dtypes(slow_cpu: None, tmp_path: Path, stored: torch.dtype) -> None:
    make_model(40).to(stored).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == stored


def test_slow_cpu_reads_the_dtype_of_weights_that_the_config_does_not_name(slow_cpu: None, tmp_path: Path) -> None:
    make_model(40).bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("dtype") == "bfloat16"
    file.write_text(json.dumps(config))
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, device="cuda").dtype == torch.bfloat16, "on its way to a GPU"


def test_fast_cpu_keeps_bfloat16(fast_cpu: None, tmp_path: Path) -> None:
    make_model(40).bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert not loading.has_fast_math(torch.float16)


def test_fast_math_needs_units_and_a_library_that_uses_them(fast_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.has_fast_math(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not loading.has_fast_math(torch.bfloat16)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert loading.has_fast_math(torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not loading.has_fast_math(torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", _raise_attribute_error)  # another torch
    assert not loading.has_fast_math(torch.bfloat16)


def _raise_attribute_error() -> bool:
    raise AttributeError


def test_unknown_device_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    for device in ("xpu:7", "nonsense"):
        with pytest.raises(UserError, match=f"--device {device}: not available"):
            load_trained(tmp_path / "missing", device=device)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("config.json", "model_type", ["llama"]),
        ("config.json", "model_type", {}),
        ("config.json", "quantization_config", "4-bit"),
        ("config.json", "dtype", ["bfloat16"]),
        ("config.json", "text_config", "x"),
        ("tokenizer_config.json", "tokenizer_class", ["x"]),
        ("tokenizer_config.json", "eos_token", 5),
        ("tokenizer_config.json", "auto_map", "x"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_model_folder_is_a_user_error(
    name: str, field: str, value: object, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(content | {field: value}))
    load = load_tokenizer if name == "tokenizer_config.json" else load_model
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "<!doctype html>"]
)
def test_a_file_of_which_only_a_pointer_or_a_web_page_was_downloaded_is_named(
    name: str, content: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: expected a file of a model, got a (Git LFS pointer|web page)"):
        load_model(tmp_path)
