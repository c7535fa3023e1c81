"""Chat logs: the user's next message is the judgment of the response before it (arXiv 2603.12273).

Reads `messages` and WildChat's `conversation` (`role` and `content`), ShareGPT's `conversations` (`from` and `value`),
and the export of ChatGPT (`mapping`, a tree of messages, of which the branch that was shown last is read).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cutlm.data.conversations import read_json_text
from cutlm.data.convert import Conversion, make_response, read_messages
from cutlm.data.files import SourceRow
from cutlm.errors import DataError

_FIELDS = ("messages", "conversation", "conversations")
# Messages of ChatGPT's export that are no part of the conversation.
_HIDDEN = ("thoughts", "reasoning_recap", "model_editable_context")


def convert(rows: Iterable[SourceRow]) -> Conversion:
    """Turn each response that the user replied to into a record with the reply as judgment.

    Whether a reply says anything about the response is not examined. Responses without a reply are unjudged.
    """
    conversion = Conversion("responses")
    problems = []
    for row in rows:
        found = _find_messages(row.value)
        if found is None:
            got = ", ".join(map(repr, row.value)) if isinstance(row.value, Mapping) else type(row.value).__name__
            problems.append(f"{row.location}: expected a conversation in {', '.join(_FIELDS)} or mapping, got {got}")
            continue
        if row.value.get("judgment"):
            problems.append(
                f"{row.location}: the row has a judgment already, which would be ignored; it is a record if its"
                " conversation is named messages (--columns), or remove the judgment"
            )
            continue
        messages = read_messages(found)
        if messages is None:
            _leave_out(conversion, row.location, "conversations with messages of another kind than text", {})
            continue
        system = row.value.get("system")
        if isinstance(system, str) and system.strip() and not any(each["role"] == "system" for each in messages):
            messages.insert(0, {"role": "system", "content": system})
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                _add(conversion, row.location, messages, index, row.value.get("tools"))
    if problems:
        raise DataError(problems)
    return conversion


def _add(conversion: Conversion, location: str, messages: list[dict[str, Any]], index: int, tools: Any) -> None:
    before, text = messages[:index], messages[index]["content"]
    response = make_response(before, text, tools)
    following = messages[index + 1] if index + 1 < len(messages) else None
    if messages[index].get("tool_calls"):
        called = {"messages": messages[: index + 1]} | ({"tools": tools} if tools else {})
        _leave_out(conversion, location, "call of a tool instead of a response", called)
    elif not text.strip():
        _leave_out(conversion, location, "empty response", response)
    elif not any(message["role"] == "user" and message["content"].strip() for message in before):
        reason = "no message by the user before the response"
        _leave_out(conversion, location, reason, response)
    elif following is None or following["role"] != "user" or not following["content"].strip():
        conversion.unjudged.append(SourceRow(location, response))
    else:
        conversion.rows.append(SourceRow(location, response | {"judgment": following["content"].strip()}))


def _leave_out(conversion: Conversion, location: str, reason: str, row: dict[str, Any]) -> None:
    conversion.left_out[reason] += 1
    conversion.listed.append({"location": location, "reason": reason, **row})


def _find_messages(row: Any) -> list[Any] | None:
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("mapping"), Mapping):
        return _follow_branch(row["mapping"], row.get("current_node"))
    values = (read_json_text(row.get(name)) for name in _FIELDS)
    return next((value for value in values if isinstance(value, list)), None)


def _follow_branch(nodes: Mapping[str, Any], last: Any) -> list[Any] | None:
    """Return the messages from the root of a tree to its current node, without empty system messages."""
    if last not in nodes:
        parents = {node.get("parent") for node in nodes.values() if isinstance(node, Mapping)}
        last = next((name for name in reversed(list(nodes)) if name not in parents), None)
    messages: list[Any] = []
    visited = set()
    while isinstance(node := nodes.get(str(last)), Mapping) and last not in visited:
        visited.add(last)
        if isinstance(message := node.get("message"), Mapping) and (read := _read_exported(message)):
            messages.insert(0, read)
        last = node.get("parent")
    return messages


def _read_exported(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a message of ChatGPT's export, with null instead of content other than text; None if it says nothing."""
    role, content = (message.get("author") or {}).get("role"), message.get("content")
    content = content if isinstance(content, Mapping) else {}
    kind, parts = content.get("content_type"), content.get("parts")
    if kind == "user_editable_context":  # the user's custom instructions
        settings = (content.get(name) for name in ("user_profile", "user_instructions"))
        role, parts = "system", ["\n\n".join(text for text in settings if isinstance(text, str))]
    elif kind in ("code", "execution_output"):
        parts = [content.get("text")]
    is_text = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    text = "".join(parts or []) if is_text else None
    if kind in _HIDDEN or text == "" or (role, text) == ("system", None):
        return None
    if role == "assistant" and message.get("recipient", "all") != "all":
        call = {"name": str(message["recipient"]), "arguments": text}
        return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": role, "content": text}
