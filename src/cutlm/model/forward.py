"""Score a micro-batch: run its sequences through the body of a model, then apply the head to the response positions.

A batch, as `CutCollator` makes it, holds sequences end to end in one tensor: the plain contexts of all unsatisfactory
records, then the judged contexts of the same records in the same order, then the satisfactory records. The two contexts
of a record usually share a prefix. This module, from top to bottom:

1. `score_batch` returns the log-probability of every response token. A sequence gets the same values whatever else is
   in the batch. `score_taught_batch` adds those of the tokens that a teacher prefers, which `score_teacher` finds.
2. *Grouping* divides the sequences into forward passes with little padding.
3. *Layouts* run one group: `run_padded` (rows padded on the right, which every causal model supports),
   `run_with_shared_kv` (the plain contexts first, then the judged ones on the KV cache of the shared prefixes) and
   `run_packed_row` (everything in one row, separated by a mask or by position ids).
4. `SequenceScorer` scores one sequence after the other on the KV cache of the one before, for a person who waits.
5. *The probe*, `choose_layout`, finds out which layouts a model supports before training; `check_head` compares the
   log-probabilities with the model's own logits.
6. `run_inside` runs any of this under DistributedDataParallel, FSDP2 and ZeRO-3.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from cutlm.errors import ConfigError, UserError
from cutlm.model.loading import find_layers, list_rope_parameters, unwrap_peft
from cutlm.model.logprobs import find_head_layer, find_top_columns, get_head, taught_logprobs, token_logprobs

logger = logging.getLogger(__name__)

# Attention implementations that take any mask.
_MASKABLE_ATTENTION = ("sdpa", "eager")
_MAX_PADDING = 1 / 8
# Sharing a prefix has its own cost: a mask makes attention visit every position of a row, and a KV cache needs a second
# pass. A prefix is shared only if that saves at least this part of the work.
_MIN_SHARED = 1 / 5
# Beyond this length a masked row is slower than separate ones.
_MAX_MASKED_TOKENS = 4096


@dataclass(frozen=True)
class ForwardLayout:
    """How sequences are laid out in forward passes; see `choose_layout`.

    Attributes:
        is_packed: Put sequences end to end in one row, separated by their position ids (flash and flex attention).
        has_prefix_mask: Run a shared prefix once, with both contexts behind it in the same row, separated by a mask.
        has_shared_kv: Run a shared prefix once and reuse its KV cache; takes precedence over `has_prefix_mask`.
        is_single_pass: Run a micro-batch in a single pass. FSDP and ZeRO-3 gather weights in every pass, so all ranks
            must make the same number of passes.
        rope_switch_length: For models whose RoPE frequencies depend on the length of the input, the length beyond
            which they change. Longer sequences share no prefix and are grouped by exact length.
    """

    is_packed: bool = False
    has_prefix_mask: bool = False
    has_shared_kv: bool = False
    is_single_pass: bool = False
    rope_switch_length: int | None = None


PADDED = ForwardLayout()


@dataclass(frozen=True)
class PrefixTree:
    """Sequences with a common prefix (the trunk) and their own continuations (the branches).

    Attributes:
        indices: The sequences: a single one, or the plain and the judged context of one response.
        num_shared: Length of the common prefix in tokens, 0 for a single sequence.
        num_tokens: Tokens of the tree, with the common prefix counted once.
    """

    indices: tuple[int, ...]
    num_shared: int
    num_tokens: int


# Runs trees through a model's body; yields each sequence's index and its last hidden states [L, H], possibly without
# those of the shared prefix. Arguments: model, trees, all sequences of the batch.
RunLayout = Callable[[nn.Module, Sequence[PrefixTree], Sequence[Tensor]], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True)
class _ForwardPass:
    trees: list[PrefixTree]
    run: RunLayout
    needs_grad: bool


def choose_tokens_per_pass(device: torch.device) -> int:
    """Number of tokens that keep a device busy; larger passes are no faster per token."""
    return 16384 if device.type == "cuda" else 1024


def score_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int | None = None,
    *,
    needs_judged_grad: bool = True,
    layout: ForwardLayout = PADDED,
    max_tokens: int | None = None,
) -> Tensor:
    """Log-probability of every response token of a micro-batch.

    Args:
        model: A causal language model, with or without an adapter.
        batch: A batch of `CutCollator`.
        chunk_size: Positions per chunk of the head; None chooses.
        needs_judged_grad: False if nothing is learned from the judged contexts, which then need no backward pass.
        layout: How the sequences are laid out in forward passes.
        max_tokens: If the micro-batch has more than twice as many tokens, as the two contexts of a very long record
            may, every pass but the last is checkpointed, so that only one is in memory at a time.

    Returns:
        [R] float32, in nats, in the order of `batch["target_ids"]`.

    Example:

        >>> batch = CutCollator()([{"prompt_ids": [1, 5], "judged_prompt_ids": None, "response_ids": [7, 2]}])
        >>> score_batch(model, batch)
        tensor([-3.1, -0.7])
    """
    states = _run_sequences(model, batch, needs_judged_grad=needs_judged_grad, layout=layout, max_tokens=max_tokens)
    return _apply_head(model, token_logprobs, torch.cat(states), batch["target_ids"], chunk_size=chunk_size)


class TaughtLogps(NamedTuple):
    """Log-probabilities of a micro-batch, some tokens of which have a teacher's distribution."""

    tokens: Tensor  # [R] of every response token, as by `score_batch`
    columns: Tensor  # [M, K + 1] of the K tokens of each taught token, and of all others together


