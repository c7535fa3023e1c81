"""The passes of a micro-batch through a model: each token once, next to no padding, and the head where it counts.

Sequences go through the body in one of four layouts, whichever the model and the machine have:

- in groups of nearly one length, padded on the right, where no token of a causal model looks;
- one context of a response as above, which lends its keys and values to the other one where both begin alike;
- as trees: the tokens with which both begin stand once, and both continuations behind them, kept apart by a mask;
- end to end in one row with position ids that begin anew, which attention of variable length (flash, flex) keeps apart.

Which a model bears is found out by `cutlm.probes`. What comes of the log-probs is left to `cutlm.batch_loss`, the
log-probs themselves to `cutlm.logprobs`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from cutlm.errors import ConfigError
from cutlm.logprobs import find_head_layer, get_head, token_logprobs
from cutlm.model import unwrap_peft

_MAX_PADDING = 1 / 8
# A mask costs attention to all places of a row, lending a second pass. Below this share of both sequences, a common
# beginning is not worth it.
_LEAST_SHARED = 1 / 5
# Under a mask attention looks at all places of a row: in a longer one company costs more than it brings.
_MOST_MASKED = 4096
# Kinds of attention that take any mask.
MASKED_KINDS = ("sdpa", "eager")


@dataclass(frozen=True)
class Passes:
    """How sequences go through the body of a model; see `cutlm.probes.choose_passes`.

    Attributes:
        is_packed: End to end in one row, kept apart by their position ids.
        is_sharing: What two contexts have in common at their beginning is run once, both behind it under a mask.
        is_lending: It is run once, and its keys and values are lent to the second context; before `is_sharing`.
        is_single: A micro-batch is one pass, whatever is in it: under FSDP and ZeRO-3 every pass gathers weights, and
            all ranks must make the same number of them.
        unpadded_beyond: Where the positions of a model depend on the length of its input, the length beyond which they
            do: longer sequences share nothing, and go together with those of their own length alone.
    """

    is_packed: bool = False
    is_sharing: bool = False
    is_lending: bool = False
    is_single: bool = False
    unpadded_beyond: int | None = None


PLAIN = Passes()


@dataclass(frozen=True)
class Tree:
    """Sequences with a common beginning: one by itself, or the two contexts of a response.

    Attributes:
        indices: Of the sequences.
        num_shared: Tokens that all of them begin with.
        num_tokens: Of them all, the shared ones once.
    """

    indices: tuple[int, ...]
    num_shared: int
    num_tokens: int


# Runs trees, given a model and the sequences; yields the index of each sequence and its hidden states [L, H], which may
# lack those of a shared beginning.
_Run = Callable[[nn.Module, Sequence[Tree], Sequence[Tensor]], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True)
class _Pass:
    """What goes through the body at a time.

    Attributes:
        trees: What is in it.
        run: In which layout: `run_padded`, `run_row` or `run_lending`.
        needs_grad: Whether anything is learned from it.
    """

    trees: list[Tree]
    run: _Run
    needs_grad: bool


def count_busy_tokens(device: torch.device) -> int:
    """Tokens that are enough to keep a device busy: a longer sequence gains nothing from company."""
    return 16384 if device.type == "cuda" else 1024


def score_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int | None = None,
    *,
    needs_judged_grad: bool = True,
    passes: Passes = PLAIN,
    max_tokens: int | None = None,
) -> Tensor:
    """Log-probability of every response token of a micro-batch.

    What a sequence gets does not depend on what else is in the batch. The head sees response positions only.

    Args:
        model: A causal language model, bare or with an adapter.
        batch: As made by `CutCollator`.
        chunk_size: Positions per chunk of the head.
        needs_judged_grad: False where nothing is learned from the context with the judgment, which then costs a
            forward pass only.
        passes: How the sequences go through the body.
        max_tokens: Where the micro-batch has more than twice as many tokens, as the two contexts of a very long record
            do, all passes but the last are made again on the way back, and no two of them are in memory at a time.

    Returns:
        [R] float32, in the order of `batch["target_ids"]`.
    """
    language_model = unwrap_peft(model)
    if passes.is_lending and language_model.training and _is_checkpointing(language_model):
        passes = replace(passes, is_lending=False)  # transformers keeps no keys and values then
    lengths, response_lengths = batch["sequence_lengths"], batch["response_lengths"]
    sequences = batch["input_ids"].split(lengths)
    judged = range(batch.get("num_unsatisfactory", 0), 2 * batch.get("num_unsatisfactory", 0))
    hidden: list[Tensor] = [batch["input_ids"]] * len(sequences)
    limit = count_busy_tokens(batch["input_ids"].device)
    planned = list(_plan_passes(batch, passes, needs_judged_grad, limit))
    is_too_much = max_tokens is not None and sum(lengths) > 2 * max_tokens
    for one in planned:
        needs_grad = one.needs_grad and torch.is_grad_enabled()
        arguments = (language_model, one.trees, sequences)
        with torch.set_grad_enabled(needs_grad):
            if is_too_much and needs_grad and one is not planned[-1]:
                found = checkpoint(lambda *given, run=one.run: dict(run(*given)), *arguments, use_reentrant=False)
            else:
                found = dict(one.run(*arguments))
        for index, states in found.items():
            hidden[index] = states[len(states) - response_lengths[index] :]
    if not needs_judged_grad:
        hidden = [states.detach() if index in judged else states for index, states in enumerate(hidden)]

    def apply_head(layer: nn.Module, states: Tensor, target_ids: Tensor) -> Tensor:
        head = get_head(language_model)
        return token_logprobs(
            states,
            head.weight,
            target_ids,
            chunk_size,
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
        )

    # The weight of the head is whole only while its layer runs, where weights are spread over processes.
    layer = find_head_layer(language_model)
    return run_inside(layer, layer, apply_head, torch.cat(hidden), batch["target_ids"])


def _is_checkpointing(language_model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())


# ---- What goes together ----


def _plan_passes(batch: Mapping[str, Any], passes: Passes, needs_judged_grad: bool, limit: int) -> Iterator[_Pass]:
    """Divides a micro-batch into passes; every sequence is in one of them."""
    lengths, num_judged = batch["sequence_lengths"], batch.get("num_unsatisfactory", 0)
    is_split = torch.is_grad_enabled() and not needs_judged_grad
    is_lending = passes.is_lending and not passes.is_single
    most = passes.unpadded_beyond or max(lengths)
    shared = batch.get("shared_lengths", []) if passes.is_sharing or is_lending else []
    trees = [
        Tree((first, first + num_judged), num_shared, lengths[first] + lengths[first + num_judged] - num_shared)
        for first, num_shared in enumerate(shared)
        if max(lengths[first], lengths[first + num_judged]) <= most
        and _is_worth_sharing(num_shared, lengths[first], lengths[first + num_judged], is_split, is_lending)
    ]
    in_trees = {index for tree in trees for index in tree.indices}
    alone = [Tree((index,), 0, length) for index, length in enumerate(lengths) if index not in in_trees]
    if passes.is_single:
        yield _Pass([*trees, *alone], run_row if passes.is_packed or passes.is_sharing else run_padded, True)
        return
    if is_lending:
        run: _Run = partial(run_lending, needs_second_grad=needs_judged_grad)
        for group in _group_by_length(trees, limit, lengths):
            yield _Pass(group, run, True)
    else:
        for group in _cut_rows(trees, min(limit, _MOST_MASKED)):
            yield _Pass(group, run_row, True)
    judged = range(num_judged, 2 * num_judged)
    unlearned = [tree for tree in alone if is_split and tree.indices[0] in judged]
    learned = [tree for tree in alone if tree not in unlearned]
    for part, needs_grad in ((learned, True), (unlearned, False)):
        packed = [tree for tree in part if passes.is_packed and tree.num_tokens <= most]
        for group in _cut_rows(packed, limit):
            yield _Pass(group, run_row, needs_grad)
        padded = [tree for tree in part if tree not in packed]
        for group in _group_by_length(padded, limit, lengths, passes.unpadded_beyond):
            yield _Pass(group, run_padded, needs_grad)


def _is_worth_sharing(num_shared: int, length: int, judged_length: int, is_split: bool, is_lending: bool) -> bool:
    """Whether running a common beginning once is less work than running each sequence.

    A pass that is learned from counts three times, for the way back. Where nothing is learned from the judged context
    (`is_split`), it counts once by itself or with what it is lent, but three times in a tree.
    """
    weight = 1 if is_split else 3
    apart = 3 * length + weight * judged_length
    together = 3 * length + (weight if is_lending else 3) * (judged_length - num_shared)
    return apart - together >= _LEAST_SHARED * apart


def _cut_rows(trees: Sequence[Tree], limit: int) -> Iterator[list[Tree]]:
    """Cuts trees into rows of at most `limit` tokens, longest first; a longer tree is a row of its own."""
    group: list[Tree] = []
    num_tokens = 0
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        if group and num_tokens + tree.num_tokens > limit:
            yield group
            group, num_tokens = [], 0
        group.append(tree)
        num_tokens += tree.num_tokens
    if group:
        yield group


def _group_by_length(
    trees: Sequence[Tree], limit: int, lengths: Sequence[int], unpadded_beyond: int | None = None
) -> Iterator[list[Tree]]:
    """Groups trees, longest first, so that a group's padded tokens stay within `limit` and are few.

    Their first sequences are padded to the longest of them, and so is what second ones have of their own. Nothing is
    padded to more than `unpadded_beyond`.
    """
    group: list[Tree] = []
    num_tokens = widest_first = widest_second = 0
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        first = lengths[tree.indices[0]]
        second = tree.num_tokens - first
        size = (len(group) + 1) * (max(widest_first, first) + max(widest_second, second))
        is_exact = unpadded_beyond is not None and widest_first > unpadded_beyond
        most = min(limit, (1 if is_exact else 1 + _MAX_PADDING) * (num_tokens + tree.num_tokens))
        if group and size > most:
            yield group
            group, num_tokens, widest_first, widest_second = [], 0, 0, 0
        group.append(tree)
        num_tokens += tree.num_tokens
        widest_first, widest_second = max(widest_first, first), max(widest_second, second)
    if group:
        yield group


# ---- Running ----


def run_padded(model: nn.Module, trees: Sequence[Tree], sequences: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Runs sequences as rows of one tensor, padded on the right.

    Yields:
        The index of each sequence and its hidden states [L, H].
    """
    indices = [tree.indices[0] for tree in trees]
    ids = nn.utils.rnn.pad_sequence([sequences[index] for index in indices], batch_first=True)
    states = _run_body(model, input_ids=ids)
    for row, index in enumerate(indices):
        yield index, states[row, : len(sequences[index])]


