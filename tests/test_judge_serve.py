"""The judge on a real server: transformers' own, with a tiny model, on this machine."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny_model

from cutlm.cli import main

_MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"{', '.join(_MISSING)} missing; pip install 'cutlm[serve]' to have them"
)


def is_up(url: str) -> bool:
    try:
        # Not through a proxy.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    model = save_tiny_model(tmp_path / "tiny", chat=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not is_up(url):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.3)
        yield url, model
    finally:
        process.kill()
        process.wait()


def test_a_real_server_judges(
    served: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, model = served
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    responses = tmp_path / "in.jsonl"
    rows = [{"instruction": f"Count to {number}.", "output": f"{number} <|im_end|>"} for number in range(4)]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = tmp_path / "prompt.txt"  # the tiny model reads letter by letter, and little at a time
    prompt.write_text("{instruction}\n{response}")
    out = tmp_path / "out.jsonl"
    options = [
        *("judge", "--responses", str(responses), "--judge", "http", "--base_url", url, "--judge_model", str(model)),
        *("--prompt_file", str(prompt), "--max_tokens", "8", "--concurrency", "2", "--out", str(out)),
    ]
    # A model of random weights says something until it is cut off: that is told from a judgment.
    assert main(options) == 1, capsys.readouterr().err
    failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
    assert {row["kind"] for row in failures} == {"cut off"}, (tmp_path / "serve.log").read_text()
    assert all(row["answer"] for row in failures)
    printed = capsys.readouterr().out
    assert "4 requests, " in printed
    assert "estimated" not in printed, "the server says how many tokens it took"
