"""Prompt templates: the text that precedes a response.

Two templates: `alpaca`, the text of the paper and its released code, and `chat`, the tokenizer's own chat template.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
_ALPACA_RESPONSE = "### Response:\n"

# The paper's code has no refinement prompt: its ILF baselines take refinements from the data.
_ALPACA_REFINEMENT_TASK = (
    "Below is an instruction that describes a task, a response to it, and a judgment of that response. Write an"
    " improved response that leaves the judgment nothing to object to.\n\n"
)
_ALPACA_DRAFT = "\n\n### Draft:\n"

# The judgment follows the instruction in the same turn, so that both contexts share the longest possible prefix.
_CHAT_JUDGMENT = "\n\nWrite a response that this judgment fits:\n"
_CHAT_DRAFT, _CHAT_OBJECTION = "\n\nA draft of the response:\n", "\n\nWhat was said about the draft:\n"
_CHAT_REFINE = "\n\nWrite an improved response, and nothing else."
_PLACEHOLDER = "[text {} of the conversation]"


class Prompt(NamedTuple):
    """The text that precedes a response.

    `user_spans` are the [start, end) of text written by a user or a model, in characters and in order; special tokens
    of a chat template count as such only outside of these.
    """

    text: str
    user_spans: list[tuple[int, int]]

    @property
    def tail(self) -> str:
        """The text between the last user text and the response; the same for every prompt of a template."""
        return self.text[self.user_spans[-1][1] :]


def render_alpaca_prompt(instruction: str, judgment: str | None = None) -> Prompt:
    """Render the alpaca prompt exactly as the paper's code does."""
    if judgment is None:
        return _render_alpaca(_ALPACA_TASK, instruction)
    return _render_alpaca(_ALPACA_JUDGED_TASK, instruction + _ALPACA_JUDGMENT + judgment)


def render_refinement_prompt(instruction: str, response: str, judgment: str) -> Prompt:
    """Render the request to improve a response so that its judgment no longer applies, in the alpaca style."""
    content = instruction + _ALPACA_DRAFT + response + _ALPACA_JUDGMENT + judgment
    return _render_alpaca(_ALPACA_REFINEMENT_TASK, content)


def _render_alpaca(task: str, content: str) -> Prompt:
    start = task + _ALPACA_INSTRUCTION
    return Prompt(f"{start}{content}\n\n{_ALPACA_RESPONSE}", [(len(start), len(start) + len(content))])


class ChatTemplate:
    """A tokenizer's own chat template, which also locates each message in the rendered text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"template: chat: the tokenizer {tokenizer.name_or_path!r} has no chat template; use template: alpaca,"
                " or a tokenizer with one"
            )
        self._tokenizer = tokenizer
        self._frames: dict[int, str] = {}

    def render_prompt(self, instruction: str, judgment: str | None = None) -> Prompt:
        """Render one user turn and the start of the assistant's turn."""
        return self.render([instruction if judgment is None else instruction + _CHAT_JUDGMENT + judgment])

    def render_refinement_prompt(self, instruction: str, response: str, judgment: str) -> Prompt:
        """Render the request to improve a response as one user turn."""
        return self.render([f"{instruction}{_CHAT_DRAFT}{response}{_CHAT_OBJECTION}{judgment}{_CHAT_REFINE}"])

    def render(self, messages: Sequence[str]) -> Prompt:
        """Render a conversation and the start of the assistant's next turn.

        Messages are of the user and the assistant in turn; the first and the last are the user's. A template may drop
        parts of the assistant's messages, such as its reasoning.

        Raises:
            ConfigError: The template refuses the messages or alters those of the user.
        """
        placeholders = [_PLACEHOLDER.format(index) for index in range(len(messages))]
        frame = self._frames.get(len(messages))
        if frame is not None and (prompt := self._fill(frame, placeholders, messages)):
            return prompt
        # Not cached, or out of date: a template may write the current time, or was replaced.
        frame = self._frames[len(messages)] = self._apply(placeholders)
        if prompt := self._fill(frame, placeholders, messages):
            return prompt
        raise ConfigError("template: chat: the tokenizer's chat template changes the user's text; use template: alpaca")

    def _fill(self, frame: str, placeholders: list[str], messages: Sequence[str]) -> Prompt | None:
        """Put messages in place of a frame's placeholders; None if the template does not render them like that.

        Searching the rendered text for a message would not do: a short one may occur in the template's own words, and
        some templates strip messages.
        """
        text, spans, rest = "", [], frame
        for index, message in enumerate(messages):
            rendered = self._apply([*placeholders[:index], message, *placeholders[index + 1 :]])
            before, _, after = frame.partition(placeholders[index])
            shown = rendered[len(before) : len(rendered) - len(after)]
            is_unaltered = index % 2 == 1 or shown in (message, message.strip())
            gap, is_found, rest = rest.partition(placeholders[index])
            if not is_found or before + shown + after != rendered or not is_unaltered:
                return None
            text += gap
            spans.append((len(text), len(text) + len(shown)))
            text += shown
        return Prompt(text + rest, spans)

    def _apply(self, contents: Sequence[str]) -> str:
        options: Any = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = self._tokenizer.apply_chat_template(make_messages(contents), **options)
        except TemplateError as error:
            message = f"template: chat: the tokenizer's chat template does not accept the messages ({error})"
            raise ConfigError(f"{message}; use template: alpaca") from None
        assert isinstance(text, str)
        return text


def make_messages(contents: Sequence[str]) -> list[dict[str, str]]:
    """Make messages of the user and the assistant in turn, the first by the user."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def build_alpaca_chat_template(has_bos: bool, gap: str = "") -> str:
    """Build the alpaca prompt as a Jinja chat template, so that other tools prompt a trained model as it was trained.

    One user turn gives exactly the training prompt; further turns follow in the same style. If the tokenizer starts
    every text with a beginning-of-sequence token (`has_bos`), the template does, because tools do not add it; some
    tokenizers need a gap after it to split the first word as usual.
    """
    start = f"{{{{ bos_token }}}}{gap}" if has_bos else ""
    parts = (_ALPACA_TASK, _ALPACA_INSTRUCTION, _ALPACA_RESPONSE)
    task, instruction, response = (part.replace("\n", "\\n") for part in parts)
    return (
        f"{start}{{{{ '{task}' }}}}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
        f"{{{{ '{response}' + message['content'] + eos_token + '\\n\\n' }}}}{{% elif message['role'] == 'user' %}}"
        f"{{{{ '{instruction}' + message['content'] + '\\n\\n' }}}}{{% else %}}{{{{ message['content'] + '\\n\\n' }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{response}' }}}}{{% endif %}}"
    )
