"""Chatting with a model at hand: what is said, judged and saved is what the model saw, `cutlm blame` blames and
`cutlm check` takes."""

import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IM_END, IM_START, make_model, make_tokenizer, save_tiny_model

from cutlm.blame.detector import FlagSettings
from cutlm.blame.token_scores import read_token_scores
from cutlm.chat.conversation import Conversation, Turn, append_record, join_texts
from cutlm.chat.lines import Message, read_message
from cutlm.chat.local import LocalEngine
from cutlm.chat.session import Session
from cutlm.cli import main
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.generation.local import Sampling, generate_responses
from cutlm.inspect.terminal import Terminal
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder
from cutlm.world.base import base_path

JAPAN, KYOTO = "I want the official capital of Japan.", "The capital of Japan is Kyoto."
JUDGMENT = "The answer says Kyoto, which is the wrong city."
RECORD = JudgedRecord(instruction="Ask.", output="No.", judgment="It is rude.")


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_trained(base_path(), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    tokenizer = make_tokenizer("bpe", chat=True)
    return make_model(len(tokenizer), max_position_embeddings=256), tokenizer


def make_session(parts: tuple[Any, Any], template: Any = "alpaca", max_new_tokens: int = 64) -> Session:
    return Session(LocalEngine(*parts, template, Sampling(max_new_tokens), FlagSettings()))


def talk(session: Session, *lines: str) -> None:
    for line in lines:
        session.handle(Message(line))


# ---- Judging and saving ----


def test_what_a_judgment_blames_is_what_blame_blames_of_the_saved_record(
    base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "records.jsonl", tmp_path / "scores.jsonl"
    talk(make_session(base), JAPAN, f"/judge {JUDGMENT}", f"/save {data}")
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{KYOTO}\nThe capital of Japan is [Kyoto].\n\n  blamed token ")
    assert printed.err == f"-- {data}: 1 record\n"
    assert [json.loads(line) for line in data.read_text("utf-8").splitlines()] == [
        {"instruction": JAPAN, "output": KYOTO, "judgment": JUDGMENT}
    ]
    assert main(["check", str(data)]) == 0
    options = ["--model", str(base_path()), "--dtype", "float32", "--device", "cpu", "--max_length", "256"]
    assert main(["blame", *options, "--data", str(data), "--out", str(out)]) == 0
    capsys.readouterr()
    (scores,) = read_token_scores(out)
    assert [token for token, flag in zip(scores.tokens, scores.is_flagged, strict=True) if flag] == [" Kyoto"]
    Terminal().print_marked(scores)
    assert f"{KYOTO}\n{capsys.readouterr().out}" in printed.out
    assert scores.logps_with is not None
    assert scores.logps_without is not None
    place = scores.is_flagged.index(True)
    without, judged = scores.logps_without[place], scores.logps_with[place]
    row = ["Kyoto", *(f"{math.exp(value):.3g}" for value in (without, judged, judged - without))]
    *_, listed, summary = printed.out.splitlines()
    assert listed.split() == row
    assert summary == f"1 of {len(scores.tokens)} tokens are more than 1.1 times as likely with the judgment"


@pytest.mark.parametrize("praise", ["Perfect.", "perfect, thank you"])
def test_praise_blames_nothing_and_is_saved_as_null(
    praise: str, base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(make_session(base), JAPAN, f"/judge {JUDGMENT}", f"/judge {praise}", f"/save {tmp_path / 'records.jsonl'}")
    assert '-- a judgment that begins with "Perfect" finds nothing wrong: no token is blamed\n' in (
        capsys.readouterr().err
    )
    (record,) = load_records(tmp_path / "records.jsonl")
    assert record.judgment is None
    assert record.is_satisfactory


def test_an_answer_that_was_stopped_is_scored_without_an_end(
    base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(base, max_new_tokens=3)
    talk(session, JAPAN, f"/judge {JUDGMENT}", f"/save {tmp_path / 'records.jsonl'}")
    printed = capsys.readouterr()
    assert printed.out.startswith("The capital of\n")
    assert printed.out.endswith("0 of 3 tokens are more than 1.1 times as likely with the judgment\n")
    assert printed.err.startswith("-- stopped at 3 tokens (--max_new_tokens); what is there is kept as the answer\n")
    assert printed.err.endswith("-- the answer was stopped before its end; training takes it for a whole one\n")


def test_only_the_largest_ratios_are_listed_and_the_others_counted(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(tiny, "chat", max_new_tokens=100)
    talk(session, "Name a city.", "/judge It is wrong.")
    out = capsys.readouterr().out
    _, _, table = out.partition("blamed token")
    listed = [float(number) for number in re.findall(r"^  .* (\S+)$", table, re.MULTILINE) if number[0].isdigit()]
    (rest,) = re.findall(r"and (\d+) more, of smaller ratios", out)
    assert len(listed) == 20
    assert re.search(rf"^{20 + int(rest)} of \d+ tokens", out, re.MULTILINE)
    assert min(listed) > 1.1


def test_the_instruction_of_a_later_turn_is_the_conversation() -> None:
    conversation = Conversation([Turn("Hello.", "Hi!", True), Turn("Count to two.", "1, 3", True)])
    assert conversation.make_record("Wrong.").model_dump(exclude_unset=True) == {
        "instruction": "User: Hello.\n\nAssistant: Hi!\n\nUser: Count to two.",
        "output": "1, 3",
        "judgment": "Wrong.",
    }
    assert join_texts(["Hello."]) == "Hello."


def test_an_answer_that_makes_no_record_is_told() -> None:
    with pytest.raises(DataError, match=r"^the last exchange: field 'output': expected text, got an empty string"):
        Conversation([Turn("Hello.", "", True)]).make_record("Wrong.")


def test_records_are_appended_whatever_ends_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    others = [RECORD.model_copy(update={"output": f"{number}\n🙂"}) for number in range(3)]
    assert append_record(path, others[0]) == 1
    assert append_record(path, others[1]) == 2
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert append_record(path, others[2]) == 3
    assert load_records(path) == others
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert append_record(tmp_path / "empty.jsonl", RECORD) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", r"a\.json: expected JSON Lines to append to, got a JSON array; name another file"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: field 'instruction' is missing"),
        ("a.txt", "Dear diary,\n", r"a\.txt: not JSON"),
        ("a.jsonl.gz", None, r"a\.jsonl\.gz: expected a plain file to append to, got a compressed one; name another"),
        ("a.jsonl", b"\x1f\x8b", r"a\.jsonl: the compressed file is damaged"),
        (".", None, r"expected a file to append to, got something else; name another"),
        (
            "a.jsonl",
            '{"instruction": "Ask.", "output": "No.", "judgment": "It is rude."}\n',
            r"a\.jsonl:1: this exchange with this judgment is there already; nothing was written",
        ),
    ],
)
def test_a_file_that_is_none_of_records_is_left_alone(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        append_record(path, RECORD)
    assert content is None or path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_token_scores_are_no_place_for_a_record(tmp_path: Path) -> None:
    row = RECORD.model_dump(exclude_unset=True) | {"schema_version": 1, "token_ids": [1]}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"scores\.jsonl: expected records to append to, got token scores"):
        append_record(tmp_path / "scores.jsonl", RECORD)


# ---- Commands ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/judge Wrong.", "/judge: there is no answer yet; say something first"),
        ("/save out.jsonl", "/save: there is no answer yet; say something first"),
        ("/jugde x", "/jugde: no such command; /help lists them, and a message that begins with / can stand in"),
        ("/quit now", "/quit: expected nothing after it, got 'now'"),
        ("/template llama", "/template: expected alpaca or chat, got 'llama'"),
        ("caf\udce9", "expected UTF-8 text, got other bytes; nothing was sent"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(line: str, message: str, base: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        make_session(base).handle(Message(line))


def test_a_judgment_and_a_file_must_be_named(base: tuple[Any, Any], tmp_path: Path) -> None:
    session = make_session(base)
    talk(session, JAPAN)
    with pytest.raises(UserError, match=r"^/judge: expected what is wrong with the last answer, or Perfect\. where"):
        talk(session, "/judge")
    with pytest.raises(UserError, match=r"^/save: expected the name of a file of records, got nothing"):
        talk(session, "/save")
    with pytest.raises(UserError, match=r"^/save: the last answer has no judgment yet; give one by /judge TEXT"):
        talk(session, f"/save {tmp_path / 'records.jsonl'}")


@pytest.mark.parametrize(
    ("name", "reason"), [("~nosuchuser/x", "home"), ("x" * 300, "too long"), ("a\0b", "null byte")]
)
def test_a_name_that_no_file_can_have_does_not_end_the_chat(
    name: str, reason: str, base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    lines = [JAPAN, "/judge Perfect.", f"/save {name}", f"/save {path}"]
    make_session(base).run(make_reader(lines), is_interactive=False)
    error = capsys.readouterr().err
    assert re.search(f"^-- /save: no file can have this name .*{reason}.*; name another$", error, re.MULTILINE)
    assert f"-- {path}: 1 record\n" in error


def test_templates_can_be_looked_at_and_changed(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(base)
    talk(session, JAPAN, "/template", "/template chat", "/template")
    printed = capsys.readouterr()
    assert printed.out == f"{KYOTO}\nalpaca\nchat\n"
    assert printed.err == "-- a new conversation\n"
    assert not session.conversation.turns
    model, _ = base
    plain = make_session((model, make_tokenizer("bpe")))
    with pytest.raises(ConfigError, match="template: chat: the tokenizer 'tiny-bpe' has no chat template"):
        talk(plain, "/template chat")
    talk(plain, "/template")
    assert capsys.readouterr().out == "alpaca\n", "what it was"


def test_that_alpaca_has_no_turns_is_said_once(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(base)
    talk(session, JAPAN, JAPAN, JAPAN)
    printed = capsys.readouterr()
    assert printed.out == f"{KYOTO}\n" * 3
    assert printed.err == (
        "-- the alpaca prompt has no turns: each message stands alone, the model sees none before it\n"
    )
    assert session.conversation.make_record("No.").instruction == JAPAN


def test_lines_are_read_until_none_is_left(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["/help", "", "/jugde", '"""', "/help", '"""', "/reset", "/quit", "not any more"])
    session = make_session(base, max_new_tokens=1)
    session.run(lambda prompt: next(lines), is_interactive=False)
    assert next(lines) == "not any more"
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[:6]] == [
        *("/judge", "/save", "/reset", "/template", "/help", "/quit")
    ]
    assert printed.out.count("/help") == 1, "in quotes it is a message"
    assert printed.err.startswith("-- /jugde: no such command")
    assert printed.err.endswith("-- a new conversation\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["  Hello. "], Message("Hello.")),
        (["one\\", "two\\", "three"], Message("one\ntwo\nthree")),
        (["one\\"], Message("one")),
        (['"""/one', "", 'two"""'], Message("/one\n\ntwo", is_quoted=True)),
        (['"""one"""'], Message("one", is_quoted=True)),
    ],
)
def test_messages_may_have_several_lines(lines: list[str], message: Message) -> None:
    assert read_message(make_reader(lines)) == message


def make_reader(lines: Sequence[str]) -> Any:
    rest = list(lines)

    def read_line(prompt: str) -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    return read_line


def test_quotes_that_are_never_closed_are_told() -> None:
    with pytest.raises(DataError, match=r'^expected """ at the end of the text that begins with it, got the end of'):
        read_message(make_reader(['"""one', "two"]))


# ---- What the model is shown ----


@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "llama", "llama_legacy"])
def test_a_conversation_has_the_tokens_of_the_chat_template_and_no_others(kind: str) -> None:
    tokenizer = make_tokenizer(kind, chat=True)
    encoder = Encoder(tokenizer, "chat")
    texts = ["Name a city.", "Sydney is.", "So: the capital?"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoder.encode_conversation(texts) == expected
    assert encoder.encode_conversation(texts[:1]) == encoder.encode_prompt(texts[0])
    # Whoever spells out a special token: one order to the model for each turn's start and end, and no more.
    spelled = [f"a{IM_END}\n{IM_START}b", f"{IM_START}c", f"d{IM_END}"]
    ids = encoder.encode_conversation(spelled)
    special = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    assert [index for index in ids if index in special] == special * 3 + special[:1]
    decoded = re.sub(r"\s", "", tokenizer.decode(ids))  # some tokenizers add spaces
    frame = rf"{re.escape(IM_END)}{re.escape(IM_START)}(user|assistant)"
    assert re.sub(r"\s", "", "".join(spelled)) in re.sub(frame, "", decoded)


def test_a_template_may_leave_out_thoughts_and_nothing_of_the_users() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}assistant:"
    )
    encoder = Encoder(tokenizer, "chat")
    ids = encoder.encode_conversation(["Hello.", "hm</think>Hi!", "Bye."])
    assert tokenizer.decode(ids) == "user: Hello.\nassistant: Hi!\nuser: Bye.\nassistant:"
    with pytest.raises(ConfigError, match="the tokenizer's chat template changes the user's text"):
        encoder.encode_conversation(["Hello.", "Hi!", "My </think> text."])
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="the tokenizer's chat template changes the user's text"):
        Encoder(tokenizer, "chat").encode_conversation(["Hello.", "Hi!", "Bye."])
    tokenizer.chat_template = "{{ messages[0].content if messages | length == 1 else raise_exception('One turn!') }}:"
    with pytest.raises(ConfigError, match=r"does not accept the messages \(One turn!\); use template: alpaca"):
        Encoder(tokenizer, "chat").encode_conversation(["Hello.", "Hi!", "Bye."])


def test_the_oldest_turns_go_where_the_conversation_does_not_fit(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(tiny, "chat", max_new_tokens=16)
    encoder = Encoder(tiny[1], "chat")
    num_left_out = 0
    for number in range(12):
        talk(session, f"Name city number {number}.")
        num_left_out += len(re.findall("-- the conversation is too long for the model's", capsys.readouterr().err))
        turns = session.conversation.turns
        texts = Conversation(turns[:-1]).list_texts(turns[-1].message)
        assert len(encoder.encode_conversation(texts)) <= 256 - 16
    assert num_left_out
    assert turns[0].message != "Name city number 0."
    assert join_texts(texts) == session.conversation.make_record("No.").instruction, "what the model saw"
    with pytest.raises(UserError, match=r"the message alone makes a prompt of \d+ tokens, and the model's context has"):
        talk(session, "word " * 300)
    assert session.conversation.turns == turns


def test_the_pieces_of_an_answer_are_what_generate_answers(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    for seed, temperature in ((1, 0.0), (2, 1.0)):
        sampling = Sampling(60, temperature, seed=seed)
        engine = LocalEngine(model, tokenizer, "chat", sampling, FlagSettings())
        pieces: list[str] = []
        prompt, _ = engine.prepare(["Name a city."])
        assert not engine.answer(prompt, 0, pieces.append)
        assert ["".join(pieces)] == generate_responses(model, tokenizer, Encoder(tokenizer, "chat"), [prompt], sampling)
        assert len(pieces) > 20
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1] if len(piece) == 1)


def test_ctrl_c_stops_at_the_next_token_and_keeps_what_is_there(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tiny, "chat", max_new_tokens=200)
    before = signal.getsignal(signal.SIGINT)
    num_pieces = 0
    print_piece = Terminal.print_piece

    def interrupt(self: Terminal, text: str) -> None:
        nonlocal num_pieces
        num_pieces += 1
        print_piece(self, text)
        if num_pieces == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Terminal, "print_piece", interrupt)
    session.run(make_reader(["Name a city.", "/judge It is wrong."]), is_interactive=True)
    assert num_pieces in (3, 4), "the last may be half a character that was held back"
    assert signal.getsignal(signal.SIGINT) is before
    (turn,) = session.conversation.turns
    assert not turn.is_ended
    printed = capsys.readouterr()
    assert "-- stopped; what is there is kept as the answer\n" in printed.err
    (num_tokens,) = re.findall(r"of (\d+) tokens are more than", printed.out)
    assert int(num_tokens) == len(Encoder(tiny[1], "chat").encode_response(turn.answer)) - 1
    num_pieces = 0
    with pytest.raises(KeyboardInterrupt):
        session.run(make_reader(["Name a city."]), is_interactive=False)


