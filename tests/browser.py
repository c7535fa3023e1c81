"""Headless Chromium for tests of pages. Tests skip if Chromium or playwright is missing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def open_browser() -> Iterator[Any]:
    """Starts and stops the browser: the body of a fixture."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Opens a page and asserts at the end that it requested nothing but itself and logged no errors.

    Args:
        browser: From `open_browser`.
        path: The HTML file.
        options: For playwright's `new_page`.
    """
    errors: list[str] = []
    requests: list[str] = []
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 800}} | options)
    page.set_default_timeout(10_000)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(path.as_uri())
        yield page
        assert errors == []
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    finally:
        page.close()
