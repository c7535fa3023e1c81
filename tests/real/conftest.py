"""Fixtures that need packages of a registry; without them, tests are skipped."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from real.manifest import FAMILIES, Family, load_tokenizer
from real.packages import UnavailableError
from real.smollm2 import make_model

from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import set_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a small instruct model, SmolLM2-135M-Instruct in float32."""
    try:
        return make_model()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family of models."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer(family: Family) -> "PreTrainedTokenizerBase":
    """The tokenizer of the family, whose template has the family's arguments as defaults."""
    try:
        return set_arguments(load_tokenizer(family), family.kwargs)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def encoder(tokenizer: "PreTrainedTokenizerBase") -> Encoder:
    """The encoder of the family under `template: chat`."""
    return Encoder(tokenizer, "chat")
