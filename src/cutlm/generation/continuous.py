"""Continuous batching: a finished row leaves the batch at once, and the next prompt takes its place.

Each row has a slot of a preallocated KV cache, in which its tokens start at column 0. Nothing is concatenated or moved
while rows grow, and a mask hides the columns that a row has not written. A new prompt copies the keys and values of the
longest prefix that it shares with a slot, so that a common system prompt is computed once.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cutlm.model.forward import attends_to_all, find_rope_switch, get_attention, has_local_weights
from cutlm.model.loading import unwrap_peft

_MAX_PREFILL_TOKENS = 4096  # of one forward pass, which bounds the memory of its activations
_NUM_SPARE_COLUMNS = 64  # by which the cache grows, or by an eighth
_ALIGNMENT = 8  # of the mask's columns, which attention kernels of GPUs expect
_MIN_SHARED = 16  # tokens of a shared prefix for which a prompt waits until another one is read


@dataclass(eq=False)
class Row:
    """A prompt and the tokens generated after it."""

    index: int
    prompt: list[int]
    new_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


def generate_rows(
    model: nn.Module, rows: Iterable[Row], num_slots: int, add_tokens: Callable[[Sequence[Row], Tensor], None]
) -> Iterator[list[Row]]:
    """Generate rows, at most `num_slots` at a time in their order, and yield those that are finished.

    Args:
        model: A model that `supports_slots` accepts.
        rows: Their prompts are not empty.
        num_slots: The number of rows in a batch.
        add_tokens: Appends a token to each of the rows by their logits [R, V], and marks those that are finished.
    """
    waiting, batch = deque(rows), SlotBatch(model)
    while waiting or batch.rows:
        finished = [row for row in batch.rows if row.is_finished]
        num_free = num_slots - len(batch.rows) + len(finished)
        if finished or (waiting and num_free):
            added = [waiting.popleft() for _ in range(min(num_free, len(waiting)))]
            for group, logits in batch.replace(finished, added):
                add_tokens(group, logits)
            if finished:
                yield finished
        else:
            add_tokens(batch.rows, batch.run_step())


# ---- The batch ----


class SlotBatch:
    """The rows that are generated together: `rows[i]` is in slot i of the cache."""

    def __init__(self, model: nn.Module) -> None:
        language_model = unwrap_peft(model)
        self._model, self._device, self._dtype = model, language_model.device, language_model.dtype
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in _list_arguments(language_model) else {}
        self._cache = SlotCache()
        self._cached_ids: list[list[int]] = []  # the tokens that a slot holds, also when their row has left
        self.rows: list[Row] = []

    def replace(self, finished: Sequence[Row], added: Sequence[Row]) -> Iterator[tuple[list[Row], Tensor]]:
        """Replace finished rows by others; yield groups of these with the logits after their prompts, [R, V]."""
        for row in finished[len(added) :]:
            self._remove(row)
        free = [self.rows.index(row) for row in finished[: len(added)]]
        free += range(len(self.rows), len(self.rows) + len(added) - len(free))
        waiting = list(zip(free, added, strict=True))
        for slot, row in waiting:
            self.rows[slot : slot + 1] = [row]
        self._cached_ids += [[] for _ in range(len(self.rows) - len(self._cached_ids))]
        while waiting:
            group, waiting = self._choose_group(waiting)
            yield [row for _, row in group], self._read_prompts(group)

    def _remove(self, row: Row) -> None:
        """Remove a row; the last one moves to its slot."""
        slot, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.rows[slot] = last
            self._copy_prefix(len(self.rows), slot, len(self._cached_ids[len(self.rows)]))

    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        if source != target:
            self._cache.copy_prefix(source, target, length)
        self._cached_ids[target] = self._cached_ids[source][:length]

    def _choose_group(self, waiting: list[tuple[int, Row]]) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]]]:
        """Choose prompts of similar length to read in one pass; those that share a prefix with one of them wait."""
        group: list[tuple[int, Row]] = []
        others = []
        num_tokens = width = 0
        for slot, row in waiting:
            num_cached = max(_count_shared(row.prompt, ids) for ids in self._cached_ids)
            num_shared = max((_count_shared(row.prompt, chosen.prompt) for _, chosen in group), default=0)
            length = len(row.prompt) - num_cached
            num_padded = (len(group) + 1) * max(width, length)
            is_padding_small = num_padded <= 1.25 * (num_tokens + length) + _NUM_SPARE_COLUMNS
            fits = num_padded <= _MAX_PREFILL_TOKENS and is_padding_small
            if not group or (fits and num_shared < num_cached + _MIN_SHARED):
                group.append((slot, row))
                num_tokens, width = num_tokens + length, max(width, length)
            else:
                others.append((slot, row))
        return group, others

    def _read_prompts(self, group: Sequence[tuple[int, Row]]) -> Tensor:
        for slot, row in group:
            # One at a time, because a copy changes the content of the slot.
            sources = range(len(self._cached_ids))
            source = max(sources, key=lambda source: _count_shared(row.prompt, self._cached_ids[source]))
            self._copy_prefix(source, slot, _count_shared(row.prompt, self._cached_ids[source]))
        slots = [slot for slot, _ in group]
        return self._run(slots, [row.prompt[len(self._cached_ids[slot]) :] for slot, row in group])

    def run_step(self) -> Tensor:
        """Run the last token of every row, and return the logits of the next, [R, V]."""
        return self._run(None, [row.new_ids[-1:] for row in self.rows])

    @torch.inference_mode()
    def _run(self, slots: list[int] | None, new_ids: Sequence[list[int]]) -> Tensor:
        """Run tokens of rows after those in their slots, and return the logits after the last of each."""
        width = max(map(len, new_ids))
        holds = [self._cached_ids[slot] for slot in (range(len(new_ids)) if slots is None else slots)]
        num_columns = max(len(held) + len(ids) for held, ids in zip(holds, new_ids, strict=True))
        starts = torch.tensor([[len(held), len(ids)] for held, ids in zip(holds, new_ids, strict=True)])
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in new_ids], device=self._device)
        positions = (starts.sum(1, keepdim=True) - width + torch.arange(width)).to(self._device)  # [R, T]
        is_padding = (torch.arange(width) < width - starts[:, 1:]).to(self._device)
        positions = positions.masked_fill(is_padding, 0)
        num_visible = -(-num_columns // _ALIGNMENT) * _ALIGNMENT
        is_hidden = torch.arange(num_visible, device=self._device) > positions[:, None, :, None]
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype, device=self._device)
        self._cache.plan(slots, positions, is_padding, num_visible, len(self._cached_ids))
        output = self._model(
            input_ids=padded,
            position_ids=positions,
            attention_mask=mask.masked_fill(is_hidden, torch.finfo(self._dtype).min),
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        for held, ids in zip(holds, new_ids, strict=True):
            held += ids
        logits: Tensor = output.logits[:, -1]
        return logits


def _count_shared(prompt: Sequence[int], ids: Sequence[int]) -> int:
    """Count the first tokens of a prompt that other tokens share, without its last one, which gives the logits."""
    low, high = 0, min(len(prompt) - 1, len(ids))
    if prompt[:high] == ids[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if prompt[low:middle] == ids[low:middle] else (low, middle)
    return low


# ---- The cache ----


class SlotCache(Cache):
    """A KV cache of rows of different lengths; call `plan` before each forward pass."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self))  # type: ignore[arg-type]
        self.num_slots = self.num_columns = self.width = 0
        self.slots: Tensor | slice = slice(0)
        self.row_ids = self.columns = torch.empty(0)

    def plan(
        self, slots: Sequence[int] | None, positions: Tensor, is_padding: Tensor, width: int, num_slots: int
    ) -> None:
        """Set the cache positions that the next forward pass writes and sees.

        Args:
            slots: Those of the rows; None for the first ones.
            positions: [R, T] the columns to write to.
            is_padding: [R, T] whether a position is padding, which goes to the last column, that no row sees.
            width: The number of columns that the rows see.
            num_slots: Those of the whole cache.
        """
        if width >= self.num_columns:
            self.num_columns = width + max(_NUM_SPARE_COLUMNS, width // 8)
        self.num_slots, self.width = num_slots, width
        self.columns = positions.masked_fill(is_padding, self.num_columns - 1)
        row_ids = torch.arange(len(positions)) if slots is None else torch.tensor(slots)
        self.row_ids = row_ids.to(positions.device)
        self.slots = slice(len(positions)) if slots is None else self.row_ids

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first columns of a slot to another."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            for states in (layer.keys, layer.values):
                if states is not None:
                    states[target, :, :length] = states[source, :, :length]


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer: [slots, heads, columns, D]."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.keys = self._write(self.keys, key_states)
        self.values = self._write(self.values, value_states)
        return self._read(self.keys), self._read(self.values)

    def _write(self, states: Tensor | None, new: Tensor) -> Tensor:
        cache = self._cache
        if states is None or states.shape[0] < cache.num_slots or states.shape[2] < cache.num_columns:
            # Zeros, because a masked NaN would still make the output NaN.
            grown = new.new_zeros(cache.num_slots, new.shape[1], cache.num_columns, new.shape[3])
            if states is not None:
                grown[: states.shape[0], :, : states.shape[2]] = states
            states = grown
        states[cache.row_ids.to(new.device)[:, None], :, cache.columns.to(new.device)] = new.transpose(1, 2)
        return states

    def _read(self, states: Tensor) -> Tensor:
        slots = self._cache.slots
        return states[slots if isinstance(slots, slice) else slots.to(states.device), :, : self._cache.width]


# ---- The models that it supports ----


def has_slots(model: nn.Module, max_length: int) -> bool:
    """Whether a model, by its class and config, can be generated from in slots, with rows of up to `max_length` tokens.

    Every layer must attend to all earlier tokens through the standard KV cache, with a mask of our own.
    """
    language_model = unwrap_peft(model)
    if not isinstance(language_model, PreTrainedModel) or not has_local_weights(language_model):
        return False
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False
    config = language_model.config.get_text_config(decoder=True)
    rope_switch = find_rope_switch(language_model)
    return (
        not config.is_encoder_decoder
        and not getattr(language_model, "_is_stateful", False)
        and {"position_ids", "attention_mask"} <= (arguments := _list_arguments(language_model))
        # transformers 5.24 calls it cache, and takes the old name, which we pass, until 5.40.
        and not arguments.isdisjoint({"past_key_values", "cache"})
        and get_attention(language_model) in ("sdpa", "eager")
        and attends_to_all(language_model)
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and (rope_switch is None or max_length <= rope_switch)
    )


def _list_arguments(language_model: nn.Module) -> set[str]:
    return set(inspect.signature(language_model.forward).parameters)
