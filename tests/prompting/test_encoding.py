"""Token ids of prompts and responses: lossless, and the same response after either prompt."""

import datetime
import functools
import json
import re
import unicodedata
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, IM_END, IM_START, TOKENIZER_KINDS, make_tokenizer
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.prompting.encoding import (
    EncodedRecord,
    Encoder,
    encode_each,
    encode_rendered,
    view_both_contexts,
)
from cutlm.prompting.rows import EncodedRecords, encode_records
from cutlm.prompting.templates import (
    RenderError,
    convert_arguments,
    read_arguments,
    render_alpaca_prompt,
    set_arguments,
)

TEMPLATES = ("alpaca", "chat")
ALL = pytest.mark.parametrize(("kind", "template"), [(kind, name) for kind in TOKENIZER_KINDS for name in TEMPLATES])
# Without "bpe_unsplit", whose merges cross words: a different ending may change the tokens far before it.
SPLIT_KINDS = [kind for kind in TOKENIZER_KINDS if kind != "bpe_unsplit"]
EVERY_KIND = pytest.mark.parametrize("kind", TOKENIZER_KINDS)
WITH_BOS = ("bpe_bos", "llama", "llama_legacy")
# These put a space before the text after each special token, not only before the first word.
RESTARTS = ("llama_legacy", "unigram")

ALPACA_PLAIN = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_JUDGED = """\
Below is an instruction that describes a task. Write a response to the instruction and the response should match \
the corresponding judgment.

### Instruction:
{instruction}

### Judgment:
{judgment}

### Response:
"""


@functools.cache
def get_tokenizer(kind: str, template: str) -> Any:
    return make_tokenizer(kind, chat=template == "chat")


@functools.cache
def get_encoder(kind: str, template: str) -> Encoder:
    return Encoder(get_tokenizer(kind, template), template)


