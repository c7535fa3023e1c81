"""Log-probs of responses by a frozen model, in evaluation mode and without gradient, in batches of a number of tokens.

What is made of them, such as flags, is left to `cutlm.blame.detector`.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cutlm.errors import ConfigError, UserError
from cutlm.model.collator import CutCollator, find_non_finite
from cutlm.model.forward import choose_layout, evaluation_mode, score_batch
from cutlm.model.loading import list_rope_parameters, unwrap_peft

MAX_TOKENS_PER_BATCH = 8192

# The index of a row, the log-probs [T] of its response, and those with the judgment, where there is one.
Scored = tuple[int, Tensor, Tensor | None]
# Scores rows but for those of the given indices, in batches that are finished together.
Scorer = Callable[[Sequence[Mapping[str, Any]], Collection[int]], Generator[list[Scored], None, None]]


def score_rows(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    done: Collection[int] = (),
    is_bf16: bool = False,
    show_progress: bool = True,
) -> Generator[list[Scored], None, None]:
    """Scores the responses of encoded rows, in evaluation mode and without gradient.

    Longest first, so that what does not fit the memory fails at once. Batches do not depend on `done`, so the results
    of a run that was stopped are those of one that was not.

    Args:
        model: A causal language model, bare or with an adapter. It is left in the mode it is in.
        rows: With `prompt_ids`, `judged_prompt_ids` (or None) and `response_ids`.
        max_tokens_per_batch: Tokens of all sequences of a batch; a longer row is a batch of its own.
        done: Indices of rows to leave out.
        is_bf16: Whether to run in bfloat16 by autocast, as training with `bf16` does.
        show_progress: Whether to show a progress bar.

    Yields:
        The rows of a batch: index, log-probs [T] and, where the row has a judged prompt, those with the judgment [T];
        float32, on the CPU.

    Raises:
        UserError: A log-prob is no number; the rows are named.
    """
    device = unwrap_peft(model).device
    layout = choose_layout(model)
    progress = tqdm(total=len(rows), initial=len(done), desc="blaming", unit="record", disable=not show_progress)
    with progress:
        for batch in _cut_batches(rows, max_tokens_per_batch):
            if all(index in done for index in batch):
                continue
            # A batch that was written down in part is made again whole: its numbers may depend on what is in it.
            tensors = CutCollator()([rows[index] for index in batch])
            tensors |= {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
            with evaluation_mode(model), torch.inference_mode(), autocast:
                logps = score_batch(model, tensors, layout=layout)
            logps = logps.cpu().clone()  # outside of inference mode: one that can be used in training
            bad = find_non_finite(logps, tensors)
            if bad:
                raise UserError(
                    f"{', '.join(bad[:5])}: log-probs that are no numbers, {len(bad)} records in all; the model's"
                    " weights are damaged, or its dtype is too narrow: try --dtype float32"
                )
            # As the collator lays them out: without the judgment, with it, then the rows without one.
            judged = [index for index in batch if rows[index]["judged_prompt_ids"] is not None]
            plain = [index for index in batch if rows[index]["judged_prompt_ids"] is None]
            parts = list(logps.split(tensors["response_lengths"]))
            scored: list[Scored] = list(zip(judged, parts, parts[len(judged) :], strict=False))
            scored += [(index, part, None) for index, part in zip(plain, parts[2 * len(judged) :], strict=True)]
            scored = [item for item in scored if item[0] not in done]
            progress.update(len(scored))
            yield scored


def check_rows(model: nn.Module, rows: Sequence[Mapping[str, Any]], max_length: int) -> None:
    """Refuses rows that the model cannot read: token ids that it has no embedding for, or too many of them.

    Raises:
        ConfigError: There are such.
    """
    language_model = unwrap_peft(model)
    sequences = [
        [*prompt, *row["response_ids"]]
        for row in rows
        for prompt in (row["prompt_ids"], row["judged_prompt_ids"])
        if prompt is not None
    ]
    problems = []
    num_embeddings = next(language_model.get_input_embeddings().parameters()).shape[0]
    largest = max(map(max, sequences))
    if 0 < num_embeddings <= largest:  # none are here where they are sharded over processes
        problems.append(
            f"tokenizer: expected token ids below {num_embeddings}, the size of the model's vocabulary, got {largest};"
            " give the model's own tokenizer"
        )
    try:
        check_context(model, rows, max_length)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def check_context(
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    max_length: int,
    prompts: Sequence[str] = ("prompt_ids", "judged_prompt_ids"),
    responses: Sequence[str] = ("response_ids",),
) -> None:
    """Refuses rows that are longer than what the model has positions for.

    Args:
        model: The model.
        rows: With token ids.
        max_length: As it was asked for, for the message.
        prompts: Columns of prompts.
        responses: Columns of what follows one of them.

    Raises:
        ConfigError: There are such.
    """
    config = unwrap_peft(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if any(rope.get("rope_type") not in (None, "default") for rope in list_rope_parameters(config)):
        return  # stretched: it is meant for more than it says
    longest = max(
        max(len(row[name] or ()) for name in prompts) + max(len(row[name]) for name in responses) for row in rows
    )
    if limit is not None and longest > limit:
        raise ConfigError(
            f"max_length: expected at most the model's context of {limit} tokens, got {max_length}, and a record of"
            f" {longest}; give --max_length {limit}"
        )


def count_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of all sequences that a row is scored by."""
    num_judged = 0 if row["judged_prompt_ids"] is None else len(row["judged_prompt_ids"]) + len(row["response_ids"])
    return len(row["prompt_ids"]) + len(row["response_ids"]) + num_judged


def _cut_batches(rows: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    room = max_tokens
    for index in sorted(range(len(rows)), key=lambda index: (-count_tokens(rows[index]), index)):
        num_tokens = count_tokens(rows[index])
        if batch and num_tokens > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(index)
        room -= num_tokens
    if batch:
        yield batch
