"""Checks that the documentation matches the code: links, file names, code names and the tables of settings."""

import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file of the repository. An output file after --json is not in the repository.
_FOLDERS = "benchmarks|docs|examples|experiments|recipes|src|tests"
_FILE = re.compile(rf"(?<![\w./{{-])(?<!--json )((?:{_FOLDERS})/[\w./-]+\.\w+)")
_TEST = re.compile(r"(?<![\w./-])(?:tests/)?((?:\w+/)?test_\w+\.py)")
_SELECTION = re.compile(r"pytest\s+(tests/[\w/]+\.py) -k\s+(\"[^\"]+\"|\w+)")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_point_to_existing_files_and_headings(page: Path) -> None:
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
    """List the anchors of the headings of a page, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    missing = {name for name in _FILE.findall(text) if not (ROOT / name).exists()}
    missing |= {name for name in _TEST.findall(text) if not list((ROOT / "tests").rglob(name))}
    assert not missing


def test_tests_selected_by_keyword_exist() -> None:
    selections = {selection for page in PAGES for selection in _SELECTION.findall(page.read_text("utf-8"))}
    assert selections
    for name, words in selections:
        if words == "NAME":
            continue
        tests = " ".join(re.findall(r"def (test_\w+)", (ROOT / name).read_text("utf-8")))
        assert all(word in tests for word in words.strip('"').split(" or ")), f"{name} -k {words}"


def test_code_names_in_the_paper_page_resolve() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "paper.md").read_text("utf-8").splitlines()]
    names = [name for row in rows if len(row) == 4 for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row[2])]
    assert len(names) > 15
    for name in names:
        pkgutil.resolve_name(f"cutlm.{name}")


def test_settings_tables_match_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(ROOT / "docs" / "settings.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as finished:
        runpy.run_path(script, run_name="__main__")
    assert finished.value.code is None


def test_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
