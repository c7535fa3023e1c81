"""Answers in the formats of real models are read as they were written."""

import pytest
from real.manifest import FAMILIES
from tiny import make_model
from transformers import PreTrainedTokenizerBase

from cutlm.generation.local import Answer, AnswerReader, make_reader
from cutlm.prompting.encoding import Encoder

ANSWER = "Canberra.\n\n    It isn't Sydney, is it?"
OPEN_THOUGHTS = (
    "Qwen3.5, thinking",
    "DeepSeek-V3 (first template)",
    "DeepSeek-R1 distilled",
    "Nemotron 3 Nano",
    "Nemotron 3 Ultra",
    "MiniMax-M2",
)


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test with some families only."""
    families = [family for family in FAMILIES if family.name in names]
    assert len(families) == len(names)
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name, indirect=True)


@pytest.fixture
def reader(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> AnswerReader:
    return make_reader(make_model(8), tokenizer, encoder)


def test_a_learned_response_is_read_as_its_text(encoder: Encoder, reader: AnswerReader) -> None:
    prompt, ids = encoder.encode_prompt("Name the capital of Australia."), encoder.encode_response(ANSWER)
    assert reader.read(prompt, ids, 1000) == Answer(ANSWER)
    assert reader.end_ids.count(ids[-1]) == 1
    assert reader.read(prompt, ids[:-1], len(ids) - 1).is_unfinished


@only(*OPEN_THOUGHTS)
def test_thoughts_that_the_prompt_opens_are_separated(
    encoder: Encoder, reader: AnswerReader, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = encoder.encode_generation_prompt("Name the capital of Australia.")
    assert "<think>" in reader.find_open_thoughts(prompt)
    ids = tokenizer(f"Not Sydney.\n</think>\n\n{ANSWER}", add_special_tokens=False)["input_ids"]
    assert reader.read(prompt, [*ids, encoder.end_of_turn_id], 1000) == Answer(ANSWER, "Not Sydney.")
    assert reader.read(prompt, ids[:3], 3).failure is not None


@only("gpt-oss")
def test_the_channels_of_harmony_are_separated(
    encoder: Encoder, reader: AnswerReader, tokenizer: PreTrainedTokenizerBase
) -> None:
    thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    ids = tokenizer(f"{thoughts}<|channel|>final<|message|>{ANSWER}", add_special_tokens=False)["input_ids"]
    prompt = encoder.encode_generation_prompt("Name the capital of Australia.")
    assert reader.read(prompt, [*ids, encoder.end_of_turn_id], 1000) == Answer(ANSWER, "Hm.")
    assert reader.read(prompt, ids[:4], 4).failure is not None
