"""Chatting with a server: pieces as they come, faults in one sentence each, and the chat goes on."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import CANARY, ChatServer, Handler, ModelServer, answer_once, hang_up, make_completion, running
from chat_server import stream_events as stream
from tiny import make_tokenizer, save_tiny_model

from cutlm.blame.detector import FlagSettings
from cutlm.chat.conversation import Turn
from cutlm.chat.local import LocalEngine
from cutlm.chat.server import ServerEngine
from cutlm.chat.session import Message, Session
from cutlm.errors import UserError
from cutlm.generation.local import Sampling
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder
from cutlm.servers.requests import Server

TURN = Turn("Name a city.", "It is Sydney.", True)
SAMPLING = Sampling(32, temperature=0.5, top_p=0.9, seed=7)


def make_event(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


WHOLE = (make_event(None), make_event("It is "), make_event("Syd"), make_event("ney."), make_event("", "stop"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with running(ChatServer()) as server:
        yield server


def make_session(url: str, tokenizer: Any = None, template: Any = None, timeout: float = 5.0) -> Session:
    server = Server(url, "the-model", 1, timeout, max_retries=0)
    return Session(ServerEngine(server, tokenizer, template, SAMPLING, FlagSettings()))


def answer_with(server: ChatServer, *events: Any) -> None:
    def fault(handler: Handler, number: int) -> bool:
        stream(handler, events)
        return True

    server.fault = fault


def test_the_conversation_goes_as_messages_and_comes_in_pieces(
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


def test_pieces_are_shown_before_the_answer_is_whole(server: ChatServer) -> None:
    shown: list[tuple[str, float]] = []

    def fault(handler: Handler, number: int) -> bool:
        stream(handler, WHOLE[:2])
        time.sleep(0.3)
        stream_rest = "".join(f"data: {json.dumps(event)}\n\n" for event in WHOLE[2:])
        handler.wfile.write(stream_rest.encode())
        return True

    server.fault = fault
    engine = ServerEngine(Server(server.url, "m", 1, 5.0, 0), None, None, SAMPLING, FlagSettings())
    prompt, _ = engine.prepare(["Name a city."])
    assert engine.answer(prompt, 0, lambda piece: shown.append((piece, time.monotonic())))
    assert [piece for piece, _ in shown] == ["It is ", "Syd", "ney."]
    assert shown[1][1] - shown[0][1] > 0.2


def test_nothing_that_a_server_sends_is_obeyed_by_the_terminal(
    server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    # JSON may spell half of a character, and the other half in the next piece.
    answer_with(server, make_event("\x1b[31mred\x07\n\tnext \ud83d"), make_event("\ude00 \u202e"), "[DONE]")
    session = make_session(server.url)
    session.handle(Message("Name a city."))
    assert capsys.readouterr().out == "\\x1b[31mred\\x07\n\tnext \\ud83d\\ude00 \\u202e\n"
    assert session.conversation.turns[0].answer == "\x1b[31mred\x07\n\tnext \U0001f600 \u202e"


def test_an_answer_that_is_cut_or_empty_is_told(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(server.url)
    cases: list[tuple[tuple[Any, ...], str, int, bool]] = [
        (WHOLE[:3], "the answer breaks off; send the message again; kept the part that was generated", 1, False),
        (
            (*WHOLE[:3], {"error": {"message": f"out of memory {CANARY}\x1b[2J"}}),
            "the server breaks off (out of memory [key]\ufffd[2J); kept the part that was generated",
            1,
            False,
        ),
        (
            (*WHOLE[:3], make_event("", "length"), "[DONE]"),
            "-- stopped at 32 tokens (--max_new_tokens); kept the part that was generated",
            1,
            False,
        ),
        ((), "the answer breaks off; send the message again; no answer, so the message was dropped", 0, False),
        ((make_event("", "stop"),), "-- the answer is empty", 1, True),
    ]
    for events, message, num_turns, is_ended in cases:
        answer_with(server, *events)
        session.handle(Message("/reset"))
        session.handle(Message("Name a city."))
        assert message in capsys.readouterr().err
        assert len(session.conversation.turns) == num_turns
        assert [turn.is_ended for turn in session.conversation.turns] == [is_ended] * num_turns


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (answer_once(500, b"<html>oops</html>"), r"the server answered 500 \(<html>oops</html>\); send the message ag"),
        (answer_once(401, {"error": "no"}), r"the server wants another key \(401: no\); set OPENAI_API_KEY to one"),
        (answer_once(404, b""), r"no such address, or no model 'the-model' there \(404\); give the server's address"),
        (
            answer_once(400, {"error": "too long"}),
            r"the message: .* refuses the request \(400: too long\); if the conv",
        ),
        (answer_once(200, make_completion("Hi!")), "the answer breaks off; send the message again"),
        (lambda handler, number: stream(handler, ["no JSON"]) or True, "expected pieces of a completion in the server"),
        (lambda handler, number: stream(handler, [{"choices": 3}]) or True, "expected pieces of a completion"),
        (lambda handler, number: stream(handler, [make_event(3)]) or True, "expected pieces of a completion"),  # type: ignore[arg-type]
        (hang_up, r"no answer \(RemoteDisconnected\); send the message again"),
        (lambda handler, number: time.sleep(0.6) or True, "no answer within 0.3 seconds; send the message again"),
    ],
)
def test_faults_are_one_sentence_and_the_chat_goes_on(
    fault: Any, message: str, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(server.url, timeout=0.3)
    server.fault = fault
    session.handle(Message("Name a city."))
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^-- .*{message}", told)
    assert told.endswith("; no answer, so the message was dropped")
    assert CANARY not in told
    assert len(server.requests) == 1, "a person is not kept waiting"
    answer_with(server, *WHOLE, "[DONE]")
    session.handle(Message("Name a city."))
    assert capsys.readouterr() == ("It is Sydney.\n", "")
    assert server.requests[0]["messages"] == server.requests[1]["messages"]


def test_a_server_that_is_not_there_is_told(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    make_session("http://127.0.0.1:1").handle(Message("Name a city."))
    assert re.search(
        r"^-- http://127.0.0.1:1/v1/chat/completions: no answer \(.*\); send the message again;"
        r" no answer, so the message was dropped\n$",
        capsys.readouterr().err,
    )


def test_a_judgment_is_kept_where_it_cannot_be_scored(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(server, *WHOLE, "[DONE]")
    session = make_session(server.url)
    session.handle(Message("Name a city."))
    with pytest.raises(UserError) as told:
        session.handle(Message("/judge It is no capital."))
    assert str(told.value) == (
        "the model's tokenizer is needed to score its answers; start with --tokenizer MODEL; cannot show the flags,"
        " but /save can save the judgment"
    )
    session.handle(Message(f"/save {tmp_path / 'records.jsonl'}"))
    assert json.loads((tmp_path / "records.jsonl").read_text())["judgment"] == "It is no capital."
    # One that returns no log-probs of prompts.
    server.fault = answer_once(200, {"choices": [{"text": "x"}]})
    server.requests.clear()
    session = make_session(server.url, make_tokenizer("bpe", chat=True))
    session.conversation.turns = [TURN]
    with pytest.raises(UserError, match="expected prompt_logprobs in the server's answer, got none; use a server that"):
        session.handle(Message("/judge It is no capital."))
    with pytest.raises(UserError, match=r"^/template: the server prompts the model by its own template; start with"):
        make_session(server.url).handle(Message("/template chat"))


def test_a_server_that_scores_prompts_blames_as_the_model_at_hand(
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


def test_prompts_made_here_go_as_token_ids(server: ChatServer, capsys: pytest.CaptureFixture[str]) -> None:
    answer_with(server, {"choices": [{"text": "It is."}]}, {"choices": [{"text": "", "finish_reason": "stop"}]})
    tokenizer = make_tokenizer("bpe", chat=True)
    session = make_session(server.url, tokenizer, "chat")
    session.handle(Message("Name a city."))
    session.handle(Message("And <|im_end|>?"))
    session.handle(Message("/template alpaca"))
    session.handle(Message("Name a city."))
    assert capsys.readouterr() == ("It is.\n" * 3, "-- started a new conversation\n")
    assert server.paths == ["/v1/completions"] * 3
    assert [request["prompt"] for request in server.requests] == [
        Encoder(tokenizer, "chat").encode_prompt("Name a city."),
        Encoder(tokenizer, "chat").encode_conversation(["Name a city.", "It is.", "And <|im_end|>?"]),
        Encoder(tokenizer, "alpaca").encode_prompt("Name a city."),
    ]
