"""Continuous batching gives the tokens that `generate` gives each prompt alone."""

from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

import cutlm.generation.local as generation
from cutlm.generation.continuous import Row, generate_rows, has_slots
from cutlm.generation.local import Generated, Sampling, generate_batches, generate_ids, supports_slots
from cutlm.prompting.encoding import Encoder

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS: dict[str, Any] = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MLA |= {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
IN_SLOTS = {
    "llama": LlamaConfig(**HEADS),
    "llama, eager": LlamaConfig(**HEADS, attn_implementation="eager"),
    "gpt2": GPT2Config(**SIZES, n_head=4),
    "gemma": GemmaConfig(**HEADS, head_dim=8),
    "qwen3": Qwen3Config(**HEADS, head_dim=8),
    "mixtral": MixtralConfig(**HEADS, **EXPERTS),
    "deepseek": DeepseekV3Config(**HEADS | MLA, moe_intermediate_size=16, first_k_dense_replace=1),
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
NOT_IN_SLOTS = {
    "bloom": BloomConfig(**SIZES, n_head=4),
    "mistral": MistralConfig(**HEADS, sliding_window=8),
    "gemma2": Gemma2Config(**HEADS, head_dim=8, sliding_window=8),
    "gpt-oss": GptOssConfig(**HEADS, **EXPERTS, head_dim=8, sliding_window=8),
    "mamba": MambaConfig(**SIZES, state_size=4),
    "dynamic rope": LlamaConfig(**HEADS, rope_parameters=DYNAMIC, max_position_embeddings=64),
}


def _make(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    return model.eval()


def _draw_prompts(num_prompts: int = 11, num_shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    shared = draw(num_shared)
    return [shared + draw(1 + (number * 13) % 29) for number in range(num_prompts)]


def _generate_alone(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    config = generation.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        return [generate_ids(model, [ids], config)[0, len(ids) :].tolist() for ids in prompts]


def _generate(model: Any, prompts: list[list[int]], lengths: list[int], num_slots: int) -> tuple[list[list[int]], int]:
    """Return the greedy tokens of rows, each of its own length, and the number of steps and passes over prompts."""
    rows = [Row(index, ids) for index, ids in enumerate(prompts)]
    num_passes = 0

    def add_tokens(batch: Any, logits: torch.Tensor) -> None:
        nonlocal num_passes
        num_passes += 1
        assert len(batch) <= num_slots
        for row, token_id in zip(batch, logits.argmax(-1).tolist(), strict=True):
            row.new_ids.append(token_id)
            row.is_finished = len(row.new_ids) == lengths[row.index]

    finished = [row for batch in generate_rows(model, rows, num_slots, add_tokens) for row in batch]
    assert sorted(row.index for row in finished) == list(range(len(rows)))
    return [row.new_ids for row in rows], num_passes


@pytest.mark.parametrize("name", IN_SLOTS)
def test_tokens_equal_those_of_prompts_alone(name: str) -> None:
    model, prompts = _make(IN_SLOTS[name]), _draw_prompts()
    assert supports_slots(model, prompts, 9)
    lengths = [1 + (number * 7) % 9 for number in range(len(prompts))]
    expected = _generate_alone(model, prompts, 9)
    assert len({tuple(ids) for ids in expected}) > 5
    tokens, num_passes = _generate(model, prompts, lengths, 3)
    assert tokens == [ids[:length] for ids, length in zip(expected, lengths, strict=True)]
    assert num_passes < sum(lengths) / 2


@pytest.mark.parametrize("num_slots", [1, 4, 50])
def test_the_cache_grows_and_prefixes_are_shared(num_slots: int) -> None:
    model, prompts = _make(IN_SLOTS["llama"]), _draw_prompts(6, num_shared=70)
    prompts = [*prompts, prompts[2], prompts[2], [5], prompts[0][:30]]
    num_tokens: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: num_tokens.append(args[0].numel())
    )
    tokens, _ = _generate(model, prompts, [90] * len(prompts), num_slots)
    hook.remove()
    assert tokens == _generate_alone(model, prompts, 90)
    if num_slots > 1:
        assert sum(num_tokens) - 89 * len(prompts) < sum(map(len, prompts)) / 2


@pytest.mark.parametrize("name", NOT_IN_SLOTS)
def test_models_with_other_caches_masks_or_positions_are_not_run_in_slots(name: str) -> None:
    assert not has_slots(_make(NOT_IN_SLOTS[name]), 65)


def test_dynamic_rope_is_run_in_slots_up_to_its_switch() -> None:
    model = _make(NOT_IN_SLOTS["dynamic rope"])
    assert has_slots(model, 64)


def test_a_model_that_ignores_the_mask_is_found(caplog: pytest.LogCaptureFixture) -> None:
    model = _make(IN_SLOTS["llama"])
    forward = model.forward

    def ignore(position_ids: Any, past_key_values: Any, attention_mask: Any = None, **inputs: Any) -> Any:
        return forward(position_ids=position_ids, past_key_values=past_key_values, **inputs)

    model.forward = ignore
    prompts = _draw_prompts()
    assert has_slots(model, 99)
    assert not supports_slots(model, prompts, 9)
    assert "without continuous batching" in caplog.text


# ---- Sampling ----


def _respond(sampling: Sampling, known: tuple[int, ...] = ()) -> dict[int, str]:
    tokenizer = make_tokenizer("bpe", chat=True)
    torch.manual_seed(0)
    model = make_model(len(tokenizer)).eval()
    encoder = Encoder(tokenizer, "chat")
    prompts = [encoder.encode_prompt("Name a city." * (1 + index % 3)) for index in range(7)]
    generated = Generated(responses=dict.fromkeys(known, "known"))
    for _ in generate_batches(model, tokenizer, encoder, prompts, sampling, generated):
        pass
    return generated.responses


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_depend_on_the_seed_and_index_only(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _respond(Sampling(8, 1.0, top_p, batch_size=3))
    assert len(set(expected.values())) == 7, "also of equal prompts"
    assert _respond(Sampling(8, 1.0, top_p, batch_size=1)) == expected
    assert _respond(Sampling(8, 1.0, top_p, batch_size=16)) == expected
    assert _respond(Sampling(8, 1.0, top_p, seed=43)) != expected
    assert _respond(Sampling(8, 1.0, top_p, batch_size=3), known=(0, 5)) == expected | {0: "known", 5: "known"}
    monkeypatch.setattr(generation, "supports_slots", lambda *args: False)
    assert _respond(Sampling(8, 1.0, top_p, batch_size=3)) == expected


def test_tokens_are_drawn_by_their_probabilities() -> None:
    indices = list(range(20000))
    logits = torch.tensor([0.1, 0.0, 0.5, 0.3, 0.1]).log().expand(len(indices), -1)
    shares = generation.Sampler(Sampling(1, 1.0), indices).choose(indices, logits).bincount(minlength=5) / 20000
    assert torch.allclose(shares, logits[0].exp(), atol=0.015)
    assert shares[1] == 0
    shares = generation.Sampler(Sampling(1, 1.0, top_p=0.7), indices).choose(indices, logits).bincount(minlength=5)
    assert torch.allclose(shares / 20000, torch.tensor([0, 0, 0.625, 0.375, 0]), atol=0.015)
    chosen = generation.Sampler(Sampling(1, 1.0, top_p=0.01), indices).choose(indices, logits)
    assert set(chosen.tolist()) == {2}
    cold = generation.Sampler(Sampling(1, 1e-3), indices[:50]).choose(indices[:50], logits[:50])
    assert set(cold.tolist()) == {2}


@pytest.mark.parametrize(("name", "expected"), [("past_key_values", True), ("cache", True), ("states", False)])
def test_a_cache_is_recognized_by_both_names_of_its_argument(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: bool
) -> None:
    names = {"position_ids", "attention_mask", name}
    monkeypatch.setattr("cutlm.generation.continuous._list_arguments", lambda _: names)
    assert has_slots(make_model(300), 64) is expected
