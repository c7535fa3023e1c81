"""Prompt templates: the text that precedes a response.

Two templates: `alpaca`, the text of the paper and its released code, and `chat`, the tokenizer's own chat template.
"""

import copy
import datetime
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from cutlm.data.conversations import Conversation, Message, read_json_text
from cutlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["alpaca", "chat"]
TEMPLATES: tuple[TemplateName, ...] = ("alpaca", "chat")
JudgmentRole = Literal["user", "system"]
JUDGMENT_ROLES: tuple[JudgmentRole, ...] = ("user", "system")

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
ALPACA_TAIL = "\n\n" + _ALPACA_RESPONSE  # from the end of the user's text to the response

# The paper's code has no refinement prompt: its ILF baselines take refinements from the data.
_ALPACA_REFINEMENT_TASK = (
    "Below is an instruction that describes a task, a response to it, and a judgment of that response. Write an"
    " improved response that leaves the judgment nothing to object to.\n\n"
)
_ALPACA_DRAFT = "\n\n### Draft:\n"
_ALPACA_ADVISED_TASK = (
    "Below is an instruction that describes a task, and a judgment of an earlier response. Write a good response that"
    " does not have this problem.\n\n"
)

# The judgment follows the instruction in the same turn, so that both contexts share the longest possible prefix.
_JUDGMENT_REQUEST = "Write a response that this judgment fits:\n"
_CHAT_JUDGMENT = "\n\n" + _JUDGMENT_REQUEST
_CHAT_DRAFT, _CHAT_OBJECTION = "\n\nA draft of the response:\n", "\n\nWhat was said about the draft:\n"
_CHAT_REFINE = "\n\nWrite an improved response, and nothing else."
_CHAT_ADVICE = "\n\nWrite a good response that does not have this problem:\n"
_CHANGES_USER_TEXT = "template: chat: the tokenizer's chat template changes the user's text; use template: alpaca"
_PLACEHOLDER = "[text {} of the conversation]"


class Prompt(NamedTuple):
    """The text that precedes a response.

    `user_spans` are the [start, end) of texts by a user or a model, in characters and in order; control tokens of a
    chat template count as such only outside of these. Empty if no text spells out a control token.
    """

    text: str
    user_spans: list[tuple[int, int]]


def add_judgment(conversation: Conversation, judgment: str) -> Conversation:
    """Return a conversation whose last message by the user asks for a response that a judgment fits."""
    return conversation.replace_instruction(conversation.instruction + _CHAT_JUDGMENT + judgment)


def add_system_judgment(conversation: Conversation, judgment: str, place: Literal["start", "end"]) -> Conversation:
    """Return a conversation with a system message that asks for a response that a judgment fits.

    At the end it is a separate message, so that both contexts share the whole conversation. At the start it continues
    the system prompt, if there is one.
    """
    text = _JUDGMENT_REQUEST + judgment
    messages = list(conversation.messages)
    if place == "end":
        messages.append({"role": "system", "content": text})
    elif messages[0]["role"] in ("system", "developer"):
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
    return Conversation(tuple(messages), conversation.tools)


def ask_for_refinement(conversation: Conversation, response: str, judgment: str) -> Conversation:
    """Return a conversation whose last message by the user asks to improve a response by its judgment."""
    return conversation.replace_instruction(
        f"{conversation.instruction}{_CHAT_DRAFT}{response}{_CHAT_OBJECTION}{judgment}{_CHAT_REFINE}"
    )


def add_advice(conversation: Conversation, judgment: str) -> Conversation:
    """Return a conversation whose last message by the user asks for a response without the problem of a judgment."""
    return conversation.replace_instruction(conversation.instruction + _CHAT_ADVICE + judgment)


def render_alpaca_prompt(instruction: str, judgment: str | None = None) -> Prompt:
    """Render the alpaca prompt exactly as the paper's code does."""
    if judgment is None:
        return _render_alpaca(_ALPACA_TASK, instruction)
    return _render_alpaca(_ALPACA_JUDGED_TASK, instruction + _ALPACA_JUDGMENT + judgment)


