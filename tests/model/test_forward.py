"""Every layout gives a record the log-probabilities and gradients that it gets alone."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from cutlm.model.collator import CutCollator
from cutlm.model.forward import PADDED, ForwardLayout, PrefixTree, _group_by_length, choose_layout, score_batch

VOCAB_SIZE = 50
PREFIX_MASK = ForwardLayout(has_prefix_mask=True)
SHARED_KV = ForwardLayout(has_shared_kv=True)
ONE_PASS = ForwardLayout(is_single_pass=True)
ONE_MASKED_PASS = ForwardLayout(has_prefix_mask=True, is_single_pass=True)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
collate = CutCollator()


def make_row(prompt: list[int], judged: list[int] | None, response: list[int]) -> dict[str, Any]:
    return {"prompt_ids": prompt, "judged_prompt_ids": judged, "response_ids": response}


tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6)
prefixes = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0, max_size=30)
judged_rows = st.builds(
    lambda prefix, prompt, judged, response: make_row([*prefix, *prompt], [*prefix, *judged], response),
    prefixes,
    tokens,
    tokens,
    tokens,
)
batches = st.lists(judged_rows | st.builds(make_row, tokens, st.none(), tokens), min_size=1, max_size=5)

LONG = list(range(40))
TWO_TREES = [
    make_row([*LONG, 3], [*LONG, 4, 5], [6, 7, 8]),
    make_row([1, 2], None, [9, 9]),
    make_row([*LONG[::-1], 1], [*LONG[::-1], 2], [3]),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model(VOCAB_SIZE)


def list_pass_sizes(model: Any, run: Callable[[], Any]) -> list[int]:
    """Number of tokens of each forward pass, padding included."""
    sizes: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return sizes


def compute_gradients(model: nn.Module, batch: dict[str, Any], layout: ForwardLayout, **options: Any) -> list[Tensor]:
    logps = score_batch(model, batch, layout=layout, **options)
    weights = torch.linspace(-1, 1, len(logps))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True))


def assert_same_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    largest = max(float(one.abs().max()) for one in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * largest)


@settings(max_examples=25, deadline=None)
@given(rows=batches, layout=st.sampled_from([PREFIX_MASK, SHARED_KV, ONE_PASS, ONE_MASKED_PASS]))
def test_layouts_agree_on_log_probs(model: nn.Module, rows: Any, layout: ForwardLayout) -> None:
    batch = collate(rows)
    with torch.no_grad():
        got, want = score_batch(model, batch, layout=layout), score_batch(model, batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [PREFIX_MASK, SHARED_KV, ONE_PASS, ONE_MASKED_PASS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layouts_agree_on_gradients(layout: ForwardLayout, attention: str) -> None:
    model = make_model(VOCAB_SIZE)
    model.set_attn_implementation(attention)
    batch = collate(TWO_TREES)
    assert_same_gradients(compute_gradients(model, batch, layout), compute_gradients(model, batch, PADDED))


def test_activation_checkpointing_keeps_gradients() -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = compute_gradients(model, batch, PADDED)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(compute_gradients(model, batch, PREFIX_MASK), want)


@pytest.mark.parametrize("layout", [PADDED, PREFIX_MASK, SHARED_KV])
def test_checkpointed_passes_repeat_their_dropout(layout: ForwardLayout) -> None:
    model = get_peft_model(make_model(VOCAB_SIZE), LoraConfig(lora_dropout=0.5, target_modules=["up_proj"]))
    # B is initialized with zeros, so A would have no gradient.
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    model.train()
    batch = collate(TWO_TREES)
    gradients = []
    for max_tokens in (None, sum(batch["sequence_lengths"]) // 2, 10):
        torch.manual_seed(0)
        sizes = list_pass_sizes(
            model.get_base_model(),
            lambda max_tokens=max_tokens: gradients.append(
                compute_gradients(model, batch, layout, max_tokens=max_tokens)
            ),
        )
        num_first = 2 if layout == SHARED_KV else 1
        # All passes but the last run twice.
        assert len(sizes) == num_first * (2 if max_tokens == 10 else 1) + 1
    for again in gradients[1:]:
        assert_same_gradients(again, gradients[0])


def test_shared_prefix_runs_once_under_a_mask(model: nn.Module) -> None:
    batch = collate(TWO_TREES)
    assert batch["shared_lengths"] == [40, 40]
    sizes = list_pass_sizes(model, lambda: score_batch(model, batch, layout=PREFIX_MASK))
    # Two trees in one row: 40 shared tokens, then prompts of 1 and 2 tokens, each with 2 of the 3 response tokens; 40
    # shared tokens, then prompts of 1 and 1 with none of 1 response token. The satisfactory record has a pass of 2 + 1.
    assert sizes == [(40 + (1 + 2) + (2 + 2)) + (40 + 1 + 1), 3]
    # Without the mask: four sequences padded to the longest, 42 + 2 tokens.
    assert list_pass_sizes(model, lambda: score_batch(model, batch)) == [4 * 44, 3]


def test_masked_rows_have_a_limit_of_their_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(TWO_TREES)
    monkeypatch.setattr("cutlm.model.forward.choose_tokens_per_pass", lambda device: 16384)
    monkeypatch.setattr("cutlm.model.forward._MAX_MASKED_TOKENS", 50)
    # The two trees of 47 and 42 tokens get a row each; the satisfactory record is no tree.
    assert list_pass_sizes(model, lambda: score_batch(model, batch, layout=PREFIX_MASK)) == [47, 42, 3]


def test_shared_prefix_runs_once_with_a_kv_cache(model: nn.Module) -> None:
    batch = collate(TWO_TREES)
    sizes = list_pass_sizes(model, lambda: score_batch(model, batch, layout=SHARED_KV))
    # Plain contexts of 40 + 1 + 2 and 40 + 1 tokens, the second padded; judged ones add 2 + 2 and 1 to the cache. The
    # satisfactory record has its own pass.
    assert sizes == [2 * 43, 2 * 4, 3]
    assert sum(sizes) < 4 * 44


def test_frozen_judged_context_has_no_graph_on_the_kv_cache(model: nn.Module) -> None:
    batch = collate([make_row([*LONG, 1], [*LONG, *[2] * 9], [3])])
    grads: list[bool] = []
    hook = model.base_model.register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: grads.append(output.last_hidden_state.requires_grad)
    )
    score_batch(model, batch, layout=SHARED_KV, needs_judged_grad=False)
    hook.remove()
    assert grads == [True, False]


def test_trees_are_grouped_by_both_lengths() -> None:
    # Each has 100 tokens, 90 + 10 or 10 + 90. In one group each would be padded to 90 + 90.
    trees = [PrefixTree((0, 1), 0, 100), PrefixTree((2, 3), 0, 100), PrefixTree((4, 5), 0, 100)]
    groups = list(_group_by_length(trees, 1000, [90, 0, 10, 0, 90, 0]))
    assert sorted(len(group) for group in groups) == [1, 1, 1]
    assert len(list(_group_by_length(trees, 1000, [90, 0, 90, 0, 90, 0]))) == 1


def test_rope_switched_by_length_does_not_depend_on_the_batch() -> None:
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 36}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make_model(VOCAB_SIZE, max_position_embeddings=144, rope_parameters=rope, num_attention_heads=4)
    layout = choose_layout(model)
    assert layout == replace(MASK_AND_KV, rope_switch_length=36)
    rows = [make_row(LONG[:length], None, [1, 2, 3]) for length in (32, 33, 34, 35, 37, 37)]
    rows.insert(0, make_row(LONG[:32], [*LONG[:31], *LONG[:9]], [1, 2, 3]))  # 34 and 42 tokens: no shared prefix
    rows.insert(1, make_row(LONG[:32], [*LONG[:31], 7, 8], [1, 2, 3]))  # 34 and 35 tokens: a shared prefix
    with torch.no_grad():
        exact = ForwardLayout(rope_switch_length=36)
        alone = torch.cat([score_batch(model, collate([row]), layout=exact) for row in rows])
        order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11, *range(12, 30)]  # both plain contexts, then both judged ones
        for chosen in (layout, replace(layout, has_shared_kv=False), exact):
            got = score_batch(model, collate(rows), layout=chosen)
            torch.testing.assert_close(got, alone[order], atol=1e-5, rtol=1e-5)
        assert (score_batch(model, collate(rows)) - alone[order]).abs().max() > 0.1, "padding must matter here"


def test_short_prefix_is_not_shared(model: nn.Module) -> None:
    # The tree would have 90 tokens instead of 50 + 50, which saves too little.
    batch = collate([make_row([*range(10), *[7] * 38], [*range(10), *[8] * 38], [1, 2, 3])])
    assert batch["shared_lengths"] == [10]
    assert list_pass_sizes(model, lambda: score_batch(model, batch, layout=PREFIX_MASK)) == [2 * 50]


def test_last_prompt_token_is_never_shared(model: nn.Module) -> None:
    batch = collate([make_row([1, 2, 3, 4], [1, 2, 3, 4, 5], [6]), make_row([1, 2], [1, 2], [3])])
    assert batch["shared_lengths"] == [3, 1]
    with torch.no_grad():
        torch.testing.assert_close(score_batch(model, batch, layout=PREFIX_MASK), score_batch(model, batch))


def test_single_pass_layouts_make_one_pass_for_any_batch(model: nn.Module) -> None:
    for rows in (TWO_TREES, TWO_TREES[:1], TWO_TREES[1:2]):
        batch = collate(rows)
        for layout in (ONE_PASS, ONE_MASKED_PASS):
            for needs_judged_grad in (True, False):
                sizes = list_pass_sizes(
                    model,
                    lambda batch=batch, layout=layout, needs=needs_judged_grad: score_batch(
                        model, batch, layout=layout, needs_judged_grad=needs
                    ),
                )
                assert len(sizes) == 1


@pytest.mark.parametrize("layout", [PREFIX_MASK, SHARED_KV, ONE_PASS, ONE_MASKED_PASS])
def test_frozen_judged_contexts_get_no_gradient(layout: ForwardLayout) -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = compute_gradients(model, batch, PADDED, needs_judged_grad=False)
    assert_same_gradients(compute_gradients(model, batch, layout, needs_judged_grad=False), want)


def test_frozen_judged_context_is_masked_only_if_it_adds_few_tokens(model: nn.Module) -> None:
    def run(num_own: int) -> list[int]:
        rows = [make_row([*LONG, 1], [*LONG, *[2] * num_own], [3])]
        return list_pass_sizes(
            model, lambda: score_batch(model, collate(rows), layout=PREFIX_MASK, needs_judged_grad=False)
        )

    # In a tree its own 2 or 20 tokens cost 3 units each; alone, all 42 or 60 tokens cost 1.
    assert run(2) == [43]
    assert run(20) == [41, 60]


def attend_by_position_ids(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Flash attention on a packed row, in plain torch: sequences are separated where position ids restart at 0."""
    assert attention_mask is None
    (position_ids,) = kwargs["position_ids"]
    starts = [*(position_ids == 0).nonzero()[:, 0].tolist(), len(position_ids)]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(states[:, :, start:end] for states in (query, key, value)), is_causal=True
        )
        for start, end in pairwise(starts)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def test_packed_rows_are_separated_by_position_ids() -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = compute_gradients(model, batch, PADDED)
    # flash-attention itself needs a GPU; this implementation has the same interface in transformers.
    AttentionInterface.register("varlen_in_plain_torch", attend_by_position_ids)
    model.set_attn_implementation("varlen_in_plain_torch")
    layout = choose_layout(model)
    assert layout == ForwardLayout(is_packed=True)
    assert list_pass_sizes(model, lambda: score_batch(model, batch, layout=layout)) == [43 + 44 + 41 + 41 + 3]
    assert_same_gradients(compute_gradients(model, batch, layout), want)


