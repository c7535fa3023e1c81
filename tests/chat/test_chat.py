"""Chat with a local model: what it sees, what a judgment flags (as `cutlm blame` does) and what is saved."""

import fcntl
import io
import json
import math
import os
import pty
import re
import select
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
from encoders import encode_turns
from tiny import IM_END, IM_START, make_model, make_tokenizer, save_tiny_model

from cutlm.chat.conversation import Conversation, Turn, append_record
from cutlm.chat.local import LocalEngine
from cutlm.chat.session import Message, Session, read_message
from cutlm.cli import main
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.flagging.detector import FlagSettings
from cutlm.flagging.token_scores import read_token_scores
from cutlm.generation.local import Sampling, generate_responses
from cutlm.inspect.terminal import Terminal
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import make_messages
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


def test_judge_flags_what_cutlm_blame_flags_in_the_saved_record(
    base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "records.jsonl", tmp_path / "scores.jsonl"
    talk(make_session(base), JAPAN, f"/judge {JUDGMENT}", f"/save {data}")
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{KYOTO}\nThe capital of Japan is [Kyoto].\n\n  flagged token ")
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
    index = scores.is_flagged.index(True)
    without, judged = scores.logps_without[index], scores.logps_with[index]
    row = ["Kyoto", *(f"{math.exp(value):.3g}" for value in (without, judged, judged - without))]
    *_, listed, summary = printed.out.splitlines()
    assert listed.split() == row
    assert summary == f"1 of {len(scores.tokens)} tokens are more than 1.1 times as likely with the judgment"


@pytest.mark.parametrize("praise", ["Perfect.", "perfect, thank you"])
def test_praise_flags_nothing_and_is_saved_as_null(
    praise: str, base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(make_session(base), JAPAN, f"/judge {JUDGMENT}", f"/judge {praise}", f"/save {tmp_path / 'records.jsonl'}")
    assert '-- a judgment that begins with "Perfect" is praise; no token is flagged\n' in (capsys.readouterr().err)
    (record,) = load_records(tmp_path / "records.jsonl")
    assert record.judgment is None
    assert record.is_satisfactory


def test_a_stopped_answer_is_scored_without_its_end_token(
    base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(base, max_new_tokens=3)
    talk(session, JAPAN, f"/judge {JUDGMENT}", f"/save {tmp_path / 'records.jsonl'}")
    printed = capsys.readouterr()
    assert printed.out.startswith("The capital of\n")
    assert printed.out.endswith("0 of 3 tokens are more than 1.1 times as likely with the judgment\n")
    assert printed.err.startswith("-- stopped at 3 tokens (--max_new_tokens); kept the part that was generated\n")
    assert printed.err.endswith("-- the answer was stopped before its end, but training will treat it as complete\n")


def test_only_the_largest_ratios_are_listed(tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(tiny, "chat", max_new_tokens=100)
    talk(session, "Name a city.", "/judge It is wrong.")
    out = capsys.readouterr().out
    _, _, table = out.partition("flagged token")
    listed = [float(number) for number in re.findall(r"^  .* (\S+)$", table, re.MULTILINE) if number[0].isdigit()]
    (rest,) = re.findall(r"and (\d+) more with smaller ratios", out)
    assert len(listed) == 20
    assert re.search(rf"^{20 + int(rest)} of \d+ tokens", out, re.MULTILINE)
    assert min(listed) > 1.1


def test_the_instruction_of_a_later_turn_is_the_whole_conversation() -> None:
    conversation = Conversation([Turn("Hello.", "Hi!", True), Turn("Count to two.", "1, 3", True)])
    record = conversation.make_record("Wrong.")
    assert record.full_instruction == "User: Hello.\n\nAssistant: Hi!\n\nUser: Count to two."
    assert record.model_dump(exclude_unset=True) == {
        "instruction": "Count to two.",
        "output": "1, 3",
        "judgment": "Wrong.",
        "messages": make_messages(["Hello.", "Hi!", "Count to two.", "1, 3"]),
    }
    assert conversation.make_record("Wrong.", is_single_turn=True).messages is None


def test_an_empty_answer_is_not_a_valid_record() -> None:
    with pytest.raises(DataError, match=r"^the last exchange: field 'output': expected text, got an empty string"):
        Conversation([Turn("Hello.", "", True)]).make_record("Wrong.")


def test_records_are_appended_with_or_without_a_final_newline(tmp_path: Path) -> None:
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
        ("a.json", "[]", r"a\.json: expected JSON Lines, got a JSON array"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: field 'instruction' is missing"),
        ("a.txt", "Dear diary,\n", r"a\.txt: not JSON"),
        ("a.csv", "instruction,output,judgment\nAsk.,No.,It is rude.\n", r"a\.csv: expected JSON Lines"),
        ("a.jsonl", '{"instruction": "Ask.", "output": "No."}\n'.encode("utf-16"), r"a\.jsonl: expected JSON Lines"),
        ("a.jsonl.gz", None, r"a\.jsonl\.gz: cannot append to a compressed file"),
        ("a.jsonl.zst", None, r"a\.jsonl\.zst: cannot append to a compressed file"),
        ("a.jsonl", b"\x1f\x8b", r"a\.jsonl: the compressed file is damaged"),
        (".", None, r"not a regular file"),
        (
            "a.jsonl",
            '{"instruction": "Ask.", "output": "No.", "judgment": "It is rude."}\n',
            r"a\.jsonl:1: already has this exchange",
        ),
    ],
)
def test_other_files_are_left_unchanged(name: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        append_record(path, RECORD)
    assert content is None or path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_records_are_not_appended_to_token_scores(tmp_path: Path) -> None:
    row = RECORD.model_dump(exclude_unset=True) | {"schema_version": 1, "token_ids": [1]}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"scores\.jsonl: expected records, got token scores"):
        append_record(tmp_path / "scores.jsonl", RECORD)


# ---- Commands ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/judge Wrong.", "/judge: there is no answer yet"),
        ("/save out.jsonl", "/save: there is no answer yet"),
        ("/jugde x", "/jugde: unknown command; /help lists all"),
        ("/quit now", "/quit: takes no argument, got 'now'"),
        ("/template llama", "/template: expected alpaca or chat, got 'llama'"),
        ("caf\udce9", "the input is not valid UTF-8"),
    ],
)
def test_bad_commands_are_user_errors(line: str, message: str, base: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        make_session(base).handle(Message(line))


def test_judge_and_save_need_an_argument_and_a_judgment(base: tuple[Any, Any], tmp_path: Path) -> None:
    session = make_session(base)
    talk(session, JAPAN)
    with pytest.raises(UserError, match=r"^/judge: expected what is wrong with the last answer"):
        talk(session, "/judge")
    with pytest.raises(UserError, match=r"^/save: expected the name of a file"):
        talk(session, "/save")
    with pytest.raises(UserError, match=r"^/save: the last answer has no judgment yet"):
        talk(session, f"/save {tmp_path / 'records.jsonl'}")


@pytest.mark.parametrize(
    ("name", "reason"), [("~nosuchuser/x", "home"), ("x" * 300, "too long"), ("a\0b", "null byte")]
)
def test_an_invalid_file_name_does_not_end_the_chat(
    name: str, reason: str, base: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    lines = [JAPAN, "/judge Perfect.", f"/save {name}", f"/save {path}"]
    make_session(base).run(make_reader(lines), is_interactive=False)
    error = capsys.readouterr().err
    assert re.search(f"^-- /save: invalid file name .*{reason}.*; name another$", error, re.MULTILINE)
    assert f"-- {path}: 1 record\n" in error


def test_the_template_can_be_shown_and_changed(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(base)
    talk(session, JAPAN, "/template", "/template chat", "/template")
    printed = capsys.readouterr()
    assert printed.out == f"{KYOTO}\nalpaca\nchat\n"
    assert printed.err == "-- started a new conversation\n"
    assert not session.conversation.turns
    model, _ = base
    plain = make_session((model, make_tokenizer("bpe")))
    with pytest.raises(ConfigError, match="template: chat: the tokenizer 'tiny-bpe' has no chat template"):
        talk(plain, "/template chat")
    talk(plain, "/template")
    assert capsys.readouterr().out == "alpaca\n", "unchanged"


def test_alpaca_is_noted_once_to_have_no_turns(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(base)
    talk(session, JAPAN, JAPAN, JAPAN)
    printed = capsys.readouterr()
    assert printed.out == f"{KYOTO}\n" * 3
    assert printed.err == ("-- the alpaca template has no turns; the model sees only the latest message\n")
    assert session.conversation.make_record("No.").instruction == JAPAN


def test_lines_are_handled_until_quit(base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["/help", "", "/jugde", '"""', "/help", '"""', "/reset", "/quit", "not any more"])
    session = make_session(base, max_new_tokens=1)
    session.run(lambda prompt: next(lines), is_interactive=False)
    assert next(lines) == "not any more"
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[:6]] == [
        *("/judge", "/save", "/reset", "/template", "/help", "/quit")
    ]
    assert printed.out.count("/help") == 1, "between quotes it is a message"
    assert printed.err.startswith("-- /jugde: unknown command")
    assert printed.err.endswith("-- started a new conversation\n")


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


def test_unclosed_quotes_are_an_error() -> None:
    with pytest.raises(DataError, match=r'^input ended within """'):
        read_message(make_reader(['"""one', "two"]))


# ---- What the model sees ----


@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "llama", "llama_legacy"])
def test_a_conversation_is_encoded_by_the_chat_template(kind: str) -> None:
    tokenizer = make_tokenizer(kind, chat=True)
    encoder = Encoder(tokenizer, "chat")
    texts = ["Name a city.", "Sydney is.", "So: the capital?"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_turns(encoder, texts) == expected
    assert encode_turns(encoder, texts[:1]) == encoder.encode_prompt(texts[0])
    # Special tokens spelled out in messages stay text: only the template starts and ends turns.
    spelled = [f"a{IM_END}\n{IM_START}b", f"{IM_START}c", f"d{IM_END}"]
    ids = encode_turns(encoder, spelled)
    special = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    assert [index for index in ids if index in special] == special * 3 + special[:1]
    decoded = re.sub(r"\s", "", tokenizer.decode(ids))  # some tokenizers add spaces
    frame = rf"{re.escape(IM_END)}{re.escape(IM_START)}(user|assistant)"
    assert re.sub(r"\s", "", "".join(spelled)) in re.sub(frame, "", decoded)


def test_a_template_may_drop_thoughts_but_no_user_text() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}assistant:"
    )
    encoder = Encoder(tokenizer, "chat")
    ids = encode_turns(encoder, ["Hello.", "hm</think>Hi!", "Bye."])
    assert tokenizer.decode(ids) == "user: Hello.\nassistant: Hi!\nuser: Bye.\nassistant:"
    with pytest.raises(ConfigError, match="the tokenizer's chat template changes the user's text"):
        encode_turns(encoder, ["Hello.", "Hi!", "My </think> text."])
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="the tokenizer's chat template changes the user's text"):
        encode_turns(Encoder(tokenizer, "chat"), ["Hello.", "Hi!", "Bye."])
    tokenizer.chat_template = "{{ messages[0].content if messages | length == 1 else raise_exception('One turn!') }}:"
    with pytest.raises(ConfigError, match=r"does not accept the messages \(One turn!\); use template: alpaca"):
        encode_turns(Encoder(tokenizer, "chat"), ["Hello.", "Hi!", "Bye."])


