"""Terminal output of the demo and the chat: stages with their time, responses with flagged tokens, tables.

Flagged tokens are red and underlined on a terminal, and in brackets if output is redirected or NO_COLOR is set.
Control characters in model output are printed as escapes, so they cannot affect the terminal.
"""

import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.tokens import split_pieces

WIDTH = 80
_BOLD, _RED, _DIM, _RESET = "\033[1m", "\033[1;4;31m", "\033[2m", "\033[0m"
_INDENT, _LABEL = 2, 13
_END = "<end>"


@dataclass
class Stage:
    """A timed stage."""

    text: str = ""  # its result, to be set within the stage and printed at its end
    seconds: float = 0.0  # how long it took


class Terminal:
    """Prints to standard output and flushes at once, because progress bars go to standard error."""

    def __init__(self) -> None:
        self._has_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def print_text(self, text: str = "", indent: int = 0) -> None:
        """Print a wrapped paragraph."""
        for line in self._wrap([(text, "")], WIDTH - indent) or [""]:
            print(f"{' ' * indent}{line}".rstrip(), flush=True)

    def print_line(self, text: str) -> None:
        """Print a line without wrapping, such as a path or a command."""
        print(make_printable(text), flush=True)

    def print_piece(self, text: str) -> None:
        """Print a piece of a text with its line breaks, and no line break after it."""
        print(make_printable(text, keep="\n\t"), end="", flush=True)

    def print_marked(self, scores: TokenScores) -> None:
        """Print a response with its line breaks, its flagged tokens marked."""
        shown = ""
        for text, style in _mark(scores):
            for part in re.findall(r"\s+|\S+", make_printable(text, keep="\n\t")):
                shown += part if part.isspace() else self._mark_word(part, style)
        print(shown, flush=True)

    def print_heading(self, text: str) -> None:
        """Print a heading after an empty line."""
        print(f"\n{self._paint(make_printable(text), _BOLD)}", flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and, unless it fails, print its name, text and time in one line."""
        stage, started = Stage(), time.perf_counter()
        yield stage
        stage.seconds = round(time.perf_counter() - started, 2)
        width = WIDTH - _INDENT - _LABEL - 9
        print(
            f"  {self._paint(f'{name:<{_LABEL}}', _DIM)}{make_printable(stage.text):<{width}}{stage.seconds:6.1f} s",
            flush=True,
        )

    def print_pairs(self, pairs: Sequence[tuple[str, str | TokenScores]]) -> None:
        """Print labelled texts; for token scores, the response with its flagged tokens marked."""
        print(flush=True)
        for name, content in pairs:
            runs = [(content, "")] if isinstance(content, str) else list(_mark(content))
            for number, line in enumerate(self._wrap(runs, WIDTH - 2 * _INDENT - _LABEL)):
                label = self._paint(f"{'' if number else name:<{_LABEL}}", _DIM)
                print(f"{' ' * 2 * _INDENT}{label}{line}", flush=True)

    def print_table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table with its first column left-aligned; the last row is a summary in bold."""
        first = max(len(row[0]) for row in (header, *rows))
        for number, row in enumerate([header, *rows]):
            line = f"  {row[0]:<{first}}" + "".join(f"{cell:>8}" for cell in row[1:])
            print(self._paint(line, _DIM if number == 0 else _BOLD if number == len(rows) else ""), flush=True)

    def _paint(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if self._has_color and style else text

    def _mark_word(self, word: str, style: str) -> str:
        if not style:
            return word
        return self._paint(word, style) if self._has_color else f"[{word}]"

    def _wrap(self, runs: Sequence[tuple[str, str]], width: int) -> list[str]:
        """Wrap styled runs of text at spaces; each word is styled separately."""
        words: list[tuple[int, str]] = [(0, "")]  # visible width, and what to print
        for text, style in runs:
            for part in re.findall(r" |[^ ]+", make_printable(text)):
                if part == " ":
                    words.append((0, ""))
                    continue
                shown = self._mark_word(part, style)
                length = len(part) if self._has_color else len(shown)
                words[-1] = (words[-1][0] + length, words[-1][1] + shown)
        lines, room = [], -1
        for length, shown in words:
            if length + 1 > room:
                lines.append(shown)
                room = width - length
            else:
                lines[-1] += f" {shown}"
                room -= length + 1
        return lines


def _mark(scores: TokenScores) -> Iterator[tuple[str, str]]:
    """Yield runs of a response with their style; the end-of-sequence token is shown only if it is flagged."""
    run, is_run_flagged = "", False
    for piece in split_pieces(scores):
        if piece.is_flagged != is_run_flagged:
            yield run, _RED if is_run_flagged else ""
            run, is_run_flagged = "", piece.is_flagged
        run += f" {_END}" if piece.is_end and piece.is_flagged else piece.text
    yield run, _RED if is_run_flagged else ""


def make_printable(text: str, keep: str = "") -> str:
    """Escape characters that a terminal might interpret or cannot show, except those of `keep`.

    Spaces of all widths, joiners and tag letters stay, because emoji and several scripts need them.
    """
    shown = "".join(
        letter if letter in keep or _is_harmless(letter) else letter.encode("unicode_escape").decode()
        for letter in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _is_harmless(letter: str) -> bool:
    is_joiner = letter in "\u200c\u200d" or "\U000e0020" <= letter <= "\U000e007f"
    return letter.isprintable() or is_joiner or unicodedata.category(letter) == "Zs"
