"""Token scores that a training makes by itself: of whom they are, when they are used again, what may replace them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_tokenizer, save_tiny_model

import cutlm.training.run as assembly
from cutlm.blame.token_scores import read_token_scores
from cutlm.cli import main
from cutlm.errors import DataError

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name the capital.", "output": "Sydney.", "judgment": "It is wrong."},
    {"instruction": "Say hello.", "output": "Hello world!", "judgment": None},
    {"instruction": "Count.", "output": "12 + 34 = 46.", "judgment": "Off the point."},
    {"instruction": "Ask.", "output": "yes", "judgment": "No question."},
]
USED_AGAIN = "holds the token scores of these records by this model; they are used again"

Train = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def list_options(folder: Path, base: Path, **settings: object) -> list[str]:
    values = {
        "model_name_or_path": base,
        "data": folder / "data.jsonl",
        "output_dir": folder / "out",
        "detector": "frozen",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    }
    return ["train", *(text for key, value in (values | settings).items() for text in (f"--{key}", str(value)))]


@pytest.fixture
def train(tmp_path: Path, base: Path) -> Train:
    write(tmp_path / "data.jsonl", RECORDS)
    return lambda **settings: main(list_options(tmp_path, base, **settings))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def forget_model(out: Path) -> None:
    """As after a run that died before its first step: the scores alone are left."""
    for path in [path for path in out.iterdir() if not path.name.startswith("token_scores")]:
        path.unlink()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_length": 512}, "max_length"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"bf16": True}, "bf16"),
        ({"threshold": 1.5}, "threshold"),
    ],
)
def test_scores_of_other_settings_are_refused_and_made_anew_on_request(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], name: str
) -> None:
    assert train() == 0
    forget_model(tmp_path / "out")
    before = (tmp_path / "out/token_scores.jsonl").read_bytes()
    capsys.readouterr()
    assert train(**settings) == 2
    message = capsys.readouterr().err
    assert (
        f"token_scores.jsonl: made with other settings ({name} differ); train on it as it is by cutlm train" in message
    )
    assert (tmp_path / "out/token_scores.jsonl").read_bytes() == before
    assert train(**settings, overwrite_output_dir=True) == 0
    assert USED_AGAIN not in capsys.readouterr().out
    forget_model(tmp_path / "out")
    assert train(**settings) == 0
    assert USED_AGAIN in capsys.readouterr().out


def test_how_the_model_is_loaded_is_part_of_what_scores_depend_on(base: Path) -> None:
    from cutlm.training.config import CUTConfig, ModelArguments

    backends = [
        assembly._describe_backend(
            make_model(64), ModelArguments(model_name_or_path=str(base), **further), CUTConfig(use_cpu=True)
        )
        for further in ({}, {"load_in_4bit": True}, {"load_in_8bit": True})
    ]
    assert len({backend["quantization"] for backend in backends}) == 3
    assert backends[0]["quantization"] is None


def test_scores_are_used_again_though_a_record_was_left_out(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data.jsonl", [*RECORDS, RECORDS[0] | {"output": "Sydney. " * 99}])
    sentence = "data.jsonl:5: the response alone fills max_length 120; left out"
    assert train(max_length=120) == 0
    assert sentence in capsys.readouterr().out
    assert len(read_token_scores(tmp_path / "out/token_scores.jsonl")) == 4
    assert train(max_length=120, overwrite_output_dir=True) == 0
    printed = capsys.readouterr().out
    assert USED_AGAIN in printed
    assert sentence in printed


def test_scores_edited_by_hand_are_not_replaced_unasked(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    forget_model(tmp_path / "out")
    path = tmp_path / "out/token_scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["is_flagged"][0] = not rows[0]["is_flagged"][0]
    rows[0]["weights"][0] = 0.5
    write(path, rows)
    edited = path.read_bytes()
    for sentence in ("edited since it was made", "what made it is not known"):
        assert train() == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert f"by cutlm train --data {path}, make it anew with --overwrite_output_dir" in message
        assert path.read_bytes() == edited
        (tmp_path / "out/token_scores.json").unlink(missing_ok=True)
    assert train(data=path) == 0, "it is trained on as a file of data"
    assert path.read_bytes() == edited
    assert train(overwrite_output_dir=True) == 0
    assert path.read_bytes() != edited


def test_scores_without_a_header_that_nobody_edited_are_made_again(train: Train, tmp_path: Path) -> None:
    assert train() == 0
    forget_model(tmp_path / "out")
    (tmp_path / "out/token_scores.json").write_text("[")
    before = (tmp_path / "out/token_scores.jsonl").read_bytes()
    assert train() == 0
    assert (tmp_path / "out/token_scores.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "out/token_scores.json").read_text())["dtype"] == "torch.float32"


def test_a_partial_file_of_other_settings_gives_way_on_request(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "out/token_scores.jsonl.partial"
    partial.parent.mkdir()
    partial.write_text('{"max_length": 7}\n{"index": 0, "logps_without": [-1.0], "logps_with": null}\n')
    assert train() == 2
    assert "started with other settings (" in capsys.readouterr().err
    assert train(overwrite_output_dir=True) == 0
    assert not partial.exists()


def test_plain_records_and_token_scores_in_one_file_are_refused(train: Train, tmp_path: Path) -> None:
    assert train() == 0
    row = json.loads((tmp_path / "out/token_scores.jsonl").read_text().splitlines()[0])
    write(tmp_path / "mixed.jsonl", [RECORDS[1], RECORDS[2], row])
    with pytest.raises(DataError, match=r"mixed.jsonl:3: expected a plain record, .*, got token scores") as error:
        assembly.load_data(str(tmp_path / "mixed.jsonl"))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("what", ["targets", "vocabulary", "context", "head"])
def test_what_is_wrong_with_the_model_is_said_before_a_record_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    tokenizer = make_tokenizer("bpe")
    size = len(tokenizer) - 200 * (what == "vocabulary")
    context = 64 if what == "context" else 2048
    make_model(size, max_position_embeddings=context).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", RECORDS)
    further = {"lora_target_modules": "query"} if what == "targets" else {}
    if what == "head":
        monkeypatch.setattr(assembly, "check_head", lambda model: (_ for _ in ()).throw(DataError("the head differs")))
    monkeypatch.setattr(assembly, "score_rows", lambda *_, **__: pytest.fail("scored"))
    assert main(list_options(tmp_path, tmp_path / "base", **further)) == 2
    message = capsys.readouterr().err
    assert {
        "targets": "lora_target_modules: no module is named query",
        "vocabulary": f"tokenizer: expected token ids below {size}, the size of the model's vocabulary",
        "context": "max_length: expected at most the model's context of 64 tokens, got 2048",
        "head": "the head differs",
    }[what] in message
    assert not list(tmp_path.glob("out/*"))


def test_a_setting_that_was_advised_is_not_refused_afterwards(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", RECORDS)
    assert main(list_options(tmp_path, tmp_path / "base")) == 2
    assert main(list_options(tmp_path, tmp_path / "base", max_length=64)) == 0


def start_two_machines(options: list[str]) -> list[tuple[int, str, str]]:
    """Runs a process on each of two machines that share a folder; exit code, stdout and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cutlm", *options],
            env=os.environ | shared | {"MASTER_PORT": str(port), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_one_process_of_all_machines_blames_and_the_others_wait_for_it(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "data.jsonl", RECORDS)
    results = start_two_machines(list_options(tmp_path, base, per_device_train_batch_size=1))
    assert [code for code, _, _ in results] == [0, 0], results
    assert ["records scored" in printed for _, printed, _ in results] == [True, False]


def test_when_the_first_process_fails_the_others_say_so(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "data.jsonl", RECORDS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/token_scores.jsonl.partial").write_text("[]\n")
    (first, _, its_message), (second, _, message) = start_two_machines(list_options(tmp_path, base))
    assert (first, second) == (2, 2)
    assert "not the partial file of a stopped run" in its_message
    assert "expected the token scores that the first process makes, found none" in message
    assert "no such file" not in message
