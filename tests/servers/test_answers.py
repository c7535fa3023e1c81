"""What real servers answer: finish reasons, errors under status 200, reasoning, lists of parts, and streams."""

import json
from typing import Any

import pytest
from chat_server import CANARY, ChatServer, Handler, make_completion, stream_events

from cutlm.servers.client import (
    INCOMPLETE,
    MALFORMED,
    NO_ANSWER,
    REFUSAL,
    Answer,
    Client,
    Refused,
    RequestFailed,
    Server,
)


def make_message(**fields: Any) -> dict[str, Any]:
    """Returns a completion with the given fields of its message."""
    choice = {"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "choices": [choice]}


def make_event(finish_reason: Any = None, **delta: Any) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def complete(server: ChatServer, value: Any, **settings: Any) -> Answer:
    """Requests a completion that the server answers with the given value."""
    server.fault = lambda handler, number: handler.answer(200, value) is None
    client = Client(Server(server.url, "m", **{"timeout": 5.0, "max_retries": 0} | settings))
    return client.complete(client.server.make_body("hi"))


def read_stream(server: ChatServer, *events: Any) -> tuple[str, str, bool]:
    """Returns the text, the reasoning, and whether the answer was truncated, of a stream of the given events."""
    server.fault = lambda handler, number: stream_events(handler, events)
    client = Client(Server(server.url, "m", timeout=5.0, max_retries=0))
    pieces = list(client.stream(client.server.make_body("hi")))
    return (
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        pieces[-1].is_truncated,
    )


COMPLETE = ("stop", "STOP", "FINISH_REASON_STOP", "eos", "end_turn", "eos_token", "stop_sequence")
TRUNCATED = ("length", "max_tokens", "MAX_TOKENS", "FINISH_REASON_MAX_TOKENS", "model_length")
FAILED = {
    **dict.fromkeys(("content_filter", "SAFETY", "PROHIBITED_CONTENT", "refusal", "sensitive"), REFUSAL),
    **dict.fromkeys(
        ("error", "abort", "cancelled", "tool_calls", "function_call", "tool_use", "pause_turn"), INCOMPLETE
    ),
    **dict.fromkeys(("insufficient_system_resource", "MALFORMED_FUNCTION_CALL", "OTHER", "something new"), INCOMPLETE),
}


@pytest.mark.parametrize("finish_reason", [None, "", *COMPLETE])
def test_known_good_ends_are_complete(server: ChatServer, finish_reason: Any) -> None:
    answer = complete(server, make_completion("Yes.", finish_reason))
    assert (answer.text, answer.is_truncated) == ("Yes.", False)
    assert answer.finish_reason == ("stop" if finish_reason else None)
    if finish_reason:
        assert read_stream(server, make_event(content="Yes."), make_event(finish_reason)) == ("Yes.", "", False)


@pytest.mark.parametrize("finish_reason", TRUNCATED)
def test_answers_that_reach_a_limit_are_truncated(server: ChatServer, finish_reason: str) -> None:
    answer = complete(server, make_completion("Yes, b", finish_reason))
    assert (answer.text, answer.finish_reason, answer.is_truncated) == ("Yes, b", "length", True)
    assert read_stream(server, make_event(content="Yes, b"), make_event(finish_reason)) == ("Yes, b", "", True)


@pytest.mark.parametrize("finish_reason", [*FAILED, {"type": "stop"}, 1, True])
def test_any_other_end_is_a_failure_that_names_it(server: ChatServer, finish_reason: Any) -> None:
    kind = FAILED[finish_reason] if isinstance(finish_reason, str) else INCOMPLETE
    with pytest.raises(RequestFailed) as failure:
        complete(server, make_completion("Yes, b", finish_reason))
    assert (failure.value.kind, failure.value.answer) == (kind, "Yes, b")
    assert isinstance(finish_reason, dict) or str(finish_reason).lower() in str(failure.value).lower()
    assert len(server.requests) == 1, "the server has answered, and a retry costs as much"
    with pytest.raises(RequestFailed) as failure:
        read_stream(server, make_event(content="Yes, b"), make_event(finish_reason))
    assert failure.value.kind == kind


ERROR = {"message": f"Provider returned error {CANARY}", "code": 502, "metadata": {}}


@pytest.mark.parametrize(
    "fields",
    [
        {"error": ERROR},
        {"error": "overloaded"},
        {"choices": [make_completion("Yes, b", "error")["choices"][0] | {"error": ERROR}]},
        {"choices": [make_completion("Yes, b", "stop")["choices"][0] | {"error": ERROR}]},
        {"object": "error", "choices": None, "message": "out of memory"},
    ],
)
def test_an_error_in_or_beside_the_choices_is_retried_and_then_a_failure(
    server: ChatServer, fields: dict[str, Any]
) -> None:
    with pytest.raises(RequestFailed) as failure:
        complete(server, make_completion("Yes, b") | fields, max_retries=1)
    assert failure.value.kind == NO_ANSWER
    assert CANARY not in str(failure.value)
    assert len(server.requests) == 2
    event = make_event(content="Yes, b") | fields
    with pytest.raises(RequestFailed) as failure:
        read_stream(server, make_event(content="Yes"), event, make_event("stop"), "[DONE]")
    assert failure.value.kind == NO_ANSWER


@pytest.mark.parametrize("code", [400, "401"])
def test_the_code_of_an_error_under_status_200_counts_as_its_status(server: ChatServer, code: Any) -> None:
    with pytest.raises(Refused) as refusal:
        complete(server, {"error": {"message": "no", "code": code}}, max_retries=1)
    assert refusal.value.status == int(code)
    assert len(server.requests) == 1


def test_an_error_instead_of_a_stream_is_a_failure(server: ChatServer) -> None:
    server.fault = lambda handler, number: handler.answer(200, {"error": "model not found"}) is None
    client = Client(Server(server.url, "m", max_retries=0))
    with pytest.raises(RequestFailed, match="model not found"):
        list(client.stream(client.server.make_body("hi")))


def test_null_is_no_error(server: ChatServer) -> None:
    choice = make_completion("Yes.")["choices"][0] | {"error": None}
    assert complete(server, {"error": None, "choices": [choice]}).text == "Yes."
    events = [make_event(content="Ye") | {"error": None}, make_event("stop", content="s.") | {"error": None}]
    events[0]["choices"][0]["error"] = None
    assert read_stream(server, *events) == ("Yes.", "", False)


REASONED: dict[str, dict[str, Any]] = {
    "DeepSeek, Qwen, z.ai": {"content": "Yes.", "reasoning_content": "Is it?"},
    "OpenRouter": {"content": "Yes.", "reasoning": "Is it?", "reasoning_details": [{"text": "Is it?"}]},
    "both names": {"content": "Yes.", "reasoning": "Is it?", "reasoning_content": "Is it?"},
    "one name is null": {"content": "Yes.", "reasoning_content": None, "reasoning": "Is it?"},
    "Mistral": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]},
            {"type": "text", "text": "Ye"},
            {"type": "text", "text": "s."},
        ]
    },
    "Anthropic": {
        "content": [
            {"type": "thinking", "thinking": "Is it?", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Yes."},
        ]
    },
    "parts of reasoning": {"content": ["Yes."], "reasoning": [{"type": "text", "text": "Is it?"}]},
}


