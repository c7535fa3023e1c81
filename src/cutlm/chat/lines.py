"""Reading messages line by line: a line that ends in a backslash goes on, and so does what stands in triple quotes."""

from collections.abc import Callable
from typing import NamedTuple

from cutlm.errors import DataError

PROMPT, CONTINUATION = "> ", "... "
_QUOTES = '"""'


class Message(NamedTuple):
    """What was entered.

    Attributes:
        text: Without white space around it.
        is_quoted: Whether it stood in triple quotes, so that it is no command, whatever it begins with.
    """

    text: str
    is_quoted: bool = False


def read_message(read_line: Callable[[str], str]) -> Message:
    """Reads one message.

    Args:
        read_line: Shows what it is given and returns a line, without its end; raises EOFError where none is left.

    Raises:
        EOFError: Nothing is left.
        DataError: Triple quotes are not closed.
    """
    line = read_line(PROMPT)
    if line.lstrip().startswith(_QUOTES):
        return Message(_read_quoted(line.lstrip()[len(_QUOTES) :], read_line), is_quoted=True)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read_line(CONTINUATION)
        except EOFError:
            line = ""
    return Message("\n".join([*lines, line]).strip())


def _read_quoted(line: str, read_line: Callable[[str], str]) -> str:
    lines = []
    while not line.rstrip().endswith(_QUOTES):
        lines.append(line)
        try:
            line = read_line(CONTINUATION)
        except EOFError:
            raise DataError(
                f"expected {_QUOTES} at the end of the text that begins with it, got the end of the input; the text is"
                " left out"
            ) from None
    return "\n".join([*lines, line.rstrip().removesuffix(_QUOTES)]).strip()
