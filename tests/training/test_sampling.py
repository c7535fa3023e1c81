"""The order of records for several ranks."""

from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from commands import ON_CPU
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model
from torch.utils.data import DataLoader, SequentialSampler

from cutlm import CUTConfig, CUTTrainer
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


class _FirstOfTwo(CUTTrainer):
    """Trains on the batches of the first of two processes, and lists their records."""

    def get_train_dataloader(self) -> Any:
        self.seen: list[list[str]] = []
        rows: Any = self.train_dataset
        shuffled = SeedableRandomSampler(rows, data_seed=42, generator=torch.Generator())
        sampler = BalancedSampler(shuffled, [1] * len(rows), 2, 2, 1)
        loader = DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=self.data_collator)
        return prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        fetched = super().get_batch_samples(*args, **kwargs)
        self.seen += [batch["locations"] for batch in fetched[0]]
        return fetched


def test_a_resumed_epoch_of_several_processes_keeps_its_order(tmp_path: Path) -> None:
    # 16 records on two processes in batches of 2: 4 steps in an epoch.
    rows = [{"prompt_ids": [1, 5], "judged_prompt_ids": None, "response_ids": [7, 2]}] * 16
    settings = ON_CPU | {"per_device_train_batch_size": 2, "num_train_epochs": 3, "save_steps": 6}
    args = CUTConfig(output_dir=str(tmp_path), **settings)
    uninterrupted, resumed = (_FirstOfTwo(make_model(32), args, rows) for _ in range(2))
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert len(uninterrupted.seen) == 12
    assert resumed.seen == uninterrupted.seen[6:]
