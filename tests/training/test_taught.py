"""A taught detector: two adapters, each trained on one half of the records, blame each other's half."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ON_CPU, KillPoint, list_options, start_command, write_lines
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import DataError
from cutlm.flagging.token_scores import read_token_scores
from cutlm.training.taught import split_halves

# Two responses to each of six instructions, the second of which is satisfactory.
ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {number}.",
        "output": ("Sydney is.", "Canberra is.")[kind],
        "judgment": None if kind else f"Sydney is not it, number {number}.",
        "source": f"mine {kind}",
    }
    for kind in (0, 1)
    for number in range(6)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


def list_detector_options(base: Path, data: Path, out: Path, *options: str, **settings: Any) -> list[str]:
    values = ON_CPU | {"model_name_or_path": base, "data": data, "output_dir": out, "max_steps": 2, "save_steps": 1}
    return ["train-detector", *list_options(**values | settings), *options]


def test_records_of_an_instruction_are_in_one_half() -> None:
    records = [JudgedRecord(**row) for row in ROWS]
    first, second = split_halves(records, seed=1)
    assert len(first) == len(second) == 6
    assert sorted(first + second, key=records.index) == records
    assert not {one.instruction for one in first} & {one.instruction for one in second}
    assert [records.index(one) for one in first] == sorted(records.index(one) for one in first)
    assert split_halves(records, seed=1) == (first, second)
    assert any(split_halves(records, seed=seed) != (first, second) for seed in range(2, 6))


def test_both_halves_need_unsatisfactory_records() -> None:
    satisfactory = [JudgedRecord(instruction=f"Ask {number}.", output="Yes.") for number in range(9)]
    wrong = [JudgedRecord(instruction=f"No {number}.", output="Yes.", judgment="No.") for number in range(2)]
    for half in split_halves(satisfactory + wrong, seed=3):
        assert sum(not one.is_satisfactory for one in half) == 1
    with pytest.raises(DataError, match="at least two instructions"):
        split_halves(satisfactory + wrong[:1], seed=3)


def test_halves_blame_each_other_and_the_scores_are_trained_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "records.jsonl", ROWS), tmp_path / "detector"
    assert main(list_detector_options(base, data, out, learning_rate=0.01)) == 0
    halves = [load_records(out / f"half-{number}.jsonl") for number in (1, 2)]
    assert sorted(map(str, [*halves[0], *halves[1]])) == sorted(map(str, load_records(data)))
    printed = capsys.readouterr().out
    commands = [
        line.split()[1:] for line in printed.splitlines() if line.startswith("  cutlm blame --model") and "half" in line
    ]
    assert [command[2][-1] + Path(command[4]).stem[-1] for command in commands] == ["12", "21"]
    for command in commands:
        assert main([*command, "--device", "cpu"]) == 0
        assert f"--model_name_or_path {base}" in capsys.readouterr().out, "the adapter is for blame only"
    lines = [(out / f"scores-{number}.jsonl").read_text("utf-8") for number in (1, 2)]
    (tmp_path / "scores.jsonl").write_text("".join(lines))
    scores = read_token_scores(tmp_path / "scores.jsonl")
    assert len({one.detector for one in scores}) == 2
    assert {one.contrast for one in scores} == {"perfect"}
    assert len(scores) == len(ROWS)
    values = ON_CPU | {"model_name_or_path": base, "data": tmp_path / "scores.jsonl", "max_steps": 1}
    assert main(["train", *list_options(**values, output_dir=tmp_path / "run")]) == 0


def test_a_stopped_run_resumes_with_the_half_that_is_missing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "records.jsonl", ROWS), tmp_path / "detector"
    options = list_detector_options(base, data, out)
    # The fourth checkpoint is the last one of the second half.
    killed = start_command(options, KillPoint("cutlm.training.checkpoints", "publish_checkpoint", 4)).wait()
    assert killed.exit_code == -9
    first = out / "detector-1" / "adapter_model.safetensors"
    before = first.stat().st_mtime_ns
    assert main([*options, "--resume_from_checkpoint", "last"]) == 0
    assert (out / "detector-2" / "adapter_model.safetensors").is_file()
    assert first.stat().st_mtime_ns == before
    assert "detector-1 is trained already" in capsys.readouterr().out
    assert main([*options, "--learning_rate", "0.1"]) == 2, "the folder holds a detector of other settings"
    assert main([*options, "--learning_rate", "0.1", "--overwrite_output_dir"]) == 0
    assert first.stat().st_mtime_ns != before


def test_settings_that_do_not_make_a_detector_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "records.jsonl", ROWS)
    for settings in ({"objective": "cut"}, {"threshold": 1.2}, {"contrast": "foreign"}, {"use_peft": False}):
        assert main(list_detector_options(base, data, tmp_path / "out", **settings)) == 2
    assert capsys.readouterr().err.count("is not a setting of cutlm train-detector") == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(list_detector_options(base, data, tmp_path / "out")) == 2
    assert json.dumps(ROWS[0]) in data.read_text()
