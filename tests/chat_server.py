"""A server of the tests' own that speaks the chat completions protocol, and misbehaves on request."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CANARY = "sk-canary-0123456789"
Fault = Callable[["Handler", int], bool]


class Handler(BaseHTTPRequestHandler):
    """Answers each question with what `ChatServer.reply` makes of it."""

    server: "ChatServer"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.paths.append(self.path)
        if self.server.fault is not None and self.server.fault(self, number):
            return
        self.answer(200, make_completion(self.server.reply(request["messages"][-1]["content"])))

    def answer(self, status: int, value: Any, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.fault: Fault | None = None
        self.reply: Callable[[str], str | None] = lambda prompt: "It is wrong."
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def handle_error(self, *args: Any) -> None:
        pass  # clients that hang up are what some tests are about


def make_completion(text: str | None, finish_reason: str = "stop", total_tokens: int | None = 100) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return completion if total_tokens is None else completion | {"usage": {"total_tokens": total_tokens}}
