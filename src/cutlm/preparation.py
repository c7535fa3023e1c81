"""Data sets for the trainer: records encoded, or encoded rows checked, downsampled, and every loss of a record noted.

Batching is left to `cutlm.collator`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.config import CUTConfig
from cutlm.encoding import Encoder, encode_records
from cutlm.errors import ConfigError, DataError
from cutlm.model import unwrap_peft
from cutlm.records import as_records

_ID_COLUMNS = ("prompt_ids", "judged_prompt_ids", "response_ids")


@dataclass
class PreparedData:
    """A data set that can be batched, and what became of the rest.

    Attributes:
        rows: Rows with `prompt_ids`, `judged_prompt_ids` and `response_ids`.
        notices: Sentences on what was cut, left out or downsampled.
        num_left_out: Records left out, for whatever reason.
        chat_template: The template by which other tools give the model the prompts of these rows, where it is known.
    """

    rows: Dataset
    notices: list[str] = field(default_factory=list)
    num_left_out: int = 0
    chat_template: str | None = None


def prepare_data(
    dataset: Dataset | Sequence[Any],
    name: str,
    args: CUTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    places: Sequence[str] | None = None,
) -> PreparedData:
    """Encodes records, or takes encoded rows as they are.

    Args:
        dataset: Records or encoded rows.
        name: What to call it in messages.
        args: Template and length.
        tokenizer: For records.
        places: Where each record stands, for messages; None numbers them.

    Raises:
        DataError: Bad records or rows; all are named.
        ConfigError: Records without a tokenizer, or one that does not fit the template.
    """
    if len(dataset) and isinstance(dataset[0], Mapping) and "response_ids" in dataset[0]:
        return PreparedData(_check_encoded(dataset, name))
    check = as_records(list(dataset), name)
    if tokenizer is None:
        raise ConfigError(f"{name}: records need a tokenizer to be encoded; give processing_class")
    encoder = Encoder(tokenizer, args.template)  # type: ignore[arg-type]
    encoded = encode_records(check.records, places or check.places, encoder, args.max_length)
    return PreparedData(
        Dataset.from_list(encoded.rows),
        [f"{name}: {encoded.describe(args.max_length)}", *encoded.left_out],
        len(encoded.left_out),
        encoder.build_chat_template(),
    )


def downsample(data: PreparedData, name: str, share: float, seed: int) -> None:
    """Keeps at most `share` satisfactory records per unsatisfactory one (paper, section 5.2), drawn by `seed`."""
    judged = data.rows["judged_prompt_ids"]
    satisfactory = [index for index in range(len(data.rows)) if judged[index] is None]
    num_kept = min(len(satisfactory), int(share * (len(data.rows) - len(satisfactory))))
    kept = set(random.Random(seed).sample(satisfactory, num_kept))
    num_dropped = len(satisfactory) - num_kept
    data.rows = data.rows.select(
        [index for index in range(len(data.rows)) if judged[index] is not None or index in kept]
    )
    data.num_left_out += num_dropped
    data.notices.append(
        f"{name}: downsample {share} keeps {num_kept} of {len(satisfactory)} satisfactory records; {num_dropped} left"
        f" out, {len(data.rows)} to train on"
    )


def check_vocabulary(model: nn.Module, rows: Dataset, name: str) -> None:
    """Refuses token ids that the model has no embedding for, as of a tokenizer that is not its own.

    Raises:
        ConfigError: There are such.
    """
    num_embeddings = next(unwrap_peft(model).get_input_embeddings().parameters()).shape[0]
    largest = max(token for key in _ID_COLUMNS for ids in rows[key] for token in ids or ())
    if 0 < num_embeddings <= largest:  # none are here where they are sharded over processes
        raise ConfigError(
            f"{name}: expected token ids below {num_embeddings}, the size of the model's vocabulary, got {largest};"
            " give the model's own tokenizer"
        )


def _check_encoded(dataset: Dataset | Sequence[Any], name: str) -> Dataset:
    """Checks rows of token ids that were made elsewhere."""
    problems = []
    for index, row in enumerate(dataset):
        for key in _ID_COLUMNS:
            value = row.get(key)
            if value is None and key == "judged_prompt_ids":
                continue
            if not value or not all(isinstance(token, int) and token >= 0 for token in value):
                problems.append(f"{name}[{index}]: field {key!r}: expected a filled list of token ids, got {value!r}")
    if problems:
        raise DataError(problems)
    if isinstance(dataset, Dataset):
        if "judged_prompt_ids" not in dataset.column_names:
            return dataset.add_column("judged_prompt_ids", [None] * len(dataset))
        return dataset
    return Dataset.from_list(
        [
            {key: row.get(key) for key in _ID_COLUMNS} | {"place": row.get("place") or f"{name}[{index}]"}
            for index, row in enumerate(dataset)
        ]
    )
