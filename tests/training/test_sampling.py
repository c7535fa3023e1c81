"""The order of records for several processes."""

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from cutlm.training.sampling import BalancedSampler, balance_step


def test_micro_batches_get_like_numbers_of_tokens_and_like_ones_stand_side_by_side() -> None:
    # Two processes take micro-batches of 2 records in turn. The largest go first, each to the emptiest micro-batch:
    # a 9, b 8, c 7, d 5; then 4 to d (9), 3 to c (10), 2 to b (10), 1 to a (10).
    sizes = [9, 1, 8, 2, 7, 3, 5, 4]
    order = balance_step(sizes, 2, 2)
    batches = [[sizes[place] for place in order[start : start + 2]] for start in range(0, 8, 2)]
    assert batches == [[9, 1], [8, 2], [7, 3], [5, 4]]


def test_single_records_meet_those_of_their_size() -> None:
    sizes = [10, 500, 20, 400]
    assert [sizes[place] for place in balance_step(sizes, 2, 1)] == [500, 400, 20, 10]


@given(st.lists(st.integers(1, 1000), min_size=0, max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_record_stays_in_its_step(sizes: list[int], num_processes: int, batch_size: int, num: int) -> None:
    sampler = BalancedSampler(SequentialSampler(sizes), sizes, num_processes, batch_size, num)
    order = list(sampler)
    step_size = num_processes * batch_size * num
    for start in range(0, len(sizes), step_size):
        step = order[start : start + step_size]
        assert sorted(step) == list(range(start, min(start + step_size, len(sizes))))


def test_the_end_of_the_data_keeps_its_order() -> None:
    assert balance_step([1, 9, 5], 2, 2) == [0, 1, 2]