def render_refinement_prompt(instruction: str, response: str, judgment: str) -> Prompt:
    """Render the request to improve a response so that its judgment no longer applies, in the alpaca style."""
    content = instruction + _ALPACA_DRAFT + response + _ALPACA_JUDGMENT + judgment
    return _render_alpaca(_ALPACA_REFINEMENT_TASK, content)


def render_advised_prompt(instruction: str, judgment: str) -> Prompt:
    """Render the request of a response without the problem that a judgment names, in the alpaca style."""
    return _render_alpaca(_ALPACA_ADVISED_TASK, instruction + _ALPACA_JUDGMENT + judgment)


def _render_alpaca(task: str, content: str) -> Prompt:
    start = task + _ALPACA_INSTRUCTION
    return Prompt(f"{start}{content}\n\n{_ALPACA_RESPONSE}", [(len(start), len(start) + len(content))])


class AnswerFormat(NamedTuple):
    """Text of a chat template around an answer."""

    prompt: str  # from the end of the user's text to the end of the generation prompt
    before: str  # from the end of the user's text to the answer
    after: str  # after the answer, if nothing follows
    after_in_history: str  # after the answer, if a user's turn follows; up to the user's text


class RenderError(ConfigError):
    """A template refuses a text, or renders it as another one."""


class ChatTemplate:
    """A tokenizer's own chat template, which also locates texts that spell out control tokens.

    Args:
        tokenizer: A tokenizer with a chat template.
        date: The date for templates that print today's.
        control_tokens: The tokens that only the template may write.

    Raises:
        ConfigError: The tokenizer has no chat template, or it does not render an answer.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", date: datetime.date, control_tokens: Sequence[str] = ()
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"template: chat: the tokenizer {tokenizer.name_or_path!r} has no chat template; use template: alpaca,"
                " or a tokenizer with one"
            )
        self._tokenizer = tokenizer
        self.sources = list_template_sources(tokenizer)
        self._dated_sources = [insert_date(source, date) for source in self.sources]
        self._control = re.compile("|".join(map(re.escape, filter(None, control_tokens))) or "(?!)")
        self.answer_format = self._find_answer_format()

    @property
    def prints_date(self) -> bool:
        """Whether the rendered text depends on the date."""
        return self._dated_sources != self.sources

    def render(self, conversation: Conversation) -> Prompt:
        """Render a conversation and the start of the assistant's next turn.

        A template may drop parts of the assistant's messages, such as its reasoning.

        Raises:
            RenderError: The template refuses the messages or alters those of the user.
        """
        conversation = self._convert_arguments(conversation)
        text = self._apply(conversation.messages, conversation.tools)
        position = 0
        for message in conversation.messages:
            if message["role"] == "user":
                content = message["content"].strip()
                position = text.find(content, position)
                if position < 0:
                    raise RenderError(_CHANGES_USER_TEXT)
                position += len(content)
        return Prompt(text, self._locate_texts(conversation, text))

    def find_system_place(self) -> Literal["start", "end"]:
        """Return where the template renders a system message besides the system prompt.

        Many render one wherever it stands, others only at the start, and some drop, move or rename a later one.

        Raises:
            ConfigError: It renders no system messages.
        """
        user, system, judgment = (_PLACEHOLDER.format(index) for index in range(3))
        turn = {"role": "user", "content": user}
        if not self._renders_system([turn], 0, judgment):
            raise ConfigError(
                "judgment_role: system: the tokenizer's chat template renders no system messages; use judgment_role:"
                " user"
            )
        prompted = [{"role": "system", "content": system}, turn]
        is_last = all(self._renders_system(messages, len(messages), judgment) for messages in ([turn], prompted))
        return "end" if is_last else "start"

    def _renders_system(self, messages: Sequence[Message], index: int, text: str) -> bool:
        """Whether a system message at an index is rendered there, and differs from a message of another role."""

        def render(role: str) -> str | None:
            try:
                return self._apply([*messages[:index], {"role": role, "content": text}, *messages[index:]])
            except RenderError:
                return None

        rendered = render("system")
        if rendered is None or rendered in (render("user"), render("assistant")):
            return False
        contents = [str(message["content"]) for message in messages]
        contents.insert(index, text)
        places = [rendered.find(content) for content in contents]
        end = rendered.removesuffix(self.answer_format.prompt)
        return -1 not in places and places == sorted(places) and end.endswith(contents[-1])

    def render_with_system_judgment(
        self, conversation: Conversation, judgment: str, place: Literal["start", "end"]
    ) -> Prompt:
        """Render a conversation with a judgment as a system message.

        Raises:
            RenderError: The template refuses the messages, or leaves out this one.
        """
        prompt = self.render(add_system_judgment(conversation, judgment, place))
        if (_JUDGMENT_REQUEST + judgment).strip() not in prompt.text:
            raise RenderError(
                "judgment_role: system: the tokenizer's chat template leaves the judgment out of this conversation; use"
                " judgment_role: user"
            )
        return prompt

    def render_answer(self, response: str) -> str:
        """Return a response as the template writes it: some templates strip white space at its ends.

        Raises:
            RenderError: The template changes it otherwise, for example by removing reasoning.
        """
        before, after = self._answer_frame
        text = self._apply(_make_messages(_PLACEHOLDER.format(0), response), is_answered=True)
        shown = text[len(before) : len(text) - len(after)]
        if before + shown + after == text and shown in (response, *_strip_each(response)):
            return shown
        raise RenderError(
            "template: chat: the tokenizer's chat template does not render the response as it is written (templates may"
            " move or remove reasoning and markup); leave these out of it, or use template: alpaca"
        )

    def render_answered(self, conversation: Conversation, response: str) -> str:
        """Render a conversation with its answer, and the template's text after it."""
        answer = {"role": "assistant", "content": response}
        conversation = self._convert_arguments(conversation)
        return self._apply([*conversation.messages, answer], conversation.tools, is_answered=True)

    def describe_omissions(self, conversations: Iterable[Conversation]) -> list[str]:
        """List the parts of conversations that the template omits without an error, such as tool calls.

        A part is tried in the first conversation that has it.
        """
        first: dict[str, Conversation] = {}
        counts: Counter[str] = Counter()
        for conversation in conversations:
            for name in _find_parts(conversation):
                first.setdefault(name, conversation)
                counts[name] += 1
        return [
            f"the chat template leaves {name} out of the prompt, which {counts[name]} of the conversations have"
            for name, conversation in first.items()
            if self._is_without(name, self._convert_arguments(conversation))
        ]

    def _is_without(self, name: str, conversation: Conversation) -> bool:
        """Whether the template omits a part, or one of several messages of it, such as a second system message."""
        if name == _TOOLS:
            changes = [Conversation(conversation.messages)]
        else:
            changes = [
                _change_message(conversation, place, name)
                for place, message in enumerate(conversation.messages)
                if _name_part(place, message) == name
            ]
        text = self._apply(conversation.messages, conversation.tools)
        return any(self._renders_as(changed, text) for changed in changes)

    def _renders_as(self, conversation: Conversation, text: str) -> bool:
        try:
            return self._apply(conversation.messages, conversation.tools) == text
        except RenderError:  # then the change was looked at
            return False

    def _convert_arguments(self, conversation: Conversation) -> Conversation:
        """Return a conversation with the arguments of calls as the template reads them: objects or JSON text."""
        if not any(message.get("tool_calls") for message in conversation.messages):
            return conversation
        kind = self._arguments_kinds[-1 if conversation.tools else 0]
        messages = tuple(convert_arguments(message, kind) for message in conversation.messages)
        return Conversation(messages, conversation.tools)

    @cached_property
    def _arguments_kinds(self) -> list[type | None]:
        """The type of call arguments that each of `sources` renders well."""
        return [self._find_arguments_kind(tools) for tools in ((), [_TOOL])[: len(self.sources)]]

    def _find_arguments_kind(self, tools: Sequence[Mapping[str, Any]]) -> type | None:
        """Return the type of call arguments that the template renders well, dict or str; None if both or neither work.

        Servers give JSON text. Some templates write that as a JSON string, with escaped quotes; others refuse it.
        """
        written = json.dumps({"a": _PLACEHOLDER.format(0)})

        def is_rendered(arguments: Any) -> bool:
            call = {"id": "call00000", "type": "function", "function": {"name": "find", "arguments": arguments}}
            result = {"role": "tool", "content": "b", "name": "find", "tool_call_id": "call00000"}
            asked, *_ = _make_messages("c")
            messages: list[Mapping[str, Any]] = [
                asked,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                result,
            ]
            try:
                text = self._apply(messages, tools)
            except RenderError:
                return False
            return (written if isinstance(arguments, str) else _PLACEHOLDER.format(0)) in text

        takes_object, takes_text = is_rendered(json.loads(written)), is_rendered(written)
        return None if takes_object == takes_text else dict if takes_object else str

    def _locate_texts(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Find the texts of a rendered conversation, if any spells out a control token; otherwise it does not matter.

        They are rendered with marks around them, because a search could find a short text in the template's own words.
        """
        written = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
        if not self._spells_control_token(written):
            return []
        marks = _choose_marks(written)
        marked = self._apply([_mark_texts(message, marks) for message in conversation.messages], conversation.tools)
        spans, start, rendered = [], 0, ""
        for piece in re.split(f"([{''.join(marks)}])", marked):
            if piece == marks[0]:
                start = len(rendered)
            elif piece == marks[1]:
                spans.append((start, len(rendered)))
            else:
                rendered += piece
        if rendered == text and not self._spells_control_token(json.dumps(conversation.tools, ensure_ascii=False)):
            return spans
        raise RenderError(
            "template: chat: a text spells out a control token of the model, and the chat template moves or changes it,"
            " so that it could pass for the template's own; remove it from the text"
        )

    def _spells_control_token(self, text: str) -> bool:
        """Whether a text has a control token, as it is or once the tokenizer has normalized it."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer if self._tokenizer.is_fast else None
        forms = [text] if normalizer is None else [text, normalizer.normalize_str(text)]
        return any(self._control.search(form) for form in forms)

    def _find_answer_format(self) -> AnswerFormat:
        user, answer, reply = (_PLACEHOLDER.format(index) for index in range(3))
        text = self._apply(_make_messages(user, answer), is_answered=True)
        before, is_found, rest = text.partition(user)
        if not is_found:
            raise ConfigError(_CHANGES_USER_TEXT)
        opening, is_found, after = rest.partition(answer)
        if not is_found:
            raise ConfigError(
                "template: chat: the tokenizer's chat template does not render an answer of the assistant; use"
                " template: alpaca"
            )
        self._answer_frame = before + user + opening, after
        prompt = self._apply(_make_messages(user)).partition(user)[2]
        try:
            history = self._apply(_make_messages(user, answer, reply))
        except RenderError:  # a template of one turn
            history = ""
        return AnswerFormat(prompt, opening, after, history.partition(answer)[2].partition(reply)[0])

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, is_answered: bool = False
    ) -> str:
        """Render messages and, unless the last one is an answer, the start of an answer."""
        options: Any = {
            "chat_template": self._dated_sources[-1 if tools else 0],
            "tokenize": False,
            "add_generation_prompt": not is_answered,
            "tools": list(tools) or None,
        }
        try:
            text = self._tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except (TemplateError, TypeError) as error:  # a TypeError by an operation of the template on the messages
            message = f"template: chat: the tokenizer's chat template does not accept the messages ({error})"
            raise RenderError(f"{message}; use template: alpaca") from None
        assert isinstance(text, str)
        return text


