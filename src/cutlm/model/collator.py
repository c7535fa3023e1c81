"""Collate encoded records into a micro-batch without padding, and split micro-batches."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from pyarrow import compute
from torch import Tensor, nn

from cutlm.errors import ConfigError
from cutlm.model.loading import list_rope_parameters, unwrap_peft

logger = logging.getLogger(__name__)

_PROMPTS = ("prompt_ids", "judged_prompt_ids")
_TEACHER_PROMPTS = ("teacher_prompt_ids", "teacher_judged_ids")
# Rows that are checked at a time.
_NUM_CHECKED = 10_000


@dataclass(frozen=True)
class TeacherRow:
    """The contexts in which a teacher that changes during training is asked about a response."""

    prompt_ids: list[int]
    judged_prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    response_ids: list[int]
    location: str


@dataclass(frozen=True)
class CutCollator:
    """Concatenates the sequences of a micro-batch into one tensor.

    First the plain contexts of all unsatisfactory records, then their judged contexts in the same order, then the
    satisfactory records, so that the token log-probabilities of both contexts are two slices of equal length.
    "Unsatisfactory" is every row with `judged_prompt_ids`.

    A sequence is a prompt and its response without the last token, which has nothing to predict. Its last
    `response_length` positions predict the response.

    Keys of a batch:

    - `input_ids`, `target_ids`: all sequences, and all responses in the same order.
    - `sequence_lengths`, `response_lengths`: their lengths.
    - `num_unsatisfactory`: number of unsatisfactory records.
    - `shared_lengths`: for each unsatisfactory record, the length of the common prefix of both prompts, at most all
      but the last token.
    - `locations`: names of the records for messages, unsatisfactory records first.
    - `is_flagged`, `flag_weights`: flags of a frozen detector for the plain contexts, if any row has `is_flagged` and
      `weights`.
    - `is_taught`, `teacher_ids`, `teacher_logps`: whether a token of the plain contexts has a distribution of a teacher
      and, for the M that have one, [M, K] its most likely tokens and their log-probabilities (-inf for padding), if any
      row has `teacher_ids` and `teacher_logps`. `old_logps`: [M] log-probabilities of these tokens of the response
      before training, if any row has `old_logps`.
    - `can_flag`: for each token of the unsatisfactory records in one context, whether it may be flagged, if any row
      has `num_template_tokens`, which the chat template writes at the start of the response.
    - `is_praised`: for each unsatisfactory record whether its judgment is praise, if any row has `is_praised`.
    - `teacher_rows`: for each record its `TeacherRow`, or None.
    - `record_weights`: for each record its weight in the loss, if any row has `record_weight`.
    - `critique_owners`: for each critique the index of its record in `locations`. Critiques are the last sequences.

    Args:
        has_critiques: Also learn to write judgments: of rows that have `critique_ids`, after `critique_prompt_ids`.
        has_teacher_rows: Keep the contexts of the teacher of rows that have `teacher_prompt_ids`.

    Example:

        >>> rows = [
        ...     {"prompt_ids": [1, 5], "judged_prompt_ids": [1, 5, 9], "response_ids": [7, 8, 2]},
        ...     {"prompt_ids": [1, 6], "judged_prompt_ids": None, "response_ids": [4, 2]},
        ... ]
        >>> CutCollator()(rows)
        {'input_ids': tensor([1, 5, 7, 8,  1, 5, 9, 7, 8,  1, 6, 4]),
         'target_ids': tensor([7, 8, 2,  7, 8, 2,  4, 2]),
         'sequence_lengths': [4, 5, 3],
         'response_lengths': [3, 3, 2],
         'num_unsatisfactory': 1,
         'shared_lengths': [1],
         'locations': ['record 0 of the batch', 'record 1 of the batch']}
    """

    has_critiques: bool = False
    has_teacher_rows: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        judged = [row for row in rows if row["judged_prompt_ids"] is not None]
        satisfactory = [row for row in rows if row["judged_prompt_ids"] is None]
        sequences = [
            *((row["prompt_ids"], row["response_ids"]) for row in judged),
            *((row["judged_prompt_ids"], row["response_ids"]) for row in judged),
            *((row["prompt_ids"], row["response_ids"]) for row in satisfactory),
        ]
        ordered = [*judged, *satisfactory]
        owners = [index for index, row in enumerate(ordered) if self.has_critiques and row.get("critique_ids")]
        sequences += [(ordered[index]["critique_prompt_ids"], ordered[index]["critique_ids"]) for index in owners]
        inputs = [[*prompt, *response[:-1]] for prompt, response in sequences]
        names = [row.get("location") or f"record {index} of the batch" for index, row in enumerate(rows)]
        is_judged = [row["judged_prompt_ids"] is not None for row in rows]
        batch = {
            "input_ids": torch.tensor([token for ids in inputs for token in ids], dtype=torch.long),
            "target_ids": torch.tensor([token for _, ids in sequences for token in ids], dtype=torch.long),
            "sequence_lengths": [len(ids) for ids in inputs],
            "response_lengths": [len(response) for _, response in sequences],
            "num_unsatisfactory": len(judged),
            "shared_lengths": [_count_shared(row["prompt_ids"], row["judged_prompt_ids"]) for row in judged],
            "locations": [
                name for kind in (True, False) for name, flag in zip(names, is_judged, strict=True) if flag == kind
            ],
        }
        if self.has_teacher_rows:
            batch["teacher_rows"] = [_make_teacher_row(row) for row in ordered]
        if self.has_critiques:
            batch["critique_owners"] = owners
        if any(row.get("is_flagged") is not None for row in rows):
            flags = [row.get("is_flagged") or [False] * len(row["response_ids"]) for row in ordered]
            weights = [row.get("weights") or [0.0] * len(row["response_ids"]) for row in ordered]
            batch["is_flagged"] = torch.tensor([flag for part in flags for flag in part], dtype=torch.bool)
            batch["flag_weights"] = torch.tensor([weight for part in weights for weight in part])
        if any("teacher_ids" in row for row in rows):
            batch |= _collate_teacher(ordered)
        if any(row.get("num_template_tokens") for row in judged):
            numbers = [row.get("num_template_tokens") or 0 for row in judged]
            can_flag = [
                index >= num
                for row, num in zip(judged, numbers, strict=True)
                for index in range(len(row["response_ids"]))
            ]
            batch["can_flag"] = torch.tensor(can_flag, dtype=torch.bool)
        if any("record_weight" in row for row in rows):
            batch["record_weights"] = [row.get("record_weight", 1.0) for row in ordered]
        if any("is_praised" in row for row in rows):
            batch["is_praised"] = [bool(row.get("is_praised")) for row in judged]
        return batch


def _make_teacher_row(row: Mapping[str, Any]) -> TeacherRow | None:
    if row.get("teacher_prompt_ids") is None:
        return None
    prompts = (row["prompt_ids"], row["teacher_judged_ids"], row["teacher_prompt_ids"])
    return TeacherRow(*prompts, row["response_ids"], row.get("location") or "a record")


def collate_teacher_rows(rows: Sequence[TeacherRow]) -> dict[str, Any]:
    """Collate the contexts of a teacher, which `score_teacher` scores."""
    return CutCollator()(
        [
            *({name: getattr(row, name) for name in (*_PROMPTS, "response_ids", "location")} for row in rows),
            *(view_teacher(vars(row)) for row in rows),
        ]
    )


def view_teacher(row: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's context of a row, as a row of one context."""
    return {
        "prompt_ids": row["teacher_prompt_ids"],
        "judged_prompt_ids": None,
        "response_ids": row["response_ids"],
        "location": f"{row.get('location') or 'a record'} with the prompt of the teacher",
    }


