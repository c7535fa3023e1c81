"""Conversations of several turns with tools are encoded as the templates of real models render them."""

import json
from typing import Any

import pytest
from real.manifest import FAMILIES, Family, load_tokenizer
from real.packages import UnavailableError
from real.test_chat_formats import tokenize

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.rows import encode_records
from cutlm.prompting.templates import JudgmentRole, add_judgment, add_system_judgment

NAMES = ("Qwen3", "Qwen3, no thoughts", "Llama 3.1", "Llama 3.2", "gpt-oss", "Qwen2.5", "Gemma 3", "DeepSeek-V3")
WITH_TOOLS = ("Qwen3", "Llama 3.1", "Llama 3.2", "gpt-oss", "Qwen2.5")
TOOL = {
    "type": "function",
    "function": {
        "name": "find_capital",
        "description": "Finds the capital of a country.",
        "parameters": {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]},
    },
}
CALL = {"type": "function", "function": {"name": "find_capital", "arguments": {"country": "Australia"}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Name the capital of Australia."},
]
CALLS = [*TURNS, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "Canberra"}]
ANSWER = {"role": "assistant", "content": "It is Canberra."}


def make_encoder(name: str, role: JudgmentRole = "user") -> Encoder:
    family: Family = next(family for family in FAMILIES if family.name == name)
    try:
        return Encoder(load_tokenizer(family), "chat", judgment_role=role)
    except UnavailableError as error:
        pytest.skip(str(error))


def check(
    encoder: Encoder, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, place: Any = None
) -> None:
    """Both contexts and the response are what the template renders for these messages."""
    record = JudgedRecord.model_validate({"messages": [*messages, ANSWER], "tools": tools, "judgment": "Too short."})
    ((row,), problems) = (lambda encoded: (encoded.rows, encoded.left_out))(
        encode_records([record], ["a:1"], encoder, 10**5)
    )
    assert not problems
    judged = add_judgment(record.conversation, "Too short.").messages
    if place is not None:
        judged = add_system_judgment(record.conversation, "Too short.", place).messages
    for ids, prompt in ((row["prompt_ids"], messages), (row["judged_prompt_ids"], judged)):
        rendered = encoder.tokenizer.apply_chat_template(
            [*prompt, ANSWER],
            tools=tools,
            tokenize=False,
            chat_template=encoder._chat._dated_sources[-1 if tools else 0],
        )
        expected = tokenize(encoder.tokenizer, rendered)
        found = [*ids, *row["response_ids"]]
        assert found == expected[: len(found)]
        assert found[-1] == encoder.end_of_turn_id
    assert row["response_ids"] == encoder.encode_response(ANSWER["content"])


@pytest.mark.parametrize("name", NAMES)
def test_several_turns(name: str) -> None:
    check(make_encoder(name), TURNS, None)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_turns_with_tools(name: str) -> None:
    check(make_encoder(name), CALLS, [TOOL])


@pytest.mark.parametrize(
    ("name", "omitted"),
    [
        *((name, []) for name in WITH_TOOLS),
        ("Llama 3 (first template)", ["calls", "descriptions"]),
        ("Yi", ["calls", "descriptions"]),
    ],
)
def test_what_a_template_leaves_out_is_said(name: str, omitted: list[str]) -> None:
    record = JudgedRecord.model_validate({"messages": [*CALLS, ANSWER], "tools": [TOOL], "judgment": "No."})
    plain = JudgedRecord.model_validate({"instruction": "Hi.", "output": "Ho."})
    found = make_encoder(name).describe_omissions([plain, record, record])
    assert sorted(sentence.split("leaves ")[1].split()[0] for sentence in found) == omitted
    assert all("which 2 of" in sentence for sentence in found)


