"""Tests of `template: chat` with the tokenizers and chat templates of real model families.

A prompt and its response must be what the model's own template renders for the conversation with this answer, through
the token that ends the assistant's turn; `real.manifest` says for each family what that is.
"""

import contextlib
import datetime
import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import SHARED
from encoders import encode_turns
from real.manifest import FAMILIES, Family
from real.manifest import load_tokenizer as load_real_tokenizer
from real.packages import UnavailableError

from cutlm.data.conversations import Conversation
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import RenderError, add_judgment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Name the capital of Australia."
JUDGMENT = "The answer is Sydney, which is wrong."
ANSWER = "The capital is Canberra."
# White space at the ends, Windows line ends, emoji of several code points, right-to-left text, and code.
TEXTS = [
    " Canberra.",
    "Canberra. ",
    "\n\nCanberra,\nof course.\n\n",
    "  one\n\n   two\t",
    "a\r\nb\r\n",
    "👩‍👩‍👧 كانبرا 堪培拉 é",
    "Answer:",
    "if x:\n    print('<b>')\n",
]


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[str], *, is_prompt: bool = False) -> str:
    """Render messages of the user and the assistant in turn by the tokenizer itself."""
    roles = ["user", "assistant"] * len(messages)
    conversation = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=is_prompt)
    assert isinstance(text, str)
    return text


def render_turn(family: Family, tokenizer: "PreTrainedTokenizerBase", instruction: str, answer: str) -> tuple[str, str]:
    """Return the text of a prompt and of the response to it, as the template writes them."""
    stripped = {"": answer, "both": answer.strip(), "right": answer.rstrip(), "newlines": answer.lstrip("\n")}
    shown = stripped[family.strips]
    response = family.response.replace("ANSWER", shown)
    text = render(tokenizer, [instruction, answer])
    # A template that does not end the turn writes the token only before the next one.
    if family.end_of_turn not in text[text.rindex(family.opening) :]:
        text += family.end_of_turn
    end = text.rindex(family.opening + response) + len(family.opening)
    return text[:end], response


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_end_of_turn_token_is_the_familys(family: Family, encoder: Encoder) -> None:
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id) == family.end_of_turn


def test_prompt_and_response_are_what_the_template_renders(family: Family, encoder: Encoder) -> None:
    prompt, response = render_turn(family, encoder.tokenizer, INSTRUCTION, ANSWER)
    prompt_ids, response_ids = encoder.encode_prompt(INSTRUCTION), encoder.encode_response(ANSWER)
    assert prompt_ids == tokenize(encoder.tokenizer, prompt)
    assert prompt_ids + response_ids == tokenize(encoder.tokenizer, prompt + response)
    assert response_ids.count(encoder.end_of_turn_id) == 1


def test_the_judged_context_is_what_the_template_renders(family: Family, encoder: Encoder) -> None:
    judged = add_judgment(Conversation.start(INSTRUCTION), JUDGMENT).instruction
    assert INSTRUCTION in judged
    assert JUDGMENT in judged
    texts = render_turn(family, encoder.tokenizer, judged, ANSWER)
    ids = encoder.encode_prompt(INSTRUCTION, JUDGMENT) + encoder.encode_response(ANSWER)
    assert ids == tokenize(encoder.tokenizer, "".join(texts))


def test_a_generation_prompt_is_what_the_template_renders(encoder: Encoder) -> None:
    prompt = render(encoder.tokenizer, [INSTRUCTION], is_prompt=True)
    ids = encoder.encode_generation_prompt(INSTRUCTION)
    assert ids == tokenize(encoder.tokenizer, prompt)
    assert encoder.encode_prompt(INSTRUCTION) == ids[: len(encoder.encode_prompt(INSTRUCTION))]


def test_a_conversation_is_what_the_template_renders(encoder: Encoder) -> None:
    messages = [INSTRUCTION, ANSWER, "Since when?"]
    expected = tokenize(encoder.tokenizer, render(encoder.tokenizer, messages, is_prompt=True))
    assert encode_turns(encoder, messages) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_odd_instructions_are_tokenized_as_the_model_does(family: Family, encoder: Encoder, text: str) -> None:
    prompt, _ = render_turn(family, encoder.tokenizer, text, ANSWER)
    assert encoder.encode_prompt(text) == tokenize(encoder.tokenizer, prompt)


