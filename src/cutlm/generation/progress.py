"""The progress bar of local generation, which also moves within a batch."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import StoppingCriteria

from cutlm.generation.continuous import Row
from cutlm.model.loading import find_layers

_SECONDS_BETWEEN_UPDATES = 0.5
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} responses [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows how many responses are complete, with the share of unfinished ones, and generated tokens per second.

    The share of a response counts its prompt and `max_new_tokens`, so the time left is usually overestimated.
    """

    def __init__(self, num_responses: int, num_resumed: int = 0, *, is_shown: bool = True) -> None:
        options: dict[str, Any] = {} if is_shown else {"disable": True}  # TQDM_DISABLE decides without it
        self._bar = tqdm(
            total=num_responses,
            initial=num_resumed,
            desc="generating",
            bar_format=_FORMAT,
            smoothing=0,  # the average rate, because batches differ
            miniters=0,
            mininterval=_SECONDS_BETWEEN_UPDATES,
            **options,
        )
        self._num_done, self._num_tokens = num_resumed, 0
        self._rows: dict[int, Row] = {}
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.n = self._num_done
        self._bar.update(0)
        self._bar.close()

    def count_tokens(self, rows: Sequence[Row], max_new_tokens: int) -> None:
        """Count a new token of each of these rows."""
        self._num_tokens += len(rows)
        for row in rows:
            self._rows[row.index] = row
            if row.is_finished:
                del self._rows[row.index]
                self._num_done += 1
        if not self._bar.disable and time.perf_counter() - self._shown >= _SECONDS_BETWEEN_UPDATES:
            self._shown = time.perf_counter()
            sizes = [(len(row.prompt) + len(row.new_ids), len(row.prompt)) for row in self._rows.values()]
            shares = sum(size / (length + max_new_tokens) for size, length in sizes)
            self._show(self._num_done + shares, self._num_tokens)

    def _show(self, num_done: float, num_tokens: int) -> None:
        speed = num_tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:.0f} tokens/s" if num_tokens else "reading prompts", refresh=False)
        self._bar.n = num_done
        self._bar.update(0)

    @contextmanager
    def watch_batch(
        self,
        language_model: nn.Module,
        num_rows: int,
        width: int,
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> Iterator[StoppingCriteria]:
        """Show the progress of a batch while it is generated with the stopping criterion that this yields.

        Args:
            language_model: The model, whose layers show progress while they read the prompts.
            num_rows: Responses in the batch.
            width: Tokens of the longest prompt.
            max_new_tokens: The largest number of tokens per response.
            end_ids: The tokens that end a response.
        """
        layers = [] if self._bar.disable else find_layers(language_model)
        batch = _Batch(num_rows, width, max_new_tokens, end_ids, max(1, len(layers)))

        def show() -> None:
            if self._bar.disable or time.perf_counter() - batch.shown < _SECONDS_BETWEEN_UPDATES:
                return
            batch.shown = time.perf_counter()
            self._show(self._num_done + num_rows * batch.compute_share(), self._num_tokens + batch.count_tokens())

        batch.show = show
        handles = [layer.register_forward_hook(batch.count_layer) for layer in layers]
        try:
            yield batch
        finally:
            for handle in handles:
                handle.remove()
        self._num_done += num_rows
        self._num_tokens += batch.count_tokens()


class _Batch(StoppingCriteria):
    """Counts the tokens of a batch; stops nothing."""

    def __init__(self, num_rows: int, width: int, max_new_tokens: int, end_ids: Sequence[int], num_layers: int) -> None:
        self.shown = time.perf_counter()
        self.show: Any = None
        self._width, self._max_new_tokens, self._num_layers = width, max_new_tokens, num_layers
        self._end_ids = torch.tensor(end_ids)
        self._num_layer_calls = self._num_steps = 0
        self._is_finished = torch.zeros(num_rows, dtype=torch.bool)
        self._num_tokens = torch.zeros((), dtype=torch.long)

    def count_layer(self, *_: object) -> None:
        self._num_layer_calls += 1
        self.show()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self._num_steps:
            names = ("_end_ids", "_is_finished", "_num_tokens")
            for name in names:
                setattr(self, name, getattr(self, name).to(input_ids.device))
        self._num_steps += 1
        self._num_tokens += (~self._is_finished).sum()
        self._is_finished |= torch.isin(input_ids[:, -1], self._end_ids)
        self.show()
        return torch.zeros_like(self._is_finished)

    def count_tokens(self) -> int:
        return int(self._num_tokens)

    def compute_share(self) -> float:
        """Return the share of the batch that is done: finished responses are, others by their tokens."""
        share_read = 1.0 if self._num_steps else min(1.0, self._num_layer_calls / self._num_layers)
        share = (share_read * self._width + self._num_steps) / (self._width + self._max_new_tokens)
        num_rows, num_finished = len(self._is_finished), int(self._is_finished.sum())
        return (num_finished + (num_rows - num_finished) * share) / num_rows
