"""Texts in a batch get the ids that each has alone; batches, processes and the cache change nothing in the rows."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from encoders import KINDS, RESPONSES, get_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IM_END, TOKENIZER_KINDS

from cutlm.data.records import JudgedRecord
from cutlm.errors import DataError
from cutlm.prompting import rows as rows_module
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.rows import encode_records

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


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_ids_are_those_of_the_tokenizer_however_it_was_called_before(kind: str) -> None:
    encoder = Encoder(copy.deepcopy(get_encoder(kind, "chat").tokenizer), "chat")
    tokenizer, texts = encoder.tokenizer, ["Hello world, 12 + 34.", "\n a", "🙂"]
    expected = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    response = encoder.encode_response("Hello world")
    tokenizer.pad_token = tokenizer.eos_token
    calls: list[dict[str, Any]] = [
        {},
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 9},
    ]
    for options in [*calls, {"split_special_tokens": True}]:
        tokenizer(["One", "Two three four."], **options)
        assert [encoder._tokenize_plain(text) for text in texts] == expected
        tokenizer(["One", "Two three four."], **options)
        assert encoder.encode_response("Hello world") == response


TURNS = [{"role": role, "content": f"{role} {index}"} for index in range(4) for role in ("user", "assistant")]
RECORDS = [
    JudgedRecord(instruction="Hello", output="x" * 100, judgment="No."),
    JudgedRecord(messages=TURNS, judgment="No."),
    JudgedRecord(instruction="y" * 100, output=" world", judgment=None),
    JudgedRecord(messages=TURNS[:4], judgment=None),
]
LOCATIONS = ["a:1", "a:2", "a:3", "a:4"]


def encode(records: list[JudgedRecord] = RECORDS, template: str = "chat", **options: Any) -> dict[str, Any]:
    encoded = encode_records(records, LOCATIONS, get_encoder("bpe", template), 60, **options)
    return vars(encoded) | {"rows": encoded.rows.to_list()}


@pytest.mark.parametrize(("size", "num_processes"), [(1, None), (3, None), (1, 2), (2, 3)])
def test_batches_and_processes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, num_processes: int | None
) -> None:
    expected = encode()
    monkeypatch.setattr(rows_module, "_BATCH_SIZE", size)
    assert encode(num_processes=num_processes) == expected
    assert expected["num_truncated"] == 2
    assert expected["indices"] == [1, 2, 3]
    assert [sentence.partition(": ")[0] for sentence in expected["left_out"]] == ["a:1"]


def test_rows_are_stored_once_for_the_same_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = encode()
    monkeypatch.setattr(rows_module, "_MIN_CACHED", 4)
    monkeypatch.setattr(rows_module.config, "HF_DATASETS_CACHE", tmp_path)
    num_encoded: Counter[str] = Counter()
    encode_batch = rows_module.encode_batch

    def count(records: Any, *args: Any) -> Any:
        num_encoded["records"] += len(records)
        return encode_batch(records, *args)

    monkeypatch.setattr(rows_module, "encode_batch", count)
    assert encode() == encode() == expected
    assert num_encoded["records"] == 4
    # Whatever the rows depend on.
    others = [RECORDS[0], RECORDS[1].model_copy(update={"judgment": "Wrong."}), *RECORDS[2:]]
    assert encode(others) != expected
    assert encode_records(RECORDS, LOCATIONS, get_encoder("bpe", "chat"), 61).num_truncated == 2
    assert encode_records(RECORDS, [*"abcd"], get_encoder("bpe", "chat"), 60).rows["location"][0] == "b"
    assert len(encode_records(RECORDS, LOCATIONS, get_encoder("llama", "chat"), 60).rows)
    assert num_encoded["records"] == 20
    # A cache that cannot be written to is not used.
    monkeypatch.setattr(rows_module.config, "HF_DATASETS_CACHE", tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert encode() == encode() == expected
    assert num_encoded["records"] == 28


def test_records_that_cannot_be_encoded_are_named_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BATCH_SIZE", 1)
    with pytest.raises(DataError) as error:
        encode(template="alpaca", num_processes=2)  # which has one turn
    assert [problem[:3] for problem in error.value.problems] == ["a:2", "a:4"]
