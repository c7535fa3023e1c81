"""Chat with a model in this process, token by token."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteriaList

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings, blame_record
from cutlm.flagging.scoring import score_rows
from cutlm.flagging.token_scores import TokenScores
from cutlm.generation.local import (
    AnswerReader,
    Sampling,
    find_context_limit,
    find_room,
    generate_ids,
    make_generation_config,
    make_logits_processors,
    make_reader,
)
from cutlm.model.collator import check_rows_fit_model
from cutlm.model.forward import check_head
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import JudgmentRole, TemplateName, make_messages

_NO_LIMIT = 2**31  # for models without a context limit


class LocalEngine:
    """An `Engine` that runs a model in this process.

    The model is in evaluation mode, with or without an adapter. `max_length` of the flag settings is replaced by the
    model's context length. Raises a UserError if the tokenizer lacks the template.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName,
        sampling: Sampling,
        settings: FlagSettings,
        judgment_role: JudgmentRole = "user",
    ) -> None:
        self._judgment_role = judgment_role
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._max_length = find_context_limit(model) or _NO_LIMIT
        self._settings = replace(settings, max_length=self._max_length)
        self._room = find_room(model, sampling.max_new_tokens)
        self.max_new_tokens = sampling.max_new_tokens
        self.set_template(template)

    def set_template(self, name: TemplateName) -> None:
        self._encoder = Encoder(self._tokenizer, name, judgment_role=self._judgment_role)
        self.template: TemplateName | None = name

    def prepare(self, texts: Sequence[str]) -> tuple[list[int], int]:
        for num_dropped in range((len(texts) + 1) // 2):
            ids = encode_texts(self._encoder, texts[2 * num_dropped :])
            if self._room is None or len(ids) <= self._room:
                return ids, num_dropped
        raise UserError(
            f"the message alone makes a prompt of {len(ids)} tokens, but the model's context leaves only"
            f" {self._room} for it; shorten it, or start with a smaller --max_new_tokens"
        )

    def answer(self, prompt: list[int], seed_offset: int, show: Callable[[str], None]) -> bool:
        reader = make_reader(self._model, self._tokenizer, self._encoder)
        streamer = _Streamer(reader, show)
        if opening := reader.find_open_thoughts(prompt):
            show(opening)
        sampling = replace(self._sampling, seed=(self._sampling.seed + seed_offset) % 2**63)

        def must_stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full((1,), stop.is_set(), device=ids.device)

        with _catch_interrupt() as stop, _explain_out_of_memory(), torch.inference_mode():
            generate_ids(
                self._model,
                [prompt],
                make_generation_config(reader, self.max_new_tokens),
                logits_processor=make_logits_processors(sampling, [0]),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([must_stop]),
            )
        if stop.is_set() and not streamer.is_ended:
            raise KeyboardInterrupt
        return streamer.is_ended

    def blame(self, record: JudgedRecord) -> tuple[TokenScores, bool]:
        check_head(self._model)

        def score(rows: Any, done: Any) -> Any:
            check_rows_fit_model(self._model, rows, self._max_length)
            return score_rows(self._model, rows, done=done, show_progress=False)

        with _explain_out_of_memory():
            return blame_record(record, self._encoder, score, self._settings, "chat")


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> list[int]:
    """Encode a conversation; for the alpaca template, which has no turns, only its last message."""
    if encoder.template == "alpaca":
        return encoder.encode_generation_prompt(texts[-1])
    return encoder.encode_generation_prompt(Conversation(tuple(make_messages(texts))))


class _Streamer(BaseStreamer):
    """Decodes each token at once; transformers' TextStreamer waits for the end of a word."""

    def __init__(self, reader: AnswerReader, show: Callable[[str], None]) -> None:
        self.is_ended = False
        self._reader, self._show = reader, show
        self._ids: list[int] | None = None
        self._num_shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:  # the first call has the prompt
            self._ids = []
            return
        for token_id in value.tolist():
            self.is_ended = self.is_ended or token_id in self._reader.end_ids
            if not self.is_ended:
                self._ids.append(token_id)
        self._show_rest()

    def end(self) -> None:
        self._show_rest(is_last=True)

    def _show_rest(self, is_last: bool = False) -> None:
        text = self._reader.decode(self._ids or [])
        is_incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last
        if len(text) > self._num_shown and not is_incomplete:
            rest, self._num_shown = text[self._num_shown :], len(text)
            self._show(rest)


@contextmanager
def _explain_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError("the device ran out of memory; use /reset to start a shorter conversation") from None


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Make the first Ctrl-C set an event that stops generation at the next token; a second one raises at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