def score_taught_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int | None = None,
    *,
    needs_judged_grad: bool = True,
    layout: ForwardLayout = PADDED,
    max_tokens: int | None = None,
) -> TaughtLogps:
    """Score a micro-batch with teacher's distributions in the same pass; see `score_batch` for the arguments.

    Args:
        batch: A batch of `CutCollator` with `is_taught` and `teacher_ids`.
    """
    states = _run_sequences(model, batch, needs_judged_grad=needs_judged_grad, layout=layout, max_tokens=max_tokens)
    # The judged contexts, which are taught nothing, lie between the plain ones.
    num_judged = sum(batch["response_lengths"][: batch["num_unsatisfactory"]])
    is_taught = batch["is_taught"]
    is_taught = torch.cat([is_taught[:num_judged], torch.zeros_like(is_taught[:num_judged]), is_taught[num_judged:]])
    # Critiques, at the end, have no teacher.
    is_taught = torch.cat([is_taught, is_taught.new_zeros(len(batch["target_ids"]) - len(is_taught))])
    arguments = (torch.cat(states), batch["target_ids"], is_taught, batch["teacher_ids"])
    return TaughtLogps(*_apply_head(model, taught_logprobs, *arguments, chunk_size=chunk_size))


@torch.no_grad()
def score_teacher(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    guidance: float,
    num_columns: int | None,
    layout: ForwardLayout = PADDED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score a micro-batch, and find the tokens that the model prefers in the contexts of a teacher.

    Args:
        model: The teacher.
        batch: A batch of `CutCollator`. Its last sequences, one for each unsatisfactory record and in the same order,
            are the contexts of the teacher.
        guidance: beta: how far it is guided away from the judged contexts.
        num_columns: K, the number of tokens at each position; None for the token of the response alone.
        layout: How the sequences are laid out in forward passes.

    Returns:
        Log-probabilities [R] of all response tokens; ids [T, K] and log-probabilities [T, K] of the teacher at the T
        response tokens of its contexts.
    """
    states = _run_sequences(model, batch, needs_judged_grad=False, layout=layout)
    num_judged, lengths, target_ids = batch["num_unsatisfactory"], batch["response_lengths"], batch["target_ids"]
    logps = _apply_head(model, token_logprobs, torch.cat(states), target_ids)
    start, end = sum(lengths[:num_judged]), sum(lengths[: 2 * num_judged])
    ids, teacher_logps = _apply_head(
        model,
        find_top_columns,
        torch.cat(states[len(states) - num_judged :]),
        torch.cat(states[num_judged : 2 * num_judged]) if guidance else None,
        target_ids=target_ids[start:end],
        guidance=guidance,
        num_columns=num_columns,
    )
    return logps, ids, teacher_logps


def _run_sequences(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    needs_judged_grad: bool,
    layout: ForwardLayout,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Run the body of the model; return the hidden states [T, H] before each token of every sequence's response."""
    language_model = unwrap_peft(model)
    if layout.has_shared_kv and language_model.training and _is_checkpointing(language_model):
        layout = replace(layout, has_shared_kv=False)  # transformers keeps no KV cache under activation checkpointing
    lengths, response_lengths = batch["sequence_lengths"], batch["response_lengths"]
    sequences = batch["input_ids"].split(lengths)
    num_judged = batch.get("num_unsatisfactory", 0)
    hidden: list[Tensor] = [batch["input_ids"]] * len(sequences)
    tokens_per_pass = choose_tokens_per_pass(batch["input_ids"].device)
    passes = list(_plan_passes(batch, layout, needs_judged_grad, tokens_per_pass))
    is_too_large = max_tokens is not None and sum(lengths) > 2 * max_tokens
    for one in passes:
        needs_grad = one.needs_grad and torch.is_grad_enabled()
        arguments = (language_model, one.trees, sequences)
        with torch.set_grad_enabled(needs_grad):
            if is_too_large and needs_grad and one is not passes[-1]:
                states_by_index = checkpoint(
                    lambda *given, run=one.run: dict(run(*given)), *arguments, use_reentrant=False
                )
            else:
                states_by_index = dict(one.run(*arguments))
        for index, states in states_by_index.items():
            hidden[index] = states[len(states) - response_lengths[index] :]
    if not needs_judged_grad:
        hidden[num_judged : 2 * num_judged] = [states.detach() for states in hidden[num_judged : 2 * num_judged]]
    return hidden


def _apply_head(model: nn.Module, compute: Callable[..., Any], states: Tensor, *args: Any, **options: Any) -> Any:
    """Call a function of `cutlm.model.logprobs` on hidden states and the model's head.

    Its arguments are the hidden states, further ones, and the options.
    """
    language_model = unwrap_peft(model)

    def apply_head(layer: nn.Module, states: Tensor, *args: Any) -> Any:
        head = get_head(language_model)
        return compute(states, head.weight, *args, bias=head.bias, softcap=head.softcap, scale=head.scale, **options)

    # With sharded weights, the head's weight is complete only while its layer runs.
    layer = find_head_layer(language_model)
    return run_inside(layer, layer, apply_head, states, *args)


def _is_checkpointing(language_model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())


# ---- Grouping ----


def _plan_passes(
    batch: Mapping[str, Any], layout: ForwardLayout, needs_judged_grad: bool, tokens_per_pass: int
) -> Iterator[_ForwardPass]:
    """Divide a micro-batch into forward passes; every sequence is in exactly one of them."""
    lengths, num_judged = batch["sequence_lengths"], batch.get("num_unsatisfactory", 0)
    is_judged_frozen = torch.is_grad_enabled() and not needs_judged_grad
    has_shared_kv = layout.has_shared_kv and not layout.is_single_pass
    max_length = layout.rope_switch_length or max(lengths)
    shared_lengths = batch.get("shared_lengths", []) if layout.has_prefix_mask or has_shared_kv else []
    pairs = [
        PrefixTree((plain, plain + num_judged), num_shared, lengths[plain] + lengths[plain + num_judged] - num_shared)
        for plain, num_shared in enumerate(shared_lengths)
        if max(lengths[plain], lengths[plain + num_judged]) <= max_length
        and _is_worth_sharing(num_shared, lengths[plain], lengths[plain + num_judged], is_judged_frozen, has_shared_kv)
    ]
    paired = {index for tree in pairs for index in tree.indices}
    singles = [PrefixTree((index,), 0, length) for index, length in enumerate(lengths) if index not in paired]
    if layout.is_single_pass:
        run = run_packed_row if layout.is_packed or layout.has_prefix_mask else run_padded
        yield _ForwardPass([*pairs, *singles], run, True)
        return
    if has_shared_kv:
        run_pairs: RunLayout = partial(run_with_shared_kv, needs_judged_grad=needs_judged_grad)
        for group in _group_by_length(pairs, tokens_per_pass, lengths):
            yield _ForwardPass(group, run_pairs, True)
    else:
        for group in _fill_rows(pairs, min(tokens_per_pass, _MAX_MASKED_TOKENS)):
            yield _ForwardPass(group, run_packed_row, True)
    frozen = [tree for tree in singles if is_judged_frozen and num_judged <= tree.indices[0] < 2 * num_judged]
    learned = [tree for tree in singles if tree not in frozen]
    for trees, needs_grad in ((learned, True), (frozen, False)):
        packed = [tree for tree in trees if layout.is_packed and tree.num_tokens <= max_length]
        for group in _fill_rows(packed, tokens_per_pass):
            yield _ForwardPass(group, run_packed_row, needs_grad)
        padded = [tree for tree in trees if tree not in packed]
        for group in _group_by_length(padded, tokens_per_pass, lengths, layout.rope_switch_length):
            yield _ForwardPass(group, run_padded, needs_grad)


def _is_worth_sharing(
    num_shared: int, length: int, judged_length: int, is_judged_frozen: bool, has_shared_kv: bool
) -> bool:
    """Whether running a shared prefix once saves enough work.

    A token that is learned from costs three units, one forward and two backward. A frozen judged context costs one unit
    a token if it runs alone or on a KV cache, but three in a row with its plain context.
    """
    judged_cost = 1 if is_judged_frozen else 3
    separate = 3 * length + judged_cost * judged_length
    together = 3 * length + (judged_cost if has_shared_kv else 3) * (judged_length - num_shared)
    return separate - together >= _MIN_SHARED * separate


def _fill_rows(trees: Sequence[PrefixTree], max_tokens: int) -> Iterator[list[PrefixTree]]:
    """Group trees, longest first, into rows of at most `max_tokens`; a longer tree gets its own row."""
    group: list[PrefixTree] = []
    num_tokens = 0
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        if group and num_tokens + tree.num_tokens > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(tree)
        num_tokens += tree.num_tokens
    if group:
        yield group


def _group_by_length(
    trees: Sequence[PrefixTree], max_tokens: int, lengths: Sequence[int], rope_switch_length: int | None = None
) -> Iterator[list[PrefixTree]]:
    """Group trees, longest first, into at most `max_tokens` padded tokens of which few are padding.

    First sequences are padded to the longest first one, and second sequences, without the shared prefix, to the longest
    second one. Nothing is padded beyond `rope_switch_length`.
    """
    group: list[PrefixTree] = []
    num_tokens = longest_first = longest_second = 0
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        first = lengths[tree.indices[0]]
        second = tree.num_tokens - first
        num_padded = (len(group) + 1) * (max(longest_first, first) + max(longest_second, second))
        is_exact = rope_switch_length is not None and longest_first > rope_switch_length
        limit = min(max_tokens, (1 if is_exact else 1 + _MAX_PADDING) * (num_tokens + tree.num_tokens))
        if group and num_padded > limit:
            yield group
            group, num_tokens, longest_first, longest_second = [], 0, 0, 0
        group.append(tree)
        num_tokens += tree.num_tokens
        longest_first, longest_second = max(longest_first, first), max(longest_second, second)
    if group:
        yield group


# ---- Layouts ----


def run_padded(
    model: nn.Module, trees: Sequence[PrefixTree], sequences: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Run single sequences as rows padded on the right, where no token of a causal model attends.

    Yields:
        Each sequence's index and its hidden states [L, H].
    """
    indices = [tree.indices[0] for tree in trees]
    ids = nn.utils.rnn.pad_sequence([sequences[index] for index in indices], batch_first=True)
    states = _run_body(model, input_ids=ids)
    for row, index in enumerate(indices):
        yield index, states[row, : len(sequences[index])]


def run_with_shared_kv(
    model: nn.Module,
    trees: Sequence[PrefixTree],
    sequences: Sequence[Tensor],
    *,
    needs_judged_grad: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Run the plain context of each tree, then the judged one on the KV cache of their shared prefix.

    Args:
        model: A causal language model that supports `use_cache`.
        trees: Trees of two sequences.
        sequences: All sequences of the batch.
        needs_judged_grad: Whether anything is learned from the judged contexts.

    Yields:
        Each sequence's index and its hidden states: [L, H] for plain contexts, [L - num_shared, H] for judged ones.
    """
    cache = DynamicCache()
    plain = [sequences[tree.indices[0]] for tree in trees]
    states = _run_body(model, input_ids=nn.utils.rnn.pad_sequence(plain, batch_first=True), past_key_values=cache)
    for row, tree in enumerate(trees):
        yield tree.indices[0], states[row, : len(plain[row])]
    judged = [sequences[tree.indices[1]][tree.num_shared :] for tree in trees]
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_judged_grad):
        states = _run_on_cache(model, trees, judged, cache)
    for row, tree in enumerate(trees):
        yield tree.indices[1], states[row, : len(judged[row])]


def _run_on_cache(
    model: nn.Module, trees: Sequence[PrefixTree], continuations: Sequence[Tensor], cache: DynamicCache
) -> Tensor:
    """Run continuations of the shared prefixes, padded on the right; the prefixes' KV cache is padded on the left.

    Returns:
        [trees, longest continuation, H]
    """
    device = continuations[0].device
    longest = max(tree.num_shared for tree in trees)
    num_shared = torch.tensor([[tree.num_shared] for tree in trees], device=device)
    ids = nn.utils.rnn.pad_sequence(list(continuations), batch_first=True)
    last = num_shared + torch.tensor([[len(own) - 1] for own in continuations], device=device)
    # Padding repeats the last position, so that no position exceeds those the model has.
    positions = torch.minimum(num_shared + torch.arange(ids.shape[1], device=device), last)
    inputs = {}
    if len(trees) > 1:
        columns = torch.arange(longest + ids.shape[1], device=device)
        inputs["attention_mask"] = (columns >= longest - num_shared).long()
    prefixes, layers = DynamicCache(), cast(list[Any], cache.layers)
    for index, layer in enumerate(layers):
        prefixes.update(_take_prefixes(layer.keys, trees, longest), _take_prefixes(layer.values, trees, longest), index)
        layer.keys = layer.values = None  # do not hold them twice
    return _run_body(model, input_ids=ids, position_ids=positions, past_key_values=prefixes, **inputs)


def _take_prefixes(states: Tensor, trees: Sequence[PrefixTree], longest: int) -> Tensor:
    """Keys or values [trees, heads, L, D] of the shared prefixes, padded on the left: [trees, heads, longest, D]."""
    if len(trees) == 1:
        return states[:, :, :longest]
    pairs = zip(states, trees, strict=True)
    return torch.stack(
        [nn.functional.pad(one[:, : tree.num_shared], (0, 0, longest - tree.num_shared, 0)) for one, tree in pairs]
    )


def run_packed_row(
    model: nn.Module, trees: Sequence[PrefixTree], sequences: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Run trees end to end in one row, each shared prefix once.

    `sdpa` and `eager` attention get a mask that separates trees and branches. Attention of variable length (flash,
    flex) separates single sequences by their position ids, which restart at 0.

    Yields:
        Each sequence's index and its hidden states without those of a shared prefix, [L - num_shared, H].
    """
    parts, positions, tree_ids, branch_ids, spans = [], [], [], [], []
    device = sequences[0].device
    start = 0
    for tree_id, tree in enumerate(trees):
        trunk = sequences[tree.indices[0]][: tree.num_shared]
        # The shared prefix is branch 0; each sequence's own tokens follow as branch 1, 2.
        pieces = [(0, trunk, 0)] if tree.num_shared else []
        pieces += [
            (branch, sequences[index][tree.num_shared :], tree.num_shared)
            for branch, index in enumerate(tree.indices, start=1)
        ]
        for branch, ids, position in pieces:
            parts.append(ids)
            positions.append(torch.arange(position, position + len(ids), device=device))
            tree_ids.append(torch.full((len(ids),), tree_id, device=device))
            branch_ids.append(torch.full((len(ids),), branch, device=device))
            if branch:
                spans.append((tree.indices[branch - 1], start, start + len(ids)))
            start += len(ids)
    inputs = {"input_ids": torch.cat(parts)[None], "position_ids": torch.cat(positions)[None]}
    if start > len(parts[0]) and get_attention(model) in _MASKABLE_ATTENTION:
        inputs["attention_mask"] = _make_mask(model, torch.cat(tree_ids), torch.cat(branch_ids))
    states = _run_body(model, **inputs)[0]
    for index, begin, end in spans:
        yield index, states[begin:end]


def _make_mask(model: nn.Module, tree_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """Attention mask of a packed row: a token attends to earlier tokens of its branch and its tree's trunk.

    Args:
        model: The model that takes the mask.
        tree_ids: [L] the tree of each token.
        branch_ids: [L] its branch, 0 for the trunk.

    Returns:
        [1, 1, L, L], True where the token of a row attends to the token of a column. Eager attention adds the mask to
        its logits and gets 0.0 there, and the smallest number elsewhere.
    """
    is_visible = (tree_ids[:, None] == tree_ids) & ((branch_ids == 0) | (branch_ids[:, None] == branch_ids))
    is_visible = is_visible.tril()[None, None]
    if get_attention(model) != "eager":
        return is_visible
    dtype = next(model.parameters()).dtype
    return torch.zeros(is_visible.shape, dtype=dtype, device=tree_ids.device).masked_fill(
        ~is_visible, torch.finfo(dtype).min
    )


def _run_body(model: nn.Module, **inputs: Any) -> Tensor:
    use_cache = "past_key_values" in inputs
    return _find_body(model)(**inputs, use_cache=use_cache).last_hidden_state


def _find_body(model: Any) -> nn.Module:
    """The part of a causal language model that computes hidden states."""
    # A class that declares no base model, such as Llama 4's text model, is its own `base_model`.
    body = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if body is None:
        raise ConfigError(f"{type(model).__name__}: expected a body and a head, found neither base_model nor model")
    return body


def get_attention(language_model: nn.Module) -> str:
    return str(getattr(language_model.config, "_attn_implementation", None) or "eager")


# ---- One sequence after the other ----


class SequenceScorer:
    """Scores one sequence after the other, each on the KV cache of the prefix that it shares with the one before.

    A response under changing judgments shares the prompt up to the judgment, and the unchanged beginning of the
    judgment. A pass can be stopped between two layers.

    Args:
        model: A causal language model in evaluation mode, with or without an adapter.

    Example:

        >>> scorer = SequenceScorer(model)
        >>> scorer.score([1, 5, 9], [7, 2])
        tensor([-3.1, -0.7])
        >>> scorer.score([1, 5, 6], [7, 2])  # runs the last token of the prompt and the response only
        tensor([-2.9, -0.8])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap_peft(model)
        self._layout = choose_layout(model)
        self._ids: list[int] = []  # the tokens whose keys and values every layer of the cache has
        self._cache = DynamicCache()

    def score(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], is_stopped: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Score a response, its end-of-turn token included.

        Args:
            prompt_ids: The tokens before it.
            response_ids: Its T tokens.
            is_stopped: Called before each layer.

        Returns:
            [T] log-probabilities, float32, on the CPU.

        Raises:
            CancelledError: `is_stopped` returned true.
        """
        ids = [*prompt_ids, *response_ids[:-1]]
        device = self._model.device
        with evaluation_mode(self._model), torch.inference_mode(), _stopping(self._model, is_stopped):
            states = self._run(torch.tensor(ids, device=device), ids, len(response_ids))
            targets = torch.tensor(list(response_ids), device=device)
            return _apply_head(self._model, token_logprobs, states, targets).cpu().clone()

    def _run(self, tokens: Tensor, ids: list[int], num_last: int) -> Tensor:
        """The hidden states [num_last, H] at the end of a sequence."""
        switch = self._layout.rope_switch_length
        if not self._layout.has_shared_kv or (switch is not None and len(ids) > switch):
            self._ids = []
            return _run_body(self._model, input_ids=tokens[None])[0, -num_last:]
        longest = min(len(self._ids), len(ids) - num_last)
        num_shared = next((index for index in range(longest) if ids[index] != self._ids[index]), longest)
        cache = DynamicCache()
        for index, layer in enumerate(cast(list[Any], self._cache.layers) if num_shared else ()):
            cache.update(layer.keys[:, :, :num_shared], layer.values[:, :, :num_shared], index)
        self._ids, self._cache = ids[:num_shared], cache
        positions = torch.arange(num_shared, len(ids), device=tokens.device)[None]
        states = _run_body(
            self._model, input_ids=tokens[None, num_shared:], position_ids=positions, past_key_values=cache
        )
        self._ids = ids
        return states[0, -num_last:]


@contextmanager
def _stopping(model: nn.Module, is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Raise `CancelledError` before the next layer once `is_stopped` returns true."""

    def check(layer: nn.Module, inputs: Any) -> None:
        if is_stopped():
            raise CancelledError

    hooks = [layer.register_forward_pre_hook(check) for layer in find_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- The probe ----


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def choose_layout(model: nn.Module, *, is_sharded: bool = False, is_compiled: bool = False) -> ForwardLayout:
    """Probe which layouts a model supports by running each on a few tokens.

    Args:
        model: A causal language model, with or without an adapter.
        is_sharded: Whether training will shard its weights over processes.
        is_compiled: Whether its layers will be compiled. A KV cache would then recompile each of them.

    Returns:
        The layout to pass to `score_batch`.
    """
    language_model = unwrap_peft(model)
    if not has_local_weights(language_model):
        return ForwardLayout(is_single_pass=is_sharded)
    attention = get_attention(language_model)
    is_global = attends_to_all(language_model)
    # Our mask goes to every layer, so every layer must attend to all earlier tokens.
    is_maskable = attention in _MASKABLE_ATTENTION and is_global
    # Flash attention, flex attention and their like; on a CPU flex attention is compiled again for each length.
    is_varlen = attention not in _MASKABLE_ATTENTION and (
        attention != "flex_attention" or language_model.device.type == "cuda"
    )
    can_cache = not (is_compiled or is_sharded) and is_global and (is_maskable or is_varlen)
    singles = [PrefixTree((0,), 0, 9), PrefixTree((1,), 0, 11), PrefixTree((2,), 0, 7)]
    tree_and_single = [PrefixTree((0, 1), 3, 17), PrefixTree((2,), 0, 7)]
    two_trees = [PrefixTree((0, 1), 3, 17), PrefixTree((2, 3), 2, 14)]
    return ForwardLayout(
        is_packed=is_varlen and _matches_separate_runs(language_model, run_packed_row, singles),
        has_prefix_mask=is_maskable and _matches_separate_runs(language_model, run_packed_row, tree_and_single),
        has_shared_kv=can_cache and _matches_separate_runs(language_model, run_with_shared_kv, two_trees),
        is_single_pass=is_sharded,
        rope_switch_length=find_rope_switch(language_model),
    )


def has_local_weights(language_model: nn.Module) -> bool:
    """Whether all weights of a model are in this process: none is on the meta device or sharded by ZeRO-3."""
    return not any(weight.is_meta or hasattr(weight, "ds_id") for weight in language_model.parameters())


def find_rope_switch(language_model: Any) -> int | None:
    """The input length beyond which a model changes its RoPE frequencies for all positions, if any.

    "dynamic" RoPE also depends on the longest input so far, which `transformers` keeps in the model.
    """
    config = language_model.config.get_text_config()
    for rope in list_rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def attends_to_all(language_model: Any) -> bool:
    """Whether every layer attends to all earlier tokens, without a sliding window."""
    config = language_model.config.get_text_config()
    if "local" in str(getattr(config, "attention_types", "")):  # GPT-Neo
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


_DESCRIPTIONS: dict[RunLayout, str] = {
    run_packed_row: "several sequences in one row",
    run_with_shared_kv: "sharing the KV cache of a common prefix",
}


def _matches_separate_runs(language_model: Any, run: RunLayout, trees: list[PrefixTree]) -> bool:
    """Whether sequences that run together get the hidden states that they get alone.

    The trees are over sequences of 9, 11, 7 and 9 tokens, of which the first two share 3 tokens and the others 2.
    """
    vocab_size = language_model.config.get_text_config().vocab_size
    device = language_model.device
    ids = [(number * 7 + 3) % vocab_size for number in range(20)]
    parts = (ids[:9], [*ids[:3], *ids[12:]], ids[5:12], [*ids[5:7], *ids[:7]])
    sequences = [torch.tensor(part, device=device) for part in parts]
    singles = [PrefixTree((index,), 0, len(parts[index])) for tree in trees for index in tree.indices]
    with evaluation_mode(language_model), torch.no_grad():
        # An error here is one of the model, not of the layout.
        alone = dict(pair for single in singles for pair in run_padded(language_model, [single], sequences))
        try:
            together = dict(run(language_model, trees, sequences))
        except (ValueError, AssertionError, RuntimeError) as error:
            if not is_layout_error(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.05
            differing = [
                index
                for index, states in together.items()
                if not (states - alone[index][-len(states) :]).float().norm() <= tolerance * alone[index].float().norm()
            ]
            if not differing:
                return True
            reason = "hidden states differ from those of separate runs"
    name = type(language_model).__name__
    logger.warning("%s does not support %s and will run without it: %s", name, _DESCRIPTIONS[run], reason)
    return False


def is_layout_error(error: Exception) -> bool:
    """Whether an error is one that models raise for a mask, position ids or a KV cache that they do not support.

    - ValueError: Bloom unpacks the two dimensions of a padding mask; xLSTM checks the shape of its state.
    - AssertionError: XLM asserts the shape of the padding mask.
    - NotImplementedError: an attention kernel without support for masks.
    - RuntimeError for sizes that do not match: OpenAI GPT ignores the KV cache, and reshapes the mask.

    A CUDA or out-of-memory error, a TypeError and the like are not errors of the layout.
    """
    if isinstance(error, NotImplementedError) or not isinstance(error, RuntimeError):
        return True
    return type(error) is RuntimeError and re.search(r"size of tensor|dimensions|shape", str(error)) is not None


def check_head(model: nn.Module) -> None:
    """Compare the log-probabilities of a few tokens with those of the model's own logits.

    It catches models that transform their logits in a way that `get_head` does not know, which would otherwise be
    trained on wrong probabilities.

    Raises:
        UserError: They differ.
    """
    language_model = unwrap_peft(model)
    device = language_model.device
    if not has_local_weights(language_model):
        return
    num_tokens = min(8, language_model.config.get_text_config().vocab_size)
    ids = torch.arange(num_tokens, device=device)
    batch = {
        "input_ids": ids[:-1],
        "target_ids": ids[1:],
        "sequence_lengths": [num_tokens - 1],
        "response_lengths": [num_tokens - 1],
    }
    with evaluation_mode(language_model), torch.no_grad():
        ours = score_batch(language_model, batch)
        logits = language_model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    theirs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.1
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance and torch.isfinite(theirs).all():
        raise UserError(
            f"{type(language_model).__name__}: log-probabilities computed from the head's weight differ from the"
            f" model's own logits by {difference:.3g}, expected at most {tolerance}; cutlm does not support how this"
            " model computes its logits"
        )


# ---- Distributed training ----


def run_inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(module, *args)` inside the forward pass of the module's wrapper.

    DistributedDataParallel, FSDP and ZeRO-3 gather weights and prepare gradients in hooks around the wrapper's forward
    pass, which calls `module.forward`. To run another computation inside these hooks, this function replaces
    `module.forward` for one call.

    Args:
        wrapper: The wrapped module, or the module itself, on which FSDP2 and ZeRO-3 put their hooks.
        module: The module inside.
        function: The function to call.
        *args: Its further arguments, passed through the wrapper.
    """
    had_own_forward = "forward" in module.__dict__
    forward = module.forward

    def restore() -> None:
        if had_own_forward:
            module.forward = forward
        else:
            module.__dict__.pop("forward", None)

    def call(*inner_args: Any) -> Any:
        restore()
        return function(module, *inner_args)

    module.forward = call
    try:
        return wrapper(*args)
    finally:
        restore()
