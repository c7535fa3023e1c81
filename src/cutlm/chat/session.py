"""A chat session: reads messages and commands, prints answers and remarks.

Answers and the output of commands go to standard output, remarks and errors to standard error.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cutlm.chat.conversation import Conversation, Turn, append_record
from cutlm.data.records import JudgedRecord, is_praise
from cutlm.errors import DataError, UserError
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.terminal import Terminal, make_printable
from cutlm.prompting.reasoning import SplitAnswer, split_reasoning
from cutlm.prompting.templates import TEMPLATES, TemplateName

MAX_TOKENS_LISTED = 20
PROMPT, CONTINUATION = "> ", "... "
_QUOTES = '"""'
_DROPPED = "no answer, so the message was dropped"
_MIN_LENGTH_SHOWN = 20  # by then, an answer that begins with thoughts has shown their markup
_HELP = (
    ("/judge TEXT", "show which tokens of the last answer this judgment flags; Perfect. if nothing is wrong"),
    ("/save FILE", "append the last exchange and its judgment to a file of records"),
    ("/reset", "start a new conversation"),
    ("/template [NAME]", f"show the prompt template, or switch to {' or '.join(TEMPLATES)}"),
    ("/help", "show this list"),
    ("/quit", "leave (or press Ctrl-D)"),
)
_HELP_NOTES = (
    'End a line with \\ to continue it on the next one, or put a text of several lines between """.',
    "Ctrl-C stops an answer.",
)


class Engine(Protocol):
    """A model that answers. All methods raise UserError for problems that the user can fix."""

    template: TemplateName | None  # None if a server applies its own
    max_new_tokens: int

    def set_template(self, name: TemplateName) -> None:
        """Switch the prompt template."""

    def prepare(self, texts: Sequence[str]) -> tuple[Any, int]:
        """Make a prompt of texts of the user and the model in turn; the last is the user's.

        Return the prompt, and the number of oldest turns dropped to make it fit.
        """

    def answer(self, prompt: Any, seed_offset: int, show: Callable[[str], None]) -> bool:
        """Generate an answer to a prompt of `prepare`; raise KeyboardInterrupt if the user stops it.

        `seed_offset` is added to the seed, so that a repeated question may get a different answer; `show` is called
        with each piece of the text, thoughts and their markup included. Return whether the model ended the answer
        within `max_new_tokens`.
        """

    def blame(self, record: JudgedRecord) -> tuple[TokenScores, bool]:
        """Score a record as `cutlm blame` does; also returns whether a prompt was truncated from the left."""


class Message(NamedTuple):
    """User input, stripped, and whether it was in triple quotes and therefore is never a command."""

    text: str
    is_quoted: bool = False


def read_message(read_line: Callable[[str], str]) -> Message:
    """Read one message: a line, lines continued by a backslash, or lines between triple quotes.

    `read_line` shows a prompt and returns a line without its end; it raises EOFError at the end of the input, and so
    does this function if no message is left.
    """
    line, lines = read_line(PROMPT), []
    if line.lstrip().startswith(_QUOTES):
        line = line.lstrip()[len(_QUOTES) :]
        while not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            try:
                line = read_line(CONTINUATION)
            except EOFError:
                raise DataError(f"input ended within {_QUOTES}; the text was not sent") from None
        return Message("\n".join([*lines, line.rstrip().removesuffix(_QUOTES)]).strip(), is_quoted=True)
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read_line(CONTINUATION)
        except EOFError:
            line = ""
    return Message("\n".join([*lines, line]).strip())


