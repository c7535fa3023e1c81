"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

# The models are so small that a second thread costs more than it brings; before torch is imported, and inherited by
# every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

SHARED = Path(__file__).parents[1] / ".." / "shared"

# How long an example takes says more about the machine than about the code.
settings.register_profile("cutlm", deadline=None, max_examples=50)
settings.load_profile("cutlm")


# A shell that starts this in the background has children ignore Ctrl-C, and so would the commands that the tests stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data beside the checkout; without it the tests that read it are skipped."""
    path = (SHARED / "data").resolve()
    if not path.is_dir():
        pytest.skip("no published data beside the checkout")
    return path
