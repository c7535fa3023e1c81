"""Generate responses with a local model, in batches of similar length, each written to a journal when it is finished.

Batches and their seeds do not depend on the journal, so a resumed run gives the same as an uninterrupted one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cutlm.data.journal import Journal
from cutlm.errors import UserError
from cutlm.model.loading import unwrap_peft
from cutlm.prompting.encoding import Encoder

MAX_NEW_TOKENS = 2048  # as in the paper


@dataclass(frozen=True)
class Sampling:
    """How to sample responses; raises a `UserError` that names all settings out of range."""

    max_new_tokens: int  # see `choose_max_new_tokens`
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling: only the likeliest tokens of this total probability
    seed: int = 42  # each batch has its own seed, derived from this one and its number
    batch_size: int = 16

    def __post_init__(self) -> None:
        minimum_1 = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        problems = [
            f"{name}: expected a whole number of at least 1, got {value}"
            for name, value in minimum_1.items()
            if value < 1
        ]
        if not self.temperature >= 0:
            problems.append(f"temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if (problem := describe_bad_seed(self.seed)) is not None:
            problems.append(problem)
        if problems:
            raise UserError(problems)


def describe_bad_seed(seed: int) -> str | None:
    """Say what is wrong with a seed; None if nothing is. Torch and servers take 8 bytes, numpy no negative number."""
    return None if 0 <= seed < 2**63 else f"seed: expected a whole number of at least 0 and below 2^63, got {seed}"


@dataclass
class Generated:
    """The responses of a run, by the index of their prompt."""

    responses: dict[int, str] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)  # those that were stopped at `max_new_tokens`
    failures: dict[int, str] = field(default_factory=dict)  # why a server gave no response to a prompt
    num_resumed: int = 0  # responses from the journal of a stopped run
    num_truncated: int = 0  # prompts that were truncated on the left to fit the model's context
    num_redacted: int = 0  # responses from which the key of a server was removed

    @classmethod
    def resume(cls, journal: Journal) -> "Generated":
        """Return the responses in the journal of a stopped run."""
        lines = journal.lines
        return cls(
            {line["index"]: line["output"] for line in lines},
            {line["index"] for line in lines if line["is_unfinished"]},
            num_resumed=len({line["index"] for line in lines}),
            num_redacted=sum(line.get("is_redacted", False) for line in lines),
        )


def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
) -> list[str]:
    """Return a response to each prompt, given as token ids; see `generate_with_journal`."""
    generated = Generated()
    for _ in generate_batches(model, tokenizer, encoder, prompts, sampling, generated):
        pass
    return [generated.responses[index] for index in range(len(prompts))]


def generate_with_journal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    journal: Journal,
) -> Generated:
    """Generate the responses that a journal does not hold yet and append them to it batch by batch."""
    generated = Generated.resume(journal)
    progress = tqdm(total=len(prompts), initial=generated.num_resumed, desc="generating", unit="response")
    with journal, progress:
        for batch in generate_batches(model, tokenizer, encoder, prompts, sampling, generated):
            journal.append(
                {"index": index, "output": text, "is_unfinished": is_unfinished} for index, text, is_unfinished in batch
            )
            progress.update(len(batch))
    return generated


def generate_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generated: Generated,
) -> Iterator[list[tuple[int, str, bool]]]:
    """Generate into `generated`, the longest prompts first, so that it runs out of memory at the start or never.

    Yield for each new response of a batch its index, its text, and whether it was stopped at `max_new_tokens`. Raise
    a `UserError` if the model's context has no room for a prompt.
    """
    room = find_room(model, sampling.max_new_tokens)
    if room is not None:
        generated.num_truncated = sum(len(ids) > room for ids in prompts)
        prompts = [encoder.truncate(ids, room) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    for number, start in enumerate(range(0, len(order), sampling.batch_size)):
        batch = order[start : start + sampling.batch_size]
        missing = {index for index in batch if index not in generated.responses}
        if not missing:
            continue
        # A batch of which the journal holds a part is generated whole: its random numbers depend on all of it.
        with seeded(sampling.seed + number, unwrap_peft(model).device):
            texts = _generate_batch(model, tokenizer, [prompts[index] for index in batch], sampling)
        answers = [(index, *answer) for index, answer in zip(batch, texts, strict=True) if index in missing]
        generated.responses |= {index: text for index, text, _ in answers}
        generated.unfinished |= {index for index, _, is_unfinished in answers if is_unfinished}
        yield answers


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers, and restore the caller's state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def choose_max_new_tokens(model: nn.Module) -> int:
    """Return 2048 as in the paper, or half of the model's context if that is less."""
    limit = find_context_limit(model)
    return MAX_NEW_TOKENS if limit is None else max(1, min(MAX_NEW_TOKENS, limit // 2))


def find_context_limit(model: nn.Module) -> int | None:
    """Return the length of the model's context in tokens; None if its config does not state one."""
    return getattr(unwrap_peft(model).config.get_text_config(), "max_position_embeddings", None)


def find_room(model: nn.Module, max_new_tokens: int) -> int | None:
    """Return how many tokens of the model's context are left for a prompt, at least 1; None if it has no limit."""
    limit = find_context_limit(model)
    if limit is not None and limit <= max_new_tokens:
        raise UserError(f"max_new_tokens: expected fewer than the model's context of {limit}, got {max_new_tokens}")
    return None if limit is None else limit - max_new_tokens


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
        length = next((index for index, token in enumerate(ids) if token in end_ids), None)
        text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        results.append((text, length is None and len(ids) >= sampling.max_new_tokens))
    return results


def make_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """Return a complete generation config: of the model's own one only its end-of-turn tokens are kept."""
    end_ids = getattr(model.generation_config, "eos_token_id", None)
    end_ids = [] if end_ids is None else end_ids if isinstance(end_ids, list | tuple) else [end_ids]
    is_sampled = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=is_sampled,
        temperature=sampling.temperature if is_sampled else None,
        top_p=sampling.top_p if is_sampled else None,
        top_k=0 if is_sampled else None,
        # Fields that are None are filled in from the model's config, and greedy would not be greedy.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted({tokenizer.eos_token_id, *end_ids}),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
