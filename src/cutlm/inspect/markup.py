"""Text from outside as HTML: never markup, the same to the letter, and what cannot be seen in it named.

The names and dots that stand for spaces, line ends and marks of direction are drawn by the style of the page.
"""

import unicodedata
from html import escape

_JOINERS = "\u200c\u200d"  # part of emoji and of many scripts' spelling


def show_text(text: str) -> str:
    """Text as HTML that reads as it does: nothing in it is markup, and what cannot be seen is named.

    What makes an odd character visible is added by the style, so that the text stays the same.

    Args:
        text: Any text. Characters that stand for nothing, halves of surrogate pairs, become "?".
    """
    return "".join(show_characters(text))


def show_characters(text: str) -> list[str]:
    """HTML for each character of a text; see `show_text`."""
    shown = []
    for place, character in enumerate(text):
        if character == " ":
            is_plain = 0 < place < len(text) - 1 and text[place - 1] != " " and text[place + 1] != " "
            shown.append(" " if is_plain else '<i class="space"> </i>')
        elif character == "\n":
            shown.append('<i class="line">\n</i>')
        elif _is_odd(character):
            # A reader of HTML takes a bare carriage return for a line feed. A mark of direction ends with its element.
            raw = "&#13;" if character == "\r" else escape(mend_text(character))
            shown.append(f'<bdi class="odd" data-name="{_name(character)}">{raw}</bdi>')
        else:
            shown.append(escape(character))
    return shown


def _is_odd(character: str) -> bool:
    kind = unicodedata.category(character)
    if kind == "Cf":
        return character not in _JOINERS and not 0xE0020 <= ord(character) <= 0xE007F  # flags are spelled by these
    return kind in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")


def _name(character: str) -> str:
    return {"\t": "\u21e5", "\r": "CR"}.get(character, f"U+{ord(character):04X}")


def mend_text(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text
