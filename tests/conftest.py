"""Fixtures for all tests."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The models are so small that a second thread costs more than it brings; before torch is imported, and inherited by
# every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from browser import open_browser
from hypothesis import settings

if TYPE_CHECKING:
    from chat_server import ChatServer

SHARED = Path(__file__).parents[1] / ".." / "shared"

# How long an example takes says more about the machine than about the code.
settings.register_profile("cutlm", deadline=None, max_examples=50)
settings.load_profile("cutlm")


# A shell that starts this in the background has children ignore Ctrl-C, and so would the commands that the tests stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _leave_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Work in an empty folder: a Trainer without `output_dir` makes a folder of that name where it starts."""
    os.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module", autouse=True)
def _freeze_imported_modules() -> None:
    """Keep what was imported before out of garbage collection, which every start of a Trainer runs in full."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data beside the checkout; without it the tests that read it are skipped."""
    path = (SHARED / "data").resolve()
    if not path.is_dir():
        pytest.skip("no published data beside the checkout")
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator["ChatServer"]:
    """A server for tests, in a process that has its key. It judges the responses of `judged_rows` by default."""
    from chat_server import CANARY, ChatServer, running
    from judged_rows import reply

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with running(ChatServer()) as server:
        server.reply = reply
        yield server


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    """A file of responses to judge."""
    from judged_rows import make_rows, write_lines

    return write_lines(tmp_path / "responses.jsonl", make_rows())


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for 16-bit numbers, such as one with AVX2, on which nothing was said yet."""
    _fake_cpu(monkeypatch, has_units=False)


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with units for bfloat16, but not for float16."""
    _fake_cpu(monkeypatch, has_units=True)


def _fake_cpu(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    import platform

    import torch

    from cutlm.model import loading

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    for function in (loading._say_float32, loading.warn_of_slow_autocast):
        function.cache_clear()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One browser for all tests of pages: playwright runs only once in a process."""
    yield from open_browser()
