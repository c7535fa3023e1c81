"""The tokens at which a model's responses end, and the `generation_config` in which a saved model carries them.

A model learns to end its turn with the end-of-turn token of its chat template, which is often not the `eos_token` of
its tokenizer. transformers, vLLM and others stop at `generation_config.eos_token_id`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from cutlm.errors import ConfigError
from cutlm.prompting.encoding import Encoder, choose_template


def list_end_ids(model: Any, *token_ids: int | None) -> list[int]:
    """List the tokens at which a model's own `generation_config` stops, and those given, in ascending order."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list | tuple) else [own]
    return sorted({token_id for token_id in (*own, *token_ids) if token_id is not None})


def find_end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the token that ends the assistant's turn by the chat template saved with a tokenizer; None if unknown."""
    if not tokenizer.chat_template:
        return None
    try:
        return Encoder(tokenizer, choose_template(tokenizer)).end_of_turn_id
    except ConfigError:  # a template that cannot be used for training
        return None


@contextmanager
def replaced_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's `generation_config` within a context."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def stopping_at(model: Any, *token_ids: int | None) -> Iterator[None]:
    """Let a model that is saved within this context carry these end tokens besides its own."""
    if getattr(model, "generation_config", None) is None:  # not a model that generates
        yield
        return
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = list_end_ids(model, *token_ids) or None
    with replaced_generation_config(model, config):
        yield
