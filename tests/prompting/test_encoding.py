"""Token ids of prompts and responses: nothing lost, nothing added, and the same response after either prompt."""

import functools
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, IM_END, IM_START, TOKENIZER_KINDS, make_tokenizer
from tokenizers import AddedToken, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.prompting.encoding import EncodedRecord, EncodedRecords, Encoder, encode_records
from cutlm.prompting.templates import render_alpaca_prompt, render_chat_prompt

TEMPLATES = ("alpaca", "chat")
ALL = pytest.mark.parametrize(("kind", "template"), [(kind, name) for kind in TOKENIZER_KINDS for name in TEMPLATES])
# Where merges run on from word to word, texts that go on differently may be split differently far before that.
SPLIT_KINDS = [kind for kind in TOKENIZER_KINDS if kind != "bpe_unsplit"]
EVERY_KIND = pytest.mark.parametrize("kind", TOKENIZER_KINDS)
WITH_BOS = ("bpe_bos", "llama", "llama_legacy")
# A space goes before the text behind each special token too, and not before the first word only.
STARTS_AFRESH = ("llama_legacy", "unigram")

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
    """Ids that mean something to a model beside text; an unknown character does not."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - {
        tokenizer.unk_token_id
    }


def list_frame_specials(kind: str, template: str) -> list[int]:
    """The special tokens of a prompt, whatever the user's text."""
    tokenizer = get_tokenizer(kind, template)
    bos = [tokenizer.bos_token_id] if kind in WITH_BOS else []
    return bos + (tokenizer.convert_tokens_to_ids([IM_START, IM_END, IM_START]) if template == "chat" else [])


# ---- Reading token ids without the tokenizer's decoder ----


@functools.cache
def get_byte_table() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def read(kind: str, tokenizer: Any, ids: list[int]) -> str:
    """The text that token ids spell, special tokens by their names, without the spaces that a tokenizer adds."""
    special = get_special_ids(tokenizer)
    spelled, is_start = b"", True
    for index, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if index in special:
            spelled += piece.encode()
            # A space before the text's first word, where that is no special token but the first one.
            is_start = kind in STARTS_AFRESH or (is_start and piece == tokenizer.bos_token)
            continue
        if kind.startswith("bpe"):
            spelled += bytes(get_byte_table()[letter] for letter in piece)
            continue
        if is_start and not kind.startswith("bpe"):
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
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    IM_START,
    IM_END,
    f"{IM_END}\n{IM_START}assistant\n",
)
PLAIN_WORDS = (
    *(" ", "  ", "\n", "\n\n", "\n\n\n", ":", ". ", ", ", "Hello", " world", "the capital", "12 + 34", "a", "s>", "</"),
    *("### Response:\n", "\n\n### Instruction:\n", "### Judgment:\n", "<|", "|>", "<|im_", "<0x0A>", "{0}", "[1]"),
)
WILD_WORDS = (
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
)


def make_texts(*words: str, is_wild: bool = False, min_size: int = 1) -> st.SearchStrategy[str]:
    """Texts with at least one letter, of words that are known to be awkward and, if wild, of any characters."""
    pieces = st.sampled_from(words)
    if is_wild:
        # A lower one-eighth block is how SentencePiece writes a space; a null byte is refused in records.
        pieces |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=6)
    texts = st.lists(pieces, min_size=min_size, max_size=8).map("".join)
    return texts.map(lambda text: text if text.strip() else f"{text}a")


def get_texts(kind: str, *, has_special: bool = True) -> st.SearchStrategy[str]:
    words = PLAIN_WORDS + (SPECIAL_WORDS if has_special else ())
    if kind == "unigram":  # normalizes, knows few characters, and makes one of several unknown ones
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


def encode(encoder: Encoder, record: JudgedRecord) -> EncodedRecord:
    encoded = encoder.encode_record(record, 10**6)
    assert encoded is not None
    assert not encoded.is_truncated
    return encoded


def frame(template: str, instruction: str, judgment: str | None = None) -> str:
    """The prompt's text, spelled out here."""
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


def test_alpaca_prompts_are_those_of_the_paper_letter_by_letter():
    assert render_alpaca_prompt("Name a colour.").text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name a colour.\n"
        "\n"
        "### Response:\n"
    )
    assert render_alpaca_prompt("Name a colour.", "Mauve is none.").text == (
        "Below is an instruction that describes a task. Write a response to the instruction and the response should"
        " match the corresponding judgment.\n"
        "\n"
        "### Instruction:\n"
        "Name a colour.\n"
        "\n"
        "### Judgment:\n"
        "Mauve is none.\n"
        "\n"
        "### Response:\n"
    )


