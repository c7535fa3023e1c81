"""Real headless Chromium for the tests of pages; where it or playwright is missing, such tests skip and say why."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def open_browser() -> Iterator[Any]:
    """Starts the browser, and ends it: the body of a fixture."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium to show pages in (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Opens a page; at the end it must have asked for nothing but itself and have complained of nothing.

    Args:
        browser: As of `open_browser`.
        path: The file.
        options: Of playwright's `new_page`.
    """
    complaints: list[str] = []
    asked: list[str] = []
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 800}} | options)
    page.set_default_timeout(10_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(path.as_uri())
        yield page
        assert complaints == []
        assert asked == [path.as_uri()]
    finally:
        page.close()
