"""Chatting with a server: streamed answers, and failures after which the chat continues."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_server import CANARY, ChatServer, Handler, ModelServer, fail_first, running, stream_events
from encoders import encode_turns
from tiny import make_tokenizer, save_tiny_model

from cutlm.chat.conversation import Turn
from cutlm.chat.local import LocalEngine
from cutlm.chat.server import ServerEngine
from cutlm.chat.session import Message, Session
from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings
from cutlm.generation.local import Sampling
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder
from cutlm.servers.client import Server

TURN = Turn("Name a city.", "It is Sydney.", True)
SAMPLING = Sampling(32, temperature=0.5, top_p=0.9, seed=7)


def make_event(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


WHOLE = (make_event(None), make_event("It is "), make_event("Syd"), make_event("ney."), make_event("", "stop"))


def make_session(url: str, tokenizer: Any = None, template: Any = None) -> Session:
    server = Server(url, "the-model", concurrency=1, timeout=5, max_retries=0)
    return Session(ServerEngine(server, tokenizer, template, SAMPLING, FlagSettings()))


def answer_with(server: ChatServer, *events: Any) -> None:
    def fault(handler: Handler, number: int) -> bool:
        return stream_events(handler, events)

    server.fault = fault


def test_the_conversation_is_sent_as_messages_and_the_answer_streamed(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(server, *WHOLE, {"choices": [], "usage": {"total_tokens": 9}}, "[DONE]")
    session = make_session(server.url)
    for message in ("Name a city.", "And <|im_end|>?"):
        session.handle(Message(message))
    assert capsys.readouterr() == ("It is Sydney.\n" * 2, "")
    first, second = server.requests
    assert server.paths == ["/v1/chat/completions"] * 2
    assert first == {
        "model": "the-model",
        "messages": [{"role": "user", "content": "Name a city."}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 32,
        "seed": 7,
        "stream": True,
    }
    assert [(turn["role"], turn["content"]) for turn in second["messages"]] == [
        ("user", "Name a city."),
        ("assistant", "It is Sydney."),
        ("user", "And <|im_end|>?"),
    ]
    assert second["seed"] == 8, "the same question may have another answer"
    assert set(server.keys) == {f"Bearer {CANARY}"}
    assert all(turn.is_ended for turn in session.conversation.turns)


def test_control_characters_are_escaped_in_the_terminal(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    # JSON may contain half of a surrogate pair, and the other half in the next piece.
    answer_with(server, make_event("\x1b[31mred\x07\n\tnext \ud83d"), make_event("\ude00 \u202e", "stop"))
    session = make_session(server.url)
    session.handle(Message("Name a city."))
    assert capsys.readouterr().out == "\\x1b[31mred\\x07\n\tnext \\ud83d\\ude00 \\u202e\n"
    assert session.conversation.turns[0].answer == "\x1b[31mred\x07\n\tnext \U0001f600 \u202e"


# Events, what is printed, the number of turns then, and whether the answer counts as ended.
ENDS: list[tuple[tuple[Any, ...], str, int, bool]] = [
    (WHOLE[:3], "the answer breaks off", 0, False),
    ((*WHOLE[:3], {"error": {"message": f"no memory {CANARY}\x1b[2J"}}), "(no memory [key]\ufffd[2J)", 0, False),
    *(((*WHOLE[:3], make_event("", end), "[DONE]"), end, 0, False) for end in ("error", "abort", "content_filter")),
    ((*WHOLE[:3], make_event("", "MAX_TOKENS"), "[DONE]"), "-- stopped at 32 tokens (--max_new_tokens)", 1, False),
    ((make_event("<think>It is"), make_event("", "length")), "thoughts without an end; no answer", 0, False),
    ((make_event("<think>It is</think>"), make_event("", "stop")), "-- no answer", 0, False),
    (({"choices": [{"delta": {"reasoning": "It"}}]}, make_event("", "stop")), "gives no answer", 0, False),
    (({"choices": [{"delta": {"reasoning": "It"}}]}, make_event("", "length")), "32 tokens", 0, False),
    ((*WHOLE[:3], make_event("", "length"), "[DONE]"), "-- stopped at 32 tokens (--max_new_tokens)", 1, False),
    ((), "the answer breaks off", 0, False),
    ((make_event("", "stop"),), "-- the answer is empty", 1, True),
]


def test_only_an_answer_that_is_complete_or_too_long_is_kept(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(server.url)
    for events, message, num_turns, is_ended in ENDS:
        answer_with(server, *events)
        session.handle(Message("/reset"))
        session.handle(Message("Name a city."))
        assert message in capsys.readouterr().err
        assert [turn.is_ended for turn in session.conversation.turns] == [is_ended] * num_turns


def test_extra_fields_are_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(server, *WHOLE)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name a city.\n"), encoding="utf-8"))
    body = '{"top_p": null, "chat_template_kwargs": {"enable_thinking": false}}'
    assert main(["chat", "--base_url", server.url, "--model", "m", "--extra_body", body]) == 0
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in server.requests[0]


REASONED: list[tuple[Any, ...]] = [
    (
        {"choices": [{"delta": {"reasoning_content": "Which "}}]},
        {"choices": [{"delta": {"reasoning": "one?"}}]},
        *WHOLE,
    ),
    ({"choices": [{"delta": {"reasoning": "Which?"}}]}, make_event("\n\n"), make_event("\n"), *WHOLE),
    (make_event("<think>Which"), make_event(" one?</think>\n\nIt is Sydney."), make_event("", "stop")),
]


def test_reasoning_is_not_a_part_of_the_conversation(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    for events in REASONED:
        session = make_session(server.url)
        answer_with(server, *events)
        session.handle(Message("Name a city."))
        session.handle(Message("Another."))
        assert [turn.answer for turn in session.conversation.turns] == ["It is Sydney."] * 2
        assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "It is Sydney."}
        assert session.conversation.make_record("No capital.").output == "It is Sydney."
    assert capsys.readouterr().err == "-- the model reasons before it answers\n" * 4


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "the server answered 500 (oops)"), (401, "rejects the key"), (400, "start a new one by /reset")],
)
def test_after_a_failure_the_chat_continues_without_the_message(
    server: ChatServer, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(server.url)
    server.fault = fail_first(status, b"oops")
    session.handle(Message("Name a city."))
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(server.requests) == 1, "it is not retried while the user waits"
    assert not session.conversation.turns
    answer_with(server, *WHOLE, "[DONE]")
    session.handle(Message("Name a city."))
    assert capsys.readouterr() == ("It is Sydney.\n", "")
    assert server.requests[0]["messages"] == server.requests[1]["messages"]


def test_a_judgment_that_cannot_be_scored_is_kept(server: ChatServer, tmp_path: Path) -> None:
    answer_with(server, *WHOLE, "[DONE]")
    session = make_session(server.url)
    session.handle(Message("Name a city."))
    with pytest.raises(UserError, match="start with --tokenizer MODEL"):
        session.handle(Message("/judge It is no capital."))
    session.handle(Message(f"/save {tmp_path / 'records.jsonl'}"))
    assert json.loads((tmp_path / "records.jsonl").read_text())["judgment"] == "It is no capital."
    # A server that returns no log-probs of prompts.
    server.fault = lambda handler, number: handler.answer(200, {"choices": [{"text": "x"}]}) is None
    session = make_session(server.url, make_tokenizer("bpe", chat=True))
    session.conversation.turns = [TURN]
    with pytest.raises(UserError, match="expected prompt_logprobs in the server's answer, got none"):
        session.handle(Message("/judge It is no capital."))
    # The failed run of requests does not keep later ones from being sent.
    answer_with(server, *WHOLE, "[DONE]")
    session.handle(Message("Name a city."))
    assert len(session.conversation.turns) == 2
    with pytest.raises(UserError, match=r"^/template: "):
        make_session(server.url).handle(Message("/template chat"))


def test_a_server_that_scores_prompts_blames_as_a_local_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = save_tiny_model(tmp_path / "model", chat=True)
    model, tokenizer = load_trained(folder, device="cpu")
    local = Session(LocalEngine(model, tokenizer, "chat", Sampling(16), FlagSettings()))
    with running(ModelServer(folder)) as server:
        session = make_session(server.url, tokenizer)
        printed = []
        for one in (local, session):
            one.conversation.turns = [TURN]
            one.handle(Message("/judge It is no capital."))
            printed.append(capsys.readouterr().out)
        assert server.paths == ["/v1/completions"] * 2
    assert printed[0] == printed[1]
    assert re.search("[1-9] of [0-9]+ tokens are", printed[0])


def test_prompts_encoded_here_are_sent_as_token_ids(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    answer_with(server, {"choices": [{"text": "It is."}]}, {"choices": [{"text": "", "finish_reason": "stop"}]})
    tokenizer = make_tokenizer("bpe", chat=True)
    session = make_session(server.url, tokenizer, "chat")
    session.handle(Message("Name a city."))
    session.handle(Message("And <|im_end|>?"))
    session.handle(Message("/template alpaca"))
    session.handle(Message("Name a city."))
    assert capsys.readouterr().out == "It is.\n" * 3
    assert server.paths == ["/v1/completions"] * 3
    assert [request["prompt"] for request in server.requests] == [
        Encoder(tokenizer, "chat").encode_prompt("Name a city."),
        encode_turns(Encoder(tokenizer, "chat"), ["Name a city.", "It is.", "And <|im_end|>?"]),
        Encoder(tokenizer, "alpaca").encode_prompt("Name a city."),
    ]