GPT_NEO = [[["global", "local"], 1]]
MASK_AND_KV = ForwardLayout(has_prefix_mask=True, has_shared_kv=True)
CHOICES: dict[str, tuple[Any, ForwardLayout]] = {
    "LLaMA": (LlamaConfig(**SHAPE), MASK_AND_KV),
    "LLaMA, eager": (LlamaConfig(**SHAPE, attn_implementation="eager"), MASK_AND_KV),
    "Qwen 3": (Qwen3Config(**SHAPE, head_dim=8), MASK_AND_KV),
    "GPT-2": (GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4), MASK_AND_KV),
    "GPT-Neo": (
        GPTNeoConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, num_heads=4, attention_types=GPT_NEO),
        PADDED,
    ),
    "Mistral with a window": (MistralConfig(**SHAPE, sliding_window=4), PADDED),
    "Mistral without a window": (MistralConfig(**SHAPE, sliding_window=None), MASK_AND_KV),
    "Gemma 3": (Gemma3TextConfig(**SHAPE, head_dim=8), PADDED),
    "BLOOM, without position ids": (
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
        SHARED_KV,
    ),
    "Mamba, recurrent": (MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2), PADDED),
}


@pytest.mark.parametrize("name", CHOICES)
def test_probe_finds_the_layouts_that_a_model_supports(name: str) -> None:
    config, expected = CHOICES[name]
    model = AutoModelForCausalLM.from_config(config).train()
    assert choose_layout(model) == expected
    assert choose_layout(model, is_compiled=True) == replace(expected, has_shared_kv=False)
    assert all(module.training for module in model.modules()), "the probe must restore the mode"
    batch = collate(TWO_TREES)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            score_batch(model, batch, layout=expected), score_batch(model, batch), atol=1e-4, rtol=1e-4
        )