# Parts of conversations that a template may leave out.
_SYSTEM, _LATER_SYSTEM, _DEVELOPER = "system messages", "system messages after the first message", "developer messages"
_CALLS, _RESULTS, _TOOLS = "calls of tools", "results of tools", "descriptions of tools"


def _find_parts(conversation: Conversation) -> set[str]:
    parts = {_name_part(place, message) for place, message in enumerate(conversation.messages)}
    return {name for name in (*parts, _TOOLS if conversation.tools else None) if name is not None}


def _name_part(place: int, message: Message) -> str | None:
    """Name the part that a message belongs to; None for a turn of the user or the assistant."""
    if message.get("tool_calls"):
        return _CALLS
    if not message["content"].strip():
        return None
    if message["role"] == "system":
        return _LATER_SYSTEM if place else _SYSTEM
    return {"developer": _DEVELOPER, "tool": _RESULTS}.get(message["role"])


def _change_message(conversation: Conversation, place: int, name: str) -> Conversation:
    """Return a conversation with one message without its calls of tools, or with another text."""
    message = conversation.messages[place]
    if name == _CALLS:
        changed: Message = {key: value for key, value in message.items() if key != "tool_calls"}
    else:
        changed = {**message, "content": _PLACEHOLDER.format(0)}
    messages = conversation.messages
    return Conversation((*messages[:place], changed, *messages[place + 1 :]), conversation.tools)


