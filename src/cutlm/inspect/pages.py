"""One self-contained HTML page of token scores: what a judgment makes likelier in each response, and what is blamed.

The page loads nothing and runs nothing: a strict Content-Security-Policy, no script, pictures as data. Everything that
comes from outside is text and never markup. Shade is never alone: what is blamed is bold and underlined too, and every
figure stands in a table below its response. The look is `page.css`, text `cutlm.inspect.markup`, curves are made by
`cutlm.inspect.plots`.
"""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from cutlm.blame.token_scores import TokenScores
from cutlm.data.files import open_atomic
from cutlm.inspect.markup import mend_text, show_characters, show_text
from cutlm.inspect.tokens import compute_log_ratios, split_pieces

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
# From which change on, in nats and up or down, a token has the first, second ... shade.
LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Example:
    """A judged response to show.

    Attributes:
        scores: The response, its judgment and its tokens' scores.
        group: The heading that it stands under.
        after: What a trained model answers to the same instruction; None where there is none.
        after_judgment: What is wrong with that; None where nothing is.
    """

    scores: TokenScores
    group: str = ""
    after: str | None = None
    after_judgment: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Cells, the first of each row its name; the last row is the sum of the others.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, for light and for dark pages.

    Attributes:
        light: A PNG file's bytes.
        dark: Likewise; None shows the light one on both.
        alt: The same in words.
    """

    light: bytes
    dark: bytes | None
    alt: str


def write_page(
    path: str | Path,
    title: str,
    lead: Sequence[str],
    examples: Sequence[Example],
    *,
    table: Table | None = None,
    picture: Picture | None = None,
) -> None:
    """Writes a page, all or nothing.

    Args:
        path: The file.
        title: Its heading.
        lead: Paragraphs of plain text below it.
        examples: What to show, those of one group one after the other.
        table: Figures to show first.
        picture: Shown after them.
    """
    with open_atomic(path) as file:
        file.write(render_page(title, lead, examples, table=table, picture=picture).encode())


def render_page(
    title: str,
    lead: Sequence[str],
    examples: Sequence[Example],
    *,
    table: Table | None = None,
    picture: Picture | None = None,
) -> str:
    """The text of a page; see `write_page`."""
    parts = [f"<h1>{show_text(title)}</h1>", *(f"<p>{show_text(text)}</p>" for text in lead)]
    if table is not None:
        parts.append(_render_table(table))
    if picture is not None:
        parts.append(_render_picture(picture))
    if examples:
        parts.append(_render_legend(examples[0].scores.threshold))
    for group, members in groupby(examples, key=lambda example: example.group):
        heading = f"<h2>{show_text(group)}</h2>" if group else ""
        parts.append(f"<section>{heading}{''.join(map(_render_example, members))}</section>")
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(mend_text(title))}</title>
<style>
{_read_style()}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


@cache
def _read_style() -> str:
    return (files("cutlm.inspect") / "page.css").read_text("utf-8")


def _render_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{show_text(name)}</th>' for name in table.header)
    rows = "".join(
        f'<tr><th scope="row">{show_text(row[0])}</th>{"".join(f"<td>{show_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    caption = f"<caption>{show_text(table.caption)}</caption>"
    return (
        f'<div class="wide"><table class="figures">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _render_picture(picture: Picture) -> str:
    light, dark = (
        None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for png in (picture.light, picture.dark)
    )
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">' if dark else ""
    return f'<picture>{source}<img src="{light}" alt="{escape(mend_text(picture.alt))}"></picture>'


def _render_legend(threshold: float) -> str:
    steps = [f'<span class="t n{level}">\u2212{LEVELS[level - 1]:g}</span>' for level in range(len(LEVELS), 0, -1)]
    steps += ['<span class="t">0</span>']
    steps += [f'<span class="t p{level}">+{LEVELS[level - 1]:g}</span>' for level in range(1, len(LEVELS) + 1)]
    return (
        '<aside class="legend"><p>Each token is shaded by what the judgment changes: log p with the judgment \u2212 log'
        f" p without it.</p><p>less likely {' '.join(steps)} likelier</p><p><mark>Bold and underlined</mark>: blamed,"
        f" for the judgment makes it more than {threshold:g} times as likely. Dotted underline: the judgment makes it"
        " less likely. The exact figures are shown when pointing at a token, and in a table below each"
        " response.</p></aside>"
    )


def _render_example(example: Example) -> str:
    scores = example.scores
    record = scores.record
    judgment = "satisfactory" if record.judgment is None else show_text(record.judgment)
    parts = [
        _render_pair("Instruction", "instruction", show_text(record.full_instruction)),
        _render_pair("Response" if example.after is None else "Before", "response", _render_tokens(scores)),
        _render_pair("Judgment", "judgment", judgment),
    ]
    if example.after is not None:
        is_right = example.after_judgment is None
        parts.append(_render_pair("After", "after", show_text(example.after)))
        verdict = "\u2713 satisfactory" if is_right else f"\u2717 {show_text(example.after_judgment or '')}"
        parts.append(_render_pair("Verdict", f"verdict {'good' if is_right else 'bad'}", verdict))
    return f"<article><dl>{''.join(parts)}</dl>{_render_numbers(scores)}</article>\n"


def _render_pair(name: str, kind: str, content: str) -> str:
    return f'<dt>{name}</dt><dd class="{kind}" dir="auto">{content}</dd>'


def _render_tokens(scores: TokenScores) -> str:
    characters = show_characters(scores.record.output)
    reached = 0
    shown: list[str] = []
    ratios = compute_log_ratios(scores)
    for piece in split_pieces(scores):
        ratio = max((ratios[index] for index in piece.indices), key=abs, default=None) if ratios else None
        # A space before a word is most often part of its token, but of no mark.
        lead = len(piece.text) - len(piece.text.lstrip(" ")) if piece.text.strip(" ") else 0
        shown += characters[reached : reached + lead]
        content = "".join(characters[reached + lead : reached + len(piece.text)])
        reached += len(piece.text)
        tag = "mark" if piece.is_flagged else "span"
        classes = " ".join(["t", *(["end"] if piece.is_end else []), *_choose_shade(ratio)])
        title = "\n".join(_describe_token(scores, place) for place in piece.indices)
        shown.append(f'<{tag} class="{classes}" title="{escape(title)}">{content}</{tag}>')
    return "".join(shown)


def _choose_shade(ratio: float | None) -> list[str]:
    if ratio is None:
        return []
    level = sum(abs(ratio) >= bound for bound in LEVELS)
    return [f"{'p' if ratio > 0 else 'n'}{level}"] if level else []


def _describe_token(scores: TokenScores, place: int) -> str:
    cells = list(_list_cells(scores, place))
    names = ("log p without", "with", "difference", "times as likely")
    known = [f"{name} {cell}" for name, cell in zip(names, cells[1:5], strict=True) if cell]
    return ", ".join([*known, *(["blamed"] if scores.is_flagged[place] else [])]) or "not scored"


def _list_cells(scores: TokenScores, place: int) -> Iterator[str]:
    """A token's text, its log-probs without and with the judgment, their difference, its exponential, and the flag."""
    is_end = place == len(scores.tokens) - 1 and scores.spans[place][0] == len(scores.record.output)
    yield "\u27e8end\u27e9" if is_end else scores.tokens[place]
    for logps in (scores.logps_without, scores.logps_with):
        yield "" if logps is None else _show_number(logps[place])
    ratios = compute_log_ratios(scores)
    yield "" if ratios is None else _show_number(ratios[place], "+")
    factor = 0.0 if ratios is None else math.exp(min(ratios[place], 700))
    yield "" if ratios is None else f"{factor:.4f}" if factor < 100 else f"{factor:.4g}"
    yield f"yes, weight {scores.weights[place]:.3g}" if scores.is_flagged[place] else ""


def _show_number(number: float, sign: str = "") -> str:
    return f"{round(number, 4) + 0.0:{sign}.4f}"  # + 0.0: not -0.0000


def _render_numbers(scores: TokenScores) -> str:
    names = ("token", "log p without", "log p with", "difference", "times as likely", "blamed")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for place in range(len(scores.tokens)):
        token, *cells = map(show_text, _list_cells(scores, place))
        cells_shown = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row" dir="auto">{token}</th>{cells_shown}</tr>')
    num_blamed = sum(scores.is_flagged)
    summary = f"{len(rows)} tokens, {num_blamed} blamed"
    return (
        f'<details><summary>{summary}</summary><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