def run_lending(
    model: nn.Module, trees: Sequence[Tree], sequences: Sequence[Tensor], *, needs_second_grad: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """Runs the first sequence of each tree, then the second behind the keys and values of what both begin with.

    Args:
        model: A causal language model that keeps keys and values (`use_cache`).
        trees: Of two sequences each.
        sequences: All.
        needs_second_grad: Whether anything is learned from second sequences.

    Yields:
        The index of each sequence and its hidden states: of the first [L, H], of the second [L - num_shared, H].
    """
    cache = DynamicCache()
    firsts = [sequences[tree.indices[0]] for tree in trees]
    states = _run_body(model, input_ids=nn.utils.rnn.pad_sequence(firsts, batch_first=True), past_key_values=cache)
    for row, tree in enumerate(trees):
        yield tree.indices[0], states[row, : len(firsts[row])]
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_second_grad):
        states = _run_behind(model, trees, [sequences[tree.indices[1]][tree.num_shared :] for tree in trees], cache)
    for row, tree in enumerate(trees):
        yield tree.indices[1], states[row, : len(sequences[tree.indices[1]]) - tree.num_shared]


def _run_behind(model: nn.Module, trees: Sequence[Tree], seconds: Sequence[Tensor], cache: DynamicCache) -> Tensor:
    """Runs what second sequences have of their own, padded on the right, what they are lent padded on the left.

    Returns:
        [trees, longest of `seconds`, H]
    """
    device = seconds[0].device
    longest = max(tree.num_shared for tree in trees)
    num_shared = torch.tensor([[tree.num_shared] for tree in trees], device=device)
    ids = nn.utils.rnn.pad_sequence(list(seconds), batch_first=True)
    last = num_shared + torch.tensor([[len(own) - 1] for own in seconds], device=device)
    # Padding stays where the model has positions.
    positions = torch.minimum(num_shared + torch.arange(ids.shape[1], device=device), last)
    inputs = {}
    if len(trees) > 1:
        places = torch.arange(longest + ids.shape[1], device=device)
        inputs["attention_mask"] = (places >= longest - num_shared).long()
    lent, layers = DynamicCache(), cast(list[Any], cache.layers)
    for number, layer in enumerate(layers):
        lent.update(_lend(layer.keys, trees, longest), _lend(layer.values, trees, longest), number)
        layer.keys = layer.values = None  # or all of it would be there twice
    return _run_body(model, input_ids=ids, position_ids=positions, past_key_values=lent, **inputs)