def convert_arguments(message: Message, kind: type | None) -> Message:
    """Return a message with the arguments of its calls as objects or as JSON text, if they are JSON."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        if "arguments" not in function:
            calls.append(call)
            continue
        arguments = function["arguments"]
        if kind is dict and isinstance(value := read_json_text(arguments), Mapping):
            arguments = value
        elif kind is str and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed = {**function, "arguments": arguments}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls} if calls else message


def _choose_marks(text: str) -> tuple[str, str]:
    """Choose two characters of the private use area that do not occur in a text."""
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    return next(free), next(free)


def _mark_texts(value: Any, marks: tuple[str, str], name: str = "") -> Any:
    """Enclose the texts of a message in marks, inside the white space at their ends; names stay as they are."""
    if isinstance(value, str):
        text = value.strip()
        if not text or name in ("role", "name", "id", "type", "tool_call_id"):
            return value
        start = value.index(text)
        return value[:start] + marks[0] + text + marks[1] + value[start + len(text) :]
    if isinstance(value, Mapping):
        return {key: _mark_texts(item, marks, key) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mark_texts(item, marks) for item in value]
    return value


def _make_messages(*contents: str) -> list[dict[str, str]]:
    return make_messages(contents)


def _strip_each(text: str) -> tuple[str, str, str]:
    return text.strip(), text.lstrip(), text.rstrip()


def make_messages(contents: Sequence[str]) -> list[dict[str, str]]:
    """Make messages of the user and the assistant in turn, the first by the user."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


