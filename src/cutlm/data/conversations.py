"""Conversations before a response: rows of chat data, read into one form.

A row may have `messages` with `tools`, or `prompt` and `completion` (text or messages), or `system` and `history` next
to `instruction` and `output`. `normalize_row` turns all of them into `instruction` and `output`, and `messages` if
there is more than one turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names, LLaMA-Factory's for a call of a tool and its result, and an older one of OpenAI for a result.
_ALIASES = {"human": "user", "function_call": "assistant", "observation": "tool", "function": "tool"}
_ALIASES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
# Under which servers give the thoughts before an answer.
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class ConversationError(ValueError):
    """A conversation is not valid: the field, and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


@dataclass(frozen=True)
class Conversation:
    """The messages before a response, and the tools that the model may call.

    Attributes:
        messages: Each with `role` and `content`; one of them is the user's. An assistant's message may have
            `tool_calls` instead of content.
        tools: JSON schemas of functions, as chat templates take them.

    Example:

        >>> Conversation.start("Name a colour.").messages
        ({'role': 'user', 'content': 'Name a colour.'},)
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def start(cls, instruction: str) -> "Conversation":
        """Return a conversation of one message by the user."""
        return cls(({"role": "user", "content": instruction},))

    @property
    def instruction(self) -> str:
        """The text of the last message by the user."""
        return str(self.messages[self._last_user_index]["content"])

    @property
    def _last_user_index(self) -> int:
        return max(index for index, message in enumerate(self.messages) if message["role"] == "user")

    @property
    def is_single_turn(self) -> bool:
        """Whether there is nothing but one message by the user."""
        return len(self.messages) == 1 and not self.tools

    def replace_instruction(self, text: str) -> "Conversation":
        """Return the conversation with another text as the last message by the user."""
        index = self._last_user_index
        changed = {**self.messages[index], "content": text}
        return Conversation((*self.messages[:index], changed, *self.messages[index + 1 :]), self.tools)

    def drop_oldest_turn(self) -> "Conversation | None":
        """Return the conversation without its oldest turn, up to the next message by the user; None without a next.

        System messages stay, as they may hold for all that follows.
        """
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if len(users) < 2:
            return None
        kept = [message for message in self.messages[: users[1]] if message["role"] in ("system", "developer")]
        return Conversation((*kept, *self.messages[users[1] :]), self.tools)

    def to_text(self) -> str:
        r"""Return the conversation as plain text, "User: Hi.\n\nAssistant: Hi!"; a single message stays as it is."""
        if self.is_single_turn:
            return self.instruction
        return "\n\n".join(f"{_NAMES[message['role']]}: {describe_message(message)}" for message in self.messages)


def describe_message(message: Message) -> str:
    """Return the text of a message, and the calls of tools in it."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    texts = [f"[calls {call.get('name')}({call.get('arguments', '')})]" for call in calls]
    return "\n".join(filter(None, [message.get("content") or "", *texts]))


