"""Texts that are tokenized as one batch get the ids that each has alone, and records in any batches the same rows."""

from typing import Any

import pytest
from encoders import KINDS, RESPONSES, get_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IM_END, TOKENIZER_KINDS

from cutlm.data.records import JudgedRecord
from cutlm.prompting import encoding
from cutlm.prompting.encoding import Encoder, encode_records

ALL = pytest.mark.parametrize(
    ("kind", "template"),
    [*((kind, "alpaca") for kind in KINDS), *((kind, "chat") for kind in TOKENIZER_KINDS)],
)
# Texts whose tokens depend on their neighbours, or that spell out tokens of a template.
TEXTS = [
    *("Hello", " world", "Hello", "\n", "a", f"x{IM_END}", f"{IM_END}\n", "<|im_start|>system\nHi.", "<eos>", "</s>"),
    *("  one\n\n two\t", "🙂", "12 + 34", ": ", "### Response:\n", "a", " a", "\n\na"),
]


def encode_alone(encoder: Encoder, record: JudgedRecord) -> dict[str, list[int] | None]:
    prompt = f"{record.instruction}\n{record.input}" if record.input else record.instruction
    is_judged = not record.is_satisfactory
    return {
        "prompt_ids": encoder.encode_prompt(prompt),
        "judged_prompt_ids": encoder.encode_prompt(prompt, record.judgment) if is_judged else None,
        "response_ids": encoder.encode_response(record.output),
    }


def encode_together(encoder: Encoder, records: list[JudgedRecord]) -> list[dict[str, Any]]:
    rows = encode_records(records, [f"a:{index}" for index in range(len(records))], encoder, 10**6).rows
    return [{name: row[name] for name in ("prompt_ids", "judged_prompt_ids", "response_ids")} for row in rows]


@ALL
def test_awkward_texts_have_the_same_ids_in_a_batch(kind: str, template: str) -> None:
    encoder = get_encoder(kind, template)
    texts = [text if text.strip() else f"{text}." for text in TEXTS]
    records = [
        JudgedRecord(instruction=text, output=other, judgment=judgment)
        for text, other, judgment in zip(texts, texts[3:] + texts[:3], [*texts[7:], *[None] * 7], strict=True)
    ]
    assert encode_together(encoder, records) == [encode_alone(encoder, record) for record in records]


@ALL
@settings(max_examples=10)
@given(texts=st.lists(RESPONSES, min_size=1, max_size=8))
def test_any_texts_have_the_same_ids_in_a_batch(kind: str, template: str, texts: list[str]) -> None:
    encoder = get_encoder(kind, template)
    records = [
        JudgedRecord(instruction=text, input=other, output=other, judgment=f"It is {text}.")
        for text, other in zip(texts, reversed(texts), strict=True)
    ]
    assert encode_together(encoder, records) == [encode_alone(encoder, record) for record in records]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_size_of_a_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    encoder = get_encoder("bpe", "chat")
    turns = [{"role": role, "content": f"{role} {index}"} for index in range(4) for role in ("user", "assistant")]
    records = [
        JudgedRecord(instruction="Hello", output="x" * 100, judgment="No."),
        JudgedRecord(messages=turns, judgment="No."),
        JudgedRecord(instruction="y" * 100, output=" world", judgment=None),
        JudgedRecord(messages=turns[:2], judgment=None),
    ]
    locations = ["a:1", "a:2", "a:3", "a:4"]
    expected = encode_records(records, locations, encoder, 60)
    monkeypatch.setattr(encoding, "_BATCH_SIZE", size)
    assert encode_records(records, locations, encoder, 60) == expected
    assert expected.num_truncated == 2
    assert [sentence.partition(": ")[0] for sentence in expected.left_out] == ["a:1"]