def test_activation_checkpointing_falls_back_from_kv_cache_to_mask() -> None:
    model, batch = make_model(VOCAB_SIZE).train(), collate(TWO_TREES)
    layout = choose_layout(model)
    assert layout == MASK_AND_KV
    want = compute_gradients(model, batch, PADDED)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # after the probe
    assert list_pass_sizes(model, lambda: score_batch(model, batch, layout=layout)) == [47 + 42, 3]
    assert_same_gradients(compute_gradients(model, batch, layout), want)
    model.eval()  # no checkpointing in evaluation mode
    assert list_pass_sizes(model, lambda: score_batch(model, batch, layout=layout)) == [2 * 43, 2 * 4, 3]


def test_kv_cache_is_not_held_twice(model: nn.Module) -> None:
    batch = collate([make_row([*LONG, 1], [*LONG, 2, 3], [3])])
    caches: list[Any] = []
    hook = model.base_model.register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    with torch.no_grad():
        score_batch(model, batch, layout=SHARED_KV)
    hook.remove()
    assert all(layer.keys is None and layer.values is None for layer in caches[0].layers)
    assert [layer.keys.shape[2] for layer in caches[1].layers] == [42, 42]


def test_probe_skips_models_without_local_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert choose_layout(model, is_sharded=True) == ONE_PASS


def test_unsupported_layout_is_logged_and_avoided(caplog: pytest.LogCaptureFixture) -> None:
    config, expected = CHOICES["BLOOM, without position ids"]
    assert choose_layout(AutoModelForCausalLM.from_config(config)) == expected
    (record,) = caplog.records
    assert "BloomForCausalLM" in record.getMessage()
    assert "ValueError" in record.getMessage(), "the reason"


def test_layout_that_changes_hidden_states_is_logged_and_avoided(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(VOCAB_SIZE)
    model.config._attn_implementation = "unknown_varlen"  # ignores position ids, so sequences see each other
    AttentionInterface.register("unknown_varlen", AttentionInterface()["sdpa"])
    assert not choose_layout(model).is_packed
    assert "hidden states differ" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), TypeError("a bug"), RuntimeError("CUDA error")]
)
@pytest.mark.parametrize("failing", ["run_packed_row", "run_with_shared_kv", "run_padded"])
def test_other_errors_in_the_probe_propagate(failing: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"cutlm.model.forward.{failing}", fail)
    with pytest.raises(type(error)) as raised:
        choose_layout(make_model(VOCAB_SIZE))
    assert raised.value is error
