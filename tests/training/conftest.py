"""Fixtures of the training tests."""

import gc
from pathlib import Path

import pytest
from tiny import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _freeze_imported_modules() -> None:
    """Keep the imported modules out of garbage collection, which every start of a Trainer runs in full."""
    import cutlm.training.run  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer; tests do not write to it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")