@pytest.mark.parametrize("name", REASONED)
def test_reasoning_is_separated_from_the_text(server: ChatServer, name: str) -> None:
    answer = complete(server, make_message(**REASONED[name]))
    assert (answer.text, answer.reasoning) == ("Yes.", "Is it?")
    assert read_stream(server, make_event(**REASONED[name]), make_event("stop")) == ("Yes.", "Is it?", False)


def test_without_reasoning_it_is_none(server: ChatServer) -> None:
    for message in ({"content": "Yes."}, {"content": "Yes.", "reasoning_content": ""}, {"content": [{"text": "Yes."}]}):
        answer = complete(server, make_message(**message))
        assert (answer.text, answer.reasoning or None) == ("Yes.", None)


def test_the_key_is_removed_from_reasoning(server: ChatServer) -> None:
    answer = complete(server, make_message(content="Yes.", reasoning=f"It is {CANARY}."))
    assert (answer.reasoning, answer.is_redacted) == ("It is [key].", True)


@pytest.mark.parametrize(
    "content", [7, {"type": "image_url"}, [{"type": "image_url", "image_url": {}}], [None], [{"text": 3}], [["a"]]]
)
def test_content_of_another_form_is_malformed(server: ChatServer, content: Any) -> None:
    with pytest.raises(RequestFailed) as failure:
        complete(server, make_message(content=content))
    assert failure.value.kind == MALFORMED


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "refusal": "I cannot help with that."},
        {"content": "", "refusal": "I cannot help with that."},
        {"content": [{"type": "refusal", "refusal": "I cannot help with that."}]},
    ],
)
def test_a_refusal_in_its_own_field_is_a_failure(server: ChatServer, message: dict[str, Any]) -> None:
    with pytest.raises(RequestFailed, match="I cannot help with that") as failure:
        complete(server, make_message(**message))
    assert failure.value.kind == REFUSAL
    with pytest.raises(RequestFailed, match="I cannot help with that"):
        read_stream(server, make_event(**message), make_event("stop"))
    assert complete(server, make_message(content="Yes.", refusal=None)).text == "Yes."