def is_conversation_row(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of a conversation that `normalize_row` reads."""
    return isinstance(read_json_text(row.get("messages")), list) or {"prompt", "completion"} <= row.keys()


def ends_with_response(row: Any) -> bool:
    """Whether a row has a response, as `output` or as the last message of its conversation."""
    try:
        return isinstance(row, Mapping) and isinstance(normalize_row(row, is_answered=True).get("output"), str)
    except ConversationError:
        return False


def normalize_row(row: Mapping[str, Any], *, is_answered: bool) -> dict[str, Any]:
    """Return a row with `instruction`, `output`, and `messages` if it has several turns, a system prompt or tools.

    Args:
        row: A row of any of the forms.
        is_answered: Whether the conversation ends with the response. If not, a response at its end is left out.

    Raises:
        ConversationError: The conversation is not valid, or fields contradict each other.
    """
    rest = {name: read_json_text(value) if name in _STRUCTURED else value for name, value in row.items()}
    if isinstance(rest.get("messages"), Sequence) and not isinstance(rest["messages"], str):
        messages = list(parse_messages(rest.pop("messages"), "messages"))
    elif {"prompt", "completion"} <= row.keys() or (not is_answered and isinstance(row.get("prompt"), str | list)):
        messages = list(_read_part(rest.pop("prompt"), "prompt", "user"))
        if (completion := rest.pop("completion", None)) is not None:
            messages += _read_part(completion, "completion", "assistant")
    elif any(rest.get(name) for name in ("system", "history", "tools")):
        if not isinstance(row.get("instruction"), str) or (is_answered and not isinstance(row.get("output"), str)):
            return rest  # the missing field is reported
        messages = list(_read_parts_around(rest))
    else:
        return rest
    tools = rest.pop("tools", None)
    is_list = isinstance(tools, Sequence) and not isinstance(tools, str)
    if tools is not None and not (is_list and all(isinstance(tool, Mapping) for tool in tools)):
        raise ConversationError("tools", f"expected a list of objects, got {type(tools).__name__}")
    _check_texts(tools, "tools")
    answer = messages.pop() if messages and messages[-1]["role"] == "assistant" else None
    if is_answered and (answer is None or answer.get("tool_calls")):
        problem = "expected a message with text by the assistant at the end, the response"
        if answer is None and any(message["role"] == "assistant" for message in messages):
            problem += "; if the last message is the user's comment on it, run: cutlm convert conversations"
        raise ConversationError("messages", problem)
    if not any(message["role"] == "user" for message in messages):
        raise ConversationError("messages", "expected a message by the user before the response, got none")
    conversation = Conversation(tuple(messages), tuple(tools or ()))
    texts = {"instruction": conversation.instruction}
    if is_answered and answer is not None:
        texts["output"] = answer["content"]
        # As `cutlm generate` writes them: next to the response, which is the final answer.
        if not rest.get("reasoning") and (thoughts := next(filter(None, map(answer.get, THOUGHTS)), None)):
            rest["reasoning"] = thoughts
    for name, text in texts.items():
        if rest.get(name, text) != text:
            raise ConversationError(name, "differs from the conversation in the same row; leave one of them out")
    for name in ("system", "history"):
        if rest.get(name):
            raise ConversationError(name, "expected none next to messages; write it as messages")
    if rest.pop("input", None):
        raise ConversationError("input", "expected none next to messages; write it into a message")
    rest |= texts
    if not conversation.is_single_turn:
        rest["messages"] = [*messages, answer] if is_answered else messages
        rest |= {"tools": list(tools)} if tools else {}
    return rest


# Fields that data sets may store as JSON text, because columns hold values of one type; calls of tools are another.
_STRUCTURED = ("messages", "tools", "history")


def read_json_text(value: Any) -> Any:
    """Return the value of a JSON text, None for an empty one, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _read_part(value: Any, field: str, role: str) -> Iterator[dict[str, Any]]:
    """Read `prompt` or `completion`: text or messages."""
    if isinstance(value, str):
        yield {"role": role, "content": value}
    else:
        yield from parse_messages(value, field)


def _read_parts_around(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read `system` and `history`, pairs of texts or messages, and remove them from the row."""
    system, history = row.pop("system", None), row.pop("history", None)
    if system:
        if not isinstance(system, str):
            raise ConversationError("system", f"expected text, got {type(system).__name__}")
        yield {"role": "system", "content": _check_text(system, "system")}
    if history and (not isinstance(history, Sequence) or isinstance(history, str)):
        raise ConversationError("history", f"expected a list of pairs or messages, got {type(history).__name__}")
    if history and all(isinstance(turn, Mapping) for turn in history):
        yield from parse_messages(history, "history")
        history = ()
    for number, turn in enumerate(history or ()):
        if not (isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ConversationError(f"history[{number}]", "expected a pair of the user's and the assistant's text")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            yield {"role": role, "content": _check_text(text, f"history[{number}]")}
    further = row.pop("input", None)
    instruction = row.pop("instruction")
    yield {"role": "user", "content": f"{instruction}\n{further}" if further else instruction}
    if (output := row.pop("output", None)) is not None:
        yield {"role": "assistant", "content": output}


def parse_messages(values: Any, field: str, *, allow_aliases: bool = False) -> Iterator[dict[str, Any]]:
    """Parse messages with `role` and `content`, or ShareGPT's with `from` and `value`; keep their other fields.

    ShareGPT's names of roles are read under `from`, and with `allow_aliases` under `role`, too.

    Raises:
        ConversationError: A message is of another kind, or has content other than text.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConversationError(field, f"expected a list of messages, got {type(values).__name__}")
    for number, value in enumerate(values):
        name = f"{field}[{number}]"
        if not isinstance(value, Mapping):
            raise ConversationError(name, f"expected an object with role and content, got {type(value).__name__}")
        # `datasets` fills fields that other messages have with None.
        message = {key: item for key, item in value.items() if item is not None}
        is_aliased = allow_aliases
        if "from" in message and "role" not in message:
            message = {"role": message.pop("from"), "content": message.pop("value", None)} | message
            is_aliased = True
        role = message.get("role")
        message["role"] = _ALIASES.get(str(role), role) if is_aliased else role
        if message["role"] not in ROLES:
            raise ConversationError(f"{name}.role", f"expected one of {', '.join(ROLES)}, got {role!r}")
        if role == "function_call":
            message |= {"content": "", "tool_calls": _read_calls(message.get("content"), f"{name}.content")}
        elif isinstance(call := message.get("function_call"), Mapping):  # an older form of OpenAI
            message["tool_calls"] = [{"type": "function", "function": call}]
            del message["function_call"]
        # An empty list, which servers return, is no call, although templates may ask whether there is a list.
        if calls := read_json_text(message.pop("tool_calls", None)):
            message["tool_calls"] = _check_calls(calls, f"{name}.tool_calls")
        message["content"] = _read_content(message.get("content"), f"{name}.content", "tool_calls" in message)
        for key, item in message.items():
            _check_texts(item, f"{name}.{key}")
        yield message


def _read_calls(content: Any, name: str) -> list[dict[str, Any]]:
    """Read the JSON text of one or several calls, each with `name` and `arguments`."""
    value = read_json_text(content)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ConversationError(name, "expected calls of tools as JSON, with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _check_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Return calls of tools, each a function with a `name` or an object that has one, without fields that are None."""
    checked = []
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]:
        call = _drop_none(call)
        if "function" in call:
            call["function"] = _drop_none(call["function"])
        if not isinstance(call.get("function", call).get("name"), str):
            raise ConversationError(name, "expected a list of calls of tools, each with a function and its name")
        checked.append(call)
    return checked


def _drop_none(value: Any) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else {}


def _read_content(content: Any, name: str, has_calls: bool) -> str:
    """Return the text of a message; parts of text are joined."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if not kinds <= {*_TEXT_PARTS}:
            raise ConversationError(name, f"expected text, got parts of {', '.join(sorted(kinds))}")
        texts = [part.get("text") for part in content]
        # OpenAI's Assistants have an object with the text and its annotations.
        texts = [text.get("value") if isinstance(text, Mapping) else text for text in texts]
        if unread := [text for text in texts if not isinstance(text, str | None)]:
            raise ConversationError(name, f"expected text, got a part with {type(unread[0]).__name__}")
        content = "".join(text or "" for text in texts)
    if content is None and has_calls:
        return ""
    if not isinstance(content, str):
        raise ConversationError(name, f"expected text, got {'null' if content is None else type(content).__name__}")
    return _check_text(content, name)


def _check_text(text: str, name: str) -> str:
    """Return a text that tokenizers accept; raise a `ConversationError` for any other."""
    if "\0" in text:
        raise ConversationError(name, "expected text without null bytes")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConversationError(name, "expected text, got half of a surrogate pair") from None
    return text


def _check_texts(value: Any, name: str) -> None:
    """Check the texts in a value, also those in the JSON text of a call's arguments, which templates may parse."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            _check_text(value, name)
        elif isinstance(value, Mapping):
            values += value.keys()
            values += (read_json_text(item) if key == "arguments" else item for key, item in value.items())
        elif isinstance(value, Sequence):
            values += value
