"""The data path of docs/architecture.md is the path that a record takes."""

import json
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import cutlm
from cutlm.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cutlm.__file__).parent
ROW = re.compile(r"^\| \d+ \| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
RECORDS = [
    {"instruction": "Name the capital of Australia.", "output": "Sydney.", "judgment": "That is its largest city."},
    {"instruction": "Name the capital of Japan.", "output": "Tokyo.", "judgment": None},
]


def read_data_path() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    return [(module, function.rpartition(".")[2]) for module, function in ROW.findall(page)]


def trace_training(folder: Path) -> list[tuple[str, str]]:
    """The functions of the package in the order of their first call, by module and name."""
    (folder / "records.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in RECORDS))
    options = {
        "model_name_or_path": PACKAGE / "world" / "base_model",
        "data": folder / "records.jsonl",
        "output_dir": folder / "out",
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    called: dict[tuple[str, str], None] = {}

    def record_call(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            module = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            called.setdefault((module, frame.f_code.co_name))

    sys.setprofile(record_call)
    threading.setprofile(record_call)
    try:
        assert main(["train", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(called)


def test_a_record_passes_the_listed_functions(tmp_path: Path) -> None:
    listed = read_data_path()
    called = trace_training(tmp_path)
    assert len(listed) == len(set(listed)) >= 30
    missing = [entry for entry in listed if entry not in called]
    assert not missing, f"listed in docs/architecture.md but never called: {missing}"


def test_the_data_path_is_short() -> None:
    listed = read_data_path()
    assert len(listed) <= 35
    assert len({module for module, _ in listed}) <= 12