class Session:
    """A chat with one model, whose `conversation` holds the turns that the model sees."""

    def __init__(self, engine: Engine) -> None:
        self.conversation = Conversation()
        self._engine = engine
        self._terminal = Terminal()
        self._num_answers = 0
        self._is_single_turn_noted = False

    def run(self, read_line: Callable[[str], str], *, is_interactive: bool) -> None:
        """Handle messages and commands until /quit or the end of the input.

        If a person types (`is_interactive`), Ctrl-C stops only the current answer.
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
        """Handle a message or command and return whether the session continues."""
        text = message.text
        if not text:
            return True
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError("the input is not valid UTF-8; nothing was sent")
        if message.is_quoted or not text.startswith("/"):
            self._say(text)
            return True
        name, *rest = text.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        commands = {"/judge": self._judge, "/save": self._save, "/template": self._choose_template}
        simple_commands = {"/reset": self._reset, "/help": print_help, "/quit": lambda: None}
        if name in commands:
            commands[name](argument)
        elif name not in simple_commands:
            hint = 'to send a message that begins with /, put it between """'
            raise UserError(f"{name}: unknown command; /help lists all; {hint}")
        elif argument:
            raise UserError(f"{name}: takes no argument, got {argument!r}")
        else:
            simple_commands[name]()
        return name != "/quit"

    def _say(self, text: str) -> None:
        if self._engine.template == "alpaca" and self.conversation.turns:
            if not self._is_single_turn_noted:
                remark("the alpaca template has no turns; the model sees only the latest message")
                self._is_single_turn_noted = True
            self.conversation = Conversation()
        prompt, num_dropped = self._engine.prepare(self.conversation.list_texts(text))
        if num_dropped:
            turns = "turn was" if num_dropped == 1 else f"{num_dropped} turns were"
            remark(f"the conversation is too long for the model's context; the oldest {turns} dropped")
            del self.conversation.turns[:num_dropped]
        answer = _Answer(self._terminal)
        try:
            is_ended = self._engine.answer(prompt, self._num_answers, answer.add)
            result = self._add_turn(text, answer, is_ended)
            if not is_ended:
                result = f"stopped at {self._engine.max_new_tokens} tokens (--max_new_tokens); {result}"
        except UserError as error:  # what arrived before it is not an answer
            result = f"{error}; {_DROPPED}"
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {self._add_turn(text, answer, is_ended=False)}") from None
        self._num_answers += 1
        if answer.is_shown:
            print(flush=True)
        if result:
            remark(result)

    def _add_turn(self, text: str, answer: "_Answer", is_ended: bool) -> str:
        """Keep an answer without its reasoning and return a remark on it, or "" if there is nothing to say."""
        split = answer.finish()
        if split.problem is not None:
            return f"{split.problem}; {_DROPPED}"
        if not split.output and (not is_ended or split.reasoning is not None):
            return _DROPPED
        # A server may split a character's surrogate pair over two pieces.
        output = split.output.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self.conversation.turns.append(Turn(text, output, is_ended))
        if not is_ended:
            return "kept the part that was generated"
        return "" if output else "the answer is empty"

    def _get_last(self, command: str) -> Turn:
        if not self.conversation.turns:
            raise UserError(f"{command}: there is no answer yet; send a message first")
        return self.conversation.turns[-1]

    def _judge(self, judgment: str) -> None:
        last = self._get_last("/judge")
        if not judgment:
            raise UserError("/judge: expected what is wrong with the last answer, or Perfect. if nothing is")
        record = self._make_record(judgment)
        last.judgment = judgment
        if is_praise(judgment):
            remark('a judgment that begins with "Perfect" is praise; no token is flagged')
            return
        try:
            scores, is_truncated = self._engine.blame(record)
        except UserError as error:
            raise UserError(f"{error}; cannot show the flags, but /save can save the judgment") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; /save can still save the judgment") from None
        if is_truncated:
            remark("the prompt was truncated from the left to fit the model's context")
        if not last.is_ended:  # a stopped response has no end-of-sequence token
            names = ("token_ids", "tokens", "spans", "logps_without", "logps_with", "is_flagged", "weights")
            scores = replace(scores, **{name: getattr(scores, name)[:-1] for name in names})
        self._print_flags(scores)

    def _print_flags(self, scores: TokenScores) -> None:
        self._terminal.print_marked(scores)
        print()
        ratios, without, judged = scores.log_ratios, scores.logps_without, scores.logps_with
        assert ratios is not None
        assert without is not None
        assert judged is not None
        flagged = [index for index, is_flagged in enumerate(scores.is_flagged) if is_flagged]
        listed = sorted(sorted(flagged, key=lambda index: -ratios[index])[:MAX_TOKENS_LISTED])
        if listed:
            print(f"  {'flagged token':<24}{'without':>10}{'with':>10}{'ratio':>10}")
        for index in listed:
            is_end = scores.spans[index] == (len(scores.record.output),) * 2
            token = "<end>" if is_end else scores.tokens[index].strip() or repr(scores.tokens[index])
            values = (without[index], judged[index], min(ratios[index], 700.0))  # exp overflows above 709
            self._terminal.print_line(f"  {token:<24}" + "".join(f"{math.exp(value):>10.3g}" for value in values))
        if len(listed) < len(flagged):
            print(f"  and {len(flagged) - len(listed)} more with smaller ratios")
        counts = f"{len(flagged)} of {len(ratios)} tokens"
        print(f"{counts} are more than {scores.threshold:g} times as likely with the judgment", flush=True)

    def _make_record(self, judgment: str) -> JudgedRecord:
        return self.conversation.make_record(judgment, is_single_turn=self._engine.template == "alpaca")

    def _save(self, name: str) -> None:
        last = self._get_last("/save")
        if not name:
            raise UserError("/save: expected the name of a file of records")
        if last.judgment is None:
            raise UserError("/save: the last answer has no judgment yet; use /judge TEXT or /judge Perfect.")
        record = self._make_record(last.judgment)
        try:
            path = Path(name).expanduser()
            num_records = append_record(path, record)
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown user's home, a NUL byte
            raise UserError(f"/save: invalid file name ({error}); name another") from None
        remark(f"{path}: {num_records} record{'s' if num_records > 1 else ''}")
        if not last.is_ended:
            remark("the answer was stopped before its end, but training will treat it as complete")

    def _reset(self) -> None:
        self.conversation = Conversation()
        remark("started a new conversation")

    def _choose_template(self, name: str) -> None:
        if not name:
            print(self._engine.template or "the server's own", flush=True)
            return
        if name not in TEMPLATES:
            raise UserError(f"/template: expected {' or '.join(TEMPLATES)}, got {name!r}")
        self._engine.set_template(name)
        self._is_single_turn_noted = False
        self._reset()


