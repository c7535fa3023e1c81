"""A chat: messages and commands in, answers and remarks out.

Answers, and what was asked for by a command, go to standard output; remarks and problems to the other stream. What a
model wrote is printed in characters that do nothing to a terminal.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cutlm.blame.token_scores import TokenScores
from cutlm.chat import Engine
from cutlm.chat.conversation import Conversation, Turn, append_record
from cutlm.chat.lines import Message, read_message
from cutlm.data.records import is_praise
from cutlm.errors import UserError
from cutlm.inspect.terminal import Terminal, make_printable
from cutlm.inspect.tokens import compute_log_ratios
from cutlm.prompting.templates import TEMPLATES

MAX_TOKENS_LISTED = 20
_HELP = (
    ("/judge TEXT", "what this judgment would blame in the last answer; Perfect. where nothing is wrong"),
    ("/save FILE", "append the last exchange and its judgment to a file of records"),
    ("/reset", "begin a new conversation"),
    ("/template [NAME]", f"how the model is prompted, or prompt it by {' or '.join(TEMPLATES)}"),
    ("/help", "this list"),
    ("/quit", "leave; so does Ctrl-D"),
)
_HELP_NOTES = (
    "A line that ends in \\ goes on in the next one; a text of many lines can stand in triple quotes.",
    "Ctrl-C stops an answer.",
)


class Session:
    """A chat with one model.

    Args:
        engine: Who answers.

    Attributes:
        conversation: What the model is shown.
    """

    def __init__(self, engine: Engine) -> None:
        self.conversation = Conversation()
        self._engine = engine
        self._terminal = Terminal()
        self._num_answers = 0
        self._knows_of_turns = False

    def run(self, read_line: Callable[[str], str], *, is_interactive: bool) -> None:
        """Reads messages and commands until none is left.

        Args:
            read_line: Shows a prompt and returns a line; raises EOFError at the end.
            is_interactive: Whether a person types. Ctrl-C then stops what is under way, and the chat goes on.

        Raises:
            KeyboardInterrupt: Ctrl-C, where nobody types.
        """
        while True:
            is_reading = True
            try:
                message = read_message(read_line)
                is_reading = False
                if not self.handle(message):
                    return
            except EOFError:
                if is_interactive:
                    print(flush=True)
                return
            except KeyboardInterrupt as interrupt:
                if not is_interactive:
                    raise
                print(file=sys.stderr)
                remark("Ctrl-D or /quit leaves" if is_reading else str(interrupt) or "stopped")
            except UserError as error:
                remark(str(error))

    def handle(self, message: Message) -> bool:
        """Does what was entered; False to leave.

        Raises:
            UserError: It cannot be done. The chat can go on.
            KeyboardInterrupt: It was stopped.
        """
        text = message.text
        if not text:
            return True
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("expected UTF-8 text, got other bytes; nothing was sent") from None
        if message.is_quoted or not text.startswith("/"):
            self._say(text)
            return True
        name, *rest = text.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        commands = {"judge": self._judge, "save": self._save, "template": self._choose_template}
        if name[1:] in commands:
            commands[name[1:]](argument)
        elif name in ("/reset", "/help", "/quit"):
            if argument:
                raise UserError(f"{name}: expected nothing after it, got {argument!r}")
            if name == "/quit":
                return False
            self._reset() if name == "/reset" else print_help()
        else:
            raise UserError(
                f"{name}: no such command; /help lists them, and a message that begins with / can stand in triple"
                " quotes"
            )
        return True

    def _say(self, text: str) -> None:
        if self._engine.template == "alpaca" and self.conversation.turns:
            if not self._knows_of_turns:
                remark("the alpaca prompt has no turns: each message stands alone, the model sees none before it")
                self._knows_of_turns = True
            self.conversation = Conversation()
        prompt, num_dropped = self._engine.prepare(self.conversation.list_texts(text))
        if num_dropped:
            turns = "1 turn" if num_dropped == 1 else f"{num_dropped} turns"
            remark(f"the conversation is too long for the model's context: the oldest {turns} left out from now on")
            del self.conversation.turns[:num_dropped]
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self._terminal.print_piece(piece)

        problem, is_ended = "", False
        try:
            is_ended = self._engine.answer(prompt, self._num_answers, show)
            if not is_ended:
                problem = f"stopped at {self._engine.max_new_tokens} tokens (--max_new_tokens)"
        except UserError as error:
            problem = str(error)
        except KeyboardInterrupt:
            self._keep(text, pieces, is_ended=False)
            raise KeyboardInterrupt(f"stopped; {_tell_rest(pieces)}") from None
        self._keep(text, pieces, is_ended)
        self._num_answers += 1
        if pieces:
            print(flush=True)
        if problem:
            remark(f"{problem}; {_tell_rest(pieces)}")
        elif not pieces:
            remark("the answer is empty")

    def _keep(self, text: str, pieces: Sequence[str], is_ended: bool) -> None:
        # Half characters are put together, where a server cut one in two.
        answer = "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if answer or is_ended:
            self.conversation.turns.append(Turn(text, answer, is_ended))

    def _get_last(self, command: str) -> Turn:
        if not self.conversation.turns:
            raise UserError(f"{command}: there is no answer yet; say something first")
        return self.conversation.turns[-1]

    def _judge(self, judgment: str) -> None:
        last = self._get_last("/judge")
        if not judgment:
            raise UserError(
                "/judge: expected what is wrong with the last answer, or Perfect. where nothing is, got nothing"
            )
        record = self.conversation.make_record(judgment)
        last.judgment = judgment
        if is_praise(judgment):
            remark('a judgment that begins with "Perfect" finds nothing wrong: no token is blamed')
            return
        try:
            scores, is_truncated = self._engine.blame(record)
        except UserError as error:
            raise UserError(f"{error}; what this judgment blames cannot be shown, but it is kept for /save") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the judgment is kept for /save") from None
        if is_truncated:
            remark("a prompt was cut from the left to fit the model's context")
        self._print_blame(scores if last.is_ended else _drop_end(scores))

    def _print_blame(self, scores: TokenScores) -> None:
        self._terminal.print_marked(scores)
        print()
        ratios = compute_log_ratios(scores)
        assert ratios is not None
        assert scores.logps_without is not None
        assert scores.logps_with is not None
        flagged = [place for place, is_flagged in enumerate(scores.is_flagged) if is_flagged]
        listed = sorted(sorted(flagged, key=lambda place: -ratios[place])[:MAX_TOKENS_LISTED])
        if listed:
            print(f"  {'blamed token':<24}{'without':>10}{'with':>10}{'ratio':>10}")
        for place in listed:
            is_end = scores.spans[place] == (len(scores.record.output),) * 2
            token = "<end>" if is_end else scores.tokens[place].strip() or repr(scores.tokens[place])
            values = (scores.logps_without[place], scores.logps_with[place], min(ratios[place], 700.0))  # a float's end
            self._terminal.print_line(f"  {token:<24}" + "".join(f"{math.exp(value):>10.3g}" for value in values))
        if len(listed) < len(flagged):
            print(f"  and {len(flagged) - len(listed)} more, of smaller ratios")
        print(
            f"{len(flagged)} of {len(ratios)} tokens are more than {scores.threshold:g} times as likely with the"
            " judgment",
            flush=True,
        )

    def _save(self, name: str) -> None:
        last = self._get_last("/save")
        if not name:
            raise UserError("/save: expected the name of a file of records, got nothing")
        if last.judgment is None:
            raise UserError("/save: the last answer has no judgment yet; give one by /judge TEXT, or /judge Perfect.")
        record = self.conversation.make_record(last.judgment)
        try:
            path = Path(name).expanduser()
            num_records = append_record(path, record)
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, nobody's home, a NUL
            raise UserError(f"/save: no file can have this name ({error}); name another") from None
        remark(f"{path}: {num_records} record{'s' if num_records > 1 else ''}")
        if not last.is_ended:
            remark("the answer was stopped before its end; training takes it for a whole one")

    def _reset(self) -> None:
        self.conversation = Conversation()
        remark("a new conversation")

    def _choose_template(self, name: str) -> None:
        if not name:
            print(self._engine.template or "the server's own", flush=True)
            return
        if name not in TEMPLATES:
            raise UserError(f"/template: expected {' or '.join(TEMPLATES)}, got {name!r}")
        self._engine.set_template(name)
        self._knows_of_turns = False
        self._reset()


def _tell_rest(pieces: Sequence[str]) -> str:
    return "what is there is kept as the answer" if pieces else "there is no answer, and the message is taken back"


def _drop_end(scores: TokenScores) -> TokenScores:
    """Without the end-of-sequence, which a response that was stopped has not."""
    names = ("token_ids", "tokens", "spans", "logps_without", "logps_with", "is_flagged", "weights")
    return replace(scores, **{name: getattr(scores, name)[:-1] for name in names})


def print_help() -> None:
    """Prints the commands."""
    for command, meaning in _HELP:
        print(f"  {command:<18} {meaning}")
    for note in _HELP_NOTES:
        print(f"  {note}")
    sys.stdout.flush()


def remark(text: str) -> None:
    """Says something beside the conversation."""
    for line in text.splitlines():
        print(f"-- {make_printable(line)}", file=sys.stderr, flush=True)
