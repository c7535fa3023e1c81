"""One self-contained HTML page of token scores that can be searched, sorted and measured at any threshold.

The page loads nothing: a strict Content-Security-Policy allows the one style and the one script in it, by their
hashes, and its data is JSON that is never run. What it looks like is `inspect.html` and `inspect.css` (on top of
`page.css`); what it does are the four parts of `inspect*.js`; what it shows is `cutlm.inspect.columns`' affair.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.inspect.markup import mend_text

_STYLES = ("page.css", "inspect.css")
_SCRIPTS = ("inspect-scores.js", "inspect-drawing.js", "inspect-curves.js", "inspect.js")


def write_inspection(path: str | Path, data: Mapping[str, Any]) -> int:
    """Writes a page, all or nothing.

    Args:
        path: The file.
        data: What `cutlm.inspect.columns.make_columns` makes.

    Returns:
        Its size in bytes.
    """
    page = render_inspection(data).encode()
    with open_atomic(path) as file:
        file.write(page)
    return len(page)


def render_inspection(data: Mapping[str, Any]) -> str:
    """The text of a page; see `write_inspection`."""
    style, script = ("".join(map(_read, names)) for names in (_STYLES, _SCRIPTS))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none';"
        " form-action 'none'"
    )
    # In a script element nothing but "<" can begin an end tag or a comment.
    content = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_read("inspect.html")).substitute(
        policy=policy,
        title=escape(mend_text(f"cutlm inspect: {', '.join(data['names'])}")),
        style=style,
        script=script,
        data=mend_text(content),
    )


def _read(name: str) -> str:
    return (files("cutlm.inspect") / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
