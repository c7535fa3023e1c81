"""The layouts of the passes through a model: whatever goes together, a record gets what it has alone."""

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
SHARING = ForwardLayout(has_prefix_mask=True)
LENDING = ForwardLayout(has_shared_kv=True)
SINGLE = ForwardLayout(is_single_pass=True)
SINGLE_ROW = ForwardLayout(has_prefix_mask=True, is_single_pass=True)
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
beginnings = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0, max_size=30)
judged_rows = st.builds(
    lambda start, prompt, judged, response: make_row([*start, *prompt], [*start, *judged], response),
    beginnings,
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


def count_passes(model: Any, run: Callable[[], Any]) -> list[int]:
    """Tokens of each pass through the body."""
    sizes: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return sizes


def find_gradients(model: nn.Module, batch: dict[str, Any], layout: ForwardLayout, **options: Any) -> list[Tensor]:
    logps = score_batch(model, batch, layout=layout, **options)
    weights = torch.linspace(-1, 1, len(logps))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True))


def assert_same_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    largest = max(float(one.abs().max()) for one in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * largest)


@settings(max_examples=25, deadline=None)
@given(rows=batches, layout=st.sampled_from([SHARING, LENDING, SINGLE, SINGLE_ROW]))
def test_every_layout_gives_the_log_probs_of_passes_apart(model: nn.Module, rows: Any, layout: ForwardLayout) -> None:
    batch = collate(rows)
    with torch.no_grad():
        got, want = score_batch(model, batch, layout=layout), score_batch(model, batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [SHARING, LENDING, SINGLE, SINGLE_ROW])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layout_gives_the_gradients_of_passes_apart(layout: ForwardLayout, attention: str) -> None:
    model = make_model(VOCAB_SIZE)
    model.set_attn_implementation(attention)
    batch = collate(TWO_TREES)
    assert_same_gradients(find_gradients(model, batch, layout), find_gradients(model, batch, PADDED))


def test_checkpointed_activations_change_nothing() -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = find_gradients(model, batch, PADDED)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(find_gradients(model, batch, SHARING), want)