@pytest.mark.parametrize("name", [*WITH_TOOLS, "Mistral Nemo", "Qwen3.5", "GLM-4.5", "Gemma 4"])
def test_arguments_of_calls_may_be_json_text(name: str) -> None:
    encoder = make_encoder(name)
    # Mistral's templates want an id of nine letters and digits, Gemma's the name of the function.
    (call,) = ({**call, "id": "call00000"} for call in CALLS[4]["tool_calls"])
    written = {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
    result = {**CALLS[5], "name": "find_capital", "tool_call_id": "call00000"}
    prompts = [
        encoder.render(Conversation((*CALLS[:4], {**CALLS[4], "tool_calls": [form]}, result), (TOOL,))).text
        for form in (call, written)
    ]
    assert prompts[0] == prompts[1]
    assert "Australia" in prompts[0].split("Name the capital of Australia.")[1]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("Qwen3", "end"), ("Llama 3.1", "end"), ("Llama 3.2", "end"), ("Qwen2.5", "end")),
        *(("gpt-oss", "start"), ("DeepSeek-V3", "start"), ("Qwen3.5", "start")),
    ],
)
def test_the_judgment_as_a_system_message(name: str, place: str) -> None:
    encoder = make_encoder(name, "system")
    assert encoder._system_place == place
    check(encoder, TURNS, None, place)
    if name in WITH_TOOLS:
        check(encoder, CALLS, [TOOL], place)
    plain, judged = (encoder.render(Conversation(tuple(CALLS[:4])), judgment).text for judgment in (None, "Too short."))
    num_shared = plain.index("Name the capital of Australia." if place == "end" else "Be brief.")
    assert plain[:num_shared] == judged[:num_shared]


def test_gemma_2_has_no_system_messages() -> None:
    with pytest.raises(ConfigError) as error:
        make_encoder("Gemma 2", "system")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("name", ["Qwen3", "Llama 3.2", "gpt-oss"])
def test_control_tokens_in_any_message_stay_text(name: str) -> None:
    encoder = make_encoder(name)
    end = encoder.tokenizer.decode([encoder.end_of_turn_id])
    found = {"role": "tool", "content": f"Canberra{end}"}
    plain = encoder.encode_prompt(Conversation(tuple(CALLS), (TOOL,)))
    spelled = encoder.encode_prompt(Conversation((*CALLS[:-1], found), (TOOL,)))
    control = encoder._control_ids
    assert [index for index in spelled if index in control] == [index for index in plain if index in control]
    assert end in encoder.tokenizer.decode(spelled)


def test_old_turns_are_dropped_whole() -> None:
    encoder = make_encoder("Qwen3")
    history = [{"role": role, "content": f"Turn {number}."} for number in range(20) for role in ("user", "assistant")]
    messages = [TURNS[0], *history, TURNS[-1]]
    record = JudgedRecord.model_validate({"messages": [*messages, ANSWER], "judgment": "Too short."})
    encoded = encode_records([record], ["a:1"], encoder, 100)
    (row,) = encoded.rows
    assert encoded.num_truncated == 1
    assert len(row["judged_prompt_ids"]) + len(row["response_ids"]) <= 100
    text = encoder.tokenizer.decode(row["judged_prompt_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTurn ")
    assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant")
    assert "Turn 19." in text
    assert "Turn 0." not in text
    # Both contexts have the same turns.
    assert encoder.tokenizer.decode(row["prompt_ids"]).count("Turn") == text.count("Turn")
    too_long = encode_records([record], ["a:1"], encoder, 20)
    assert not len(too_long.rows)
    assert len(too_long.left_out) == 1


def test_the_alpaca_prompt_refuses_conversations_by_name() -> None:
    tokenizer = make_encoder("Qwen3").tokenizer
    record = JudgedRecord.model_validate({"messages": [*TURNS, ANSWER], "judgment": "Too short."})
    with pytest.raises(DataError) as error:
        encode_records([record], ["a:1"], Encoder(tokenizer, "alpaca"), 100)
    assert [problem[:4] for problem in error.value.problems] == ["a:1:"]
    with pytest.raises(DataError) as error:
        encode_records([record] * 9, [f"a:{number}" for number in range(9)], Encoder(tokenizer, "alpaca"), 100)
    assert len(error.value.problems) == 9
    (line,) = str(error.value).splitlines()
    assert line.startswith("a:0 and 8 more rows: template: alpaca")
    assert json.dumps(record.model_dump(mode="json"))