def _lend(states: Tensor, trees: Sequence[Tree], longest: int) -> Tensor:
    """Keys or values [trees, heads, L, D] of what trees share, padded on the left: [trees, heads, longest, D]."""
    if len(trees) == 1:
        return states[:, :, :longest]
    pairs = zip(states, trees, strict=True)
    return torch.stack(
        [nn.functional.pad(one[:, : tree.num_shared], (0, 0, longest - tree.num_shared, 0)) for one, tree in pairs]
    )


def run_row(model: nn.Module, trees: Sequence[Tree], sequences: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Runs trees end to end in one row.

    Yields:
        The index of each sequence and its hidden states but for those of a shared beginning, [L - num_shared, H].
    """
    parts, positions, owners, branches, places = [], [], [], [], []
    device = sequences[0].device
    start = 0
    for number, tree in enumerate(trees):
        first = sequences[tree.indices[0]]
        # The shared beginning, then each sequence's own tokens; the first one's follow at once.
        pieces = [(0, first[: tree.num_shared], 0)] if tree.num_shared else []
        pieces += [
            (branch, sequences[index][tree.num_shared :], tree.num_shared)
            for branch, index in enumerate(tree.indices, start=1)
        ]
        for branch, ids, position in pieces:
            parts.append(ids)
            positions.append(torch.arange(position, position + len(ids), device=device))
            owners.append(torch.full((len(ids),), number, device=device))
            branches.append(torch.full((len(ids),), branch, device=device))
            if branch:
                places.append((tree.indices[branch - 1], start, start + len(ids)))
            start += len(ids)
    inputs = {"input_ids": torch.cat(parts)[None], "position_ids": torch.cat(positions)[None]}
    # Attention of variable length goes by the position ids alone.
    if start > len(parts[0]) and name_attention(model) in MASKED_KINDS:
        inputs["attention_mask"] = _make_mask(model, torch.cat(owners), torch.cat(branches))
    states = _run_body(model, **inputs)[0]
    for index, begin, end in places:
        yield index, states[begin:end]


def _make_mask(model: nn.Module, owners: Tensor, branches: Tensor) -> Tensor:
    """Who sees whom: a token sees those before it in its own branch, and the beginning that its tree shares.

    Args:
        model: Whose attention takes it.
        owners: [L] the tree of each token.
        branches: [L] its branch, 0 for the shared beginning.

    Returns:
        [1, 1, L, L], True (or 0.0, for attention that adds it to its logits) where a row's token sees a column's.
    """
    is_seen = (owners[:, None] == owners) & ((branches == 0) | (branches[:, None] == branches))
    is_seen = is_seen.tril()[None, None]
    if name_attention(model) != "eager":
        return is_seen
    dtype = next(model.parameters()).dtype
    return torch.zeros(is_seen.shape, dtype=dtype, device=owners.device).masked_fill(~is_seen, torch.finfo(dtype).min)


def _run_body(model: nn.Module, **inputs: Any) -> Tensor:
    use_cache = "past_key_values" in inputs
    return _find_body(model)(**inputs, use_cache=use_cache).last_hidden_state


def _find_body(model: Any) -> nn.Module:
    """What makes the hidden states.

    Raises:
        ConfigError: It cannot be told from the head.
    """
    # A class that names no part of its own as its base, as Llama 4's text model, is its own `base_model`.
    body = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if body is None:
        raise ConfigError(f"{type(model).__name__}: expected a body and a head, found no base_model or model in it")
    return body


def name_attention(language_model: nn.Module) -> str:
    return str(getattr(language_model.config, "_attn_implementation", None) or "eager")


def run_inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(module, *args)` inside the forward pass of what wraps the module.

    DistributedDataParallel, FSDP and ZeRO-3 prepare parameters and gradients only around a forward pass; this lends it
    to a computation that is not the module's forward.

    Args:
        wrapper: The wrapped module, or the module itself, on which FSDP2 and ZeRO-3 have put hooks.
        module: The module inside.
        function: What to call.
        *args: Its further arguments.
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
