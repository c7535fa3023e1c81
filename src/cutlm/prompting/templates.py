"""Prompt templates: how an instruction, and a judgment of the response to it, become the text before a response.

Two templates: `alpaca`, the text of the paper and its released code, and `chat`, the tokenizer's own chat template.
Turning the text into token ids is left to `cutlm.prompting.encoding`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jinja2 import TemplateError

from cutlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["alpaca", "chat"]
TEMPLATES: tuple[TemplateName, ...] = ("alpaca", "chat")

_ALPACA_TASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_JUDGED_TASK = (
    "Below is an instruction that describes a task. Write a response to the instruction and the response should match"
    " the corresponding judgment.\n\n"
)
_ALPACA_INSTRUCTION = "### Instruction:\n"
_ALPACA_JUDGMENT = "\n\n### Judgment:\n"
_ALPACA_RESPONSE_MARK = "### Response:\n"
_ALPACA_RESPONSE = "\n\n" + _ALPACA_RESPONSE_MARK

_ALPACA_REFINEMENT_TASK = (
    "Below is an instruction that describes a task, a response to it, and a judgment of that response. Write an"
    " improved response that leaves the judgment nothing to object to.\n\n"
)
_ALPACA_DRAFT = "\n\n### Draft:\n"

# After the instruction, in the same turn, so that both contexts begin with the same tokens for as long as possible.
_CHAT_JUDGMENT = "\n\nWrite a response that this judgment fits:\n"
_CHAT_DRAFT, _CHAT_OBJECTION = "\n\nA draft of the response:\n", "\n\nWhat was said about the draft:\n"
_CHAT_REFINE = "\n\nWrite an improved response, and nothing else."
_STAND_IN = "[text {} of the conversation]"


class Prompt(NamedTuple):
    """The text before a response.

    Attributes:
        text: All of it.
        content_start: Where the text of the user begins; before it, and after `content_end`, special tokens of a
            chat template count as such.
        content_end: Where the text of the user ends. What follows is the same for every prompt of a template.
    """

    text: str
    content_start: int
    content_end: int

    @property
    def tail(self) -> str:
        """What stands between the user's text and the response."""
        return self.text[self.content_end :]


def render_alpaca_prompt(instruction: str, judgment: str | None = None) -> Prompt:
    """Renders the alpaca prompt, letter by letter that of the paper's code."""
    if judgment is None:
        start, content = _ALPACA_TASK + _ALPACA_INSTRUCTION, instruction
    else:
        start, content = _ALPACA_JUDGED_TASK + _ALPACA_INSTRUCTION, instruction + _ALPACA_JUDGMENT + judgment
    return Prompt(start + content + _ALPACA_RESPONSE, len(start), len(start) + len(content))


def render_refinement_prompt(instruction: str, response: str, judgment: str) -> Prompt:
    """Renders, in the alpaca style, the request to rewrite a response so that its judgment no longer holds.

    The text is our own: the paper's code has none (its ILF baselines take refinements that came with the data).
    """
    start = _ALPACA_REFINEMENT_TASK + _ALPACA_INSTRUCTION
    content = instruction + _ALPACA_DRAFT + response + _ALPACA_JUDGMENT + judgment
    return Prompt(start + content + _ALPACA_RESPONSE, len(start), len(start) + len(content))


def render_chat_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str, judgment: str | None = None) -> Prompt:
    """Renders one user turn, and the opening of the assistant's, by the tokenizer's own chat template.

    Raises:
        ConfigError: The tokenizer has no chat template, or its template does not show the user's text as it is.
    """
    content = instruction if judgment is None else instruction + _CHAT_JUDGMENT + judgment
    text, [(start, end)] = render_chat_conversation(tokenizer, [content])
    return Prompt(text, start, end)


def render_chat_conversation(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """Renders the turns of a conversation, and the opening of the assistant's next one.

    Args:
        tokenizer: With a chat template.
        texts: What was said, by the user and the assistant in turn; the first and the last are the user's.

    Returns:
        The text, and where each of `texts` stands in it: [start, end). Of what the assistant said a template may leave
        out a part, such as its thoughts.

    Raises:
        ConfigError: The tokenizer has no chat template, or its template does not show the user's texts as they are.
    """
    # Where a text stands is read off a rendering of stand-ins: a short one may well occur in the template's own words,
    # and some templates trim what they are given.
    stand_ins = [_STAND_IN.format(place) for place in range(len(texts))]
    frame = _apply_chat_template(tokenizer, stand_ins)
    whole, spans = "", []
    for place, text in enumerate(texts):
        rendered = _apply_chat_template(tokenizer, [*stand_ins[:place], text, *stand_ins[place + 1 :]])
        before, _, after = frame.partition(stand_ins[place])
        shown = rendered[len(before) : len(rendered) - len(after)]
        is_own = place % 2 == 1 or shown in (text, text.strip())
        if stand_ins[place] not in frame or before + shown + after != rendered or not is_own:
            raise ConfigError(
                "template: chat: the tokenizer's chat template changes the user's text; use template: alpaca"
            )
        whole += before[before.rfind(stand_ins[place - 1]) + len(stand_ins[place - 1]) :] if place else before
        spans.append((len(whole), len(whole) + len(shown)))
        whole += shown
    return whole + after, spans


def _apply_chat_template(tokenizer: "PreTrainedTokenizerBase", contents: Sequence[str]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"template: chat: the tokenizer {tokenizer.name_or_path!r} has no chat template; use template: alpaca, or"
            " a tokenizer with one"
        )
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(
            f"template: chat: the tokenizer's chat template does not take what was said ({error}); use template: alpaca"
        ) from None
    assert isinstance(text, str)
    return text


def render_chat_refinement_prompt(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, response: str, judgment: str
) -> Prompt:
    """Renders the same request as one user turn of the tokenizer's own chat template."""
    content = f"{instruction}{_CHAT_DRAFT}{response}{_CHAT_OBJECTION}{judgment}{_CHAT_REFINE}"
    return render_chat_prompt(tokenizer, content)


def build_alpaca_chat_template(has_bos: bool, gap: str = "") -> str:
    """The alpaca prompt as a Jinja chat template, so that other tools prompt a trained model rightly.

    One user turn gives exactly the training prompt. Further turns follow in the same style.

    Args:
        has_bos: Whether the tokenizer begins every text with a beginning-of-sequence token, which tools do not add
            to a rendered chat template.
        gap: What to put after it, for tokenizers that would otherwise split the first word differently.
    """
    start = f"{{{{ bos_token }}}}{gap}" if has_bos else ""
    return (
        start
        + "{{ '"
        + _escape(_ALPACA_TASK)
        + "' }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '"
        + _escape(_ALPACA_RESPONSE_MARK)
        + "' + message['content'] + eos_token + '\\n\\n' }}{% elif message['role'] == 'user' %}{{ '"
        + _escape(_ALPACA_INSTRUCTION)
        + "' + message['content'] + '\\n\\n' }}{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '"
        + _escape(_ALPACA_RESPONSE_MARK)
        + "' }}{% endif %}"
    )


def _escape(text: str) -> str:
    return text.replace("\n", "\\n")
