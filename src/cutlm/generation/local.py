"""Responses to a list of instructions, by a local model: batches of like length, written down as they come.

A run that is stopped goes on with the batches it has not finished; batches are the same either way, so the result is
that of a run without a stop.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cutlm.data.files import read_rows, write_rows
from cutlm.data.journal import Journal
from cutlm.data.records import InstructionRow, validate_row
from cutlm.errors import DataError, UserError
from cutlm.model.loading import unwrap_peft
from cutlm.prompting.encoding import Encoder

ALPACA_EVAL = "alpaca_eval"


@dataclass(frozen=True)
class Sampling:
    """How to draw responses.

    Attributes:
        max_new_tokens: Where a response is stopped at the latest; see `choose_max_new_tokens`.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens of this total probability.
        seed: Of the random numbers; each batch has its own, made from this and its number.
        batch_size: Prompts at a time.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 16

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: expected a whole number of at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0:
            problems.append(f"temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if (problem := describe_bad_seed(self.seed)) is not None:
            problems.append(problem)
        if problems:
            raise UserError(problems)


def describe_bad_seed(seed: int) -> str | None:
    """What is wrong with a seed of random numbers; None where nothing is. Servers and torch take whole numbers of 8
    bytes, numpy none below 0."""
    return None if 0 <= seed < 2**63 else f"seed: expected a whole number of at least 0 and below 2^63, got {seed}"


@dataclass
class Counts:
    """What happened on the way.

    Attributes:
        num_resumed: Responses taken over from a run that was stopped.
        num_truncated: Prompts cut from the left to fit the model's context.
        responses: The responses, by the index of their prompt.
        unfinished: Those of them that were stopped at `max_new_tokens`, without an end of their own.
    """

    num_resumed: int = 0
    num_truncated: int = 0
    responses: dict[int, str] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)

    @property
    def num_unfinished(self) -> int:
        return len(self.unfinished)

    def take_over(self, journal: Journal) -> None:
        """Takes over what a run that was stopped had written down."""
        self.responses |= {line["index"]: line["output"] for line in journal.lines}
        self.unfinished |= {line["index"] for line in journal.lines if line["is_unfinished"]}
        self.num_resumed = len(self.responses)


def load_prompts(source: str) -> list[dict[str, Any]]:
    """Reads instructions: a JSON array or JSON Lines with `instruction`, optional `input` and `dataset`.

    Args:
        source: A file, or "alpaca_eval" for the hub's set of 805 instructions.

    Raises:
        DataError: The file cannot be read, or a row has no instruction; all such rows are named.
    """
    if source == ALPACA_EVAL and not Path(source).exists():
        source = _fetch_alpaca_eval()
    rows, problems = read_rows(source)
    for row in rows:
        validate_row(row, InstructionRow, problems)
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError(f"{source}: no instructions; expected a JSON array or JSON Lines with at least one")
    return [row.value for row in rows]


def _fetch_alpaca_eval() -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"alpaca_eval: the instructions cannot be fetched from the hub ({reason}); give a file"
        ) from None


def generate_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[dict[str, Any]],
    out: str | Path,
    sampling: Sampling,
    *,
    generator: str,
    dataset: str,
    fingerprint: str,
    judgment: str | None = None,
) -> Counts:
    """Answers prompts and writes AlpacaEval's format: `instruction`, `output`, `generator`, `dataset`.

    Finished batches go to `OUT.partial` at once; it is removed when `out` is whole.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Makes the prompts' token ids.
        prompts: Rows with `instruction`, optional `input` and `dataset`.
        out: The file to write.
        sampling: How to draw.
        generator: The model's name in the output.
        dataset: What rows without a `dataset` get.
        fingerprint: Of the model; a partial file made with another one is refused.
        judgment: What the responses shall deserve to be told, for models that learned from hindsight.

    Raises:
        UserError: A partial file of another run is in the way.
    """
    instructions = [join_instruction(row) for row in prompts]
    header = describe_run(instructions, judgment, sampling, encoder.template, fingerprint)
    encoded = [encoder.encode_prompt(instruction, judgment) for instruction in instructions]
    journal = Journal(out, header)
    counts = generate_with_journal(model, tokenizer, encoder, encoded, sampling, journal)
    write_rows(out, make_rows(prompts, counts.responses, generator, dataset))
    journal.remove()
    return counts


def join_instruction(row: dict[str, Any]) -> str:
    """The instruction of a row and, after a newline, its input where there is one."""
    return f"{row['instruction']}\n{row['input']}" if row.get("input") else str(row["instruction"])


def describe_run(
    instructions: Sequence[str], judgment: str | None, sampling: Sampling, template: str, model: str
) -> dict[str, Any]:
    """What responses depend on, as the header of a journal."""
    return {
        "sampling": asdict(sampling),
        "template": template,
        "model": model,
        "prompts": hashlib.sha256(json.dumps([instructions, judgment]).encode()).hexdigest(),
    }