# A tool with which the template for tools is tried.
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "find", "description": "e", "parameters": _PARAMETERS}}


# ---- The source of a chat template ----

_CALL_OF_DATE = re.compile(r"""strftime_now\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
# Default arguments are Jinja statements at the start of a template, after a comment from which they are read again.
_ARGUMENTS = re.compile(
    r"\{#- chat_template_kwargs: (\{.*?\}) -?#\}(?:\{%- if .*? is not defined %\}.*?\{%- endif %\})*", re.DOTALL
)
_RESERVED_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")


def get_template_source(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a tokenizer's chat template; of several named ones, the default."""
    return list_template_sources(tokenizer)[0]


def list_template_sources(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return a tokenizer's chat template, and the one for conversations with tools if that is another one."""
    sources = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    return list(dict.fromkeys(map(str, sources)))


def insert_date(source: str, date: datetime.date) -> str:
    """Replace a template's calls for today's date by a date, so that prompts do not depend on the clock."""
    return _CALL_OF_DATE.sub(lambda match: json.dumps(date.strftime(match[2])), source)


def parse_date(text: str | None) -> datetime.date:
    """Read a date such as 2026-11-26; None is today.

    Raises:
        ConfigError: It is not a date.
    """
    if text is None:
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(f"template_date: expected a date such as 2026-11-26, got {text!r}") from None


def read_arguments(source: str) -> tuple[dict[str, Any], str]:
    """Return the default arguments that `set_arguments` wrote into a template, and the template without them."""
    match = _ARGUMENTS.match(source)
    return (json.loads(match[1]), source[match.end() :]) if match else ({}, source)


def set_arguments(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Return a tokenizer whose chat template has default values for its arguments, such as `enable_thinking`.

    They are part of the template, so they are saved with the tokenizer, and every tool that does not set these
    arguments itself prompts the model as cutlm does. The tokenizer that is passed stays as it is.

    Args:
        tokenizer: A tokenizer with a chat template.
        arguments: By name; values as in JSON. Earlier defaults of other arguments are kept.

    Raises:
        ConfigError: There is no chat template, or it does not use an argument.

    Example:

        >>> tokenizer = set_arguments(tokenizer, {"enable_thinking": False})
    """
    if not arguments:
        return tokenizer
    if not tokenizer.chat_template:
        raise ConfigError(
            f"chat_template_kwargs: the tokenizer {tokenizer.name_or_path!r} has no chat template; remove the setting"
        )
    sources = list_template_sources(tokenizer)
    earlier = read_arguments(sources[0])[0]
    problems = []
    for name in arguments:
        if name in _RESERVED_ARGUMENTS or not name.isidentifier():
            problems.append(f"chat_template_kwargs: {name!r} is not an argument that can be set; remove it")
        elif not any(re.search(rf"\b{name}\b", read_arguments(source)[1]) for source in sources):
            problems.append(f"chat_template_kwargs: the chat template has no argument {name!r}; remove or correct it")
    if problems:
        raise ConfigError(problems)
    merged = earlier | dict(arguments)
    comment = json.dumps(merged).replace("#", "\\u0023")
    # Python's notation for JSON values is also Jinja's.
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in merged.items()
    )
    configured = copy.copy(tokenizer)
    start = f"{{#- chat_template_kwargs: {comment} #}}{defaults}"
    named = tokenizer.chat_template
    if isinstance(named, dict):
        configured.chat_template = {name: start + read_arguments(source)[1] for name, source in named.items()}
    else:
        configured.chat_template = start + read_arguments(named)[1]
    _check_arguments(tokenizer, configured, merged)
    return configured


def _check_arguments(
    tokenizer: "PreTrainedTokenizerBase", configured: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]
) -> None:
    """Check that defaults in the template give the same prompt as arguments of the call."""
    source = read_arguments(get_template_source(configured))[1]
    options: Any = {"tokenize": False, "add_generation_prompt": True}
    messages = make_messages([_PLACEHOLDER.format(0)])
    try:
        expected = tokenizer.apply_chat_template(messages, chat_template=source, **arguments, **options)
        text = configured.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"chat_template_kwargs: the chat template does not accept {dict(arguments)} ({error}); correct the values"
        ) from None
    if text != expected:
        raise ConfigError("chat_template_kwargs: the chat template does not allow defaults for them; edit it instead")


def fingerprint_template(template: TemplateName, sources: Sequence[str], judgment_role: JudgmentRole) -> str:
    """Identify the prompts of a template by its sources and arguments, not by what it renders on a certain day."""
    role = f" {judgment_role}" if judgment_role != "user" else ""
    if template == "alpaca":
        content: list[Any] = [
            _ALPACA_TASK,
            _ALPACA_JUDGED_TASK,
            _ALPACA_INSTRUCTION,
            _ALPACA_JUDGMENT,
            _ALPACA_RESPONSE,
        ]
    else:
        content = [*read_arguments(sources[0]), _CHAT_JUDGMENT, *sources[1:]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{template} {digest[:16]}{role}"


def build_alpaca_chat_template(start: str = "") -> str:
    """Build the alpaca prompt as a Jinja chat template, so that other tools prompt a trained model as it was trained.

    One user turn gives exactly the training prompt; further turns follow in the same style. `start` is the
    tokenizer's prefix of every text, such as a beginning-of-sequence token: tools do not add it to a rendered prompt.
    """
    parts = (_ALPACA_TASK, _ALPACA_INSTRUCTION, _ALPACA_RESPONSE)
    task, instruction, response = (part.replace("\n", "\\n") for part in parts)
    return (
        f"{{{{ '{start}{task}' }}}}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
        f"{{{{ '{response}' + message['content'] + eos_token + '\\n\\n' }}}}{{% elif message['role'] == 'user' %}}"
        f"{{{{ '{instruction}' + message['content'] + '\\n\\n' }}}}{{% else %}}{{{{ message['content'] + '\\n\\n' }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{response}' }}}}{{% endif %}}"
    )
