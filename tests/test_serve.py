"""Judging, generating and the loop with a real server: transformers' own, with tiny models, on this machine."""

import io
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import SERVE, find_port, needs_server, serving
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.online.loop import run_loop
from cutlm.online.settings import read_plan

pytestmark = needs_server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("serve") / "serve.log") as url:
        yield url


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_real_server_judges(url: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Count to {number}.", "output": f"{number} <|im_end|>"} for number in range(4)]
    responses = _write_lines(tmp_path / "in.jsonl", rows)
    prompt = tmp_path / "prompt.txt"  # the tiny model reads letter by letter, and little at a time
    prompt.write_text("{instruction}\n{response}")
    out = tmp_path / "out.jsonl"
    options = [
        *("judge", "--responses", str(responses), "--judge", "http", "--base_url", url, "--judge_model", str(model)),
        *("--prompt_file", str(prompt), "--max_tokens", "8", "--concurrency", "2", "--out", str(out)),
    ]
    # A model of random weights says something until it is cut off: that is told from a judgment.
    assert main(options) == 1, capsys.readouterr().err
    failures = [json.loads(line) for line in Path(f"{out}.failures.jsonl").read_text("utf-8").splitlines()]
    assert {row["kind"] for row in failures} == {"cut off"}
    assert all(row["answer"] for row in failures)
    printed = capsys.readouterr().out
    assert "4 requests, " in printed
    assert "estimated" not in printed, "the server says how many tokens it took"


def test_a_real_server_answers_as_the_model_at_hand(url: str, model: Path, tmp_path: Path) -> None:
    prompts = _write_lines(tmp_path / "in.jsonl", [{"instruction": f"Name {index} cities."} for index in range(5)])
    shared = ["generate", "--model", str(model), "--prompts", str(prompts), "--max_new_tokens", "12"]
    served, local = tmp_path / "served.json", tmp_path / "local.json"
    assert main([*shared, "--server", url, "--concurrency", "2", "--out", str(served)]) == 0
    assert main([*shared, "--device", "cpu", "--out", str(local)]) == 0
    assert served.read_bytes() == local.read_bytes()
    assert len({row["output"] for row in json.loads(served.read_text("utf-8"))}) > 1


def test_a_real_server_chats_as_the_model_at_hand(
    url: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ["chat", "--model", str(model), "--max_new_tokens", "12"]
    texts = []
    for options in (["--server", url], ["--device", "cpu"]):
        lines = io.BytesIO(b"Name a city.\n/reset\nName another.\n")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))
        assert main([*shared, *options]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("-- stopped at 12 tokens (--max_new_tokens); what is there is kept") == 2
        # Half a character at the end, where the answer was stopped, is shown by the one and not by the other.
        texts.append([line.rstrip("\N{REPLACEMENT CHARACTER}") for line in printed.out.splitlines()])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2


def test_the_loop_has_a_real_server_answer_and_each_iteration_has_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions = _write_lines(
        tmp_path / "in.jsonl", [{"instruction": f"Name a city, {index}."} for index in range(6)]
    )
    held_out = _write_lines(tmp_path / "held_out.jsonl", [{"instruction": "Name a river."}])
    (tmp_path / "letters.py").write_text("def judge(instruction, response):\n    return 'There is no Z in it.'\n")
    port = find_port()
    command = shlex.join([*SERVE, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
    settings = {
        "model_name_or_path": model,
        "output_dir": tmp_path / "run",
        "instructions": instructions,
        "num_iterations": 1,
        "num_instructions": 3,
        "generate": f"--server http://127.0.0.1:{port} --max_new_tokens 8 --num_samples 2 --temperature 1",
        # A reading of {model} by the shell alone: which model it is, the request says.
        "server_command": f"echo {{model}} >> {tmp_path}/served.txt; exec {command}",
        "server_wait": 120,
        "judge": "rules --rules letters:judge",
        "eval_instructions": held_out,
        "template": "chat",
        "max_length": 256,
        "max_steps": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
    }
    monkeypatch.syspath_prepend(tmp_path)
    plan = read_plan(None, [f"--{name}={value}" for name, value in settings.items()])
    # The stages' commands in this process, as starting Python for each takes its time.
    assert run_loop(plan, run=lambda arguments, **_: main(arguments))
    folder = tmp_path / "run" / "iteration-1"
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 6
    assert [row["instruction"] for row in rows[::2]] == [row["instruction"] for row in rows[1::2]]
    # Before, for the round itself, and of what came of it.
    assert (tmp_path / "served.txt").read_text().split() == [str(model), str(model), str(folder / "model")]
    for iteration in ("iteration-0", "iteration-1"):
        answers = (tmp_path / "run" / iteration / "evaluation" / "responses.jsonl").read_text("utf-8").splitlines()
        assert len(answers) == 1
