"""A server of the tests' own that speaks the completions protocols, and misbehaves on request."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

CANARY = "sk-canary-0123456789"
Fault = Callable[["Handler", int], bool]


class Handler(BaseHTTPRequestHandler):
    """Answers each question with what `ChatServer.respond` makes of it."""

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

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """The whole answer; here what `reply` makes of the last message."""
        return make_completion(self.reply(request["messages"][-1]["content"]))

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def handle_error(self, *args: Any) -> None:
        pass  # clients that hang up are what some tests are about


class ModelServer(ChatServer):
    """Speaks vLLM's protocol with a real model behind it."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.url = self.url.removesuffix("/v1")
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        ids = request["prompt"]
        assert request["max_tokens"] == 1
        assert request["prompt_logprobs"] == 0
        with self.lock, torch.no_grad():
            logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for place, index in enumerate(ids[1:]):
            own = {"logprob": float(logps[place, index]), "rank": 1, "decoded_token": "?"}
            entries.append({str(index): own})
        choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        return {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": [choice]}


def make_completion(text: str | None, finish_reason: str = "stop", total_tokens: int | None = 100) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return completion if total_tokens is None else completion | {"usage": {"total_tokens": total_tokens}}


@contextmanager
def running(server: ChatServer) -> Iterator[ChatServer]:
    """The server in a thread of its own, until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def stream_events(handler: Handler, events: Sequence[Any]) -> None:
    """Answers by server-sent events, each as JSON or, a text, as it is; then hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    for event in events:
        handler.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
    handler.close_connection = True


# The command in a process of its own: the waiting is as in the real one, only shorter.
COMMAND = """
import sys
import cutlm.servers.http as posting
posting.FIRST_WAIT = 0.01
from cutlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def ask_to_wait(times: list[float], *, is_date: bool) -> Fault:
    """Has whoever asks first wait for 0.7 seconds, or up to a date, and notes when each request comes."""

    def fault(handler: Handler, number: int) -> bool:
        times.append(time.monotonic())
        if number == 0:
            # A date has whole seconds.
            handler.answer(429, {}, Retry_After=formatdate(time.time() + 2, usegmt=True) if is_date else "0.7")
        return number == 0

    return fault


def stall(reached: threading.Event, first: int) -> Fault:
    """Leaves requests from a number on without an answer, and says when there is one."""

    def fault(handler: Handler, number: int) -> bool:
        if number >= first:
            reached.set()
            time.sleep(60)
        return False

    return fault


# Which requests, by their number, go wrong below.
BAD_NUMBERS = (0, 4)


def answer_once(status: int, value: Any, **headers: str) -> Fault:
    def fault(handler: Handler, number: int) -> bool:
        if number in BAD_NUMBERS:
            handler.answer(status, value, **headers)
            return True
        return False

    return fault


def hang(handler: Handler, number: int) -> bool:
    if number in BAD_NUMBERS:
        time.sleep(1.0)
        return True
    return False


def hang_up(handler: Handler, number: int) -> bool:
    if number in BAD_NUMBERS:
        handler.close_connection = True
        handler.connection.close()
        return True
    return False


def answer_half(handler: Handler, number: int) -> bool:
    if number in BAD_NUMBERS:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True
        return True
    return False


def drip(handler: Handler, number: int) -> bool:
    """Answers a byte at a time for ever: never so long without one that it would be noticed."""
    _send_without_end(handler, b" ", 0.1)
    return True


def pour(handler: Handler, number: int) -> bool:
    """Answers as much as is taken."""
    _send_without_end(handler, b" " * 2**20, 0.0)
    return True


def _send_without_end(handler: Handler, piece: bytes, wait: float) -> None:
    handler.send_response(200 if len(handler.server.requests) % 2 else 500)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while True:  # until the client hangs up
        handler.wfile.write(piece)
        time.sleep(wait)


# What may pass, and is asked again.
PASSING: dict[str, Fault] = {
    "too many requests": answer_once(429, {"error": "slow down"}, Retry_After="0"),
    "its own error": answer_once(500, b"<html>oops</html>"),
    "overloaded": answer_once(503, b""),
    "an error as success": answer_once(200, {"error": {"message": "Rate limit exceeded", "code": 429}}),
    "no JSON": answer_once(200, b'{"choices": [{"mess'),
    "a cut connection": hang_up,
    "half an answer": answer_half,
    "a hang": hang,
}
# What never ends, and why it is given up.
ENDLESS: dict[str, tuple[Fault, str]] = {
    "a byte at a time": (drip, "the server's answer was not whole after 0.6 seconds, after 1 attempts"),
    "too much": (pour, "the server's answer is larger than 16 MiB, after 1 attempts"),
}