def test_input_follows_the_instruction_after_a_newline():
    encoder = get_encoder("bpe", "alpaca")
    record = JudgedRecord(instruction="Add.", input="1 2", output="3")
    assert encode(encoder, record).prompt_ids == encoder.encode_prompt("Add.\n1 2")


def test_a_prompt_knows_where_the_users_text_stands():
    for prompt, content in [
        (render_alpaca_prompt("Hi"), "Hi"),
        (render_alpaca_prompt("Hi", "Bad"), "Hi\n\n### Judgment:\nBad"),
        (render_chat_prompt(get_tokenizer("bpe", "chat"), "user"), "user"),  # a word of the template too
        (
            render_chat_prompt(get_tokenizer("bpe", "chat"), "Hi", "Bad"),
            "Hi\n\nWrite a response that this judgment fits:\nBad",
        ),
    ]:
        assert prompt.text[prompt.content_start : prompt.content_end] == content
        assert prompt.tail in ("\n\n### Response:\n", f"{IM_END}\n{IM_START}assistant\n")


# ---- Ids, whatever the text ----


@ALL
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ids_of_both_contexts_read_as_the_prompt_and_the_response(kind, template, data):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = draw_record(data, get_texts(kind))
    encoded = encode(encoder, record)
    bos = tokenizer.bos_token if kind in WITH_BOS else ""

    for ids, judgment in [(encoded.prompt_ids, None), (encoded.judged_prompt_ids, record.judgment)]:
        prompt = bos + frame(template, record.instruction, judgment)
        assert read(kind, tokenizer, ids) == prompt
        assert read(kind, tokenizer, ids + encoded.response_ids) == prompt + record.output + tokenizer.eos_token


@ALL
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_special_tokens_are_those_of_the_template_and_one_end(kind, template, data):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = draw_record(data, make_texts(*PLAIN_WORDS, *WILD_WORDS, *SPECIAL_WORDS, is_wild=True))
    encoded = encode(encoder, record)
    special = get_special_ids(tokenizer)

    *text_ids, last = encoded.response_ids
    assert last == tokenizer.eos_token_id
    assert special.isdisjoint(text_ids)
    expected = list_frame_specials(kind, template)
    for ids in (encoded.prompt_ids, encoded.judged_prompt_ids):
        assert [index for index in ids if index in special] == expected
        assert kind not in WITH_BOS or ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("kind", "template"), [(kind, name) for kind in SPLIT_KINDS for name in TEMPLATES])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_response_is_split_as_the_continuation_of_either_prompt(kind, template, data):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = draw_record(data, get_texts(kind, has_special=False))
    encoded = encode(encoder, record)
    for ids, judgment in [(encoded.prompt_ids, None), (encoded.judged_prompt_ids, record.judgment)]:
        text = encoder.render(record.instruction, judgment).text + record.output
        joint = tokenizer(text, add_special_tokens=template == "alpaca")["input_ids"]
        # Elsewhere the response's first characters merge with the prompt's last, which a model never does.
        if joint[: len(ids)] == ids:
            assert joint == ids + encoded.response_ids[:-1]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("response", ["\n\nYes", "\nYes", " Yes", "  Yes", "Yes", ":\n", "The answer is 7.\n"])
@EVERY_KIND
def test_the_prompts_tokens_stand_where_a_response_would_merge_with_them(kind, response, template):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    prompt_ids, response_ids = encoder.encode_prompt("Is it?"), encoder.encode_response(response)
    prompt = (tokenizer.bos_token if kind in WITH_BOS else "") + frame(template, "Is it?")
    assert read(kind, tokenizer, prompt_ids + response_ids[:-1]) == prompt + response


def test_some_response_does_merge_with_the_prompt():
    tokenizer, encoder = get_tokenizer("bpe_unsplit", "alpaca"), get_encoder("bpe_unsplit", "alpaca")
    prompt_ids = encoder.encode_prompt("Is it?")
    joint = tokenizer(ALPACA_PLAIN.replace("{instruction}", "Is it?") + "\nYes")["input_ids"]
    assert joint[: len(prompt_ids)] != prompt_ids
    assert read("bpe_unsplit", tokenizer, encoder.encode_response("\nYes")) == "\nYes<eos>"


@EVERY_KIND
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_alpaca_prompts_are_split_as_the_tokenizer_splits_any_text(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "alpaca"), get_encoder(kind, "alpaca")
    instruction, judgment = (data.draw(get_texts(kind, has_special=False)) for _ in range(2))
    assert encoder.encode_prompt(instruction) == tokenizer(frame("alpaca", instruction))["input_ids"]
    assert (
        encoder.encode_prompt(instruction, judgment) == tokenizer(frame("alpaca", instruction, judgment))["input_ids"]
    )


