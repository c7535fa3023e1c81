"""The package as others get it: a wheel that works outside of the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    # Built from what is under version control's eye, in a copy: a build leaves folders behind.
    names = ["pyproject.toml", "README.md", "LICENSE", "src"]
    copy.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("cutlm-*.whl")
    return path


def test_the_wheel_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
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


def test_the_wheel_holds_all_that_is_needed_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "cutlm").rglob("*.py")}
    assert modules <= set(names)
    assert "cutlm/py.typed" in names
    assert {"cutlm/report/page.css", "cutlm/world/words.json"} <= set(names)
    assert {f"cutlm/report/inspect.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)
    for extra in ("eval", "serve", "quantization", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_tables_of_speed_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cutlm; dir(cutlm); assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
