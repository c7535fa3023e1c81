"""Generate responses with a local model, with continuous batching, each written to a journal when it is finished.

A response depends on its prompt, index and seed, so a resumed run gives the same as an uninterrupted one, up to
rounding. A run starts by checking that the model gives a row in a batch what it gives the row alone: in slots, see
`continuous`, or else in batches padded on the left; otherwise rows run one at a time.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from cutlm.data.journal import Journal
from cutlm.errors import UserError
from cutlm.generation.continuous import Row, generate_rows, has_slots
from cutlm.generation.progress import Progress
from cutlm.model.forward import evaluation_mode, is_layout_error
from cutlm.model.generation_config import list_end_ids, replaced_generation_config
from cutlm.model.loading import unwrap_peft
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.reasoning import find_open_thoughts, split_reasoning

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 2048  # as in the paper


@dataclass(frozen=True)
class Sampling:
    """How to sample responses; raises a `UserError` that names all settings out of range."""

    max_new_tokens: int  # see `choose_max_new_tokens`
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling: only the likeliest tokens of this total probability
    seed: int = 42  # each prompt has its own random numbers, from this seed and its index
    batch_size: int = 32

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


@dataclass(frozen=True)
class Answer:
    """Answer of a local model to one prompt."""

    output: str  # the final answer
    reasoning: str | None = None  # thoughts and other channels, if there are some
    is_unfinished: bool = False  # whether it was stopped at `max_new_tokens`
    failure: str | None = None  # why there is no answer, as a sentence; `output` must not be used then

    def to_line(self, index: int) -> dict[str, Any]:
        """Return the line of a journal."""
        if self.failure is not None:
            return {"index": index, "failure": self.failure}
        line: dict[str, Any] = {"index": index, "output": self.output, "is_unfinished": self.is_unfinished}
        return line | ({"reasoning": self.reasoning} if self.reasoning is not None else {})


@dataclass
class Generated:
    """The responses of a run, by the index of their prompt."""

    responses: dict[int, str] = field(default_factory=dict)  # the final answers
    reasoning: dict[int, str] = field(
        default_factory=dict
    )  # their thoughts and other channels, of those that have some
    unfinished: set[int] = field(default_factory=set)  # those that were stopped at `max_new_tokens`
    failures: dict[int, str] = field(default_factory=dict)  # why there is no response to a prompt
    num_resumed: int = 0  # responses from the journal of a stopped run
    num_truncated: int = 0  # prompts that were truncated on the left to fit the model's context
    num_redacted: int = 0  # responses from which the key of a server was removed

    @classmethod
    def resume(cls, journal: Journal) -> "Generated":
        """Return the responses in the journal of a stopped run."""
        generated = cls(num_resumed=len({line["index"] for line in journal.lines}))
        for line in journal.lines:
            generated.add(line)
        return generated

    def add(self, line: dict[str, Any]) -> None:
        """Add a line of a journal."""
        index = line["index"]
        if "failure" in line:
            self.failures[index] = line["failure"]
            return
        self.responses[index] = line["output"]
        if line.get("reasoning") is not None:
            self.reasoning[index] = line["reasoning"]
        if line["is_unfinished"]:
            self.unfinished.add(index)
        else:  # an earlier line may have a response that was requested again
            self.unfinished.discard(index)
        self.num_redacted += line.get("is_redacted", False)

    def list_missing(self, num_prompts: int) -> list[int]:
        """Return the indices of the prompts that have neither a response nor a failure."""
        return [index for index in range(num_prompts) if index not in self.responses and index not in self.failures]

    def has_too_many_failures(self, max_failure_rate: float) -> bool:
        """Whether more than this share of the prompts has no response, or none has one."""
        num_prompts = len(self.responses) + len(self.failures)
        return bool(self.failures) and (not self.responses or len(self.failures) > max_failure_rate * num_prompts)


def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
) -> list[str]:
    """Return a response to each prompt, given as token ids; see `generate_with_journal`.

    A response that cannot be separated from its thoughts is empty.
    """
    generated = Generated()
    for _ in generate_batches(model, tokenizer, encoder, prompts, sampling, generated):
        pass
    return [generated.responses.get(index, "") for index in range(len(prompts))]


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
    with journal, Progress(len(prompts), generated.num_resumed) as progress:
        for lines in generate_batches(model, tokenizer, encoder, prompts, sampling, generated, progress):
            journal.append(lines)
    return generated


def generate_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generated: Generated,
    progress: Progress | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Generate into `generated`, the longest prompts first, so that it runs out of memory at the start or never.

    Yield the journal's lines of each batch, those of new responses only. Raise a `UserError` if the model's context is
    too short for any prompt.
    """
    prompts = fit_prompts(prompts, find_room(model, sampling.max_new_tokens), encoder, generated)
    missing = sorted(generated.list_missing(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    reader = make_reader(model, tokenizer, encoder)
    rows = [Row(index, prompts[index]) for index in missing]
    for batch in _generate_rows(model, reader, rows, sampling, progress or Progress(len(prompts), is_shown=False)):
        lines = [reader.read(row.prompt, row.new_ids, sampling.max_new_tokens).to_line(row.index) for row in batch]
        for line in lines:
            generated.add(line)
        yield lines


def fit_prompts(
    prompts: Sequence[list[int]], room: int | None, encoder: Encoder, generated: Generated
) -> Sequence[list[int]]:
    """Truncate prompts on the left to `room` tokens (None for no limit), and count them in `generated`."""
    if room is None:
        return prompts
    generated.num_truncated = sum(len(ids) > room for ids in prompts)
    return [encoder.truncate(ids, room) for ids in prompts]


def _generate_rows(
    model: nn.Module, reader: "AnswerReader", rows: list[Row], sampling: Sampling, progress: Progress
) -> Iterator[list[Row]]:
    """Generate rows with continuous batching, or where the model does not support that in batches or one at a time."""
    prompts, size = [row.prompt for row in rows], sampling.batch_size
    if len(rows) > 1 and size > 1:
        if supports_slots(model, prompts, sampling.max_new_tokens):
            yield from _generate_in_slots(model, reader, rows, sampling, progress)
            return
        if not supports_padding(model, prompts):
            size = 1
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        _generate_batch(model, reader, batch, sampling, progress)
        yield batch


def _generate_in_slots(
    model: nn.Module, reader: "AnswerReader", rows: list[Row], sampling: Sampling, progress: Progress
) -> Iterator[list[Row]]:
    sampler, end_ids = Sampler(sampling, [row.index for row in rows]), set(reader.end_ids)

    def add_tokens(batch: Sequence[Row], logits: Tensor) -> None:
        for row, token_id in zip(batch, sampler.choose([row.index for row in batch], logits).tolist(), strict=True):
            row.new_ids.append(token_id)
            row.is_finished = token_id in end_ids or len(row.new_ids) == sampling.max_new_tokens
        progress.count_tokens(batch, sampling.max_new_tokens)

    yield from generate_rows(model, rows, sampling.batch_size, add_tokens)


class Sampler:
    """Chooses tokens by their logits.

    Each prompt has its own random numbers, so that its response does not depend on the other prompts of a batch.
    """

    def __init__(self, sampling: Sampling, indices: Sequence[int]) -> None:
        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self._generators = {index: np.random.default_rng([sampling.seed, index]) for index in indices}

    def choose(self, indices: Sequence[int], logits: Tensor) -> Tensor:
        """Choose a token for each of the prompts by its logits: [R, V] to [R]."""
        if not self._temperature:
            return logits.argmax(-1)
        probabilities = (logits.float() / self._temperature).softmax(-1)
        numbers = torch.tensor([[self._generators[index].random()] for index in indices]).to(probabilities)
        if self._top_p == 1:
            return _invert(probabilities, numbers)
        probabilities, token_ids = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it have less than `top_p`, so the likeliest one always does.
        is_kept = probabilities.cumsum(-1) - probabilities < self._top_p
        return token_ids.gather(1, _invert(probabilities * is_kept, numbers)[:, None])[:, 0]


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Return where the cumulative weights [R, V] reach the numbers [R, 1], given as shares of their totals: [R]."""
    totals = weights.cumsum(-1)
    last = totals[:, -1:]
    numbers = torch.minimum(numbers * last, last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(totals, numbers, right=True)[:, 0]


class SampledTokens(LogitsProcessor):
    """Leaves `generate` only the tokens that a `Sampler` chooses."""

    def __init__(self, sampler: Sampler, indices: Sequence[int]) -> None:
        self._sampler, self._indices = sampler, indices

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._sampler.choose(self._indices, scores)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def choose_max_new_tokens(model: nn.Module) -> int:
    """Return 2048 as in the paper, or half of the model's context if that is less."""
    return choose_max_new_tokens_in(find_context_limit(model))


def choose_max_new_tokens_in(limit: int | None) -> int:
    """Return the same for a context of `limit` tokens; None for no limit."""
    return MAX_NEW_TOKENS if limit is None else max(1, min(MAX_NEW_TOKENS, limit // 2))


def find_context_limit(model: nn.Module) -> int | None:
    """Return the length of the model's context in tokens; None if its config does not state one."""
    return getattr(unwrap_peft(model).config.get_text_config(), "max_position_embeddings", None)


def find_room(model: nn.Module, max_new_tokens: int) -> int | None:
    """Return how many tokens of the model's context are left for a prompt, at least 1; None if it has no limit."""
    return find_room_in(find_context_limit(model), max_new_tokens)


def find_room_in(limit: int | None, max_new_tokens: int) -> int | None:
    """Return how many of `limit` tokens are left for a prompt, at least 1; None if there is no limit."""
    if limit is not None and limit <= max_new_tokens:
        raise UserError(f"max_new_tokens: expected fewer than the model's context of {limit}, got {max_new_tokens}")
    return None if limit is None else limit - max_new_tokens


@torch.inference_mode()
def _generate_batch(
    model: Any, reader: "AnswerReader", rows: Sequence[Row], sampling: Sampling, progress: Progress
) -> None:
    """Generate the tokens of rows in one batch, until the last one is finished."""
    width = max(len(row.prompt) for row in rows)
    with progress.watch_batch(unwrap_peft(model), len(rows), width, sampling.max_new_tokens, reader.end_ids) as watch:
        output = generate_ids(
            model,
            [row.prompt for row in rows],
            make_generation_config(reader, sampling.max_new_tokens),
            logits_processor=make_logits_processors(sampling, [row.index for row in rows]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    for row, ids in zip(rows, output[:, width:].tolist(), strict=True):
        row.new_ids, row.is_finished = ids, True


def generate_ids(model: Any, prompts: Sequence[list[int]], config: GenerationConfig, **options: Any) -> Any:
    """Call `generate` on prompts padded on the left, by the given settings only and not the model's own."""
    language_model: Any = unwrap_peft(model)
    width, pad_id, device = max(map(len, prompts)), config.pad_token_id, language_model.device
    # Fields that are None would be filled in from the model's config: forced and suppressed tokens, penalties, beams.
    with replaced_generation_config(language_model, GenerationConfig()):
        return model.generate(
            input_ids=torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
            generation_config=config,
            **options,
        )


def make_generation_config(reader: "AnswerReader", max_new_tokens: int) -> GenerationConfig:
    """Return a complete config of greedy generation: of the model's own one only its end-of-turn tokens are kept."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=reader.end_ids, pad_token_id=reader.pad_id
    )


def make_logits_processors(sampling: Sampling, indices: Sequence[int]) -> LogitsProcessorList:
    """Return what makes greedy generation sample, for the prompts of these indices."""
    is_sampled = sampling.temperature > 0
    return LogitsProcessorList([SampledTokens(Sampler(sampling, indices), indices)] if is_sampled else [])


# ---- Reading answers ----

# Special tokens that delimit thoughts, channels and final answers.
_DELIMITER = re.compile(
    r"think|thought|reason|channel|inner_|_of_box|_(response|text|solution|answer)\|>$|<unused9[45]>"
    r"|<\|(start|end|begin|message|content|constrain|call)\|>$",
    re.IGNORECASE,
)
NUM_TAIL_TOKENS = 32  # at the end of a prompt, which may begin the model's thoughts


class AnswerReader:
    """Reads generated token ids as answers, and knows at which tokens generation stops.

    Attributes:
        end_ids: The end-of-turn token, the tokenizer's end-of-sequence token, and those of the model.
        pad_id: The token for padding; any would do, because it is masked.
    """

    def __init__(self, end_ids: list[int], pad_id: int, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> None:
        self.end_ids, self.pad_id = end_ids, pad_id
        self._tokenizer, self._encoder = tokenizer, encoder
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._skipped_ids = {index for index, text in special.items() if not _DELIMITER.search(text)}

    def decode(self, ids: Sequence[int]) -> str:
        """Decode an answer with the special tokens that delimit thoughts and channels, and without others."""
        return self._encoder.remove_template_space(self._decode(ids))

    def _decode(self, ids: Sequence[int]) -> str:
        kept = [token_id for token_id in ids if token_id not in self._skipped_ids]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def find_open_thoughts(self, prompt: Sequence[int]) -> str:
        """Return the text with which a prompt begins the model's thoughts, or "" if it does not."""
        return find_open_thoughts(self._decode(prompt[-NUM_TAIL_TOKENS:]))

    def read(self, prompt: Sequence[int], ids: Sequence[int], max_new_tokens: int) -> Answer:
        """Read the tokens generated after a prompt, up to the first end token."""
        length = next((index for index, token_id in enumerate(ids) if token_id in self.end_ids), None)
        is_unfinished = length is None and len(ids) >= max_new_tokens
        split = split_reasoning(self.find_open_thoughts(prompt) + self.decode(ids[:length]))
        if is_unfinished and (split.problem or (split.reasoning is not None and not split.output.strip())):
            return Answer("", failure=f"stopped at {max_new_tokens} tokens, before the final answer")
        if problem := split.problem or find_malformed_text(split.output):
            return Answer("", failure=problem)
        return Answer(split.output, split.reasoning, is_unfinished)


def is_stopped(failure: str) -> bool:
    """Whether a response failed because `max_new_tokens` was too small, so that a larger one may help."""
    return failure.startswith("stopped at ")


def find_malformed_text(output: str) -> str | None:
    """Say why no record may have this response; None if one may."""
    malformed = re.search("[\0\ud800-\udfff]", output)
    return "the answer has null bytes or halves of surrogate pairs" if malformed else None


def make_reader(model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> AnswerReader:
    """Return the reader of a local model's answers."""
    language_model = unwrap_peft(model)
    end_ids = list_end_ids(language_model, tokenizer.eos_token_id, encoder.end_of_turn_id)
    return AnswerReader(end_ids, _choose_pad_id(language_model, tokenizer, end_ids), tokenizer, encoder)


def _choose_pad_id(language_model: Any, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    # Some tokenizers have a padding token that the model has no embedding for.
    pad_id, num_embeddings = tokenizer.pad_token_id, language_model.get_input_embeddings().weight.shape[0]
    return pad_id if pad_id is not None and pad_id < num_embeddings else end_ids[0]


# ---- The checks of batches ----

_PROBE_LENGTHS = (5, 23, 12)
_PROBE_NEW_TOKENS = 3


def supports_slots(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> bool:
    """Whether a model gives rows in slots, with continuous batching, the logits that it gives each row alone.

    Compares them on parts of the longest prompt: a row takes the slot of another one and copies a prefix of a third.
    """
    source = max(prompts, key=len)
    if not has_slots(model, len(source) + max_new_tokens):
        return False
    forced = source[:_PROBE_NEW_TOKENS]
    whole, end = source[-max(_PROBE_LENGTHS) :], source[-min(_PROBE_LENGTHS) :]
    rows = [Row(index, ids) for index, ids in enumerate([whole, end, whole[: len(whole) // 2] + end])]
    logits: dict[int, list[Tensor]] = {row.index: [] for row in rows}

    def add_tokens(batch: Sequence[Row], scores: Tensor) -> None:
        for row, row_scores in zip(batch, scores, strict=True):
            logits[row.index].append(row_scores)
            row.new_ids.append(forced[len(row.new_ids)])
            row.is_finished = row is rows[1] or len(row.new_ids) == len(forced)

    try:
        with evaluation_mode(unwrap_peft(model)):
            for _ in generate_rows(model, rows, 2, add_tokens):
                pass
    except (ValueError, AssertionError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        if not is_layout_error(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    else:
        alone = [_compute_logits(model, [row.prompt], forced)[0] for row in rows]
        together = [_center(torch.stack(logits[row.index])) for row in rows]
        if _are_close(model, [(ours, theirs[: len(ours)]) for ours, theirs in zip(together, alone, strict=True)]):
            return True
        reason = "its logits differ from those for the prompts alone"
    logger.warning("%s generates without continuous batching: %s", type(unwrap_peft(model)).__name__, reason)
    return False


def _are_close(model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether logits in a batch equal those of the rows alone, given as pairs of [positions, V], up to rounding."""
    differences = torch.cat([(together - alone).norm(dim=-1) / alone.norm(dim=-1) for together, alone in pairs])
    # Right models differ by up to 5e-6 in float32 and by 0.02 in bfloat16, wrong ones by 0.06 or more. The median,
    # because rounding may choose another expert for a token.
    return bool(differences.median() <= (1e-3 if unwrap_peft(model).dtype == torch.float32 else 0.05))


def supports_padding(model: Any, prompts: Sequence[list[int]]) -> bool:
    """Whether a model gives rows of a batch, padded on the left, the logits that it gives each row alone.

    Compares them on the ends of the longest prompt, with a few tokens generated on the cache; warns if they differ.
    """
    source = max(prompts, key=len)
    rows = [source[-length:] for length in sorted({min(length, len(source)) for length in _PROBE_LENGTHS})]
    if len(prompts) < 2 or len(rows) < 2 or len(set(map(len, prompts))) < 2:
        return True  # nothing is padded
    forced = source[:_PROBE_NEW_TOKENS]
    alone = torch.cat([_compute_logits(model, [row], forced) for row in rows])
    try:
        together = _compute_logits(model, rows, forced)
    except (ValueError, AssertionError, RuntimeError) as error:
        if not is_layout_error(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    else:
        if _are_close(model, list(zip(together[:-1], alone[:-1], strict=True))):  # those of the padded rows
            return True
        reason = "its logits for padded prompts differ from those for the prompts alone"
    logger.warning("%s generates responses one at a time: %s", type(unwrap_peft(model)).__name__, reason)
    return False


@torch.inference_mode()
def _compute_logits(model: Any, rows: Sequence[list[int]], forced: Sequence[int]) -> Tensor:
    """Compute the logits after each row and after each of the tokens forced to follow it: [R, F, V], centered."""
    width = max(map(len, rows))

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        token_id = torch.tensor([forced[input_ids.shape[1] - width]], device=scores.device)
        return torch.full_like(scores, -torch.inf).index_fill(1, token_id, 0.0)

    config = GenerationConfig(
        max_new_tokens=len(forced),
        do_sample=False,
        pad_token_id=rows[0][0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    with evaluation_mode(unwrap_peft(model)):
        output = generate_ids(model, rows, config, logits_processor=LogitsProcessorList([force]))
    return _center(torch.stack(output.logits, 1))


def _center(logits: Tensor) -> Tensor:
    logits = logits.float()
    logits = torch.where(torch.isfinite(logits), logits, 0.0)  # some models mask parts of their vocabulary
    return logits - logits.mean(-1, keepdim=True)
