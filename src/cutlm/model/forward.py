"""The passes of a micro-batch through a model: each token once, next to no padding, and the head where it counts.

Here it is planned what goes together. How that is run is `cutlm.model.layouts`; which layouts a model bears is found
out by `cutlm.model.probes`. What comes of the log-probs is left to `cutlm.training.batch_loss`, the log-probs
themselves to `cutlm.model.logprobs`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cutlm.model.layouts import Run, Tree, run_lending, run_padded, run_row
from cutlm.model.loading import unwrap_peft
from cutlm.model.logprobs import find_head_layer, get_head, token_logprobs

_MAX_PADDING = 1 / 8
# A mask costs attention to all locations of a row, lending a second pass. Below this share of both sequences, a common
# beginning is not worth it.
_LEAST_SHARED = 1 / 5
# Under a mask attention looks at all locations of a row: in a longer one company costs more than it brings.
_MOST_MASKED = 4096


@dataclass(frozen=True)
class Passes:
    """How sequences go through the body of a model; see `cutlm.model.probes.choose_passes`.

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
class _Pass:
    """What goes through the body at a time.

    Attributes:
        trees: What is in it.
        run: In which layout: `run_padded`, `run_row` or `run_lending`.
        needs_grad: Whether anything is learned from it.
    """

    trees: list[Tree]
    run: Run
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
        run: Run = partial(run_lending, needs_second_grad=needs_judged_grad)
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
