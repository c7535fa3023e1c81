"""Fixtures that need packages of a registry; without them, tests are skipped."""

from pathlib import Path

import pytest
from real.packages import UnavailableError
from real.smollm2 import make_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a small instruct model, SmolLM2-135M-Instruct in float32."""
    try:
        return make_model()
    except UnavailableError as error:
        pytest.skip(str(error))
