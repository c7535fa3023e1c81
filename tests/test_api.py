"""The Python API does what the commands do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from judged_rows import make_rows
from tiny import save_tiny_model

from cutlm import CUTConfig, CUTTrainer, blame, generate, judge, merge
from cutlm.cli import main
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.token_scores import read_token_scores
from cutlm.model.loading import load_tokenizer

if TYPE_CHECKING:
    from chat_server import ChatServer

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name the capital.", "output": "Sydney.", "judgment": "It is wrong."},
    {"instruction": "Say hello.", "output": "Hello world!", "judgment": None},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def test_generate_returns_what_the_command_writes(model: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "One."}, {"instruction": "Two.", "input": "2"}])
    options = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
    assert main(["generate", *options, "--template", "alpaca", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    rows = generate(
        model, ["One.", {"instruction": "Two.", "input": "2"}], template="alpaca", max_new_tokens=4, device="cpu"
    )
    assert rows == read_lines(tmp_path / "out.jsonl")


def test_a_prompt_without_an_instruction_is_named(model: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\[1\]: field 'instruction'"):
        generate(model, ["One.", {"question": "Two?"}])


@pytest.mark.parametrize("rows", ["records.jsonl", Path("records.jsonl")])
def test_text_in_place_of_a_list_is_one_problem(model: Path, tmp_path: Path, rows: Any) -> None:
    config = CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    calls: dict[str, Callable[[], Any]] = {
        "prompts": lambda: generate(model, rows),
        "responses": lambda: judge(rows, rules=lambda *_: None),
        "records": lambda: blame(model, rows),
        "train_dataset": lambda: CUTTrainer(str(model), config, str(rows), processing_class=load_tokenizer(model)),
    }
    for name, call in calls.items():
        with pytest.raises(DataError) as error:
            call()
        assert [problem.split(":")[0] for problem in error.value.problems] == [name]


def test_rows_that_are_no_objects_are_named(model: Path) -> None:
    for call in (
        lambda: generate(model, ["Hi.", 5]),
        lambda: judge([{"instruction": "a", "output": "b"}, "c"], rules=str),
    ):
        with pytest.raises(DataError) as error:
            call()
        (problem,) = error.value.problems
        assert "[1]" in problem


def test_judge_by_a_function() -> None:
    rows = [{"instruction": "2 + 2?", "output": text, "note": "kept"} for text in ("4", "5", " ")]
    records, failures = judge(rows, rules=lambda instruction, response: None if response == "4" else "Wrong.")
    assert [(record.output, record.judgment) for record in records] == [("4", None), ("5", "Wrong.")]
    assert records[0].model_extra == {"note": "kept"}
    assert {index: failure.kind for index, failure in failures.items()} == {2: "empty response"}


def test_judge_by_a_server(server: "ChatServer", tmp_path: Path) -> None:
    responses = write_lines(tmp_path / "responses.jsonl", make_rows())
    options = ["--responses", str(responses), "--judge", "http", "--base_url", server.url, "--judge_model", "m"]
    main(["judge", *options, "--max_retries", "0", "--out", str(tmp_path / "records.jsonl")])
    records, failures = judge(make_rows(), base_url=server.url, judge_model="m", max_retries=0)
    assert [(row.instruction, row.judgment) for row in records] == [
        (row["instruction"], row["judgment"]) for row in read_lines(tmp_path / "records.jsonl")
    ]
    assert len(records) + len(failures) == len(make_rows())


@pytest.mark.parametrize("options", [{}, {"base_url": "http://127.0.0.1:1"}, {"rules": print, "base_url": "http://x"}])
def test_judge_needs_one_kind_of_judge(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected either rules, or base_url and judge_model"):
        judge([{"instruction": "a", "output": "b"}], **options)


def test_judge_refuses_the_name_of_a_function() -> None:
    with pytest.raises(ConfigError, match="expected a function, got 'my_rules:judge'"):
        judge([{"instruction": "a", "output": "b"}], rules="my_rules:judge")  # type: ignore[arg-type]


def test_blame_returns_what_the_command_writes(model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "records.jsonl", RECORDS)
    options = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "scores.jsonl"), "--device", "cpu"]
    assert main(["blame", *options, "--threshold", "1.05"]) == 0
    assert blame(model, RECORDS, threshold=1.05, device="cpu") == read_token_scores(tmp_path / "scores.jsonl")
    assert blame(model, RECORDS, threshold=1.05, device="cpu", out=tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "scores.jsonl").read_bytes()


def test_the_example_trains_and_merges(tmp_path: Path) -> None:
    from python_api import align

    before, after = align(tmp_path, num_instructions=28, num_epochs=1)
    assert 0 < before < 1
    assert 0 < after <= 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="merged"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_sampling_does_not_touch_the_random_numbers_of_the_caller(model: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    generate(model, ["One."], template="alpaca", max_new_tokens=4, temperature=1.0, device="cpu")
    assert torch.rand(1) == expected