def test_the_oldest_turns_are_dropped_if_the_conversation_does_not_fit(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(tiny, "chat", max_new_tokens=16)
    encoder = Encoder(tiny[1], "chat")
    num_dropped = 0
    for number in range(12):
        talk(session, f"Name city number {number}.")
        num_dropped += len(re.findall("-- the conversation is too long for the model's", capsys.readouterr().err))
        turns = session.conversation.turns
        texts = Conversation(turns[:-1]).list_texts(turns[-1].message)
        assert len(encode_turns(encoder, texts)) <= 256 - 16
    assert num_dropped
    assert turns[0].message != "Name city number 0."
    seen = session.conversation.make_record("No.").conversation
    assert [message["content"] for message in seen.messages] == texts, "what the model saw"
    with pytest.raises(UserError, match=r"the message alone makes a prompt of \d+ tokens"):
        talk(session, "word " * 300)
    assert session.conversation.turns == turns


def test_the_pieces_of_an_answer_equal_a_generated_response(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    for seed, temperature in ((1, 0.0), (3, 1.0)):  # without null bytes
        sampling = Sampling(60, temperature, seed=seed)
        engine = LocalEngine(model, tokenizer, "chat", sampling, FlagSettings())
        pieces: list[str] = []
        prompt, _ = engine.prepare(["Name a city."])
        assert not engine.answer(prompt, 0, pieces.append)
        assert ["".join(pieces)] == generate_responses(model, tokenizer, Encoder(tokenizer, "chat"), [prompt], sampling)
        assert len(pieces) > 20
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1] if len(piece) == 1)


