"""Log-probabilities of encoded responses by a frozen local model, in batches of a bounded number of tokens."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cutlm.errors import UserError
from cutlm.flagging.teacher import Columns, TeacherSettings, list_columns
from cutlm.model.collator import (
    CutCollator,
    check_rows_fit_model,
    find_non_finite,
    view_teacher,
    warn_of_long_limit,
)
from cutlm.model.forward import (
    check_head,
    choose_layout,
    choose_tokens_per_pass,
    evaluation_mode,
    score_batch,
    score_teacher,
)
from cutlm.model.loading import (
    find_base_model,
    fingerprint_model,
    is_adapter_folder,
    load_trained,
    unwrap_peft,
    warn_of_slow_autocast,
)
from cutlm.model.progress import advance_by_layers, make_token_bar


class Scored(NamedTuple):
    """A row that is scored."""

    row: int  # its index
    without: Tensor  # [T] log-probs of its response
    judged: Tensor | None  # [T] those with the judgment, if it has a judged prompt
    teacher: Columns | None = None  # the teacher's distributions, if it has a prompt of the teacher


# Scores all rows except those with the given indices; yields batches that are finished together.
Scorer = Callable[[Sequence[Mapping[str, Any]], Collection[int]], Generator[list[Scored], None, None]]


def score_rows(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens_per_batch: int | None = None,
    done: Collection[int] = (),
    is_bf16: bool = False,
    show_progress: bool = True,
    teacher: TeacherSettings | None = None,
) -> Generator[list[Scored], None, None]:
    """Score the responses of encoded rows in evaluation mode and without gradients.

    The longest rows come first, so that a batch that does not fit into memory fails at once. Batches do not depend on
    `done`, so a resumed run gives the numbers of an uninterrupted one.

    Args:
        model: A causal language model, with or without an adapter. Its training mode is restored.
        rows: Rows with `prompt_ids`, `judged_prompt_ids` (or None) and `response_ids`.
        max_tokens_per_batch: Tokens of all sequences in a batch; a longer row is a batch by itself. None: see
            `choose_tokens_per_batch`.
        done: Indices of rows to skip.
        is_bf16: Run under bfloat16 autocast, as training with `bf16` does.
        show_progress: Show a progress bar.
        teacher: How the distributions of a teacher are made, for rows that have `teacher_prompt_ids` too.

    Yields:
        One batch; float32, on the CPU.

    Raises:
        UserError: Some log-probabilities are not finite; the message names the rows.
    """
    device = unwrap_peft(model).device
    layout = choose_layout(model)
    max_tokens = max_tokens_per_batch or choose_tokens_per_batch(device)
    sizes = [count_tokens(row) for row in rows]
    num_finished = len(done)
    bar = make_token_bar("blame", sum(sizes), num_done=sum(sizes[index] for index in done), is_shown=show_progress)
    with bar:
        for batch in _cut_batches(sizes, max_tokens):
            missing = [index for index in batch if index not in done]
            if not missing:
                continue
            # A half-finished batch is scored again as a whole, because its numbers may depend on its composition.
            asked = [index for index in batch if teacher and rows[index].get("teacher_prompt_ids") is not None]
            tensors = CutCollator()(
                [*(rows[index] for index in batch), *(view_teacher(rows[index]) for index in asked)]
            )
            tensors |= {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
            moving = advance_by_layers(bar, model, sum(sizes[index] for index in missing))
            with evaluation_mode(model), torch.inference_mode(), autocast, moving:
                if teacher and asked:
                    numbers: Any = {"guidance": teacher.guidance, "num_columns": teacher.num_columns}
                    logps, ids, teacher_logps = score_teacher(model, tensors, layout=layout, **numbers)
                else:
                    logps = score_batch(model, tensors, layout=layout)
            logps = logps.cpu().clone()  # a copy made outside inference mode can take part in autograd
            bad = find_non_finite(logps, tensors)
            if bad:
                raise UserError(
                    f"{', '.join(bad[:5])}: non-finite log-probabilities in {len(bad)} records; the weights are"
                    " damaged, or the dtype is too narrow: try --dtype float32"
                )
            # The collator's order: judged rows without the judgment, the same with it, the other rows, then the
            # teacher's contexts of the judged rows.
            judged = [index for index in batch if rows[index]["judged_prompt_ids"] is not None]
            plain = [index for index in batch if rows[index]["judged_prompt_ids"] is None]
            parts = list(logps.split(tensors["response_lengths"]))
            columns: list[Columns | None] = [None] * len(judged)
            if asked:
                sizes_of_asked = [len(rows[index]["response_ids"]) for index in asked]
                pairs = zip(ids.cpu().split(sizes_of_asked), teacher_logps.cpu().split(sizes_of_asked), strict=True)
                columns = [list_columns(*pair) for pair in pairs]
            scored = list(map(Scored, judged, parts, parts[len(judged) :], columns))
            scored += [Scored(index, part, None) for index, part in zip(plain, parts[2 * len(judged) :], strict=False)]
            scored = [item for item in scored if item.row not in done]
            num_finished += len(scored)
            bar.set_postfix_str(f"{num_finished} of {len(rows)} records", refresh=False)
            yield scored


def choose_tokens_per_batch(device: torch.device) -> int:
    """Number of tokens in a batch that keeps the device busy, and after which the progress bar moves soon."""
    return min(8192, choose_tokens_per_pass(device))


def load_scorer(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    is_bf16: bool = False,
    max_length: int = 2048,
    max_tokens_per_batch: int | None = None,
    show_progress: bool = True,
    teacher: TeacherSettings | None = None,
) -> tuple[PreTrainedTokenizerBase, Scorer, str, dict[str, Any]]:
    """Load a model or adapter to score with.

    Returns:
        The tokenizer, the scorer, a fingerprint of the model, and further settings that the numbers depend on, by name.
    """
    model, tokenizer = load_trained(path, dtype=dtype, base=base, device=device)
    if is_bf16 and unwrap_peft(model).device.type == "cpu":
        warn_of_slow_autocast()
    check_head(model)
    warn_of_long_limit(unwrap_peft(model).config, max_length)
    fingerprint = fingerprint_model(path)
    if is_adapter_folder(path):
        fingerprint += f" on {fingerprint_model(find_base_model(path, base))}"
    language_model = unwrap_peft(model)
    max_tokens_per_batch = max_tokens_per_batch or choose_tokens_per_batch(language_model.device)
    backend = {
        "dtype": f"{language_model.dtype}",
        "bf16": is_bf16,
        "device": language_model.device.type,
        "max_tokens_per_batch": max_tokens_per_batch,
    }

    def score(rows: Sequence[Mapping[str, Any]], done: Collection[int]) -> Generator[list[Scored], None, None]:
        check_rows_fit_model(model, rows, max_length)
        return score_rows(
            model,
            rows,
            max_tokens_per_batch=max_tokens_per_batch,
            done=done,
            is_bf16=is_bf16,
            show_progress=show_progress,
            teacher=teacher,
        )

    return tokenizer, score, fingerprint, backend


def count_tokens(row: Mapping[str, Any]) -> int:
    """Number of tokens in all sequences by which a row is scored."""
    prompts = (row["prompt_ids"], row["judged_prompt_ids"], row.get("teacher_prompt_ids"))
    return sum(len(prompt) + len(row["response_ids"]) for prompt in prompts if prompt is not None)


def _cut_batches(sizes: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Divide rows of these sizes, longest first, into batches of at most `max_tokens`, or of one longer row."""
    batch: list[int] = []
    room = max_tokens
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        if batch and sizes[index] > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(index)
        room -= sizes[index]
    if batch:
        yield batch
