"""Generate responses with a local model, in batches of similar length, each written to a journal when it is finished.

Batches and their seeds do not depend on the journal, so a resumed run gives the same as an uninterrupted one. A run
starts by checking that the model gives a row in a batch what it gives the row alone; otherwise rows run one at a time.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from cutlm.data.journal import Journal
from cutlm.errors import UserError
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


@dataclass(frozen=True)
class Answer:
    """What a local model generated for one prompt."""

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
        self.num_redacted += line.get("is_redacted", False)

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

    Yield the journal's lines of each batch, those of new responses only. Raise a `UserError` if the model's context has
    no room for a prompt.
    """
    room = find_room(model, sampling.max_new_tokens)
    if room is not None:
        generated.num_truncated = sum(len(ids) > room for ids in prompts)
        prompts = [encoder.truncate(ids, room) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    reader = AnswerReader(model, tokenizer, encoder)
    is_known = [index in generated.responses or index in generated.failures for index in range(len(prompts))]
    if not all(is_known) and sampling.batch_size > 1 and not supports_padding(model, [prompts[i] for i in order]):
        sampling = replace(sampling, batch_size=1)
    for number, start in enumerate(range(0, len(order), sampling.batch_size)):
        batch = order[start : start + sampling.batch_size]
        missing = {index for index in batch if not is_known[index]}
        if not missing:
            continue
        # A batch of which the journal holds a part is generated whole: its random numbers depend on all of it.
        with seeded(sampling.seed + number, unwrap_peft(model).device):
            rows = [prompts[index] for index in batch]
            answers = _generate_batch(model, reader, rows, sampling, progress, len(missing))
        pairs = zip(batch, answers, strict=True)
        lines = [answer.to_line(index) for index, answer in pairs if index in missing]
        for line in lines:
            generated.add(line)
        yield lines


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
    model: Any,
    reader: "AnswerReader",
    prompts: list[list[int]],
    sampling: Sampling,
    progress: Progress | None = None,
    num_new: int | None = None,
) -> list[Answer]:
    config = make_generation_config(reader, sampling)
    width = max(map(len, prompts))
    sizes = (len(prompts), len(prompts) if num_new is None else num_new, width, sampling.max_new_tokens)
    watch = nullcontext() if progress is None else progress.watch_batch(unwrap_peft(model), *sizes, reader.end_ids)
    with watch as criterion:
        criteria = StoppingCriteriaList([] if criterion is None else [criterion])
        output = generate_ids(model, prompts, config, stopping_criteria=criteria)
    return [
        reader.read(prompt, ids, sampling.max_new_tokens)
        for prompt, ids in zip(prompts, output[:, width:].tolist(), strict=True)
    ]


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


def make_generation_config(reader: "AnswerReader", sampling: Sampling) -> GenerationConfig:
    """Return a complete generation config: of the model's own one only its end-of-turn tokens are kept."""
    is_sampled = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=is_sampled,
        temperature=sampling.temperature if is_sampled else None,
        top_p=sampling.top_p if is_sampled else None,
        top_k=0 if is_sampled else None,
        eos_token_id=reader.end_ids,
        pad_token_id=reader.pad_id,
    )


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

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> None:
        language_model = unwrap_peft(model)
        self.end_ids = list_end_ids(language_model, tokenizer.eos_token_id, encoder.end_of_turn_id)
        self.pad_id = _choose_pad_id(language_model, tokenizer, self.end_ids)
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
        if split.problem:
            return Answer("", failure=split.problem)
        return Answer(split.output, split.reasoning, is_unfinished)


def _choose_pad_id(language_model: Any, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    # Some tokenizers have a padding token that the model has no embedding for.
    pad_id, num_embeddings = tokenizer.pad_token_id, language_model.get_input_embeddings().weight.shape[0]
    return pad_id if pad_id is not None and pad_id < num_embeddings else end_ids[0]


# ---- The check of batches ----

_PROBE_LENGTHS = (5, 23, 12)
_PROBE_NEW_TOKENS = 3


def supports_padding(model: Any, prompts: Sequence[list[int]]) -> bool:
    """Whether a model gives rows of a batch, padded on the left, the logits that it gives each row alone.

    Compares them on the ends of the longest prompt, with a few tokens generated on the cache; warns if they differ.
    """
    source = max(prompts, key=len)
    rows = [source[-length:] for length in sorted({min(length, len(source)) for length in _PROBE_LENGTHS})]
    if len(prompts) < 2 or len(rows) < 2 or len(set(map(len, prompts))) < 2:
        return True  # nothing is padded
    language_model = unwrap_peft(model)
    forced = source[:_PROBE_NEW_TOKENS]
    alone = torch.cat([_compute_logits(model, [row], forced) for row in rows])
    try:
        together = _compute_logits(model, rows, forced)
    except (ValueError, AssertionError, RuntimeError) as error:
        if not is_layout_error(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    else:
        # Of the padded rows. Right models differ by up to 5e-6 in float32 and by 0.02 in bfloat16, wrong ones by 0.06
        # or more. The median, because rounding may choose another expert for a token.
        differences = ((together - alone).norm(dim=-1) / alone.norm(dim=-1))[:-1]
        if differences.median() <= (1e-3 if language_model.dtype == torch.float32 else 0.05):
            return True
        reason = "its logits for padded prompts differ from those for the prompts alone"
    logger.warning("%s generates responses one at a time: %s", type(language_model).__name__, reason)
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
    logits = torch.stack(output.logits, 1).float()
    logits = torch.where(torch.isfinite(logits), logits, 0.0)  # some models mask parts of their vocabulary
    return logits - logits.mean(-1, keepdim=True)
