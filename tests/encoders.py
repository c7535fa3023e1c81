"""Encoders of many kinds of tokenizers, and texts that are hard to tokenize."""

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from tiny import TOKENIZER_KINDS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cutlm.data.conversations import Conversation
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import make_messages

KINDS = (*TOKENIZER_KINDS, "wordpiece", "slow")
_WORDS = (
    *(" ", "  ", "\n", "\n\n", "\t", "Hello", " world", "The capital", ". ", ", ", "12 + 34", "a", ":", "x_1"),
    *("é", "e\u0301", "你好", "🙂", "👩\u200d👩\u200d👧", " 🙂", "\u00a0", "ﬁ", "\u3000"),
    *("</s>", "<eos>", "<s>", "### Response:\n"),
)
# Records cannot contain a null byte; SentencePiece writes a space as a lower one-eighth block.
_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0▁\ufffd")
_TEXTS = st.lists(st.sampled_from(_WORDS) | st.text(_LETTERS, max_size=4), min_size=1, max_size=8).map("".join)
RESPONSES = _TEXTS.map(lambda text: text if text.strip() else f"{text}a")


def make_wordpiece() -> Any:
    """BERT's tokenizer: lower case, no spaces, continued words after `##`."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["hello", "world", "cap", "##ital", "##ello", "the", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@functools.cache
def get_encoder(kind: str, template: str = "alpaca") -> Encoder:
    """The encoder of a kind of tokenizer; "wordpiece" and "slow" have no chat template."""
    if kind == "slow":
        return Encoder(ByT5Tokenizer(), "alpaca")
    if kind == "wordpiece":
        return Encoder(make_wordpiece(), "alpaca")
    return Encoder(make_tokenizer(kind, chat=template == "chat"), template)  # type: ignore[arg-type]


def encode_turns(encoder: Encoder, texts: Sequence[str]) -> list[int]:
    """The generation prompt of a conversation: texts by the user and the assistant in turn."""
    return encoder.encode_generation_prompt(Conversation(tuple(make_messages(texts))))