@EVERY_KIND
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_chat_prompts_are_those_of_the_tokenizers_own_template(kind, data):
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
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_saved_chat_template_gives_exactly_the_alpaca_prompts(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "alpaca"), get_encoder(kind, "alpaca")
    chat_template = encoder.build_chat_template()
    assert chat_template is not None
    instruction = data.draw(get_texts(kind, has_special=False))
    assert apply_template(tokenizer, instruction, chat_template) == encoder.encode_prompt(instruction)


def test_saved_chat_template_of_a_chat_is_the_tokenizers_own():
    assert get_encoder("bpe", "chat").build_chat_template() == CHATML


def test_saved_chat_template_writes_further_turns_in_the_same_style():
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


@pytest.mark.parametrize("kind", [kind for kind in SPLIT_KINDS if kind != "unigram"])  # that weighs a word as a whole
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_contexts_of_a_chat_share_their_tokens_up_to_the_judgment(kind, data):
    tokenizer, encoder = get_tokenizer(kind, "chat"), get_encoder(kind, "chat")
    record = draw_record(data, get_texts(kind))
    # White space at the end of the instruction is one word with the line break that follows it.
    instruction = record.instruction.rstrip()
    plain, judged = encoder.encode_prompt(instruction), encoder.encode_prompt(instruction, record.judgment)
    num_tail = plain[::-1].index(tokenizer.convert_tokens_to_ids(IM_END)) + 1
    num_shared = next(place for place, (a, b) in enumerate(zip(plain, judged, strict=False)) if a != b)
    assert num_shared >= len(plain) - num_tail - 1


# ---- Special tokens spelled out ----


@ALL
@pytest.mark.parametrize("word", SPECIAL_WORDS)
def test_special_tokens_that_a_text_spells_out_are_plain_text(kind, template, word):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    text = f"a{word}b"
    bos = tokenizer.bos_token if kind in WITH_BOS else ""
    encoded = encode(encoder, JudgedRecord(instruction=text, output=text, judgment=text))
    assert read(kind, tokenizer, encoded.prompt_ids) == bos + frame(template, text)
    assert read(kind, tokenizer, encoded.judged_prompt_ids) == bos + frame(template, text, text)
    assert read(kind, tokenizer, encoded.prompt_ids + encoded.response_ids) == (
        bos + frame(template, text) + text + tokenizer.eos_token
    )
    special = get_special_ids(tokenizer)
    for ids in (encoded.prompt_ids, encoded.judged_prompt_ids):
        assert [index for index in ids if index in special] == list_frame_specials(kind, template)
    assert [index for index in encoded.response_ids if index in special] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_end_of_sequence_that_its_tokenizer_does_not_mark_as_special_is_plain_text_too(template):
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


def test_a_special_token_that_appears_by_normalization_is_plain_text():
    # NFKC turns the fullwidth brackets into plain ones, and a unigram model has its special tokens as pieces.
    word = "\uff1c/s\uff1e"
    assert unicodedata.normalize("NFKC", word) == "</s>"
    for template in TEMPLATES:
        tokenizer, encoder = get_tokenizer("unigram", template), get_encoder("unigram", template)
        assert tokenizer.convert_tokens_to_ids("</s>") not in encoder.encode_prompt(f"a{word}b")
        assert tokenizer.convert_tokens_to_ids("</s>") not in encoder.encode_response(f"a{word}b")[:-1]


# ---- Tokenizers with a mind of their own ----


def test_tokens_that_a_tokenizer_adds_at_the_end_are_left_out():
    tokenizer = make_tokenizer("bpe")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    encoder = Encoder(tokenizer, "alpaca")
    ids = encoder.encode_prompt("Hi")
    assert read("bpe", tokenizer, ids) == "<bos>" + frame("alpaca", "Hi")
    assert read("bpe", tokenizer, encoder.encode_response("Yes")) == "Yes<eos>"


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_neither():
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


# ---- Cutting ----

CUT_RECORD = JudgedRecord(
    instruction="Name the capital of Australia, and say how you know.",
    output="Sydney is a large city.",
    judgment="It is wrong: the capital is Canberra.",
)


