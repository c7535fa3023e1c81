"""cutlm: language models learn from written judgments of their responses.

`CUTTrainer` with `CUTConfig` trains, `load_records` reads `JudgedRecord`s, and `generate`, `judge`, `blame` and `merge`
do the work of the commands with these names. Names are imported when first used, so that `import cutlm` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlm.api import blame, generate, judge, merge
    from cutlm.data.records import JudgedRecord, load_records
    from cutlm.training.config import CUTConfig
    from cutlm.training.trainer import CUTTrainer

__version__ = "0.1.0"
__all__ = ["CUTConfig", "CUTTrainer", "JudgedRecord", "blame", "generate", "judge", "load_records", "merge"]

_MODULES = {
    "CUTConfig": "cutlm.training.config",
    "CUTTrainer": "cutlm.training.trainer",
    "JudgedRecord": "cutlm.data.records",
    "blame": "cutlm.api",
    "generate": "cutlm.api",
    "judge": "cutlm.api",
    "load_records": "cutlm.data.records",
    "merge": "cutlm.api",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'cutlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