def _collate_teacher(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    is_taught: list[bool] = []
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    old_logps: list[float] = []
    for row in rows:
        own_ids = row.get("teacher_ids") or [[]] * len(row["response_ids"])
        places = [place for place, columns in enumerate(own_ids) if columns]
        is_taught += [bool(columns) for columns in own_ids]
        ids += [own_ids[place] for place in places]
        logps += [row["teacher_logps"][place] for place in places]
        old_logps += [row["old_logps"][place] for place in places] if row.get("old_logps") else []
    width = max(map(len, ids), default=1)
    padded_ids = [[*columns, *[columns[0]] * (width - len(columns))] for columns in ids]
    padded_logps = [[*columns, *[-math.inf] * (width - len(columns))] for columns in logps]
    batch = {
        "is_taught": torch.tensor(is_taught, dtype=torch.bool),
        "teacher_ids": torch.tensor(padded_ids, dtype=torch.long).reshape(-1, width),
        "teacher_logps": torch.tensor(padded_logps, dtype=torch.float32).reshape(-1, width),
    }
    return batch | ({"old_logps": torch.tensor(old_logps)} if any("old_logps" in row for row in rows) else {})


def _count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two prompts, without the last token of either, which predicts the response."""
    longest = min(len(first), len(second)) - 1
    return next((index for index in range(longest) if first[index] != second[index]), longest)


def split_batch(batch: Mapping[str, Any], max_tokens: int) -> list[dict[str, Any]]:
    """Split a micro-batch into smaller ones of at most `max_tokens` tokens.

    Losses are sums, so the losses and gradients of the parts add up to those of the whole. Records are split by length,
    the longest first; both contexts of a record stay together.

    Args:
        batch: A batch of `CutCollator`.
        max_tokens: Maximum number of tokens of all sequences of a part; a record with more gets its own part.
    """
    lengths, num_judged = batch["sequence_lengths"], batch["num_unsatisfactory"]
    owners = batch.get("critique_owners", [])
    first_critique = len(lengths) - len(owners)
    owned = [[index, num_judged + index] for index in range(num_judged)]
    owned += [[index] for index in range(2 * num_judged, first_critique)]
    for critique, owner in enumerate(owners, first_critique):
        owned[owner].append(critique)
    sizes = [sum(lengths[index] for index in indices) for indices in owned]
    parts: list[list[int]] = []
    room = 0
    for record in sorted(range(len(owned)), key=lambda record: -sizes[record]):
        if not parts or sizes[record] > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(record)
        room -= sizes[record]
    return [_take_records(batch, sorted(part), owned) for part in parts] if len(parts) > 1 else [dict(batch)]


def _take_records(batch: Mapping[str, Any], records: list[int], owned: list[list[int]]) -> dict[str, Any]:
    num_judged = batch["num_unsatisfactory"]
    judged = [record for record in records if record < num_judged]
    # Plain contexts, judged contexts, satisfactory records: the order of `CutCollator`.
    indices = [*(owned[record][0] for record in judged), *(owned[record][1] for record in judged)]
    indices += [owned[record][0] for record in records if record >= num_judged]
    critiques = {record: owned[record][1 + (record < num_judged) :] for record in records}
    indices += [index for own in critiques.values() for index in own]
    part: dict[str, Any] = {
        name: torch.cat([batch[name].split(batch[lengths])[index] for index in indices])
        for name, lengths in (("input_ids", "sequence_lengths"), ("target_ids", "response_lengths"))
    }
    part |= {name: [batch[name][index] for index in indices] for name in ("sequence_lengths", "response_lengths")}
    part["num_unsatisfactory"] = len(judged)
    part["shared_lengths"] = [batch["shared_lengths"][record] for record in judged]
    part["locations"] = [batch["locations"][record] for record in records]
    if "teacher_rows" in batch:
        part["teacher_rows"] = [batch["teacher_rows"][record] for record in records]
    if "record_weights" in batch:
        part["record_weights"] = [batch["record_weights"][record] for record in records]
    if "critique_owners" in batch:
        part["critique_owners"] = [place for place, record in enumerate(records) if critiques[record]]
    # One response for each record, without the judged contexts.
    sizes = [batch["response_lengths"][indices[0]] for indices in owned]
    if "is_flagged" in batch:
        for name in ("is_flagged", "flag_weights"):
            part[name] = torch.cat([batch[name].split(sizes)[record] for record in records])
    if "is_taught" in batch:
        are_taught = batch["is_taught"].split(sizes)
        part["is_taught"] = torch.cat([are_taught[record] for record in records])
        counts = [int(own.sum()) for own in are_taught]
        for name in ("teacher_ids", "teacher_logps", "old_logps"):
            if name in batch:
                part[name] = torch.cat([batch[name].split(counts)[record] for record in records])
    if "can_flag" in batch and judged:
        sizes = batch["response_lengths"][:num_judged]
        part["can_flag"] = torch.cat([batch["can_flag"].split(sizes)[record] for record in judged])
    if "is_praised" in batch:
        part["is_praised"] = [batch["is_praised"][record] for record in judged]
    return part


def split_lengths(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Count the response tokens of unsatisfactory records (in one context) and of satisfactory records."""
    num_unsatisfactory, lengths = batch["num_unsatisfactory"], _list_lengths(batch)
    return sum(lengths[:num_unsatisfactory]), sum(lengths[2 * num_unsatisfactory :])


def list_record_lengths(batch: Mapping[str, Any]) -> list[int]:
    """List the numbers of tokens of the responses of the records, in the order of `locations`."""
    lengths, num_unsatisfactory = _list_lengths(batch), batch["num_unsatisfactory"]
    return [*lengths[:num_unsatisfactory], *lengths[2 * num_unsatisfactory :]]


def list_critique_lengths(batch: Mapping[str, Any]) -> list[int]:
    """List the numbers of tokens of the critiques of a batch."""
    return batch["response_lengths"][len(_list_lengths(batch)) :]


def _list_lengths(batch: Mapping[str, Any]) -> list[int]:
    """The lengths of the responses in all contexts, without those of critiques."""
    lengths = batch["response_lengths"]
    return lengths[: len(lengths) - len(batch.get("critique_owners", []))]


def find_non_finite(logps: Tensor, batch: Mapping[str, Any]) -> list[str]:
    """Return the locations of records with non-finite log-probabilities.

    Args:
        logps: [R], in the order of `batch["target_ids"]`.
        batch: A batch of `CutCollator`.
    """
    num_unsatisfactory = batch["num_unsatisfactory"]
    # Both contexts of an unsatisfactory record belong to the same record.
    records = [*range(num_unsatisfactory), *range(len(batch["locations"])), *batch.get("critique_owners", [])]
    bad = {
        record
        for record, part in zip(records, logps.split(batch["response_lengths"]), strict=True)
        if not torch.isfinite(part).all()
    }
    return [batch["locations"][record] for record in sorted(bad)]


def find_position_limit(config: Any) -> int | None:
    """Find how many tokens the config of a model allows.

    None if it does not say, or has a scaled RoPE, which is meant for more positions than are stated.
    """
    config = config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    is_scaled = any(rope.get("rope_type") not in (None, "default") for rope in list_rope_parameters(config))
    return None if is_scaled else limit


def warn_of_long_limit(config: Any, max_length: int) -> None:
    """Warn, before data are prepared, that records longer than the context of the model are refused."""
    limit = find_position_limit(config)
    if limit is not None and max_length > limit:
        logger.warning(
            f"max_length: {max_length} is above the model's context of {limit} tokens, and longer records are refused;"
            f" set --max_length {limit} to truncate their prompts instead"
        )


def describe_excess(config: Any, longest: int, max_length: int) -> str | None:
    """Say that the longest record does not fit the context of a model, given its config; None if it does."""
    limit = find_position_limit(config)
    if limit is None or longest <= limit:
        return None
    return (
        f"max_length: expected at most the model's context of {limit} tokens, got {max_length} and a record of"
        f" {longest}; set --max_length {limit}"
    )


def check_rows_fit_model(
    model: nn.Module,
    rows: Dataset | pyarrow.Table | Sequence[Mapping[str, Any]],
    max_length: int,
    prompts: Sequence[str] = ("prompt_ids", "judged_prompt_ids"),
    responses: Sequence[str] = ("response_ids",),
) -> None:
    """Check that the model has an embedding for every token id and a position for every token.

    Args:
        model: The model.
        rows: Rows of token ids.
        max_length: The user's limit, for the message.
        prompts: Columns that hold prompts; None counts as empty. Those of a teacher are found.
        responses: Columns that hold what follows a prompt.

    Raises:
        ConfigError: A token id or a length is out of range.
    """
    language_model = unwrap_peft(model)
    longest = largest = 0
    if isinstance(rows, Dataset):
        prompts = [*prompts, *(name for name in _TEACHER_PROMPTS if name in rows.column_names)]
    for batch in _read_batches(rows, (*prompts, *responses)):
        lengths = {name: compute.fill_null(compute.list_value_length(ids), 0) for name, ids in batch.items()}
        longest_prompts = compute.max_element_wise(*(lengths[name] for name in prompts))
        longest_responses = compute.max_element_wise(*(lengths[name] for name in responses))
        longest = max(longest, compute.max(compute.add(longest_prompts, longest_responses)).as_py())
        largest = max(largest, *(compute.max(compute.list_flatten(ids)).as_py() or 0 for ids in batch.values()))
    if isinstance(rows, Dataset) and "teacher_ids" in rows.column_names:
        for table in rows.with_format("arrow", columns=["teacher_ids"]).iter(_NUM_CHECKED):
            # Without an unsatisfactory record the column holds nothing but None, and has no type.
            taught = table["teacher_ids"].cast(pyarrow.list_(pyarrow.list_(pyarrow.int64())))
            largest = max(largest, compute.max(compute.list_flatten(taught, recursive=True)).as_py() or 0)
    problems = []
    num_embeddings = next(language_model.get_input_embeddings().parameters()).shape[0]
    if 0 < num_embeddings <= largest:  # 0 where weights are sharded across processes
        problems.append(
            f"tokenizer: expected token ids below {num_embeddings}, the size of the model's vocabulary, got {largest};"
            " use the model's own tokenizer"
        )
    if excess := describe_excess(language_model.config, longest, max_length):
        problems.append(excess)
    if problems:
        raise ConfigError(problems)


def _read_batches(
    rows: Dataset | pyarrow.Table | Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[dict[str, pyarrow.ChunkedArray]]:
    """Yield columns of token ids, some thousand rows at a time."""
    kind = pyarrow.list_(pyarrow.int64())
    if isinstance(rows, Dataset):
        for table in rows.with_format("arrow", columns=list(names)).iter(_NUM_CHECKED):
            yield {name: table[name].cast(kind) for name in names}
    elif isinstance(rows, pyarrow.Table):
        if rows.num_rows:
            yield {name: rows[name].cast(kind) for name in names}
    else:
        for start in range(0, len(rows), _NUM_CHECKED):
            part = rows[start : start + _NUM_CHECKED]
            yield {name: pyarrow.chunked_array([[row[name] for row in part]], kind) for name in names}