def test_a_tool_call_is_no_answer(server: ChatServer) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]
    with pytest.raises(RequestFailed, match="calls a tool"):
        complete(server, make_message(content="", tool_calls=calls))
    assert complete(server, make_message(content="Yes.", tool_calls=[])).text == "Yes."


def test_further_fields_of_servers_change_nothing(server: ChatServer) -> None:
    choice = make_completion("Yes.")["choices"][0] | {"stop_reason": 128001, "logprobs": None, "token_ids": None}
    choice |= {"content_filter_results": {"hate": {"filtered": False}}, "native_finish_reason": "STOP"}
    more = {"prompt_logprobs": None, "timings": {"prompt_ms": 1.0}, "provider": "p", "prompt_filter_results": []}
    assert complete(server, {"choices": [choice], "usage": None, **more}).text == "Yes."
    server.fault = lambda handler, number: (
        handler.answer(200, b"\n\n  \n" + b'{"choices": [{"message": {"content": "Yes."}}]}') is None
    )
    client = Client(Server(server.url, "m"))
    assert client.complete(client.server.make_body("hi")).text == "Yes.", "blank lines keep a connection open"


def test_comments_and_pings_in_a_stream_are_skipped(server: ChatServer) -> None:
    def fault(handler: Handler, number: int) -> bool:
        stream_events(handler, [{"choices": [], "prompt_filter_results": []}, make_event(content="Ye")])
        handler.wfile.write(b': OPENROUTER PROCESSING\n\n\nevent: ping\ndata: {"type": "ping"}\n\n')
        handler.wfile.write(f"data: {json.dumps(make_event('stop', content='s.'))}\n\n".encode())
        return True

    server.fault = fault
    client = Client(Server(server.url, "m"))
    assert "".join(piece.text for piece in client.stream(client.server.make_body("hi"))) == "Yes."


def test_a_stream_without_finish_reason_is_complete_if_the_server_says_so(server: ChatServer) -> None:
    assert read_stream(server, make_event(content="Yes."), "[DONE]") == ("Yes.", "", False)
    with pytest.raises(RequestFailed, match="breaks off"):
        read_stream(server, make_event(content="Yes."))
