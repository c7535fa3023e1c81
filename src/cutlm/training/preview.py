"""Show the data of a training run without its model: counts, lengths in tokens, and examples.

In an example, [[ ]] enclose the trained tokens and {{ }} those to unlearn, if these are known before training.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import quantiles
from typing import Any

import pyarrow
from datasets import Dataset
from pyarrow import compute

from cutlm.data.doubts import describe_doubts
from cutlm.errors import MAX_PROBLEMS_SHOWN, ConfigError, UserError
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.tables import format_table
from cutlm.inspect.terminal import make_printable
from cutlm.model.collator import describe_excess
from cutlm.model.loading import load_config, load_tokenizer
from cutlm.prompting.encoding import Encoder, describe_unused_template
from cutlm.training.config import CUTConfig, ModelArguments, Settings
from cutlm.training.dataset import drop_excluded, encode_dataset, make_encoder
from cutlm.training.run import LoadedData, Prepare, keep_rows, load_data, select_rows, split_rows

NUM_EXAMPLES = 3
_MAX_LOCATIONS_NAMED = 5
# Characters of a prompt that are shown at its start and at its end.
_NUM_SHOWN = 400
_PERCENTILES = (50, 90, 99)
_PARTS = {
    "prompt_ids": "prompt",
    "judged_prompt_ids": "prompt with the judgment",
    "response_ids": "response",
    "chosen_ids": "chosen response",
    "rejected_ids": "rejected response",
}


def preview_run(settings: Settings, prepare: Prepare = keep_rows) -> Iterator[str]:
    """Yield the lines of a preview of a run's data.

    Raises:
        UserError: The data or the tokenizer cannot be read, or do not fit the settings.
    """
    data_args, model_args, config = settings.parts
    data = load_data(data_args.data, data_args.columns)
    rows = prepare(data.rows)
    train_indices, eval_indices = split_rows(len(rows), data_args.eval_split, config.seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    train_rows = select_rows(rows, train_indices)
    if config.objective == "cut" and config.detector is None and isinstance(rows[0], TokenScores):
        config = copy.copy(config)
        config.detector = "frozen"
    encoder = make_encoder(tokenizer, config, train_rows)
    encoded, notices = _encode(train_rows, config, encoder, [data.locations[index] for index in train_indices])
    if excess := _find_excess(encoded, model_args, config.max_length):
        yield f"warning: {excess}"
    yield from _list_warnings(data)
    if unused := describe_unused_template(tokenizer, config.template):
        yield f"warning: {unused}"
    yield from notices[:MAX_PROBLEMS_SHOWN]
    if len(notices) > MAX_PROBLEMS_SHOWN:
        yield f"... and {len(notices) - MAX_PROBLEMS_SHOWN} more sentences"
    if eval_indices:
        yield f"{len(eval_indices)} records are to evaluate on (eval_split)"
    elif data_args.eval_data:
        yield f"{len(load_data(data_args.eval_data, data_args.columns).rows)} records are to evaluate on (eval_data)"
    yield _count_steps(len(encoded), config)
    yield ""
    yield from tabulate_lengths(encoded, config.max_length).split("\n")
    examples = choose_examples(encoded)
    for number, index in enumerate(examples, start=1):
        row = encoded[index]
        yield ""
        kind = {True: ", satisfactory", False: ", unsatisfactory", None: ""}[row.get("is_satisfactory")]
        location = row.get("location") or f"pair {index + 1}"
        yield f"Example {number} of {len(examples)}: {location}{kind}"
        yield from render_row(row, config, encoder)


def _encode(
    rows: Sequence[Any], config: CUTConfig, encoder: Encoder, locations: Sequence[str]
) -> tuple[Dataset, list[str]]:
    """Encode rows as the trainer of the objective does; also return what it would report."""
    if config.is_of_pairs:
        if isinstance(rows[0], TokenScores):
            raise ConfigError(f"objective {config.objective} learns from records; got token scores, which are for cut")
        from cutlm.training.pairs import encode_records_as_pairs  # imports TRL

        pairs, notices = encode_records_as_pairs(rows, config, encoder, locations)
        return pairs, notices
    data, _ = encode_dataset(rows, "train_dataset", config, encoder, locations)
    drop_excluded(data, "train_dataset", config)
    return data.rows, data.notices


def _find_excess(rows: Dataset, model_args: ModelArguments, max_length: int) -> str | None:
    """Say that a row is longer than the model's context, so that training would refuse it; None if none is."""
    if model_args.model_name_or_path is None:
        return None
    try:
        model_config = load_config(model_args.model_name_or_path, revision=model_args.model_revision)
    except UserError:  # a tokenizer alone can be previewed
        return None
    return describe_excess(model_config, max(_measure(rows)), max_length)


def _list_warnings(data: LoadedData) -> Iterator[str]:
    for doubt in describe_doubts(data.records, data.locations, _MAX_LOCATIONS_NAMED):
        yield f"warning: {doubt}"


