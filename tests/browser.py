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
def visit(
    browser: Any, path: Path, *, width: int = 1100, height: int = 800, color_scheme: str = "light"
) -> Iterator[Any]:
    """Opens a page and asserts at the end that it requested nothing but itself and logged no errors.

    All visits share one tab, because opening a tab takes longer than most tests.

    Args:
        browser: From `open_browser`.
        path: The HTML file.
        width: Of the window.
        height: Likewise.
        color_scheme: "light" or "dark".
    """
    page = browser.contexts[0].pages[0] if browser.contexts else browser.new_page()
    page.set_default_timeout(10_000)
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=color_scheme)
    page.mouse.move(0, 0)
    errors: list[str] = []
    requests: list[str] = []

    def refuse(dialog: Any) -> None:
        errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    listeners = {
        "dialog": refuse,
        "console": lambda message: errors.append(message.text),
        "pageerror": lambda error: errors.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(path.as_uri())
        yield page
        assert errors == []
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        page.goto("about:blank")
