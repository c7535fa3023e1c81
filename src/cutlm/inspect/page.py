"""The token page: one self-contained HTML file of token scores to search, sort and flag at any threshold.

The page loads nothing from the network. A strict Content-Security-Policy allows only its own style and script, by their
hashes. Its content is JSON that is never executed: `scores.js` computes flags and counts from it, `drawing.js` draws
records and curves, `controls.js` handles input; `text.js` makes elements whose texts are always text nodes, `tokens.js`
draws tokens. `page.html`, `tokens.css` and `page.css` are the frame.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.flagging.report import Sensitivity
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.tokens import has_same_tokens, split_pieces
from cutlm.prompting.spans import flag_spans

# The first two are modules that `cutlm.studio` shares. A page without a network cannot import; all become one script.
_SCRIPTS = ("text.js", "tokens.js", "scores.js", "drawing.js", "controls.js")
_STYLES = ("tokens.css", "page.css")
_MODULE_WORDS = re.compile(r"^import [^;]*;\n|^export ", re.MULTILINE)
_SETTINGS = (
    *("threshold", "unlikelihood_weight", "gamma", "contrast", "surprise_weight"),
    *("detector", "tokenizer", "template"),
)


@dataclass(frozen=True)
class PageRecord:
    """A record to show."""

    scores: tuple[TokenScores, ...]  # its scores by each file: one, or two (before and after training)
    group: str = ""  # a name to filter by; "" for none
    answer: str | None = None  # a trained model's answer to the same instruction, if any
    answer_judgment: str | None = None  # the judgment of that answer; None if it is satisfactory


@dataclass(frozen=True)
class Table:
    """A table above the records. The first cell of a row is its name, the last row is a summary of the others."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture above the records: PNG bytes for a light and, unless None, for a dark page, and the same in words."""

    light: bytes
    dark: bytes | None
    alt: str


def write_page(path: str | Path, records: Sequence[PageRecord], **options: Any) -> int:
    """Write a token page (see `render_page`) atomically and return its size in bytes."""
    page = render_page(records, **options).encode()
    with open_atomic(path) as file:
        file.write(page)
    return len(page)


def render_page(
    records: Sequence[PageRecord],
    *,
    title: str = "Flagged tokens",
    lead: Sequence[str] = (),  # paragraphs below the title
    sections: Sequence[Table | Picture] = (),  # shown before the records
    names: Sequence[str] = (),  # of the files of scores; two if records have two scores each
    num_unpaired: Sequence[int] = (),  # for each of two files, the number of records that only it has
    sensitivities: Sequence[Sensitivity | None] = (),  # for each file that of its detector, None if unknown
) -> str:
    """Render a token page."""
    settings: dict[tuple[Any, ...], int] = {}
    data = {
        "title": title,
        "lead": list(lead),
        "sections": [
            {name: _encode_png(value) if isinstance(value, bytes) else value for name, value in vars(section).items()}
            for section in sections
        ],
        "names": list(names),
        "unpaired": list(num_unpaired),
        "sensitivities": [known and vars(known) | {"noise": known.describe_noise()} for known in sensitivities],
        "records": [_describe_record(record, settings) for record in records],
        "settings": [dict(zip(_SETTINGS, values, strict=True)) for values in settings],
    }
    style = "".join(map(_read, _STYLES))
    script = '"use strict";\n' + _MODULE_WORDS.sub("", "".join(map(_read, _SCRIPTS)))
    pictures = " img-src data:;" if any(isinstance(section, Picture) for section in sections) else ""
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';{pictures} base-uri 'none';"
        " form-action 'none'"
    )
    # Within a script element only "<" can start an end tag or a comment.
    content = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Template(_read("page.html")).substitute(
        policy=policy, title=escape(": ".join([title, *([", ".join(names)] if names else [])])),
        style=style, script=script, data=content,
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode()  # lone surrogates become "?"


def _describe_record(record: PageRecord, settings: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    judged = record.scores[0].record
    sides = [describe_side(side, settings) for side in record.scores]
    if len(sides) == 2 and has_same_tokens(*record.scores):
        for name in ("pieces", "sizes", "has_end"):
            sides[1].pop(name, None)  # the page takes the first side's
    row: dict[str, Any] = {"instruction": judged.full_instruction, "judgment": judged.judgment}
    row |= {"is_satisfactory": judged.is_satisfactory, "sides": sides}
    if record.group:
        row["group"] = record.group
    if record.answer is not None:
        row["answer"] = {"text": record.answer, "judgment": record.answer_judgment}
    return row


def describe_side(scores: TokenScores, settings: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    """Describe the scores of a response by one model, for `tokens.js`.

    Numbers are kept exactly as in the file, so that the page finds the same flags by eq. 5.

    Args:
        scores: The scores.
        settings: Numbers the settings of the scores of a page; new ones are added.
    """
    pieces = split_pieces(scores)
    flagged = [index for index, is_flagged in enumerate(scores.is_flagged) if is_flagged]
    side: dict[str, Any] = {
        "pieces": [piece.text for piece in pieces],
        "has_end": bool(pieces) and pieces[-1].is_end,
        "without": scores.logps_without,
        "with": scores.logps_with,
        "flagged": flagged,
        "weights": [scores.weights[index] for index in flagged],
        "wrong": None,  # the tokens inside `wrong_spans`
        "settings": settings.setdefault(tuple(getattr(scores, name) for name in _SETTINGS), len(settings)),
    }
    if num_template := scores.num_template_tokens:
        side["num_template_tokens"] = num_template
    if scores.contrast != "judgment":
        side["reference"] = scores.logps_reference
    if scores.record.wrong_spans and not scores.record.is_satisfactory:
        marks = flag_spans(scores.spans[num_template:], scores.record.wrong_spans)
        side["wrong"] = [index for index, is_wrong in enumerate(marks, start=num_template) if is_wrong]
    if any(len(piece.indices) != 1 for piece in pieces):
        side["sizes"] = [len(piece.indices) for piece in pieces]
    return side


def _encode_png(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _read(name: str) -> str:
    return (files("cutlm.inspect") / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
