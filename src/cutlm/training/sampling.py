"""The order of records for several processes: the same records in each optimizer step, with like numbers of tokens on
all of them, so that none waits for another.

As the loss is taken over the whole step, who of the processes gets which record changes nothing of it.
"""

import heapq
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


def balance_step(sizes: Sequence[int], num_processes: int, batch_size: int) -> list[int]:
    """Orders the records of an optimizer step.

    The largest first, each goes to the micro-batch that has the fewest tokens yet; then micro-batches of like size are
    put next to each other, as processes take them in turn.

    Args:
        sizes: Tokens of each record.
        num_processes: How many take micro-batches in turn.
        batch_size: Records of a micro-batch; the last ones of a pass over the data may have fewer.

    Returns:
        The locations of the records: a micro-batch after the other.
    """
    num_batches = -(-len(sizes) // batch_size)
    if num_batches % num_processes or len(sizes) % batch_size:
        return list(range(len(sizes)))  # the end of a pass over the data, which Accelerate fills up by itself
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0] * num_batches
    open_batches = [(0, number) for number in range(num_batches)]
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        _, number = heapq.heappop(open_batches)
        batches[number].append(place)
        totals[number] += sizes[place]
        if len(batches[number]) < batch_size:
            heapq.heappush(open_batches, (totals[number], number))
    in_order = sorted(range(num_batches), key=lambda number: (-totals[number], number))
    return [place for number in in_order for place in batches[number]]


class BalancedSampler(Sampler[int]):
    """Another sampler's order, each optimizer step of it balanced.

    Args:
        sampler: Which records come when.
        sizes: Tokens of each record.
        num_processes: How many share a step.
        batch_size: Records of a micro-batch of one of them.
        num_accumulated: Micro-batches of a process in a step.
    """

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
            yield from (step[place] for place in balance_step(sizes, self._num_processes, self._batch_size))

    def set_epoch(self, epoch: int) -> None:
        """Tells the other sampler which pass over the data is next."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
