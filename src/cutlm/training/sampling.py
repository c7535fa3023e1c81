"""The order of records on several processes: each optimizer step has the same records, balanced by their tokens.

The loss is taken over the whole step, so it does not depend on which process gets which record.
"""

import heapq
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


def balance_step(sizes: Sequence[int], num_processes: int, batch_size: int) -> list[int]:
    """Order the records of an optimizer step so that processes wait little for each other.

    The largest record first, each goes to the micro-batch with the fewest tokens so far; then micro-batches of similar
    size are placed next to each other, because processes take them in turn.

    Args:
        sizes: Number of tokens of each record.
        num_processes: Number of processes that take micro-batches in turn.
        batch_size: Number of records in a micro-batch.

    Returns:
        Indices of the records, one micro-batch after the other.
    """
    num_batches = -(-len(sizes) // batch_size)
    if num_batches % num_processes or len(sizes) % batch_size:
        return list(range(len(sizes)))  # the end of an epoch, which Accelerate completes itself
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    open_batches = [(0, number) for number in range(num_batches)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        _, number = heapq.heappop(open_batches)
        batches[number].append(index)
        totals[number] += sizes[index]
        if len(batches[number]) < batch_size:
            heapq.heappush(open_batches, (totals[number], number))
    in_order = sorted(range(num_batches), key=lambda number: (-totals[number], number))
    return [index for number in in_order for index in batches[number]]


class BalancedSampler(Sampler[int]):
    """The order of another sampler, with each optimizer step balanced by `balance_step`."""

    def __init__(
        self, sampler: Sampler[int], sizes: Sequence[int], num_processes: int, batch_size: int, num_accumulated: int
    ) -> None:
        self._sampler, self._sizes = sampler, sizes
        self._num_processes, self._batch_size = num_processes, batch_size
        self._step_size = num_processes * batch_size * num_accumulated

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[int]:
        order = list(self._sampler)
        for start in range(0, len(order), self._step_size):
            step = order[start : start + self._step_size]
            sizes = [self._sizes[index] for index in step]
            yield from (step[index] for index in balance_step(sizes, self._num_processes, self._batch_size))

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the other sampler."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