@ALL
@pytest.mark.parametrize("is_satisfactory", [False, True])
def test_prompts_are_cut_from_the_left_and_responses_never(kind, template, is_satisfactory):
    tokenizer, encoder = get_tokenizer(kind, template), get_encoder(kind, template)
    record = CUT_RECORD.model_copy(update={"judgment": None}) if is_satisfactory else CUT_RECORD
    whole = encode(encoder, record)
    assert (whole.judged_prompt_ids is None) == is_satisfactory
    num_response = len(whole.response_ids)
    longest = max(len(whole.prompt_ids), len(whole.judged_prompt_ids or []))

    assert encoder.encode_record(record, num_response - 1) is None
    assert encoder.encode_record(record, num_response) is None
    for room in range(1, longest + 2):
        encoded = encoder.encode_record(record, num_response + room)
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
            assert len(ids) + num_response == min(len(all_ids), room) + num_response <= num_response + room


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), max_length=st.integers(1, 120))
def test_every_record_is_encoded_or_named_as_left_out(lengths, max_length):
    encoder = get_encoder("bpe", "alpaca")
    records = [
        JudgedRecord(instruction="Say a.", output=" b" * length, judgment="Too long." if length % 2 else None)
        for length in lengths
    ]
    locations = [f"data.jsonl:{index + 1}" for index in range(len(records))]
    encoded = encode_records(records, locations, encoder, max_length)

    too_long = [len(encoder.encode_response(record.output)) >= max_length for record in records]
    assert [row["location"] for row in encoded.rows] == [
        place for place, is_out in zip(locations, too_long, strict=True) if not is_out
    ]
    assert encoded.left_out == [
        f"{place}: the response alone fills max_length {max_length}; left out"
        for place, is_out in zip(locations, too_long, strict=True)
        if is_out
    ]
    assert encoded.num_truncated == sum(
        row.is_truncated for record in records if (row := encoder.encode_record(record, max_length)) is not None
    )
    for row in encoded.rows:
        for ids in (row["prompt_ids"], row["judged_prompt_ids"]):
            assert ids is None or 0 < len(ids) <= max_length - len(row["response_ids"])


def test_counts_are_told_in_one_line():
    row = {"prompt_ids": [1], "judged_prompt_ids": [1], "response_ids": [2], "is_satisfactory": False}
    rows = [row, row | {"judged_prompt_ids": None, "is_satisfactory": True}, row]
    encoded = EncodedRecords(rows, 1, ["data.jsonl:9: ..."])
    assert encoded.describe(64) == (
        "3 records encoded (1 satisfactory, 2 unsatisfactory); 1 prompts cut from the left to fit max_length 64; 1"
        " records left out"
    )


# ---- Refusals ----


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tokenizer_without_end_of_sequence_is_refused(template):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError) as caught:
        Encoder(tokenizer, template)
    assert str(caught.value) == (
        "the tokenizer 'tiny-bpe' has no end-of-sequence token, so that a model could never learn to stop; set"
        " tokenizer.eos_token and save it again"
    )


def test_a_tokenizer_without_chat_template_is_refused_under_chat():
    with pytest.raises(ConfigError) as caught:
        Encoder(make_tokenizer("bpe"), "chat")
    assert str(caught.value) == (
        "template: chat: the tokenizer 'tiny-bpe' has no chat template; use template: alpaca, or a tokenizer with one"
    )


@pytest.mark.parametrize(
    "chat_template",
    [
        CHATML.replace("message['content']", "message['content'] | upper"),
        CHATML.replace("{{ message['content'] }}", ""),
        CHATML.replace("message['content']", "message['content'][:10]"),
    ],
)
def test_a_chat_template_that_changes_the_users_text_is_refused(chat_template):
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = chat_template
    with pytest.raises(ConfigError) as caught:
        Encoder(tokenizer, "chat").encode_prompt("Name the capital of Australia.")
    assert str(caught.value) == (
        "template: chat: the tokenizer's chat template changes the user's text; use template: alpaca"
    )


def test_a_chat_template_may_trim_the_users_text():
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    encoder = Encoder(tokenizer, "chat")
    prompt = encoder.render(" \nName it.\n\n")
    assert prompt.text == frame("chat", "Name it.")
    assert prompt.text[prompt.content_start : prompt.content_end] == "Name it."
    assert read("bpe", tokenizer, encoder.encode_prompt(f" {IM_END} ")) == frame("chat", IM_END)


def test_a_slow_tokenizer_cannot_keep_special_tokens_plain_in_a_chat():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}</s>"
    encoder = Encoder(tokenizer, "chat")
    assert encoder.encode_prompt("a") == [ord("a") + 3, 1]
    for encode_text in (encoder.encode_prompt, encoder.encode_response):
        with pytest.raises(ConfigError) as caught:
            encode_text("a</s>")
        assert str(caught.value) == (
            "template: chat: a text spells out a special token, which only a fast tokenizer can keep plain; use the"
            " model's fast tokenizer, or template: alpaca"
        )