def _count_steps(num_rows: int, config: CUTConfig) -> str:
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    divide: Any = math.floor if config.dataloader_drop_last else math.ceil
    num_batches = divide(num_rows / (config.per_device_train_batch_size * config.world_size))
    num_steps = math.ceil(num_batches / config.gradient_accumulation_steps)
    total = config.max_steps if config.max_steps > 0 else math.ceil(num_steps * config.num_train_epochs)
    return f"{num_rows} rows, {size} per optimizer step: {num_steps} steps per epoch, {total} in all"


def tabulate_lengths(rows: Dataset, max_length: int) -> str:
    """Tabulate the lengths of each part of the rows, in tokens."""
    columns = {}
    for key, name in _PARTS.items():
        lengths = _count_tokens(rows, key)
        if lengths.null_count < len(lengths):
            columns[name] = lengths.drop_null().to_pylist()
    columns[f"longest sequence (max_length {max_length})"] = _measure(rows)
    cells = []
    for name, lengths in columns.items():
        values = [len(lengths), min(lengths), *_find_percentiles(lengths), max(lengths), sum(lengths)]
        cells.append([name, *(f"{value:,}" for value in values)])
    return format_table(["tokens", "rows", "min", *(f"{p} %" for p in _PERCENTILES), "max", "sum"], cells)


def _find_percentiles(lengths: Sequence[int]) -> list[int]:
    if len(lengths) == 1:
        return [lengths[0]] * len(_PERCENTILES)
    cuts = quantiles(lengths, n=100, method="inclusive")
    return [round(cuts[percent - 1]) for percent in _PERCENTILES]


def _count_tokens(rows: Dataset, name: str) -> pyarrow.ChunkedArray:
    """Count the tokens in a column of each row; null where it is missing."""
    if name not in rows.column_names:
        return pyarrow.chunked_array([pyarrow.nulls(len(rows), pyarrow.int32())])
    column = rows.select_columns(name).with_format("arrow")[:][name]
    return compute.list_value_length(column.cast(pyarrow.list_(pyarrow.int64())))


def _measure(rows: Dataset) -> list[int]:
    """Return the length of the longest sequence of each row."""
    prompts = (_count_tokens(rows, name) for name in ("prompt_ids", "judged_prompt_ids"))
    responses = (_count_tokens(rows, name) for name in ("response_ids", "chosen_ids", "rejected_ids"))
    longest = compute.add(compute.max_element_wise(*prompts), compute.max_element_wise(*responses))
    return list(longest.to_pylist())


def choose_examples(rows: Dataset) -> list[int]:
    """Choose the first unsatisfactory and the first satisfactory row, and the longest; if these are fewer, others."""
    is_satisfactory = list(rows["is_satisfactory"]) if "is_satisfactory" in rows.column_names else []
    lengths = _measure(rows)
    wanted = [is_satisfactory.index(kind) for kind in (False, True) if kind in is_satisfactory]
    wanted += [lengths.index(max(lengths)), *range(min(NUM_EXAMPLES, len(rows)))]
    return list(dict.fromkeys(wanted))[:NUM_EXAMPLES]


def render_row(row: Mapping[str, Any], config: CUTConfig, encoder: Encoder) -> Iterator[str]:
    """Yield the lines of a row: each of its sequences, with the trained tokens marked."""
    for name, prompt_ids, response_ids, is_trained in _list_sequences(row, config):
        yield f"  {name}, {len(prompt_ids)} + {len(response_ids)} tokens{'' if is_trained else ', not trained'}:"
        flags = row.get("is_flagged") if prompt_ids is row["prompt_ids"] else None
        response = _mark(response_ids, flags or [False] * len(response_ids), encoder)
        text = str(encoder.tokenizer.decode(list(prompt_ids)))
        text = _shorten(text) + (f"[[{response}]]" if is_trained else response)
        for line in make_printable(text, keep="\n\t").split("\n"):
            yield f"    {line}".rstrip()


def _list_sequences(
    row: Mapping[str, Any], config: CUTConfig
) -> Iterator[tuple[str, Sequence[int], Sequence[int], bool]]:
    """Yield each sequence of a row: its name, the prompt, the response, and whether the response is trained."""
    if "chosen_ids" in row:
        yield "chosen", row["prompt_ids"], row["chosen_ids"], True
        yield "rejected", row["prompt_ids"], row["rejected_ids"], True
        return
    is_included = config.parts.satisfactory if row["is_satisfactory"] else config.parts.contrast
    yield "prompt and response", row["prompt_ids"], row["response_ids"], is_included
    if row.get("judged_prompt_ids") is not None:
        yield "with the judgment", row["judged_prompt_ids"], row["response_ids"], config.parts.unsatisfactory


def _mark(ids: Sequence[int], flags: Sequence[bool], encoder: Encoder) -> str:
    """Decode a response with its flagged tokens in {{ }}."""
    text = ""
    for is_flagged, run in groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1]):
        part = str(encoder.tokenizer.decode([token for token, _ in run]))
        text += f"{{{{{part}}}}}" if is_flagged else part
    return text


def _shorten(text: Any) -> str:
    text = str(text)
    if len(text) <= 2 * _NUM_SHOWN:
        return text
    return f"{text[:_NUM_SHOWN]}[... {len(text) - 2 * _NUM_SHOWN:,} characters ...]{text[-_NUM_SHOWN:]}"
