"""Code in a model folder never runs and never asks to: known model types load, others are refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_model

from cutlm.cli import main

CODE = """from pathlib import Path
Path(r"{marker}").write_text("ran")
from transformers import LlamaConfig as MyConfig, LlamaForCausalLM as MyModel, PreTrainedTokenizerFast as MyTokenizer
def generate(*args, **kwargs): raise RuntimeError
"""


def make_folder(folder: Path, marker: Path, config: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
    save_tiny_model(folder)
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for name in ("my_code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=marker))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "my_code.MyTokenizer"}}))
    return folder


AUTO_MAP = {"auto_map": {"AutoConfig": "my_code.MyConfig", "AutoModelForCausalLM": "my_code.MyModel"}}
AUTO_TOKENIZER = {"auto_map": {"AutoTokenizer": ["my_code.MyTokenizer", "my_code.MyTokenizer"]}}


@pytest.mark.parametrize(
    ("config", "tokenizer", "code"),
    [
        (AUTO_MAP, {}, 0),
        ({}, AUTO_TOKENIZER, 0),
        (AUTO_MAP, AUTO_TOKENIZER, 0),
        (AUTO_MAP | {"model_type": "mine"}, {}, 2),
        ({}, AUTO_TOKENIZER | {"tokenizer_class": "MyTokenizer"}, None),
        (AUTO_MAP | {"model_type": "mine"}, AUTO_TOKENIZER | {"tokenizer_class": "MyTokenizer"}, 2),
        ({"auto_map": {"AutoConfig": "someone/else--my_code.MyConfig"}, "model_type": "mine"}, {}, 2),
    ],
)
@pytest.mark.parametrize("command", ["generate", "train"])
def test_code_in_a_model_folder_never_runs_and_never_asks(
    command: str,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    code: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ask(*args: Any) -> str:
        raise AssertionError(f"asked {args}")

    monkeypatch.setattr("builtins.input", ask)
    marker = tmp_path / "marker"
    model = make_folder(tmp_path / "model", marker, config, tokenizer)
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Hi.", "output": "Ho.", "judgment": null}\n')
    if command == "generate":
        options = [f"--model={model}", f"--prompts={data}", f"--out={tmp_path / 'out.jsonl'}", "--max_new_tokens=1"]
        options += ["--device=cpu", "--template=alpaca"]
    else:
        options = [f"--model_name_or_path={model}", f"--data={data}", f"--output_dir={tmp_path / 'out'}", "--use_cpu"]
        options += ["--max_steps=1", "--report_to=none"]
    got = main([command, *options])
    assert not marker.exists()
    error = capsys.readouterr().err
    assert got == code if code is not None else got in (0, 2)
    if got == 2:
        assert "needs Python code that comes with it, which cutlm never runs" in error
        return
    if command == "train":
        assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
