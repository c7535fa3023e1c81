"""What a command imports: libraries that it does not use would only delay its start."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import list_options, write_lines

from cutlm.world.base import base_path

LIBRARIES = {
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "pandas", "pyarrow", "scipy", "sklearn"),
    *("matplotlib", "openai", "lm_eval", "alpaca_eval", "rouge_score", "starlette", "uvicorn", "pydantic", "jinja2"),
}
_PROGRAM = """
import json, sys
from cutlm.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:  # of --help
    code = end.code
print("\\n" + json.dumps([code, sorted(name for name in sys.modules if "." not in name)]))
"""
RECORD = {"instruction": "Work out 47 plus 5.", "output": "47 plus 5 is 42.", "judgment": "The carry is missing."}


def list_imported(arguments: Sequence[object], program: str = _PROGRAM) -> set[str]:
    """The libraries that a command has imported when it ends without an error."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert not code, done.stderr
    return LIBRARIES & set(modules)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "records.jsonl", [RECORD] * 2)


def test_importing_the_package_imports_no_library() -> None:
    assert list_imported([], "import cutlm, json, sys; print(json.dumps([0, list(sys.modules)]))") == set()


def test_help_and_the_tiny_world_need_no_library(tmp_path: Path) -> None:
    assert list_imported(["train", "--help"]) == set()
    assert list_imported(["world", "tasks", "--out", tmp_path / "tasks.jsonl"]) == set()


def test_commands_on_records_need_pydantic_only(tmp_path: Path, records: Path) -> None:
    assert list_imported(["check", records]) == {"pydantic"}
    turns = [("user", "2 + 2?"), ("assistant", "5"), ("user", "No, that is wrong.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = write_lines(tmp_path / "rows.jsonl", [{"messages": messages}])
    convert = ["convert", "conversations", rows, "--out", tmp_path / "converted.jsonl"]
    assert list_imported(convert) <= {"pydantic", "jinja2"}


def test_generating_needs_neither_training_nor_data_sets(tmp_path: Path, records: Path) -> None:
    options = list_options(
        model=base_path(), prompts=records, out=tmp_path / "out.json", max_new_tokens=2, device="cpu"
    )
    imported = list_imported(["generate", *options])
    assert {"torch", "transformers"} <= imported
    assert not imported & {"trl", "peft", "datasets", "pandas", "openai", "matplotlib"}


def test_training_imports_trl_for_pairs_only(tmp_path: Path, records: Path) -> None:
    options = list_options(model_name_or_path=base_path(), data=records, output_dir=tmp_path / "out", max_steps=1)
    options += list_options(use_cpu=True, report_to="none", max_length=128, sensitivity_records=0)
    imported = list_imported(["train", *options])
    assert {"torch", "transformers", "peft"} <= imported
    assert not imported & {"trl", "openai", "matplotlib", "sklearn", "lm_eval"}
