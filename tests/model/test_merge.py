"""Merging keeps the logits, the dtype and the prompt of training, and refuses what cannot be merged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlm.cli import main
from cutlm.prompting.encoding import Encoder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return _save_adapter(tmp_path / "adapter", base)


def _save_adapter(folder: Path, base: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj", "up_proj"], init_lora_weights=False, r=4),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = Encoder(tokenizer, "alpaca").build_chat_template()
    tokenizer.save_pretrained(folder)
    return folder


def _merge(adapter: Path, out: Path, *options: str) -> int:
    return main(["merge", "--adapter", str(adapter), "--out", str(out), *options])


@pytest.mark.parametrize("cpu", ["fast_cpu", "slow_cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_has_adapter_logits_and_base_dtype(
    tmp_path: Path,
    dtype: torch.dtype,
    cpu: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request.getfixturevalue(cpu)
    tokenizer = make_tokenizer("bpe")
    make_model(len(tokenizer)).to(dtype).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = _save_adapter(tmp_path / "adapter", tmp_path / "base", dtype)
    assert _merge(adapter, tmp_path / "merged") == 0
    assert f"({str(dtype).removeprefix('torch.')})" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(adapter)).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, got, before = (model(ids).logits.float() for model in (adapted, merged, plain))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert (before - expected).abs().max() > 0.2 * expected.abs().max(), "the adapter must change the logits"
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {dtype}
    assert not any("lora" in name for name in weights)


def test_merged_tokenizer_has_training_template(tmp_path: Path, adapter: Path) -> None:
    assert _merge(adapter, tmp_path / "merged") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    instruction = "Name the capital of {Australia}.\n\nOnly one word."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == Encoder(tokenizer, "alpaca").encode_prompt(instruction)
    assert tokenizer.decode(prompt) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def test_missing_base_model_is_refused(
    tmp_path: Path, adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base.rename(tmp_path / "moved")
    assert _merge(adapter, tmp_path / "merged") == 2
    assert str(base) in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert _merge(adapter, tmp_path / "merged", "--base", str(tmp_path / "moved")) == 0


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": null}', "{half", "[]", None])
def test_folder_without_usable_adapter_config_is_refused(
    tmp_path: Path, adapter: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter / "adapter_config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    assert _merge(adapter, tmp_path / "merged") == 2
    assert str(adapter if content is None else config) in capsys.readouterr().err


def test_full_model_and_missing_folder_are_no_adapters(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _merge(base, tmp_path / "merged") == 2
    assert "got a full model" in capsys.readouterr().err
    assert _merge(tmp_path / "nowhere", tmp_path / "merged") == 2
    assert "no such folder" in capsys.readouterr().err


def test_adapter_of_another_base_is_refused(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(64, hidden_size=16).save_pretrained(tmp_path / "other")
    assert _merge(adapter, tmp_path / "merged", "--base", str(tmp_path / "other")) == 2
    assert "does not fit its base model" in capsys.readouterr().err


def test_base_model_is_never_replaced_by_its_merge(tmp_path: Path, adapter: Path, base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    assert _merge(adapter, base, "--overwrite") == 2
    assert (base / "model.safetensors").read_bytes() == before


def test_adapter_file_that_lacks_weights_is_refused(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1" not in name}, file)
    assert _merge(adapter, tmp_path / "merged") == 2
    assert f"{file}: 4 LoRA weights are missing" in capsys.readouterr().err
    file.write_bytes(b"half")
    assert _merge(adapter, tmp_path / "merged") == 2
    file.unlink()
    assert _merge(adapter, tmp_path / "merged") == 2
    assert f"{file}: no such file" in capsys.readouterr().err


def test_adapter_with_non_finite_values_is_refused(tmp_path: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    assert _merge(adapter, tmp_path / "merged") == 2
    assert not (tmp_path / "merged").exists()


def test_only_a_model_folder_is_replaced_and_only_with_overwrite(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert _merge(adapter, out) == 0
    assert _merge(adapter, out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert _merge(adapter, out, "--overwrite") == 0
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear mother")
    assert _merge(adapter, tmp_path / "letters", "--overwrite") == 2
    assert str(tmp_path / "letters") in capsys.readouterr().err
    assert (tmp_path / "letters" / "to_mother.txt").read_text() == "Dear mother"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "letters", "merged"]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs, which needs root on Linux")
@pytest.mark.parametrize(
    ("command", "size", "message"),
    [
        ("merge", "100k", "No space left on device"),
        ("train", "100k", "MB free, expected at least"),
        ("train", "500k", "free disk space"),  # enough for the weights, not for the optimizer's state
    ],
)
def test_full_disk_is_one_error_line_and_leaves_no_partial_model(
    adapter: Path, tmp_path: Path, command: str, size: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        if command == "merge":
            options = ["--adapter", str(adapter), "--out", str(disk / "model")]
        else:
            data = tmp_path / "records.json"
            data.write_text(json.dumps([{"instruction": "Hi.", "output": "Hello.", "judgment": None}]))
            base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
            options = ["--model_name_or_path", base, "--data", str(data), "--output_dir", str(disk / "run")]
            options += ["--use_peft=false", "--max_steps=1", "--use_cpu", "--report_to=none", "--max_length=256"]
        assert main([command, *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"cutlm {command}: ")]
        assert message in line
        assert not (disk / "model").exists()
        assert not list(disk.glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
