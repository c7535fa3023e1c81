"""The documentation: what it names exists, and its tables of settings are the code's."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file of the checkout as a page names it; what a command is told to write is no such file.
_FILE = re.compile(r"(?<![\w./{-])(?<!--json )((?:benchmarks|docs|experiments|recipes|src|tests)/[\w./-]+\.\w+)")
_TEST = re.compile(r"(?<![\w/])(test_\w+\.py)")
_CHOICE = re.compile(r"pytest\s+(tests/test_\w+\.py) -k\s+(\"[^\"]+\"|\w+)")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert not broken


def list_anchors(page: Path) -> Iterator[str]:
    """The names by which a page's headings can be linked to."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = {*_FILE.findall(text), *(f"tests/{name}" for name in _TEST.findall(text))}
    assert not {name for name in named if not (ROOT / name).exists()}


def test_tests_that_are_chosen_by_a_word_are_in_the_file_that_is_named() -> None:
    chosen = {
        choice for page in PAGES if page.name != "AGENTS.md" for choice in _CHOICE.findall(page.read_text("utf-8"))
    }
    assert chosen
    for name, words in chosen:
        tests = " ".join(re.findall(r"def (test_\w+)", (ROOT / name).read_text("utf-8")))
        assert all(word in tests for word in words.strip('"').split(" or ")), f"{name} -k {words}"


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "docs" / "settings.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
