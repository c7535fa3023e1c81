"""Fixtures of the training tests."""

from pathlib import Path

import pytest
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer; tests do not write to it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")