@pytest.mark.parametrize("text", TEXTS)
def test_odd_answers_are_written_as_the_template_does(family: Family, encoder: Encoder, text: str) -> None:
    prompt_ids, response_ids = encoder.encode_prompt(INSTRUCTION), encoder.encode_response(text)
    expected = tokenize(encoder.tokenizer, "".join(render_turn(family, encoder.tokenizer, INSTRUCTION, text)))
    if expected[: len(prompt_ids)] == prompt_ids:
        assert prompt_ids + response_ids == expected
    else:  # the answer's first characters merge with the prompt's last ones
        assert decode(encoder.tokenizer, prompt_ids + response_ids) == decode(encoder.tokenizer, expected)


def test_texts_have_the_same_ids_in_a_batch(family: Family, encoder: Encoder) -> None:
    texts = [INSTRUCTION, *TEXTS, *spell(find_control_tokens(family, encoder.tokenizer)), ANSWER, *TEXTS]
    prompts = [encoder.render(text, judgment) for text in texts for judgment in (None, JUDGMENT)]
    assert encoder.encode_prompts(prompts) == [encoder.encode_prompts([prompt])[0] for prompt in prompts]
    answers = []
    for text in texts:
        with contextlib.suppress(RenderError):  # a template may remove reasoning
            answers.append(encoder.render_response(text))
    assert len(answers) > len(TEXTS)
    assert encoder.encode_responses(answers) == [encoder.encode_responses([answer])[0] for answer in answers]