def make_rows(
    prompts: Sequence[dict[str, Any]], responses: dict[int, str], generator: str, dataset: str
) -> list[dict[str, Any]]:
    """Rows of AlpacaEval's format, in the order of the prompts; a prompt without a response has none."""
    rows = []
    for index, row in enumerate(prompts):
        if index not in responses:
            continue
        answer = {"instruction": row["instruction"], "output": responses[index], "generator": generator}
        if row.get("input"):
            answer["input"] = row["input"]
        rows.append(answer | {"dataset": row.get("dataset") or dataset})
    return rows


def generate_with_journal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    journal: Journal,
) -> Counts:
    """Generates what a journal does not hold yet, and writes it there batch by batch.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Cuts prompts that do not fit.
        encoded: Token ids of the prompts.
        sampling: How to draw.
        journal: Of this run or of one that was stopped.
    """
    counts = Counts()
    counts.take_over(journal)
    with journal, tqdm(total=len(encoded), initial=counts.num_resumed, desc="generating", unit="response") as progress:
        for batch in generate_batches(model, tokenizer, encoder, encoded, sampling, counts):
            journal.append(
                {"index": index, "output": text, "is_unfinished": is_unfinished} for index, text, is_unfinished in batch
            )
            progress.update(len(batch))
    return counts


def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    encoded: Sequence[list[int]],
    sampling: Sampling,
) -> list[str]:
    """Generates a response to each prompt, in their order; nothing is written down.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Cuts prompts that do not fit.
        encoded: Token ids of the prompts.
        sampling: How to draw.
    """
    counts = Counts()
    for _ in generate_batches(model, tokenizer, encoder, encoded, sampling, counts):
        pass
    return [counts.responses[index] for index in range(len(encoded))]


def generate_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    counts: Counts,
) -> Iterator[list[tuple[int, str, bool]]]:
    """Generates batch by batch, longest prompts first, so that what does not fit the memory fails at once.

    Yields:
        For each prompt of a batch its index, the response, and whether it was stopped at `max_new_tokens`.
    """
    encoded, counts.num_truncated = _fit_context(unwrap_peft(model), encoder, encoded, sampling.max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
    for number, start in enumerate(range(0, len(order), sampling.batch_size)):
        batch = order[start : start + sampling.batch_size]
        if all(index in counts.responses for index in batch):
            continue
        torch.manual_seed(sampling.seed + number)
        texts = _generate_batch(model, tokenizer, [encoded[index] for index in batch], sampling)
        answers = [(index, text, is_unfinished) for index, (text, is_unfinished) in zip(batch, texts, strict=True)]
        # A batch of which a part had been written down is made again whole, but no response counts twice.
        answers = [answer for answer in answers if answer[0] not in counts.responses]
        counts.unfinished |= {index for index, _, is_unfinished in answers if is_unfinished}
        counts.responses |= {index: text for index, text, _ in answers}
        yield answers


def choose_max_new_tokens(model: nn.Module) -> int:
    """2048 as in the paper, or half of the model's context where that is less."""
    limit = find_context_limit(model)
    return 2048 if limit is None else max(1, min(2048, limit // 2))


def find_context_limit(model: nn.Module) -> int | None:
    """The most tokens that a model can read; None where it does not say."""
    return getattr(unwrap_peft(model).config.get_text_config(), "max_position_embeddings", None)


def find_room(model: nn.Module, max_new_tokens: int) -> int | None:
    """Tokens that the model's context leaves for a prompt; None where it has no end.

    Raises:
        UserError: There is no room.
    """
    limit = find_context_limit(model)
    if limit is not None and limit <= max_new_tokens:
        raise UserError(f"max_new_tokens: expected fewer than the model's context of {limit}, got {max_new_tokens}")
    return None if limit is None else limit - max_new_tokens


def _fit_context(
    model: Any, encoder: Encoder, encoded: Sequence[list[int]], max_new_tokens: int
) -> tuple[Sequence[list[int]], int]:
    room = find_room(model, max_new_tokens)
    if room is None:
        return encoded, 0
    return [encoder.truncate(ids, room) for ids in encoded], sum(len(ids) > room for ids in encoded)


@torch.inference_mode()
def _generate_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], sampling: Sampling
) -> list[tuple[str, bool]]:
    device = unwrap_peft(model).device
    width = max(map(len, prompts))
    config = make_generation_config(model, tokenizer, sampling)
    end_ids, pad_id = config.eos_token_id, config.pad_token_id
    output = model.generate(
        input_ids=torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        generation_config=config,
    )
    results = []
    for ids in output[:, width:].tolist():
        length = next((place for place, token in enumerate(ids) if token in end_ids), None)
        text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        results.append((text, length is None and len(ids) >= sampling.max_new_tokens))
    return results


def make_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """How a model draws, with nothing left to its own settings but further end-of-sequence tokens."""
    end_ids = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))}
    is_sampled = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=is_sampled,
        temperature=sampling.temperature if is_sampled else None,
        top_p=sampling.top_p if is_sampled else None,
        top_k=0 if is_sampled else None,
        # What is not said here is taken from the model's own settings: greedy would not be greedy.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(end_ids),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