@pytest.mark.parametrize("layout", [PADDED, SHARING, LENDING])
def test_passes_over_very_long_records_are_made_again_with_the_same_dropout(layout: ForwardLayout) -> None:
    model = get_peft_model(make_model(VOCAB_SIZE), LoraConfig(lora_dropout=0.5, target_modules=["up_proj"]))
    # Weights of B are 0 at first, and so would be the gradients of A, whose input is dropped out.
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    model.train()
    batch = collate(TWO_TREES)
    gradients = []
    for max_tokens in (None, sum(batch["sequence_lengths"]) // 2, 10):
        torch.manual_seed(0)
        sizes = count_passes(
            model.get_base_model(),
            lambda max_tokens=max_tokens: gradients.append(find_gradients(model, batch, layout, max_tokens=max_tokens)),
        )
        num_first = 2 if layout == LENDING else 1
        assert len(sizes) == num_first * (2 if max_tokens == 10 else 1) + 1, "all but the last once more"
    for again in gradients[1:]:
        assert_same_gradients(again, gradients[0])


def test_a_shared_beginning_is_run_once(model: nn.Module) -> None:
    batch = collate(TWO_TREES)
    assert batch["shared_lengths"] == [40, 40]
    sizes = count_passes(model, lambda: score_batch(model, batch, layout=SHARING))
    # Two trees in one row: 40 shared tokens, then prompts of 1 and 2 with responses of 3 less their last; 40, then 1
    # and 1 with responses of 1 less their last. The third record by itself: 2 and 2 - 1.
    assert sizes == [(40 + (1 + 2) + (2 + 2)) + (40 + 1 + 1), 3]
    # Apart they are four sequences of nearly one length, the longest of 42 + 2.
    assert count_passes(model, lambda: score_batch(model, batch)) == [4 * 44, 3]


def test_rows_under_a_mask_are_kept_shorter_than_others(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(TWO_TREES)
    monkeypatch.setattr("cutlm.model.forward.choose_tokens_per_pass", lambda device: 16384)
    monkeypatch.setattr("cutlm.model.forward._MAX_MASKED_TOKENS", 50)
    # The two trees of 47 and 42 tokens no longer go together; the third record is no tree.
    assert count_passes(model, lambda: score_batch(model, batch, layout=SHARING)) == [47, 42, 3]


def test_a_shared_beginning_is_lent_to_what_follows_it(model: nn.Module) -> None:
    batch = collate(TWO_TREES)
    sizes = count_passes(model, lambda: score_batch(model, batch, layout=LENDING))
    # Plain contexts of 40 + 1 + 2 and 40 + 1 tokens, the second padded; of their own, judged ones have 2 + 2 and 1. The
    # third record by itself.
    assert sizes == [2 * 43, 2 * 4, 3]
    assert sum(sizes) < 4 * 44


def test_what_is_lent_and_not_learned_from_costs_a_way_forward(model: nn.Module) -> None:
    batch = collate([make_row([*LONG, 1], [*LONG, *[2] * 9], [3])])
    grads: list[bool] = []
    hook = model.base_model.register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: grads.append(output.last_hidden_state.requires_grad)
    )
    score_batch(model, batch, layout=LENDING, needs_judged_grad=False)
    hook.remove()
    assert grads == [True, False]


def test_trees_are_grouped_by_the_lengths_of_both_parts() -> None:
    # All have 100 tokens: 90 and 10 of their own, or 10 and 90. Padded together they would be of 90 + 90.
    trees = [PrefixTree((0, 1), 0, 100), PrefixTree((2, 3), 0, 100), PrefixTree((4, 5), 0, 100)]
    groups = list(_group_by_length(trees, 1000, [90, 0, 10, 0, 90, 0]))
    assert sorted(len(group) for group in groups) == [1, 1, 1]
    assert len(list(_group_by_length(trees, 1000, [90, 0, 90, 0, 90, 0]))) == 1


def test_positions_that_depend_on_the_length_of_the_input_do_not_depend_on_company() -> None:
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 36}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make_model(VOCAB_SIZE, max_position_embeddings=144, rope_parameters=rope, num_attention_heads=4)
    layout = choose_layout(model)
    assert layout == replace(EITHER, rope_switch_length=36)
    rows = [make_row(LONG[:length], None, [1, 2, 3]) for length in (32, 33, 34, 35, 37, 37)]
    rows.insert(0, make_row(LONG[:32], [*LONG[:31], *LONG[:9]], [1, 2, 3]))  # 34 and 42 tokens: nothing is shared
    rows.insert(1, make_row(LONG[:32], [*LONG[:31], 7, 8], [1, 2, 3]))  # 34 and 35: it is
    with torch.no_grad():
        exact = ForwardLayout(rope_switch_length=36)
        alone = torch.cat([score_batch(model, collate([row]), layout=exact) for row in rows])
        order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11, *range(12, 30)]  # both plain contexts, then both judged ones
        for chosen in (layout, replace(layout, has_shared_kv=False), exact):
            got = score_batch(model, collate(rows), layout=chosen)
            torch.testing.assert_close(got, alone[order], atol=1e-5, rtol=1e-5)
        assert (score_batch(model, collate(rows)) - alone[order]).abs().max() > 0.1, "padded, they do"


def test_a_beginning_that_is_a_small_part_is_not_shared(model: nn.Module) -> None:
    # 10 tokens of 50 and 50, of which a tree has 90: a tenth less.
    batch = collate([make_row([*range(10), *[7] * 38], [*range(10), *[8] * 38], [1, 2, 3])])
    assert batch["shared_lengths"] == [10]
    assert count_passes(model, lambda: score_batch(model, batch, layout=SHARING)) == [2 * 50]


def test_the_last_token_of_a_prompt_is_not_shared_even_where_one_begins_the_other(model: nn.Module) -> None:
    batch = collate([make_row([1, 2, 3, 4], [1, 2, 3, 4, 5], [6]), make_row([1, 2], [1, 2], [3])])
    assert batch["shared_lengths"] == [3, 1]
    with torch.no_grad():
        torch.testing.assert_close(score_batch(model, batch, layout=SHARING), score_batch(model, batch))


def test_under_sharding_a_batch_is_one_pass_whatever_is_in_it(model: nn.Module) -> None:
    for rows in (TWO_TREES, TWO_TREES[:1], TWO_TREES[1:2]):
        batch = collate(rows)
        for layout in (SINGLE, SINGLE_ROW):
            for needs_judged_grad in (True, False):
                sizes = count_passes(
                    model,
                    lambda batch=batch, layout=layout, needs=needs_judged_grad: score_batch(
                        model, batch, layout=layout, needs_judged_grad=needs
                    ),
                )
                assert len(sizes) == 1