def find_control_tokens(family: Family, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Find the tokens that only a template may write, by their text."""
    text = render(tokenizer, [INSTRUCTION, ANSWER, INSTRUCTION], is_prompt=True)
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    written = {content: index for content, index in tokens.items() if not content.isspace() and content in text}
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    family_tokens = {token.content: tokens[token.content] for token in family.tokens}
    return special | family_tokens | written | {family.end_of_turn: tokenizer.convert_tokens_to_ids(family.end_of_turn)}


def spell(control: dict[str, int]) -> list[str]:
    """Texts that spell out control tokens, alone, in a row and next to white space."""
    row = "".join(control)
    return [*control, row, f" {row} ", "\n".join(f"{token} x" for token in control)]


def test_control_tokens_in_an_instruction_stay_text(family: Family, encoder: Encoder) -> None:
    control = find_control_tokens(family, encoder.tokenizer)

    def keep_control(ids: list[int]) -> list[int]:
        return [index for index in ids if index in control.values()]

    for text in spell(control):
        for judgment in (None, text):
            instruction = f"What does {text} mean?"
            [(start, end)] = encoder.render(instruction, judgment).user_spans
            ids = encoder.encode_prompt(instruction, judgment)
            assert keep_control(ids) == keep_control(encoder.encode_prompt("What?")), text
            assert encoder.render(instruction, judgment).text[start:end] in decode(encoder.tokenizer, ids)


def test_control_tokens_at_the_start_of_an_instruction_stay_text(family: Family, encoder: Encoder) -> None:
    control = find_control_tokens(family, encoder.tokenizer)
    plain = [index for index in encoder.encode_prompt("What?") if index in control.values()]
    for text in spell(control):
        ids = encoder.encode_prompt(f"{text}What?")
        assert [index for index in ids if index in control.values()] == plain, text
        assert f"{text}What?".strip() in decode(encoder.tokenizer, ids)


def test_control_tokens_in_an_answer_stay_text_or_are_refused(family: Family, encoder: Encoder) -> None:
    control = find_control_tokens(family, encoder.tokenizer)
    plain = [index for index in encoder.encode_response("It.") if index in control.values()]
    prompt_ids = encoder.encode_prompt(INSTRUCTION)
    frame = render(encoder.tokenizer, [INSTRUCTION, "PLACEHOLDER"])
    for text in spell(control):
        answer = f"It {text} is."
        is_rendered = render(encoder.tokenizer, [INSTRUCTION, answer]) == frame.replace("PLACEHOLDER", answer)
        try:
            ids = encoder.encode_response(answer)
        except RenderError:
            assert not is_rendered, text  # a template may remove reasoning
            continue
        assert is_rendered, text
        assert [index for index in ids if index in control.values()] == plain, text
        assert answer in decode(encoder.tokenizer, prompt_ids + ids)


@pytest.mark.parametrize("text", [ANSWER, *TEXTS])
def test_spans_cover_the_answer_and_not_what_the_template_writes(family: Family, encoder: Encoder, text: str) -> None:
    ids = encoder.encode_response(text)
    spans = encoder.locate_tokens(text, ids)
    assert len(spans) == len(ids)
    covered = {index for start, end in spans for index in range(start, end)}
    assert covered >= {index for index, character in enumerate(text) if not character.isspace()}
    num_template_tokens = encoder.count_template_tokens(ids)
    assert all(start == end for start, end in spans[:num_template_tokens])
    before_answer = family.response.partition("ANSWER")[0]
    if not before_answer or before_answer.strip():  # white space alone may merge with the answer
        assert bool(num_template_tokens) == bool(before_answer)


def test_prompts_depend_on_the_date_only_if_the_template_prints_it(encoder: Encoder) -> None:
    first, second = (
        Encoder(encoder.tokenizer, "chat", datetime.date(2025, 1, day)).encode_prompt(INSTRUCTION) for day in (2, 3)
    )
    assert (first != second) == ("strftime_now" in encoder.tokenizer.get_chat_template())
    assert encoder.fingerprint == Encoder(encoder.tokenizer, "chat", datetime.date(2025, 1, 2)).fingerprint


def test_alpaca_prompts_start_as_the_tokenizer_starts_texts(
    family: Family, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    encoder = Encoder(tokenizer, "alpaca")
    prompt, ids = encoder.render(" Name a\ncolour.").text, encoder.encode_prompt(" Name a\ncolour.")
    prefix_ids = tokenizer.convert_tokens_to_ids(re.findall(r"<[^>]*>|\[[^]]*\]|sop", family.alpaca_prefix))
    assert ids[: len(prefix_ids)] == prefix_ids
    assert set(tokenizer.all_special_ids).isdisjoint(ids[len(prefix_ids) :])
    assert decode(tokenizer, ids[len(prefix_ids) :]).removeprefix(" ") == prompt
    response_ids = encoder.encode_response(ANSWER)
    assert response_ids[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, ids + response_ids[:-1]).endswith(prompt + ANSWER)


def test_a_chat_template_for_alpaca_prompts_gives_the_same_ids(tokenizer: "PreTrainedTokenizerBase") -> None:
    encoder = Encoder(tokenizer, "alpaca")
    template = encoder.build_chat_template()
    if template is None:
        pytest.skip("no chat template prompts this tokenizer as in training")
    for text in (INSTRUCTION, *TEXTS):
        messages = [{"role": "user", "content": text}]
        options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
        assert tokenizer.apply_chat_template(messages, **options) == encoder.encode_prompt(text)


# Tokenizers whose behaviour is easily lost: `legacy: true`, tokens with rstrip, an unusual prefix or an end token.
@pytest.mark.parametrize("name", ["Llama 2", "Yi", "InternLM2", "GLM-4.5"])
def test_a_saved_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    try:
        tokenizer = load_real_tokenizer(next(family for family in FAMILIES if family.name == name))
    except UnavailableError as error:
        pytest.skip(str(error))
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    for template in ("chat", "alpaca"):
        before, after = Encoder(tokenizer, template), Encoder(saved, template)
        for text in (INSTRUCTION, *TEXTS, "<s> </s> <|user|>"):
            assert after.encode_prompt(text) == before.encode_prompt(text)
            assert after.encode_response(text) == before.encode_response(text)


# Where a template has several turns in the manifest, the one without arguments.
_CASES = {
    "Gemma 2": "Gemma 2",
    "Phi-3 mini": "Phi-3 mini",
    "gpt-oss": "gpt-oss",
    "Llama 2 chat": "Llama 2",
    "Qwen3": "Qwen3",
    "Llama 3.2": "Llama 3.2",
    "DeepSeek-V3": "DeepSeek-V3",
}


def test_the_manifest_agrees_with_the_published_cases() -> None:
    path = SHARED / "cases" / "chat_formats.json"
    if not path.is_file():
        pytest.skip("no published cases beside the checkout")
    families = {family.name: family for family in FAMILIES}
    for case in json.loads(path.read_text("utf-8")):
        family = families[_CASES[case["family"]]]
        assert family.end_of_turn == case["end_of_turn"]
        assert (family.opening + family.response).endswith(case["turn"].replace("|ANSWER|", "ANSWER"))


def test_the_page_of_chat_formats_is_up_to_date() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "chat_formats.py"))
    page = script["PAGE"].read_text("utf-8")
    try:
        assert script["update_tables"](page) == page
    except UnavailableError as error:
        pytest.skip(str(error))
