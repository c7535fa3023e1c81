"""cutlm: language models learn from judgments, what is said about their answers.

Names are loaded when first used, so that `import cutlm` and the command line's `--help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlm.data.records import JudgedRecord, load_records
    from cutlm.training.config import CUTConfig
    from cutlm.training.trainer import CUTTrainer

__version__ = "0.1.0"
__all__ = ["CUTConfig", "CUTTrainer", "JudgedRecord", "load_records"]

_HOMES = {
    "CUTConfig": "cutlm.training.config",
    "CUTTrainer": "cutlm.training.trainer",
    "JudgedRecord": "cutlm.data.records",
    "load_records": "cutlm.data.records",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cutlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
