"""Checks that the documentation matches the code: links, file names, code names and the tables of settings."""

import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cutlm

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
    ]
)
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


@pytest.mark.parametrize("name", ["settings.py", "commands.py"])
def test_generated_pages_match_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(ROOT / "docs" / name)
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as finished:
        runpy.run_path(script, run_name="__main__")
    assert finished.value.code is None


def test_the_page_of_the_python_api_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: cutlm\.(\w+)$", text, re.MULTILINE)) == sorted(cutlm.__all__)


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w/-]+\.md)$", menu, re.MULTILINE)
    assert len(listed) == len(set(listed))
    in_site = {str(page.relative_to(ROOT)).removeprefix("docs/") for page in PAGES} - {"AGENTS.md"}
    assert in_site <= set(listed)


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/data.md", "data.md"),
        ("docs/data.md", "../README.md", "README.md"),
        ("docs/data.md", "world.md", "world.md"),
        ("docs/data.md", "../recipes/online/a.yaml", "recipes/online/a.yaml"),
        ("experiments/real/detection.md", "../../docs/data.md", "../../data.md"),
        ("experiments/README.md", "methods.md", "methods.md"),
    ],
)
def test_links_of_the_site(source: str, link: str, expected: str) -> None:
    hooks = load_hooks()
    assert hooks["rewrite_link"](link, source) == expected


def test_the_site_warns_of_what_other_servers_would_send(caplog: pytest.LogCaptureFixture) -> None:
    hooks = load_hooks()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="data.md"))
    hooks["on_post_page"]('<a href="https://a.org">a</a><link rel="icon" href="assets/a.png">', page=page, config=None)
    assert not caplog.records
    for tag in ('<script src="//cdn.org/a.js">', '<link rel="stylesheet" href="https://fonts.org/a.css">'):
        hooks["on_post_page"](tag, page=page, config=None)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def load_hooks() -> dict[str, Any]:
    pytest.importorskip("mkdocs")
    return runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))


def test_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
