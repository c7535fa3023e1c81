"""The layouts in which sequences go through the body of a model, each in one pass or two.

- in groups of nearly one length, padded on the right, where no token of a causal model looks (`run_padded`);
- one context of a response as above, which lends its keys and values to the other one where both begin alike
  (`run_lending`);
- as trees: the tokens with which both begin stand once, and both continuations behind them, kept apart by a mask
  (`run_row`);
- end to end in one row with position ids that begin anew, which attention of variable length (flash, flex) keeps apart
  (`run_row`).

What goes together is left to `cutlm.model.forward`, which of them a model bears to `cutlm.model.probes`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cutlm.errors import ConfigError

# Kinds of attention that take any mask.
MASKED_KINDS = ("sdpa", "eager")


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
Run = Callable[[nn.Module, Sequence[Tree], Sequence[Tensor]], Iterator[tuple[int, Tensor]]]


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
        locations = torch.arange(longest + ids.shape[1], device=device)
        inputs["attention_mask"] = (locations >= longest - num_shared).long()
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
    parts, positions, owners, branches, locations = [], [], [], [], []
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
                locations.append((tree.indices[branch - 1], start, start + len(ids)))
            start += len(ids)
    inputs = {"input_ids": torch.cat(parts)[None], "position_ids": torch.cat(positions)[None]}
    # Attention of variable length goes by the position ids alone.
    if start > len(parts[0]) and name_attention(model) in MASKED_KINDS:
        inputs["attention_mask"] = _make_mask(model, torch.cat(owners), torch.cat(branches))
    states = _run_body(model, **inputs)[0]
    for index, begin, end in locations:
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
