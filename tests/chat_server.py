"""A server for tests that speaks the completions protocols and misbehaves on request."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CANARY = "sk-canary-0123456789"
# Gets the handler and the number of the request; returns whether it has dealt with the request.
Fault = Callable[["Handler", int], bool]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with what `ChatServer.respond` returns."""

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
        self.answer(200, self.server.respond(request))

    def answer(self, status: int, value: Any, **headers: str) -> None:
        """Sends JSON or bytes; asks for a short wait before a retry unless told otherwise."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status >= 400 and "Retry_After" not in headers:
            headers["Retry_After_Ms"] = "1"
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

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns a completion with what `reply` returns for the last message."""
        return make_completion(self.reply(request["messages"][-1]["content"]))

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def handle_error(self, *args: Any) -> None:
        pass  # some tests hang up


class ModelServer(ChatServer):
    """Speaks vLLM's protocol with a real model behind it."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        ids = request["prompt"]
        assert request["max_tokens"] == 1
        assert request["prompt_logprobs"] == 0
        with self.lock, torch.no_grad():
            logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for position, token in enumerate(ids[1:]):
            own = {"logprob": float(logps[position, token]), "rank": 1, "decoded_token": "?"}
            entries.append({str(token): own})
        choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        return {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": [choice]}


def make_completion(
    text: str | None, finish_reason: str | None = "stop", total_tokens: int | None = 100, **fields: Any
) -> dict[str, Any]:
    """Returns a completion, with further fields of its message."""
    message = {"role": "assistant", "content": text, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return completion if total_tokens is None else completion | {"usage": {"total_tokens": total_tokens}}


@contextmanager
def running(server: ChatServer) -> Iterator[ChatServer]:
    """Runs the server in a thread until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stream_events(handler: Handler, events: Sequence[Any]) -> bool:
    """Sends server-sent events, each as JSON or, if it is a text, unchanged; then hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    for event in events:
        handler.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
    handler.close_connection = True
    return True


def stall(reached: threading.Event, first: int) -> Fault:
    """Leaves requests without an answer from a number on, and sets the event at the first of them."""

    def fault(handler: Handler, number: int) -> bool:
        if number >= first:
            reached.set()
            time.sleep(60)
        return False

    return fault


def fail_first(status: int, value: Any, **headers: str) -> Fault:
    """Answers the first request in this way."""
    return lambda handler, number: number == 0 and handler.answer(status, value, **headers) is None


def hang(handler: Handler, number: int) -> bool:
    if number == 0:
        time.sleep(0.5)
    return number == 0


def hang_up(handler: Handler, number: int) -> bool:
    if number == 0:
        handler.close_connection = True
        handler.connection.close()
    return number == 0


def answer_half(handler: Handler, number: int) -> bool:
    if number == 0:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True
    return number == 0


def drip(handler: Handler, number: int) -> bool:
    """Sends a byte at a time forever, each well within the timeout."""
    send_forever(handler, b" ", 0.02)
    return True


def pour(handler: Handler, number: int) -> bool:
    """Sends as much as the client reads."""
    send_forever(handler, b" " * 2**20, 0.0)
    return True


def send_forever(handler: Handler, piece: bytes, wait: float) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while True:  # until the client hangs up
        handler.wfile.write(piece)
        time.sleep(wait)