class _Answer:
    """The text of an answer while it arrives, of which only the final answer is shown."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._text = self._shown = ""
        self._has_noted_thoughts = False

    @property
    def is_shown(self) -> bool:
        """Whether a part of the answer is on the screen."""
        return bool(self._shown)

    def add(self, piece: str) -> None:
        """Add a piece of the text and show the new part of the final answer."""
        self._text += piece
        if len(self._text.strip()) >= _MIN_LENGTH_SHOWN:
            self.finish()

    def finish(self) -> SplitAnswer:
        """Show the new part of the final answer, and return the whole."""
        split = split_reasoning(self._text)
        if split.problem is None:
            if not split.output.startswith(self._shown):
                print(flush=True)
                remark("the text above is the model's reasoning")  # because the end of thoughts followed
                self._shown = ""
            if rest := split.output[len(self._shown) :]:
                self._terminal.print_piece(rest)
            self._shown = split.output
        if not (self._has_noted_thoughts or self._shown) and (split.reasoning or split.problem):
            self._has_noted_thoughts = True
            remark("the model reasons before it answers")
        return split


def print_help() -> None:
    """Print the commands."""
    lines = [*(f"{command:<18} {meaning}" for command, meaning in _HELP), *_HELP_NOTES]
    print("\n".join(f"  {line}" for line in lines), flush=True)


def remark(text: str) -> None:
    """Print a remark on standard error."""
    for line in text.splitlines():
        print(f"-- {make_printable(line)}", file=sys.stderr, flush=True)
