"""`cutlm --version --verbose`, and the files that describe the project."""

import platform
from pathlib import Path

import pytest
import torch
import yaml

from cutlm import __version__
from cutlm.cli import main

ROOT = Path(__file__).parents[2]


def test_a_report_has_versions_and_devices_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert main(["--version", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cutlm {__version__}"
    assert lines[1].startswith(f"python {platform.python_version()} on ")
    assert f"torch {torch.__version__.partition('+')[0]}" in lines or f"torch {torch.__version__}" in lines
    assert sum(line.startswith(("CPU: ", "vllm")) for line in lines) == 2
    assert not any("sk-secret" in line for line in lines)


@pytest.mark.parametrize(
    "words", [["--version", "--verbose", "x"], ["--verbose", "--version", "check"], ["--version", "x"], ["--verbose"]]
)
def test_the_version_is_no_option_of_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1


def test_the_citation_has_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["url"].endswith("2312.14591")


def test_a_bug_report_asks_for_the_versions() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text("utf-8"))
    assert any("--version --verbose" in field["attributes"]["label"] for field in form["body"])
