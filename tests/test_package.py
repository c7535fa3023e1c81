"""Checks of the built wheel, and of the benchmark tables and import time of the package."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("cutlm-*.whl")
    return path


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"instruction": "Hi.", "output": "Hello.", "judgment": None}]))
    code = (
        "import sys, cutlm\n"
        f"assert cutlm.__file__.startswith({str(site)!r}), cutlm.__file__\n"
        "from cutlm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "check", str(records)],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "1 records: 1 satisfactory, 0 unsatisfactory" in result.stdout


def test_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
    package = ROOT / "src" / "cutlm"
    kinds = {".py", ".css", ".html", ".js", ".json", ".jinja", ".safetensors", ".svg", ".typed"}
    expected = {str(path.relative_to(ROOT / "src")) for path in package.rglob("*") if path.suffix in kinds}
    assert expected | {"cutlm/py.typed", "cutlm/world/words.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("cutlm/", "cutlm-")) for name in names)
    for extra in ("eval", "serve", "studio", "quantization", "gguf", "vllm", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_benchmark_tables_match_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, cutlm; dir(cutlm); assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
