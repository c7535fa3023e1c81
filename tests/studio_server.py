"""A studio for tests: its server in a thread, the page in a browser, and plain requests."""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from commands import Running, start_command, write_lines

from cutlm.studio.items import read_items
from cutlm.studio.journal import Journal, name_journal
from cutlm.studio.security import Access
from cutlm.studio.server import Studio, make_app
from cutlm.studio.session import Session
from cutlm.studio.worker import Worker


def make_rows(num: int = 4) -> list[dict[str, Any]]:
    """Responses to judge."""
    return [
        {"instruction": f"Name the capital of country {number}.", "output": f"City {number} is the capital, I think."}
        for number in range(num)
    ]


@dataclass
class RunningStudio:
    """A studio that runs."""

    studio: Studio
    access: Access
    out: Path

    def read_records(self) -> list[dict[str, Any]]:
        """Write the records and read them."""
        self.studio.session.write()
        return read_lines(self.out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines, which also splits at U+2028 within a text.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.exists() else []


@contextmanager
def running(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    reviewer: str = "ann",
    models: Any = None,
    judge: Any = None,
    password: str | None = None,
    is_reviewing: bool = False,
) -> Iterator[RunningStudio]:
    """Run a studio in a thread; `is_reviewing` if the rows are records."""
    out = folder / "records.jsonl"
    path = write_lines(folder / "read.jsonl", rows)
    items, _ = read_items(None, [path]) if is_reviewing else read_items([path], None)
    with ExitStack() as stack:
        session = stack.enter_context(Session(items, out, stack.enter_context(Journal(name_journal(out, reviewer)))))
        studio = Studio(session, stack.enter_context(Worker()), models, 1.1, judge)
        stack.callback(studio.close)
        if studio.drafter is not None:
            stack.enter_context(studio.drafter)
        config = uvicorn.Config("", log_level="error", access_log=False, timeout_graceful_shutdown=1)
        listener = stack.enter_context(config_socket())
        access = Access("127.0.0.1", listener.getsockname()[1], password)
        config.app = make_app(studio, access)
        server = uvicorn.Server(config)
        studio.is_ending = lambda: server.should_exit
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield RunningStudio(studio, access, out)
        finally:
            server.should_exit = True
            thread.join()


def config_socket() -> Any:
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[tuple[Running, str]]:
    """Start `cutlm studio` in a process, and kill it at the end; yield it and its address."""
    process = start_command(["studio", *arguments])
    try:
        process.wait_for_output("press Ctrl-C")
        yield process, process.read_output().split("open ")[1].split()[0]
    finally:
        process.kill()


@contextmanager
def browse(browser: Any, url: str, *, width: int = 1200, color_scheme: str = "light") -> Iterator[Any]:
    """Open the page in a browser context of its own; at the end, assert that it logged no error and left the server."""
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=color_scheme)
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems: list[str] = []

    def refuse(dialog: Any) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("dialog", refuse)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    origin = url.split("/?")[0]
    page.on("request", lambda sent: None if sent.url.startswith(origin) else problems.append(sent.url))
    page.problems = problems
    try:
        page.goto(url)
        wait_until_ready(page)
        yield page
        assert problems == [], problems
    finally:
        context.close()


def wait_until_ready(page: Any) -> None:
    page.wait_for_selector("html[data-ready]", state="attached")


def wait_until(page: Any, expression: str, value: Any = True, timeout: float = 60) -> None:
    """Wait until an expression has a value. The page's policy forbids `wait_for_function`, which evaluates in it."""
    deadline = time.monotonic() + timeout
    while (found := page.evaluate(expression)) != value:
        assert time.monotonic() < deadline, (expression, found)
        page.wait_for_timeout(20)


def wait_until_saved(page: Any) -> None:
    wait_until(page, "document.getElementById('saved').className === 'saved'")


@contextmanager
def held_changes(page: Any) -> Iterator[None]:
    """Let no change reach the server until the end."""
    errors = pytest.importorskip("playwright.sync_api").Error
    held: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.method == "PUT":
            held.append(route)
        else:
            route.continue_()

    page.route("**/api/items/*", hold)
    yield
    for route in held:
        with suppress(errors):  # of a page that was left
            route.continue_()
    page.unroute("**/api/items/*")


def wait_for_response(page: Any, number: int) -> None:
    """Wait until the page shows the response with this number, from 1."""
    wait_until(page, f"document.getElementById('position').textContent.startsWith('Response {number} of')")


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def send(
    access: Access,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    is_own: bool = True,
) -> tuple[int, Any, Mapping[str, str]]:
    """Send a request, by default with the headers of the studio's own page; return status, content and headers."""
    own = {"Host": f"127.0.0.1:{access.port}"}
    if is_own:
        own |= {"Cookie": f"{access.cookie}={access.token}", "Origin": f"http://127.0.0.1:{access.port}"}
    connection = http.client.HTTPConnection("127.0.0.1", access.port, timeout=20)
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    connection.request(method, path, content, own | dict(headers or {}))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status, json.loads(text) if is_json else text.decode(), dict(answer.headers)
