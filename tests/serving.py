"""A real server, `transformers serve`; each request names the model."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(
    bool(_MISSING), reason=f"{', '.join(_MISSING)} missing; run: pip install 'cutlm[serve]'"
)
SERVE = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]


def find_port() -> int:
    """Returns a free port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def serving(log: Path) -> Iterator[str]:
    """Runs `transformers serve` until the end of the block.

    Args:
        log: A file for what it prints.

    Yields:
        Its address, for --base_url.
    """
    port = find_port()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*SERVE, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not _is_up(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        # Not through a proxy.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