def get_special_ids(tokenizer: Any) -> set[int]:
    """The ids of special tokens, except the unknown token."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - {
        tokenizer.unk_token_id
    }


def list_template_specials(kind: str, template: str) -> list[int]:
    """The special tokens of a prompt that come from its template."""
    tokenizer = get_tokenizer(kind, template)
    bos = [tokenizer.bos_token_id] if kind in WITH_BOS else []
    return bos + (tokenizer.convert_tokens_to_ids([IM_START, IM_END, IM_START]) if template == "chat" else [])


# ---- Reading token ids without the tokenizer's decoder ----


@functools.cache
def get_byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def read(kind: str, tokenizer: Any, ids: list[int]) -> str:
    """The text that token ids spell, special tokens by name, without the spaces that a tokenizer adds."""
    special = get_special_ids(tokenizer)
    spelled, is_start = b"", True
    for index, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if index in special:
            spelled += piece.encode()
            is_start = kind in RESTARTS or (is_start and piece == tokenizer.bos_token)
            continue
        if kind.startswith("bpe"):
            spelled += bytes(get_byte_table()[letter] for letter in piece)
            continue
        if is_start:
            assert piece[0] == "▁"
            piece = piece[1:]
        if len(piece) == 6 and piece.startswith("<0x") and kind.startswith("llama"):
            spelled += bytes([int(piece[3:5], 16)])
        else:
            spelled += piece.replace("▁", " ").encode()
        is_start = False
    return spelled.decode()


# ---- Texts ----

SPECIAL_WORDS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", IM_START, IM_END, f"{IM_END}\n{IM_START}assistant\n"),
)
PLAIN_WORDS = (
    *(" ", "  ", "\n", "\n\n", "\n\n\n", ":", ". ", ", ", "Hello", " world", "the capital", "12 + 34", "a", "s>", "</"),
    *("### Response:\n", "\n\n### Instruction:\n", "### Judgment:\n", "<|", "|>", "<|im_", "<0x0A>", "{0}", "[1]"),
)
WILD_WORDS = (
    *(
        "Überraschung",
        "é",
        "e\u0301",
        "你好",
        "🙂",
        "👩‍👩‍👧",
        "\t",
        "\r\n",
        "\u00a0",
        "\u200b",
        "\u2028",
        "ﬁ",
        "＜/s＞",
        "＜",
    ),
)


def make_texts(*words: str, is_wild: bool = False) -> st.SearchStrategy[str]:
    """Non-blank texts of awkward words and, if wild, of any characters."""
    pieces = st.sampled_from(words)
    if is_wild:
        # SentencePiece writes a space as "▁"; records refuse null bytes.
        pieces |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=6)
    texts = st.lists(pieces, min_size=1, max_size=8).map("".join)
    return texts.map(lambda text: text if text.strip() else f"{text}a")


def get_texts(kind: str, *, has_special: bool = True) -> st.SearchStrategy[str]:
    words = PLAIN_WORDS + (SPECIAL_WORDS if has_special else ())
    if kind == "unigram":  # normalizes, knows few characters, and merges unknown ones
        texts = make_texts(*(word for word in words if word != "<unk>"))
    else:
        texts = make_texts(*words, *WILD_WORDS, is_wild=True)
    return texts if has_special else texts.filter(lambda text: not any(word in text for word in SPECIAL_WORDS))


def draw_record(data: st.DataObject, texts: st.SearchStrategy[str]) -> JudgedRecord:
    judgment = data.draw(texts.filter(lambda text: not text.lower().startswith("perfect")), label="judgment")
    return JudgedRecord(
        instruction=data.draw(texts, label="instruction"),
        output=data.draw(texts, label="output"),
        judgment=judgment,
    )


def fit(encoder: Encoder, record: JudgedRecord, max_length: int) -> EncodedRecord | None:
    (encoded,) = encode_rendered([view_both_contexts(record, encoder)], encoder)
    return encoder.fit(encoded, max_length)


def encode(encoder: Encoder, record: JudgedRecord) -> EncodedRecord:
    encoded = fit(encoder, record, 10**6)
    assert encoded is not None
    assert not encoded.is_truncated
    return encoded


def check_special_ids(kind: str, template: str, encoded: EncodedRecord) -> None:
    """The only special tokens are those of the template and the end-of-sequence token."""
    tokenizer = get_tokenizer(kind, template)
    special = get_special_ids(tokenizer)
    for ids in (encoded.prompt_ids, encoded.judged_prompt_ids):
        assert [index for index in ids if index in special] == list_template_specials(kind, template)
        assert kind not in WITH_BOS or ids[0] == tokenizer.bos_token_id
    assert encoded.response_ids[-1] == tokenizer.eos_token_id
    assert special.isdisjoint(encoded.response_ids[:-1])


def check_record(kind: str, template: str, record: JudgedRecord) -> None:
    """The ids of both contexts spell the prompt and the response."""
    tokenizer = get_tokenizer(kind, template)
    encoded = encode(get_encoder(kind, template), record)
    bos = tokenizer.bos_token if kind in WITH_BOS else ""
    for ids, judgment in [(encoded.prompt_ids, None), (encoded.judged_prompt_ids, record.judgment)]:
        prompt = bos + frame(template, record.instruction, judgment)
        assert read(kind, tokenizer, ids) == prompt
        assert read(kind, tokenizer, ids + encoded.response_ids) == prompt + record.output + tokenizer.eos_token
    check_special_ids(kind, template, encoded)


def frame(template: str, instruction: str, judgment: str | None = None) -> str:
    """The expected text of a prompt."""
    if template == "alpaca":
        return (
            ALPACA_PLAIN.replace("{instruction}", instruction)
            if judgment is None
            else ALPACA_JUDGED.format(instruction=instruction, judgment=judgment)
        )
    if judgment is not None:
        instruction = f"{instruction}\n\nWrite a response that this judgment fits:\n{judgment}"
    return f"{IM_START}user\n{instruction}{IM_END}\n{IM_START}assistant\n"


# ---- Prompts as text ----


def test_alpaca_prompts_equal_those_of_the_paper():
    assert render_alpaca_prompt("Name {a}.").text == frame("alpaca", "Name {a}.")
    assert render_alpaca_prompt("Name {a}.", "It is {}.").text == frame("alpaca", "Name {a}.", "It is {}.")


def test_input_follows_the_instruction_after_a_newline():
    encoder = get_encoder("bpe", "alpaca")
    record = JudgedRecord(instruction="Add.", input="1 2", output="3")
    assert encode(encoder, record).prompt_ids == encoder.encode_prompt("Add.\n1 2")


@pytest.mark.parametrize(("judgment", "content"), [(None, "user<|im_end|>"), ("Bad", "user<|im_end|>{}Bad")])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_locates_the_users_text(template, judgment, content):
    # The chat template contains this word too. Texts without a control token need no span.
    prompt = get_encoder("bpe", template).render("user<|im_end|>", judgment)
    separator = "\n\n### Judgment:\n" if template == "alpaca" else "\n\nWrite a response that this judgment fits:\n"
    [(start, end)] = prompt.user_spans
    assert prompt.text[start:end] == content.format(separator)
    tail = prompt.text[end:]
    assert tail == ("\n\n### Response:\n" if template == "alpaca" else f"{IM_END}\n{IM_START}assistant\n")


# ---- Ids, whatever the text ----


@ALL
@settings(max_examples=25)
@given(data=st.data())
def test_ids_of_both_contexts_spell_the_prompt_and_the_response(kind, template, data):
    check_record(kind, template, draw_record(data, get_texts(kind)))


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25)
@given(data=st.data())
def test_a_normalizing_tokenizer_adds_no_special_tokens_for_any_text(template, data):
    record = draw_record(data, make_texts(*PLAIN_WORDS, *WILD_WORDS, *SPECIAL_WORDS, is_wild=True))
    check_special_ids("unigram", template, encode(get_encoder("unigram", template), record))


@pytest.mark.parametrize(("kind", "template"), [(kind, name) for kind in SPLIT_KINDS for name in TEMPLATES])
@settings(max_examples=25)
@given(data=st.data())
def test_a_response_is_tokenized_as_the_continuation_of_either_prompt(kind, template, data):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = draw_record(data, get_texts(kind, has_special=False))
    encoded = encode(encoder, record)
    for ids, judgment in [(encoded.prompt_ids, None), (encoded.judged_prompt_ids, record.judgment)]:
        text = encoder.render(record.instruction, judgment).text + record.output
        joint = tokenizer(text, add_special_tokens=template == "alpaca")["input_ids"]
        # Otherwise the response's first characters merge with the prompt's last, which a model cannot generate.
        if joint[: len(ids)] == ids:
            assert joint == ids + encoded.response_ids[:-1]


@ALL
def test_a_response_that_would_merge_with_the_prompt_leaves_its_tokens_unchanged(kind, template):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    prompt_ids = encoder.encode_prompt("Is it?")
    prompt = (tokenizer.bos_token if kind in WITH_BOS else "") + frame(template, "Is it?")
    for response in ("\n\nYes", "\nYes", " Yes", "  Yes", "Yes", ":\n", "The answer is 7.\n"):
        assert read(kind, tokenizer, prompt_ids + encoder.encode_response(response)[:-1]) == prompt + response


def test_some_response_does_merge_with_the_prompt():
    tokenizer, encoder = get_tokenizer("bpe_unsplit", "alpaca"), get_encoder("bpe_unsplit", "alpaca")
    prompt_ids = encoder.encode_prompt("Is it?")
    assert tokenizer(frame("alpaca", "Is it?") + "\nYes")["input_ids"][: len(prompt_ids)] != prompt_ids


@EVERY_KIND
@settings(max_examples=20)
@given(data=st.data())
def test_alpaca_prompts_have_the_tokenizers_own_ids(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "alpaca"), get_encoder(kind, "alpaca")
    instruction, judgment = (data.draw(get_texts(kind, has_special=False)) for _ in range(2))
    for words in ([instruction], [instruction, judgment]):
        assert encoder.encode_prompt(*words) == tokenizer(frame("alpaca", *words))["input_ids"]


@EVERY_KIND
@settings(max_examples=20)
@given(data=st.data())
def test_chat_prompts_have_the_ids_of_the_tokenizers_own_template(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "chat"), get_encoder(kind, "chat")
    instruction = data.draw(get_texts(kind, has_special=False))
    assert encoder.encode_prompt(instruction) == apply_template(tokenizer, instruction)


def apply_template(tokenizer: Any, instruction: str, chat_template: str | None = None) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}],
        chat_template=chat_template,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )


@EVERY_KIND
@settings(max_examples=20)
@given(data=st.data())
def test_the_saved_chat_template_gives_exactly_the_alpaca_prompts(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "alpaca"), get_encoder(kind, "alpaca")
    chat_template = encoder.build_chat_template()
    assert chat_template is not None
    instruction = data.draw(get_texts(kind, has_special=False))
    assert apply_template(tokenizer, instruction, chat_template) == encoder.encode_prompt(instruction)


def test_the_saved_chat_template_under_chat_is_the_tokenizers_own():
    assert get_encoder("bpe", "chat").build_chat_template() == CHATML


def test_the_saved_chat_template_continues_a_conversation_in_the_same_style():
    tokenizer = get_tokenizer("bpe", "alpaca")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(
        turns,
        chat_template=get_encoder("bpe", "alpaca").build_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello<eos>\n\n### Instruction:\nBye\n\n### Response:\n"
    )


@pytest.mark.parametrize("kind", [kind for kind in SPLIT_KINDS if kind != "unigram"])  # scores whole words
@settings(max_examples=25)
@given(data=st.data())
def test_both_contexts_of_a_chat_share_the_prefix_before_the_judgment(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "chat"), get_encoder(kind, "chat")
    record = draw_record(data, get_texts(kind))
    # Trailing white space merges with the line break that follows.
    instruction = record.instruction.rstrip()
    plain, judged = encoder.encode_prompt(instruction), encoder.encode_prompt(instruction, record.judgment)
    num_tail = plain[::-1].index(tokenizer.convert_tokens_to_ids(IM_END)) + 1
    num_shared = next(index for index, (a, b) in enumerate(zip(plain, judged, strict=False)) if a != b)
    assert num_shared >= len(plain) - num_tail - 1


# ---- Special tokens spelled out ----


@ALL
def test_special_tokens_in_a_text_are_plain_text(kind, template):
    for word in SPECIAL_WORDS:
        text = f"a{word}b"
        check_record(kind, template, JudgedRecord(instruction=text, output=text, judgment=text))


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_end_of_sequence_token_not_marked_as_special_is_plain_text_in_a_text(template):
    backend = make_tokenizer("bpe").backend_tokenizer
    backend.add_tokens([AddedToken(IM_START, special=False), AddedToken(IM_END, special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=IM_END)
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, template)
    num_in_frame = 1 if template == "chat" else 0
    for ids, expected in [
        (encoder.encode_response(f"a{IM_END}b"), 1),
        (encoder.encode_prompt(f"a{IM_END}b"), num_in_frame),
        (encoder.encode_prompt("a", f"a{IM_END}b"), num_in_frame),
    ]:
        assert ids.count(tokenizer.eos_token_id) == expected


def test_a_special_token_that_normalization_produces_is_plain_text():
    # A unigram model has its special tokens in its vocabulary.
    word = "\uff1c/s\uff1e"
    assert unicodedata.normalize("NFKC", word) == "</s>"
    for template in TEMPLATES:
        tokenizer, encoder = get_tokenizer("unigram", template), get_encoder("unigram", template)
        assert tokenizer.convert_tokens_to_ids("</s>") not in encoder.encode_prompt(f"a{word}b")
        assert tokenizer.convert_tokens_to_ids("</s>") not in encoder.encode_response(f"a{word}b")[:-1]


# ---- Unusual tokenizers ----


def test_tokens_that_a_tokenizer_appends_are_left_out():
    tokenizer = make_tokenizer("bpe")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    encoder = Encoder(tokenizer, "alpaca")
    ids = encoder.encode_prompt("Hi")
    assert read("bpe", tokenizer, ids) == "<bos>" + frame("alpaca", "Hi")
    assert read("bpe", tokenizer, encoder.encode_response("Yes")) == "Yes<eos>"


def test_a_tokenizers_own_truncation_and_padding_are_disabled():
    tokenizer = make_tokenizer("bpe")
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    encoder, expected = Encoder(tokenizer, "alpaca"), get_encoder("bpe", "alpaca")
    text = "Name the capital of Australia. " * 5
    assert encoder.encode_prompt(text, text) == expected.encode_prompt(text, text)
    assert encoder.encode_response(text) == expected.encode_response(text)


def test_a_slow_tokenizer_encodes_the_same_text():
    tokenizer = ByT5Tokenizer()
    encoder = Encoder(tokenizer, "alpaca")
    text = "a</s>b"
    for ids, expected in [
        (encoder.encode_prompt(text), frame("alpaca", text)),
        (encoder.encode_prompt(text, text), frame("alpaca", text, text)),
        (encoder.encode_response(text)[:-1], text),
    ]:
        assert ids == [byte + 3 for byte in expected.encode()]


# ---- Truncation ----

LONG_RECORD = JudgedRecord(
    instruction="Name the capital of Australia, and say how you know.",
    output="Sydney is a large city.",
    judgment="It is wrong: the capital is Canberra.",
)


@ALL
@pytest.mark.parametrize("is_satisfactory", [False, True])
def test_prompts_are_truncated_on_the_left_and_responses_never(kind, template, is_satisfactory):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = LONG_RECORD.model_copy(update={"judgment": None}) if is_satisfactory else LONG_RECORD
    whole = encode(encoder, record)
    assert (whole.judged_prompt_ids is None) == is_satisfactory
    num_response = len(whole.response_ids)
    longest = max(len(whole.prompt_ids), len(whole.judged_prompt_ids or []))

    assert fit(encoder, record, num_response - 1) is None
    assert fit(encoder, record, num_response) is None
    for room in (1, 2, 3, longest // 2, longest - 1, longest, longest + 1):
        encoded = fit(encoder, record, num_response + room)
        assert encoded.response_ids == whole.response_ids
        assert encoded.is_truncated == (room < longest)
        assert (encoded.judged_prompt_ids is None) == is_satisfactory
        pairs = [(encoded.prompt_ids, whole.prompt_ids)]
        if not is_satisfactory:
            pairs.append((encoded.judged_prompt_ids, whole.judged_prompt_ids))
        for ids, all_ids in pairs:
            if len(all_ids) <= room:
                assert ids == all_ids
            elif kind in WITH_BOS and room > 1:
                assert ids == [tokenizer.bos_token_id, *all_ids[-(room - 1) :]]
            else:
                assert ids == all_ids[-room:]
            assert len(ids) == min(len(all_ids), room)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), max_length=st.integers(1, 120))
def test_every_record_is_encoded_or_reported(lengths, max_length):
    encoder = get_encoder("bpe", "alpaca")
    records = [
        JudgedRecord(instruction="Say a.", output=" b" * length, judgment="Too long." if length % 2 else None)
        for length in lengths
    ]
    locations = [f"data.jsonl:{index + 1}" for index in range(len(records))]
    encoded = encode_records(records, locations, encoder, max_length)

    too_long = [len(encoder.encode_response(record.output)) >= max_length for record in records]
    assert [row["location"] for row in encoded.rows] == [
        location for location, is_out in zip(locations, too_long, strict=True) if not is_out
    ]
    assert [sentence.split(": ")[0] for sentence in encoded.left_out] == [
        location for location, is_out in zip(locations, too_long, strict=True) if is_out
    ]
    assert encoded.num_truncated == sum(
        row.is_truncated for record in records if (row := fit(encoder, record, max_length)) is not None
    )
    for row in encoded.rows:
        for ids in (row["prompt_ids"], row["judged_prompt_ids"]):
            assert ids is None or 0 < len(ids) <= max_length - len(row["response_ids"])


def test_counts_are_described_in_one_line():
    rows = Dataset.from_dict({"response_ids": [[1], [2], [3]]})
    counts = {"num_satisfactory": 1, "num_truncated": 4, "left_out": ["data.jsonl:9: ..."], "skipped": {"old": 2}}
    line = EncodedRecords(rows=rows, **counts).describe(64)
    assert re.findall(r"\d+", line) == ["3", "1", "2", "4", "64", "3"]


# ---- Refusals ----


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tokenizer_without_end_of_sequence_is_refused(template):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer 'tiny-bpe' has no end-of-sequence token"):
        Encoder(tokenizer, template)


def test_a_tokenizer_without_chat_template_is_refused_under_chat():
    with pytest.raises(ConfigError, match="the tokenizer 'tiny-bpe' has no chat template"):
        Encoder(make_tokenizer("bpe"), "chat")


@pytest.mark.parametrize("content", ["message['content'] | upper", "''", "message['content'][:10]"])
def test_a_chat_template_that_changes_the_users_text_is_refused(content):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = CHATML.replace("message['content']", content)
    with pytest.raises(ConfigError, match="changes the user's text"):
        Encoder(tokenizer, "chat").encode_prompt("Name the capital of Australia.")


DATED = """Today is {{ strftime_now('%d %b %Y') }}, or {{strftime_now( "%Y-%m-%d" )}}.\n""" + CHATML


def test_a_chat_template_that_prints_the_date_prints_that_of_the_encoder():
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = DATED
    encoders = [Encoder(tokenizer, "chat", datetime.date(2024, 7, day)) for day in (5, 6)]
    assert encoders[0].render("Hi").text == "Today is 05 Jul 2024, or 2024-07-05.\n" + frame("chat", "Hi")
    assert [encoder.template_date for encoder in encoders] == ["2024-07-05", "2024-07-06"]
    assert encoders[0].fingerprint == encoders[1].fingerprint
    assert encoders[0].encode_prompt("Hi") != encoders[1].encode_prompt("Hi")
    assert Encoder(get_tokenizer("bpe", "chat"), "chat").template_date is None
    assert Encoder(tokenizer, "alpaca").template_date is None


def test_a_chat_template_may_strip_the_users_text():
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    encoder = Encoder(tokenizer, "chat")
    prompt = encoder.render(" \nName it.\n\n")
    assert prompt.text == frame("chat", "Name it.")
    spelled = encoder.render(f" \nName {IM_END}.\n\n")
    assert [spelled.text[start:end] for start, end in spelled.user_spans] == [f"Name {IM_END}."]
    assert read("bpe", tokenizer, encoder.encode_prompt(f" {IM_END} ")) == frame("chat", IM_END)


def test_a_slow_tokenizer_cannot_keep_special_tokens_plain_in_a_chat():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}</s>"
    encoder = Encoder(tokenizer, "chat")
    assert encoder.encode_generation_prompt("a") == [ord("a") + 3, 1]
    # The template renders an answer before the end-of-sequence token of its generation prompt.
    assert encoder.encode_prompt("a") + encoder.encode_response("b") == [ord("a") + 3, ord("b") + 3, 1]
    for encode_text in (encoder.encode_prompt, encoder.encode_response):
        with pytest.raises(ConfigError, match="spells out a special token"):
            encode_text("a</s>")


# ---- What a chat template writes around an answer ----

THINK = ("<think>", "</think>")
CLOSED = "<|a|>\n<think>\n\n</think>\n\n{}<|end|>\n"
# Each: the template's text for an answer, its generation prompt, its end-of-turn token, and its control tokens.
TURNS = {
    "an end of turn of its own": ("<|a|>\n{}<|end|>\n", "<|a|>\n", "<|end|>", ("<|a|>", "<|end|>")),
    "a channel": ("<|a|><|channel|>final{}<|end|>", "<|a|>", "<|end|>", ("<|a|>", "<|channel|>", "<|end|>")),
    "an empty block of thoughts": (CLOSED, "<|a|>\n", "<|end|>", ("<|a|>", *THINK, "<|end|>")),
    "a prompt that opens the thoughts": (CLOSED, "<|a|>\n<think>\n", "<|end|>", ("<|a|>", *THINK, "<|end|>")),
    "thoughts that are not kept": ("<|a|>{}<|end|>", "<|a|><think>\n", "<|end|>", ("<|a|>", *THINK, "<|end|>")),
    "a space": ("[a] {} <|end|>", "[a]", "<|end|>", ("<|end|>",)),
    "no end of turn": ("<|a|>\n{}\n", "<|a|>\n", "<|u|>", ("<|a|>", "<|u|>")),
    "the end of sequence": ("<|a|>\n{}<eos>\n", "<|a|>\n", "<eos>", ("<|a|>",)),
}  # fmt: skip


def make_turn_tokenizer(turn: str, *, is_special: bool = True, strips: bool = False) -> Any:
    answer, prompt, _, control = TURNS[turn]
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens([AddedToken(text, special=is_special) for text in control])
    user = "{{ '<|u|>' if '<|u|>' in '" + "".join(control) + "' else '[u]' }}"
    before, after = ("{{ " + repr(part) + " }}" for part in answer.split("{}"))
    content = "{{ message['content']" + " | trim" * strips + " }}"
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}" + user + content + "{% else %}"
        f"{before}{content}{after}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )
    return tokenizer


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("answer", ["Canberra.", " \nTwo\n\nlines. ", "🙂"])
def test_a_prompt_and_a_response_are_what_the_template_renders(turn, is_special, answer):
    tokenizer = make_turn_tokenizer(turn, is_special=is_special)
    encoder = Encoder(tokenizer, "chat")
    end = TURNS[turn][2]
    messages = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": answer}]
    if turn == "no end of turn":  # the next turn ends it
        messages.append({"role": "user", "content": "Why?"})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    start = rendered.index(answer) + len(answer)
    rendered = rendered[: rendered.index(end, start) + len(end)]
    response_ids = encoder.encode_response(answer)
    assert tokenizer.decode(encoder.encode_prompt("Name it.") + response_ids) == rendered
    assert response_ids[-1] == encoder.end_of_turn_id == tokenizer.convert_tokens_to_ids(end)
    if not answer.startswith(" "):  # white space may merge with that of the prompt, which is fixed
        assert (
            encoder.encode_prompt("Name it.") + response_ids
            == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize("turn", TURNS)
def test_what_the_template_writes_before_an_answer_is_counted(turn):
    tokenizer = make_turn_tokenizer(turn)
    encoder = Encoder(tokenizer, "chat")
    ids = encoder.encode_response("Canberra.")
    opening = {
        "a channel": "<|channel|>final",
        "an empty block of thoughts": "<think>\n\n</think>\n\n",
        "a prompt that opens the thoughts": "\n\n</think>\n\n",
    }.get(turn, "")
    num = encoder.count_template_tokens(ids)
    assert tokenizer.decode(ids[:num]) == opening
    spans = encoder.locate_tokens("Canberra.", ids)
    assert spans[:num] == [(0, 0)] * num
    assert spans[-1] == (9, 9)
    assert {place for start, end in spans for place in range(start, end)} == set(range(9))


def test_the_generation_prompt_is_the_templates_own_even_if_it_opens_thoughts():
    encoder = Encoder(make_turn_tokenizer("a prompt that opens the thoughts"), "chat")
    decode = encoder.tokenizer.decode
    assert decode(encoder.encode_generation_prompt("Name it.")) == "[u]Name it.<|a|>\n<think>\n"
    assert decode(encoder.encode_prompt("Name it.")) == "[u]Name it.<|a|>\n<think>"


def test_a_template_may_strip_an_answer():
    encoder = Encoder(make_turn_tokenizer("an empty block of thoughts", strips=True), "chat")
    ids = encoder.encode_response("\n A b \n")
    assert encoder.tokenizer.decode(ids) == "<think>\n\n</think>\n\nA b<|end|>"
    spans = encoder.locate_tokens("\n A b \n", ids)
    num = encoder.count_template_tokens(ids)
    assert {place for start, end in spans[num:] for place in range(start, end)} >= {2, 4}
    assert spans[-1] == (7, 7)


def test_a_response_that_the_template_alters_is_named():
    tokenizer = make_turn_tokenizer("thoughts that are not kept")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    encoder = Encoder(tokenizer, "chat")
    records = [
        JudgedRecord(instruction="Name it.", output=output, judgment="No.")
        for output in ("Canberra.", "<think>Hm.</think>Canberra.", "</think>Sydney.")
    ]
    with pytest.raises(DataError) as error:
        encode_records(records, ["a:1", "a:2", "a:3"], encoder, 100)
    assert [problem.split(":")[:2] for problem in error.value.problems] == [["a", "2"], ["a", "3"]]


@pytest.mark.parametrize("is_special", [True, False])
def test_control_tokens_in_a_users_text_are_text(is_special):
    tokenizer = make_turn_tokenizer("an empty block of thoughts", is_special=is_special)
    encoder = Encoder(tokenizer, "chat")
    control = set(tokenizer.convert_tokens_to_ids(list(TURNS["an empty block of thoughts"][3])))
    text = "Hi<|end|>\n<|a|>\n<think>Ha.</think>"
    ids = encoder.encode_prompt(text)
    assert [index for index in ids if index in control] == tokenizer.convert_tokens_to_ids(["<|a|>"])
    assert tokenizer.decode(ids) == f"[u]{text}<|a|>\n"
    response_ids = encoder.encode_response(text)
    assert [index for index in response_ids if index in control] == tokenizer.convert_tokens_to_ids([*THINK, "<|end|>"])
    alpaca_ids = Encoder(tokenizer, "alpaca").encode_prompt(text)
    assert control.isdisjoint(alpaca_ids)


def test_added_tokens_that_the_template_does_not_write_stay_tokens():
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.add_tokens(["<table>", "\n\n\n"])
    ids = Encoder(tokenizer, "chat").encode_prompt("<table>\n\n\n")
    assert {tokenizer.convert_tokens_to_ids("<table>"), tokenizer.convert_tokens_to_ids("\n\n\n")} <= set(ids)


@pytest.mark.parametrize("text", [" Name it.", "\n\n Name it. \n", "Name it."])
def test_a_control_token_that_takes_white_space_next_to_it_is_kept(text):
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens(
        [
            AddedToken(name, special=True, rstrip=True, lstrip=name == "<|end|>")
            for name in ("<|user|>", "<|a|>", "<|end|>")
        ]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|user|>\n' if message['role'] == 'user' else '<|a|>\n' }}"
        "{{ message['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|a|>\n{% endif %}"
    )
    encoder = Encoder(tokenizer, "chat")
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encoder.encode_prompt(text) + encoder.encode_response(text) == expected
    spelled = encoder.encode_prompt(f"<|user|>{text}")
    assert spelled.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1


# ---- Arguments of chat templates ----

SWITCHED = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{{ effort | default('') }}{% endif %}",
)


def test_template_arguments_become_defaults_that_are_saved(tmp_path):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = SWITCHED
    arguments = {"enable_thinking": False, "effort": "#} 'low' {{ \" \\ é"}
    changed = set_arguments(tokenizer, arguments)
    assert tokenizer.chat_template == SWITCHED
    changed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    options: Any = {"tokenize": False, "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(messages, **options, **arguments)
    assert expected.endswith("assistant\n<think>\n\n</think>\n\n" + arguments["effort"])
    assert loaded.apply_chat_template(messages, **options) == expected
    # Arguments of a call still count.
    assert "<think>" not in loaded.apply_chat_template(messages, **options, enable_thinking=True)
    assert read_arguments(loaded.chat_template) == (arguments, SWITCHED)
    again = set_arguments(loaded, {"effort": None})
    assert read_arguments(again.chat_template) == ({"enable_thinking": False, "effort": None}, SWITCHED)
    encoders = [Encoder(each, "chat") for each in (tokenizer, changed, again)]
    assert len({encoder.fingerprint for encoder in encoders}) == 3
    assert encoders[1].fingerprint == Encoder(loaded, "chat").fingerprint


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt", "a b"])
def test_an_argument_that_the_template_does_not_have_is_refused(name):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = SWITCHED
    with pytest.raises(ConfigError, match=name):
        set_arguments(tokenizer, {name: 1})
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        set_arguments(make_tokenizer("bpe"), {"effort": 1})


def test_records_and_prompts_that_the_template_refuses_are_named():
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['content'].startswith('<tool>') %}{{ raise_exception('No user query found.') }}{% endif %}"
        + CHATML
    )
    encoder = Encoder(tokenizer, "chat")
    texts = ["Name it.", "<tool>x</tool>", "<tool>"]
    records = [JudgedRecord(instruction=text, output="Sydney.", judgment="No.") for text in texts]
    locations = ["a:1", "a:2", "a:3"]
    with pytest.raises(DataError) as error:
        encode_records(records, locations, encoder, 100)
    assert [problem[:3] for problem in error.value.problems] == ["a:2", "a:3"]
    with pytest.raises(DataError) as error:
        encode_each(encoder.encode_generation_prompt, texts, locations)
    assert [problem[:3] for problem in error.value.problems] == ["a:2", "a:3"]
    assert encode_each(encoder.encode_generation_prompt, texts[:1], locations[:1]) == [encoder.encode_prompt(texts[0])]


@pytest.mark.parametrize(
    ("condition", "omitted"),
    [
        ("message['role'] != 'developer'", {"developer messages"}),
        ("message['role'] != 'system' or loop.first", {"system messages after the first message"}),
        ("message['role'] != 'developer' or loop.index == 2", {"developer messages"}),
        (
            "message['role'] not in ('system', 'developer') or loop.first",
            {"system messages after the first message", "developer messages"},
        ),
        ("true", set()),
    ],
)
def test_each_message_that_a_template_omits_is_said(condition: str, omitted: set[str]) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    loop = "{% for message in messages %}"
    tokenizer.chat_template = CHATML.replace(loop, f"{loop}{{% if {condition} %}}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    roles = ("system", "developer", "user", "assistant", "system", "developer", "user", "assistant")
    messages = [{"role": role, "content": f"Text {number}."} for number, role in enumerate(roles)]
    found = Encoder(tokenizer, "chat").describe_omissions(
        [JudgedRecord.model_validate({"messages": messages, "judgment": None})]
    )
    assert {sentence.split("leaves ")[1].split(" out of")[0] for sentence in found} == omitted


# As Hermes, Mistral and Command-R have it: a template with tools next to the default one, which renders no calls.
TOOL_USE = (
    "<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}"
    "{{ ' (short)' if is_short is defined and is_short }}<|im_end|>\n"
) + CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}"
    "{% endfor %}",
)
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "city"}}}
CALLING = [
    {"role": "user", "content": "Name a city."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Sydney"},
]
ANSWERED = [*CALLING, {"role": "assistant", "content": "Sydney."}]


def make_named_tokenizer(tool_use: str = TOOL_USE) -> Any:
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_use, "rag": "{{ documents[0] }}"}
    return tokenizer


@pytest.mark.parametrize("as_text", [False, True])
def test_conversations_with_tools_have_the_template_for_tools(as_text: bool) -> None:
    tokenizer = make_named_tokenizer()
    encoder = Encoder(tokenizer, "chat")
    arguments: Any = json.dumps(CALL["function"]["arguments"]) if as_text else CALL["function"]["arguments"]
    call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
    messages = [ANSWERED[0], ANSWERED[1] | {"tool_calls": [call]}, *ANSWERED[2:]]
    record = JudgedRecord.model_validate({"messages": messages, "tools": [FIND], "judgment": None})
    text = encoder.render(record.conversation).text
    options: Any = {"tools": [FIND], "tokenize": False}
    assert text == tokenizer.apply_chat_template(CALLING, add_generation_prompt=True, **options)
    assert "Tools: find" in text
    ids = encoder.encode_prompt(record.conversation) + encoder.encode_response(record.output)
    whole = tokenizer.apply_chat_template(ANSWERED, **options)
    assert tokenizer.decode(ids) == whole.removesuffix("\n")
    encoder.check_conversation(record.conversation, record.output)
    assert encoder.describe_omissions([record]) == []
    # Without tools it is the default one.
    assert (
        encoder.render("Name a city.").text
        == Encoder(make_tokenizer("bpe", chat=True), "chat").render("Name a city.").text
    )


def test_a_template_for_tools_with_another_answer_is_refused() -> None:
    # Command-R asks for a list of actions before the answer.
    request = "<|im_start|>system\nWrite actions.<|im_end|>\n"
    asking = TOOL_USE.replace("{% if add_generation_prompt", request + "{% if add_generation_prompt")
    encoder = Encoder(make_named_tokenizer(asking), "chat")
    record = JudgedRecord.model_validate({"messages": ANSWERED, "tools": [FIND], "judgment": None})
    encoder.check_conversation(Conversation.start("Name a city."), "Sydney.")
    with pytest.raises(RenderError, match="without tools"):
        encoder.check_conversation(record.conversation, record.output)


def test_settings_and_fingerprints_count_for_every_named_template() -> None:
    tokenizer = make_named_tokenizer()
    changed = set_arguments(tokenizer, {"is_short": True})
    conversation = Conversation(tuple(CALLING), (FIND,))
    assert "(short)" in Encoder(changed, "chat").render(conversation).text
    assert "(short)" not in Encoder(tokenizer, "chat").render(conversation).text
    dated = make_named_tokenizer(TOOL_USE + "{{ strftime_now('%d') if false }}")
    assert Encoder(dated, "chat").template_date is not None
    assert Encoder(tokenizer, "chat").template_date is None
    plain = make_tokenizer("bpe", chat=True)
    assert len({Encoder(each, "chat").fingerprint for each in (tokenizer, changed, dated, plain)}) == 4


@pytest.mark.parametrize("kind", [dict, str, None])
def test_a_call_without_arguments_stays_without(kind: type | None) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now"}}, {"name": "now"}]}
    assert convert_arguments(message, kind) == message


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "x = 1"}]}
    assert convert_arguments(message, dict) == convert_arguments(message, str) == message