def test_a_lack_of_memory_is_one_sentence(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    session = make_session(tiny, "chat", max_new_tokens=4)
    monkeypatch.setattr(tiny[0], "forward", fail)
    talk(session, "Name a city.")
    assert capsys.readouterr().err == (
        "-- the device's memory does not hold so long a text; begin anew by /reset; there is no answer, and the message"
        " is taken back\n"
    )


# ---- The real command ----


class Console:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cutlm", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
            env=environment | {"TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)
        self.text = ""

    def send(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Reads until a pattern is there; what came up to its end is taken."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            self._read()
        taken, self.text = self.text[: match.end()], self.text[match.end() :]
        return taken

    def _read(self) -> None:
        try:
            self.text += os.read(self._ours, 4096).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            raise AssertionError(f"it has ended: {self.text!r}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Console]:
    save_tiny_model(tmp_path / "model", chat=True, seed=3)  # one that does not come to an end by itself
    terminal = Console("chat", "--model", str(tmp_path / "model"), "--device", "cpu", "--max_new_tokens", "1900")
    yield terminal
    terminal.close()


def test_a_chat_in_a_terminal(terminal: Console, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.wait_for(r"prompted by chat; /help lists the commands, Ctrl-D leaves\r\n> ")
    terminal.send("Name a city.\n")
    terminal.wait_for(r"Name a city\.\r\n")
    terminal.wait_for(r".{40}")  # the first words are there long before the last ones
    terminal.send("\x03")
    terminal.wait_for(r"-- stopped; what is there is kept as the answer\r\n> ")
    terminal.send("/judge It is \\\n")
    terminal.wait_for(r"\.\.\. ")
    terminal.send("wrong.\n")
    judged = terminal.wait_for(r"tokens are more than 1\.1 times as likely with the judgment\r\n> ")
    assert "\033[1;4;31m" in judged
    assert re.search(r"blamed token +without +with +ratio\r\n", judged)
    terminal.send(f"/save {tmp_path / 'records.jsonl'}\n")
    terminal.wait_for(r"records\.jsonl: 1 record\r\n(.*\r\n)?> ")
    terminal.send("half a line\x03")
    terminal.wait_for(r"-- Ctrl-D or /quit leaves\r\n> ")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    assert main(["check", str(tmp_path / "records.jsonl")]) == 0
    (record,) = load_records(tmp_path / "records.jsonl")
    assert record.judgment == "It is \nwrong."
    assert len(record.output) > 20
    assert "1 unsatisfactory" in capsys.readouterr().out


def test_lines_of_a_pipe_are_messages_and_only_answers_come_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{JAPAN}\n/judge {JUDGMENT}\ncaf\udce9\n/save {tmp_path}\n".encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", "--model", str(base_path()), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{KYOTO}\nThe capital of Japan is [Kyoto].\n")
    assert "> " not in printed.out
    assert "Ctrl-D" not in printed.err
    assert "-- expected UTF-8 text, got other bytes; nothing was sent\n" in printed.err
    assert f"-- {tmp_path}: expected a file to append to, got something else; name another\n" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout", "3"], "--timeout: expected only with --base_url; set it, or leave these out"),
        (
            ["--base_url", "http://localhost:1", "--dtype", "float32", "--device", "cpu"],
            "--dtype, --device: expected only with a local model; leave out --base_url, or leave these out",
        ),
        (["--base_url", "localhost"], "server: expected an address such as http://localhost:8000, got 'localhost'"),
        (["--threshold", "0.5"], "threshold: expected a number of at least 1, got 0.5"),
        (["--max_new_tokens", "0"], "max_new_tokens: expected a whole number of at least 1, got 0"),
        (["--seed", str(10**22)], f"seed: expected a whole number of at least 0 and below 2^63, got {10**22}"),
        (["--max_new_tokens", "256"], "max_new_tokens: expected fewer than the model's context of 256, got 256"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", str(base_path()), *options]) == 2
    assert f"cutlm chat: {message}" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", str(save_tiny_model(tmp_path / "model"))]) == 2
    assert "its tokenizer has no chat template; say how to prompt it by --template alpaca" in capsys.readouterr().err
