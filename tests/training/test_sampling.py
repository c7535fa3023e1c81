"""The order of records for several ranks."""

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from cutlm.training.sampling import BalancedSampler, balance_step


def test_micro_batches_have_similar_sizes_and_the_most_similar_are_adjacent() -> None:
    # Two ranks take micro-batches of 2 records in turn. The largest records come first, each into the emptiest
    # micro-batch: a 9, b 8, c 7, d 5; then 4 to d (9), 3 to c (10), 2 to b (10), 1 to a (10).
    sizes = [9, 1, 8, 2, 7, 3, 5, 4]
    order = balance_step(sizes, 2, 2)
    batches = [[sizes[index] for index in order[start : start + 2]] for start in range(0, 8, 2)]
    assert batches == [[9, 1], [8, 2], [7, 3], [5, 4]]


def test_micro_batches_of_one_record_are_sorted_by_size() -> None:
    sizes = [10, 500, 20, 400]
    assert [sizes[index] for index in balance_step(sizes, 2, 1)] == [500, 400, 20, 10]


@given(st.lists(st.integers(1, 1000), min_size=0, max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_record_stays_in_its_step(sizes: list[int], num_ranks: int, batch_size: int, num_batches: int) -> None:
    order = list(BalancedSampler(SequentialSampler(sizes), sizes, num_ranks, batch_size, num_batches))
    step_size = num_ranks * batch_size * num_batches
    for start in range(0, len(sizes), step_size):
        assert sorted(order[start : start + step_size]) == list(range(start, min(start + step_size, len(sizes))))


def test_the_incomplete_last_step_keeps_its_order() -> None:
    assert balance_step([1, 9, 5], 2, 2) == [0, 1, 2]
