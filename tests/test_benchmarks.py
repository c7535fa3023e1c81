"""The benchmarks run and report consistent figures, on models that are too tiny for meaningful ones."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = {"vocab_size": 1000, "num_layers": 1, "width": 32, "num_heads": 2, "mlp_width": 64}
OPTIONS = [f"--{name}={value}" for name, value in SHAPE.items()]

Load = Callable[..., Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a script of benchmarks/, which is not a package."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def import_script(name: str, *options: str) -> Any:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *options])
        return __import__(name)

    return import_script


@pytest.fixture
def run_in_process(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs a script of benchmarks/ with its variants in this process, after a look at the folder of each."""

    def run(script: Any, look: Callable[[str, Path], None] = lambda variant, folder: None) -> None:
        def run_here(variant: str, folder: str) -> Any:
            look(variant, Path(folder))
            with contextlib.redirect_stdout(io.StringIO()) as printed, monkeypatch.context() as context:
                context.setattr(sys, "argv", [*sys.argv, "--variant", variant, "--folder", str(folder)])
                script.main()
            return json.loads(printed.getvalue().splitlines()[-1])

        monkeypatch.setattr("common.run_alone", run_here)
        script.main()

    return run


@pytest.fixture
def train_step(load: Load, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs train_step.py with its variants in this process."""
    script = load("train_step")

    def run(*options: str) -> None:
        def run_here(variant: str, folder: str) -> Any:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run("--variant", variant, "--folder", folder, *options)
            return json.loads(printed.getvalue().splitlines()[-1])

        monkeypatch.setattr("common.run_alone", run_here)
        monkeypatch.setattr(sys, "argv", ["train_step.py", *options])
        script.main()

    return run


def test_training_step_compares_all_variants(
    train_step: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    train_step(*OPTIONS, "--num_records=3", "--repeats=1", f"--json={out}")
    known = json.loads(out.read_text())
    variants = ["released", "cutlm", "frozen", "floor", "dpo", "sft"]
    assert [row["variant"] for row in known["rows"]] == variants
    seconds = {name: known["results"][name]["seconds"] for name in variants}
    assert known["speedup_over_released_style"] == pytest.approx(seconds["released"] / seconds["cutlm"])
    assert known["time_over_floor"] == pytest.approx(seconds["cutlm"] / seconds["floor"])
    assert known["time_over_trl_dpo"] == pytest.approx(seconds["cutlm"] / seconds["dpo"])
    assert known["time_over_trl_sft"] == pytest.approx(seconds["cutlm"] / seconds["sft"])
    peaks = {name: known["results"][name]["peak"] for name in variants}
    assert known["memory_ratio_over_released_style"] == pytest.approx(peaks["released"] / peaks["cutlm"])
    # Both implementations compute the same loss.
    first = {name: known["results"][name]["first_loss"] for name in variants}
    assert first["cutlm"] == pytest.approx(first["released"], abs=1e-4)
    assert "| cutlm |" in capsys.readouterr().out


def test_gpu_benchmark_runs_variants_of_the_training_step(
    load: Load, train_step: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    assert gpu.run(["--num_records=nothing"], "frozen") == {"failed": "exit code 2"}

    def run_here(command: list[str], **kwargs: Any) -> Any:
        train_step(*command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_here)
    result = gpu.run([*OPTIONS, "--num_records=2", "--batch_size=2", "--bf16", "--repeats=1"], "frozen")
    assert result["seconds"] > 0
    assert result["num_tokens"] > result["num_response_tokens"] > 0


def test_gpu_benchmark_reports_the_share_of_the_matrix_rate(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    gpu = load("gpu", "--variants", "cutlm", "--shapes", "tiny", f"--json={out}")
    # Replace what needs a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "measure_rate", lambda: 1e9)
    monkeypatch.setattr(gpu, "SHAPES", {"tiny": SHAPE})
    found = {"seconds": 0.5, "peak": 3e9, "num_tokens": 2000, "num_response_tokens": 1000}
    runs = []
    monkeypatch.setattr(gpu, "run", lambda options, variant: runs.append((options, variant)) or found)
    gpu.main()
    assert [("--activation_checkpointing" in options, variant) for options, variant in runs] == [
        (False, "cutlm"),
        (True, "cutlm"),
    ]
    # Weights: 4 * 32 * 32 + 3 * 32 * 64 = 10,240 in the one layer, 1000 * 32 = 32,000 in the head. Without
    # checkpointing 2 * (2 * 10,240 * 2000 + 2 * 32,000 * 1000) = 209,920,000 operations in half a second.
    rows = json.loads(out.read_text())["rows"]
    assert [row["tokens a second"] for row in rows] == [4000, 4000]
    assert rows[0]["of the matrix rate"] == pytest.approx(0.41984)
    assert rows[1]["of the matrix rate"] == pytest.approx(0.41984 + 2 * 10_240 * 2000 / 0.5 / 1e9)
    assert [row["peak GB"] for row in rows] == [3, 3]


@pytest.mark.parametrize("kind", ["ours", "products", "dense", "torch"])
def test_head_benchmark_runs_every_kind(load: Load, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    load("head", "--num_positions=20", "--width=8", f"--variant={kind} 300").main()
    assert set(json.loads(capsys.readouterr().out)) == {"seconds", "peak"}


@pytest.mark.parametrize("variant", ["cut", "frozen", "blame"])
def test_shared_prefix_benchmark_runs(
    load: Load, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num_records=2", "--num_prompt=20", "--num_response=5", "--num_judgment=6"]
    load("shared_prefix", *OPTIONS, *sizes, f"--variant={variant}", f"--folder={tmp_path}").main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0


@pytest.mark.parametrize("kind", ["cutlm", "floor"])
def test_scaling_benchmark_runs(
    load: Load, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = load("scaling", *OPTIONS, f"--variant={kind} num_records 4")
    monkeypatch.setattr(scaling, "DEFAULTS", {"length": 32, "vocab_size": 1000, "num_records": 4})
    scaling.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0
    assert scaling.find_exponent((1, 2, 4), [3.0, 6.0, 12.0]) == pytest.approx(1)


def test_cpu_benchmark_compares_the_dtypes(load: Load, run_in_process: Load, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    rows = [
        {"instruction": "Add.", "output": "It is 5.", "judgment": "No."},
        {"instruction": "Name.", "output": "Two."},
    ]
    records.write_text("".join(json.dumps(row | {"judgment": row.get("judgment")}) + "\n" for row in rows))
    save_tiny_model(tmp_path / "model", chat=True)
    out = tmp_path / "results.json"
    options = [f"--model={tmp_path / 'model'}", f"--records={records}", "--max_new_tokens=2", "--repeats=1"]
    script = load("cpu_dtype", *options, f"--json={out}")
    dtypes = []

    def read_dtype(variant: str, folder: Path) -> None:
        dtypes.append(json.loads((folder / variant.split()[1] / "config.json").read_text())["dtype"])

    run_in_process(script, read_dtype)
    known = json.loads(out.read_text())
    assert sorted(dtypes) == ["bfloat16", "bfloat16", "float32", "float32"]
    assert known["num_records"] == 2
    seconds = [known["results"][f"blame {dtype}"]["cpu_seconds"] for dtype in ("bfloat16", "float32")]
    assert known["blame_cpu_seconds_bfloat16_over_float32"] == pytest.approx(seconds[0] / seconds[1])


def test_size_benchmark_measures_each_command(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    script = load("size", "--num_records=16", f"--folder={tmp_path}", f"--json={out}", "--commands", "check", "inspect")
    run, names = script.measure, list[str]()

    def measure(command: list[str], folder: Path, is_to_kill: Any = None) -> Any:
        names.append(command[0])
        return run(command, folder, is_to_kill) if command[0] == "check" else {"seconds": 1.0, "peak GB": 9.0}

    monkeypatch.setattr(script, "measure", measure)
    script.main()
    known = json.loads(out.read_text())
    assert [row["command"] for row in known["rows"]] == ["check", "inspect"]
    assert 0.01 < known["rows"][0]["peak GB"] < 2
    assert known["rows"][0]["CPU seconds"] > 0
    assert (known["num_records"], known["peak_gb"], names) == (16, 9.0, ["check", "inspect"])
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len({row["instruction"] for row in rows}) == 16
    assert {row["judgment"] is None for row in rows} == {True, False}


def test_preparation_benchmark_compares_with_trl(
    load: Load, run_in_process: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    rows = [
        {"instruction": "Add.", "output": "It is 5.", "judgment": "No."},
        {"instruction": "Name.", "output": "Two.", "judgment": None},
    ]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(tmp_path / "model", chat=True)
    out = tmp_path / "results.json"
    options = [f"--records={records}", f"--tokenizer={tmp_path / 'model'}", "--num_records=8", "--repeats=1"]
    script = load("preparation", *options, f"--json={out}")
    monkeypatch.setattr("datasets.disable_caching", lambda: None)  # it would last
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    run_in_process(script)
    known = json.loads(out.read_text())
    # The same texts: of an unsatisfactory record, both contexts are examples.
    counts = {name: result["num_rows"] for name, result in known["results"].items()}
    assert counts == {"cutlm 2": 2, "cutlm 4": 4, "cutlm 8": 8, "trl 8": 12, "plain 8": 8, "cached 8": 8}
    seconds = {name: result["seconds"] for name, result in known["results"].items()}
    assert known["time_over_trl"] == pytest.approx(seconds["cutlm 8"] / seconds["trl 8"])
    line = {f"cutlm {size}": {"seconds": 3 + 0.5 * size, "cpu_seconds": 1, "peak": 2e9} for size in (2, 4, 8)}
    figures = script.compare(line)
    assert figures["seconds_per_1000_records"] == pytest.approx(500)
    assert figures["seconds_at_no_records"] == pytest.approx(3)
    assert figures["largest_deviation_from_line"] == pytest.approx(0, abs=1e-9)
    assert figures["peak_gb"] == 2


def test_generation_benchmark_compares_with_padded_batches(load: Load, run_in_process: Load, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    options = ["--num_prompts=5", "--max_new_tokens=4", "--batch_size=2", "--repeats=1"]
    script = load("generation", *OPTIONS, *options, "--engines", "cutlm", "padded", f"--json={out}")

    run_in_process(script)
    known = json.loads(out.read_text())
    assert [(row["engine"], row["tokens"]) for row in known["rows"]] == [("cutlm", 20), ("padded", 20)]
    assert known["share_of_equal_responses"] == 1.0
    speeds = {row["engine"]: row["tokens a second"] for row in known["rows"]}
    assert known["speedup_over_padded"] == pytest.approx(speeds["cutlm"] / speeds["padded"])