@pytest.mark.parametrize("layout", [SHARING, LENDING, SINGLE, SINGLE_ROW])
def test_nothing_flows_back_through_a_context_from_which_nothing_is_learned(layout: ForwardLayout) -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = find_gradients(model, batch, PADDED, needs_judged_grad=False)
    assert_same_gradients(find_gradients(model, batch, layout, needs_judged_grad=False), want)


def test_a_context_from_which_nothing_is_learned_is_shared_only_where_the_way_back_is_short(model: nn.Module) -> None:
    def run(num_own: int) -> list[int]:
        rows = [make_row([*LONG, 1], [*LONG, *[2] * num_own], [3])]
        return count_passes(model, lambda: score_batch(model, collate(rows), layout=SHARING, needs_judged_grad=False))

    # In a tree the 2 or 20 tokens of its own count 3 times, apart all 42 or 60 of them once.
    assert run(2) == [43]
    assert run(20) == [41, 60]


def attend_by_position_ids(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash attention does with a row whose position ids begin anew, one sequence after the other."""
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


def test_sequences_in_one_row_are_kept_apart_by_attention_of_variable_length() -> None:
    model, batch = make_model(VOCAB_SIZE), collate(TWO_TREES)
    want = find_gradients(model, batch, PADDED)
    # flash-attention itself needs a GPU; this is what transformers asks of it.
    AttentionInterface.register("in_plain_torch", attend_by_position_ids)
    model.set_attn_implementation("in_plain_torch")
    layout = choose_layout(model)
    assert layout == ForwardLayout(is_packed=True)
    assert count_passes(model, lambda: score_batch(model, batch, layout=layout)) == [43 + 44 + 41 + 41 + 3]
    assert_same_gradients(find_gradients(model, batch, layout), want)


GPT_NEO = [[["global", "local"], 1]]
EITHER = ForwardLayout(has_prefix_mask=True, has_shared_kv=True)
CHOICES: dict[str, tuple[Any, ForwardLayout]] = {
    "LLaMA": (LlamaConfig(**SHAPE), EITHER),
    "LLaMA, eager": (LlamaConfig(**SHAPE, attn_implementation="eager"), EITHER),
    "Qwen 3": (Qwen3Config(**SHAPE, head_dim=8), EITHER),
    "GPT-2": (GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4), EITHER),
    "GPT-Neo": (
        GPTNeoConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, num_heads=4, attention_types=GPT_NEO),
        PADDED,
    ),
    "Mistral with a window": (MistralConfig(**SHAPE, sliding_window=4), PADDED),
    "Mistral without": (MistralConfig(**SHAPE, sliding_window=None), EITHER),
    "Gemma 3": (Gemma3TextConfig(**SHAPE, head_dim=8), PADDED),
    "a model whose positions are no ids": (
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
        LENDING,
    ),
    "a recurrent model": (MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2), PADDED),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_layout_is_taken_only_where_the_model_bears_it(name: str) -> None:
    config, expected = CHOICES[name]
    model = AutoModelForCausalLM.from_config(config).train()
    assert choose_layout(model) == expected
    assert choose_layout(model, is_compiled=True) == replace(expected, has_shared_kv=False)
    assert all(module.training for module in model.modules()), "left as it was"
    batch = collate(TWO_TREES)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            score_batch(model, batch, layout=expected), score_batch(model, batch), atol=1e-4, rtol=1e-4
        )


def test_while_activations_are_checkpointed_there_are_no_keys_to_lend() -> None:
    model, batch = make_model(VOCAB_SIZE).train(), collate(TWO_TREES)
    layout = choose_layout(model)
    assert layout == EITHER
    want = find_gradients(model, batch, PADDED)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # whenever that is done
    assert count_passes(model, lambda: score_batch(model, batch, layout=layout)) == [47 + 42, 3], "the mask"
    assert_same_gradients(find_gradients(model, batch, layout), want)
    model.eval()  # nothing is checkpointed then
    assert count_passes(model, lambda: score_batch(model, batch, layout=layout)) == [2 * 43, 2 * 4, 3]


def test_what_is_lent_is_not_kept_twice(model: nn.Module) -> None:
    batch = collate([make_row([*LONG, 1], [*LONG, 2, 3], [3])])
    caches: list[Any] = []
    hook = model.base_model.register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    with torch.no_grad():
        score_batch(model, batch, layout=LENDING)
    hook.remove()
    assert all(layer.keys is None and layer.values is None for layer in caches[0].layers)
    assert [layer.keys.shape[2] for layer in caches[1].layers] == [42, 42]


def test_of_weights_that_are_elsewhere_nothing_is_tried() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert choose_layout(model, is_sharded=True) == SINGLE