def test_whether_to_stop_is_known_on_the_device_of_the_model(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of the CPU cannot be combined with one of a GPU; the device "meta" refuses it, too."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("cutlm.chat.local.generate_ids", lambda *args, **options: found.update(options))
    LocalEngine(*tiny, "chat", Sampling(8), FlagSettings()).answer([5, 6], 0, lambda text: None)
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    assert found["stopping_criteria"](ids, None).device == ids.device


def test_ctrl_c_stops_at_the_next_token_and_keeps_the_answer_so_far(
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
    assert num_pieces in (3, 4), "the last piece may be an incomplete character that was held back"
    assert signal.getsignal(signal.SIGINT) is before
    (turn,) = session.conversation.turns
    assert not turn.is_ended
    printed = capsys.readouterr()
    assert "-- stopped; kept the part that was generated\n" in printed.err
    (num_tokens,) = re.findall(r"of (\d+) tokens are more than", printed.out)
    assert int(num_tokens) == len(Encoder(tiny[1], "chat").encode_response(turn.answer)) - 1
    num_pieces = 0
    with pytest.raises(KeyboardInterrupt):
        session.run(make_reader(["Name a city."]), is_interactive=False)


def test_out_of_memory_is_a_user_error(
    tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    session = make_session(tiny, "chat", max_new_tokens=4)
    monkeypatch.setattr(tiny[0], "forward", fail)
    talk(session, "Name a city.")
    assert capsys.readouterr().err == (
        "-- the device ran out of memory; use /reset to start a shorter conversation; no answer, so the message was"
        " dropped\n"
    )


# ---- The real command ----


class Console:
    """A command running in its own pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cutlm", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches the command
            env=environment | {"TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)
        self.text = ""

    def send(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, again: str = "") -> str:
        """Reads until a pattern matches; returns and removes everything up to its end.

        After each silence of some seconds it sends `again`.
        """
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self._ours], [], [], 3)[0]:
                self._read()
            elif again:
                self.send(again)
        taken, self.text = self.text[: match.end()], self.text[match.end() :]
        return taken

    def _read(self) -> None:
        try:
            self.text += os.read(self._ours, 4096).decode("utf-8", "replace")
        except OSError:  # the command closed its end
            raise AssertionError(f"the command has ended: {self.text!r}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Console]:
    save_tiny_model(tmp_path / "model", chat=True, seed=3)  # this seed does not end its answers by itself
    terminal = Console("chat", "--model", str(tmp_path / "model"), "--device", "cpu", "--max_new_tokens", "1900")
    yield terminal
    terminal.close()


def test_a_chat_in_a_terminal(terminal: Console, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.wait_for(r"chat template; /help lists the commands, Ctrl-D leaves\r\n> ")
    terminal.send("Name a city.\n")
    terminal.wait_for(r"Name a city\.\r\n")
    terminal.wait_for(r".{40}")  # the first words arrive long before the last ones
    terminal.send("\x03")
    terminal.wait_for(r"-- stopped; kept the part that was generated\r\n> ")
    terminal.send("/judge It is \\\n")
    terminal.wait_for(r"\.\.\. ")
    terminal.send("wrong.\n")
    judged = terminal.wait_for(r"tokens are more than 1\.1 times as likely with the judgment\r\n> ")
    assert "\033[1;4;31m" in judged
    assert re.search(r"flagged token +without +with +ratio\r\n", judged)
    terminal.send(f"/save {tmp_path / 'records.jsonl'}\n")
    terminal.wait_for(r"records\.jsonl: 1 record\r\n(.*\r\n)?> ")
    terminal.send("half a line\x03")
    # Python loses a Ctrl-C that arrives between its printing the prompt and waiting for input.
    terminal.wait_for(r"-- Ctrl-D or /quit leaves\r\n> ", again="\x03")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    assert main(["check", str(tmp_path / "records.jsonl")]) == 0
    (record,) = load_records(tmp_path / "records.jsonl")
    assert record.judgment == "It is \nwrong."
    assert len(record.output) > 20
    assert "1 unsatisfactory" in capsys.readouterr().out


def test_piped_lines_are_messages_and_only_answers_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{JAPAN}\n/judge {JUDGMENT}\ncaf\udce9\n/save {tmp_path}\n".encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", "--model", str(base_path()), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{KYOTO}\nThe capital of Japan is [Kyoto].\n")
    assert "> " not in printed.out
    assert "Ctrl-D" not in printed.err
    assert "-- the input is not valid UTF-8; nothing was sent\n" in printed.err
    assert f"-- {tmp_path}: not a regular file; name another\n" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout", "3"], "--timeout: expected only with --base_url; set it, or leave these out"),
        (
            ["--base_url", "http://localhost:1", "--dtype", "float32", "--device", "cpu"],
            "--dtype, --device: expected only with a local model; leave out --base_url, or leave these out",
        ),
        (["--base_url", "localhost"], "base_url: expected an address such as http://localhost:8000/v1, got"),
        (["--threshold", "0.5"], "threshold: expected a number of at least 1, or auto, got 0.5"),
        (["--max_new_tokens", "0"], "max_new_tokens: expected a whole number of at least 1, got 0"),
        (["--seed", str(10**22)], f"seed: expected a whole number of at least 0 and below 2^63, got {10**22}"),
        (["--max_new_tokens", "256"], "max_new_tokens: expected fewer than the model's context of 256, got 256"),
    ],
)
def test_bad_options_are_user_errors(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", str(base_path()), *options]) == 2
    assert f"cutlm chat: {message}" in capsys.readouterr().err


def test_a_tokenizer_without_a_chat_template_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", str(save_tiny_model(tmp_path / "model"))]) == 2
    assert "its tokenizer has no chat template; set --template alpaca" in capsys.readouterr().err
