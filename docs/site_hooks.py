"""Hooks of MkDocs: pages outside of docs/ are in the site too, and the site loads nothing from other servers.

Links are written as they work in the repository. They are rewritten to the places of the pages in the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    *("*.md", "experiments/**/*.md", "experiments/**/*.png", "recipes/**/*.md", "recipes/**/*.yaml"),
    *("examples/*.py", "LICENSE"),
)
NOT_PAGES = ("AGENTS.md",)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
_CODE = re.compile(r"`[^`]*`")
# What a browser loads with the page; a link (<a href>) is loaded when the reader follows it.
_LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")

logger = get_plugin_logger("site")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages outside of docs/, under their paths in the repository."""
    for path in sorted({path for pattern in OUTSIDE for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and name not in NOT_PAGES:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page, and the vertical bars in its tables."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    lines = _LINK.sub(lambda match: rewrite_link(match[1], source), markdown).split("\n")
    # GitHub needs a backslash before a bar within code in a table; Python-Markdown would show it.
    return "\n".join(
        _CODE.sub(lambda match: match[0].replace("\\|", "|"), line) if line.startswith("|") else line for line in lines
    )


def rewrite_link(link: str, source: str) -> str:
    """Turn a link of the file `source` in the repository into the link of its page in the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    here, there = (name.removeprefix("docs/") for name in (source, target))
    return posixpath.relpath(there, posixpath.dirname(here) or ".")


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Warn of what a page would load from other servers; the strict build fails."""
    for url in _LOADED.findall(output):
        logger.warning("%s loads %s from another server", page.file.src_uri, url)
    return output
