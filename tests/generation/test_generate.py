"""Generating: the model's own greedy answers, in AlpacaEval's format, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cutlm.generation.local as generation
from cutlm.cli import main
from cutlm.prompting.encoding import Encoder

PROMPTS: list[dict[str, Any]] = [
    {"instruction": "Name a city." + " Please." * (index % 4), "input": "In Europe" if index == 2 else ""}
    for index in range(7)
]
KILLED = """
import os, signal, sys
import cutlm.generation.local as generation
original, num_calls = generation._generate_batch, 0
def killing(*args, **kwargs):
    global num_calls
    num_calls += 1
    if num_calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
generation._generate_batch = killing
from cutlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def _options(model: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    return [
        *("generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out)),
        *("--max_new_tokens", "12", "--batch_size", "2", "--device", "cpu", *options),
    ]


def _answer_alone(folder: Path, row: dict[str, Any]) -> str:
    """Greedy, one token at a time, the whole text run through the model for each."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    prompt = Encoder(tokenizer, "chat").encode_prompt(text)
    ids: list[int] = []
    with torch.no_grad():
        while len(ids) < 12:
            token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_are_the_models_own_in_the_order_of_the_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    assert main(_options(model, prompts, tmp_path / "out.json")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in PROMPTS]
    assert [row["output"] for row in rows] == [_answer_alone(model, row) for row in PROMPTS]
    assert {row["generator"] for row in rows} == {"tiny"}
    assert {row["dataset"] for row in rows} == {"prompts"}
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}
    assert rows[2]["input"] == "In Europe"
    assert not (tmp_path / "out.json.partial").exists()


def test_it_stops_at_the_end_of_sequence_and_counts_what_did_not(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    model = make_model(len(tokenizer))
    model.lm_head.weight.data[:] = 0  # every token is as likely as any other, and the first of the vocabulary is taken
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    assert main(_options(tmp_path / "endless", prompts, tmp_path / "a.json")) == 0
    assert "7 of them stopped at 12 tokens" in capsys.readouterr().out
    model.model.norm.weight.data[:] = 0
    model.model.norm.weight.data[0] = 0.0
    model.config.eos_token_id = model.generation_config.eos_token_id = 0  # now that first token ends a response
    model.save_pretrained(tmp_path / "silent")
    tokenizer.save_pretrained(tmp_path / "silent")
    assert main(_options(tmp_path / "silent", prompts, tmp_path / "b.json")) == 0
    assert "0 of them stopped at 12 tokens" in capsys.readouterr().out
    assert {row["output"] for row in json.loads((tmp_path / "b.json").read_text())} == {""}


@pytest.mark.parametrize("temperature", ["0", "1.0"])
def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_gives(
    model: Path, prompts: Path, tmp_path: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = _options(model, prompts, tmp_path / "whole.json", "--temperature", temperature)
    assert main(whole) == 0
    options = _options(model, prompts, tmp_path / "killed.json", "--temperature", temperature)
    result = subprocess.run([sys.executable, "-c", KILLED, *options], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    partial = tmp_path / "killed.json.partial"
    assert len(partial.read_text().splitlines()) == 1 + 4, "two batches of two were written down"
    assert not (tmp_path / "killed.json").exists()
    with open(partial, "a") as file:  # as after a power loss, in the middle of a line
        file.write('{"index": 5, "outp')
    assert main(options) == 0
    assert "4 responses were there" in capsys.readouterr().out
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_greedy_is_greedy_whatever_the_model_says_of_itself(tmp_path: Path, model: Path, prompts: Path) -> None:
    other = tmp_path / "tiny"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.generation_config.repetition_penalty = 5.0
    loaded.generation_config.no_repeat_ngram_size = 2
    loaded.save_pretrained(other)
    AutoTokenizer.from_pretrained(model).save_pretrained(other)
    assert main(_options(model, prompts, tmp_path / "a.json")) == 0
    assert main(_options(other, prompts, tmp_path / "b.json")) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_prompts_are_never_written_over(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = prompts.read_bytes()
    assert main(_options(model, prompts, prompts, "--overwrite")) == 2
    assert "got one of the inputs" in capsys.readouterr().err
    assert prompts.read_bytes() == before


def test_what_no_run_left_is_not_gone_on_with(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json.partial").write_text("[]\n")
    assert main(_options(model, prompts, tmp_path / "out.json")) == 2
    assert "not the partial file of a stopped run" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_sentence(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_options(model, prompts, tmp_path / "out.json", "--device", "bogus")) == 2
    assert "--device bogus: not available" in capsys.readouterr().err


def test_sampling_is_decided_by_the_seed(model: Path, prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(_options(model, prompts, tmp_path / f"{name}.json", "--temperature", "1", "--seed", seed)) == 0
    a, b, c = ((tmp_path / f"{name}.json").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_other_settings_do_not_mix_with_a_stopped_run(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _options(model, prompts, tmp_path / "out.json")
    subprocess.run([sys.executable, "-c", KILLED, *options], capture_output=True, check=False)
    before = (tmp_path / "out.json.partial").read_bytes()
    assert main([*options, "--temperature", "0.5"]) == 2
    assert "started with other settings (sampling differ)" in capsys.readouterr().err
    assert (tmp_path / "out.json.partial").read_bytes() == before


def test_an_existing_file_is_left_alone(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").write_text("precious")
    assert main(_options(model, prompts, tmp_path / "out.json")) == 2
    assert "exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "precious"


def test_bad_prompts_are_all_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "ok"}\n{"text": "x"}\n[1]\n{"instruction": "x", "input": 3}\nnot json\n')
    assert main(_options(model, path, tmp_path / "out.json")) == 2
    message = capsys.readouterr().err
    assert "bad.jsonl:2: field 'instruction' is missing; the object has 'text'" in message
    assert "bad.jsonl:3: expected an object with the fields instruction, input, dataset, got a list" in message
    assert "bad.jsonl:4: field 'input': expected a string or null, got a number (3)" in message
    assert "bad.jsonl:5: not JSON" in message


def test_a_model_without_a_template_must_be_told_one(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    assert main(_options(folder, prompts, tmp_path / "out.json")) == 2
    assert "say how to prompt it by --template alpaca" in capsys.readouterr().err
    assert main(_options(folder, prompts, tmp_path / "out.json", "--template", "alpaca")) == 0


def test_sampling_out_of_range_is_said_at_once(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "-1", "--top_p", "2", "--batch_size", "0"]
    assert main([*_options(model, prompts, tmp_path / "out.json"), *options]) == 2
    message = capsys.readouterr().err
    for name in ("temperature: expected", "top_p: expected", "batch_size: expected"):
        assert name in message


def test_prompts_longer_than_the_context_are_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    make_model(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"instruction": "word " * 100}, {"instruction": "Hi."}]))
    assert main(_options(tmp_path / "short", path, tmp_path / "out.json")) == 0
    assert "1 prompts were cut from the left" in capsys.readouterr().out
    assert main([*_options(tmp_path / "short", path, tmp_path / "b.json"), "--max_new_tokens", "64"]) == 2
    assert "expected fewer than the model's context of 64" in capsys.readouterr().err


def test_the_hubs_instructions_are_asked_for_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str | None]] = []
    local = tmp_path / "alpaca_eval.json"
    local.write_text(json.dumps([{"instruction": "Name a city.", "dataset": "helpful_base", "output": "Paris."}]))

    def fetch(repository: str, name: str, repo_type: str | None = None) -> str:
        asked.append((repository, name, repo_type))
        return str(local)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert main(_options(model, Path("alpaca_eval"), tmp_path / "out.json")) == 0
    assert asked == [("tatsu-lab/alpaca_eval", "alpaca_eval.json", "dataset")]
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["dataset"] == "helpful_base"


def test_without_a_network_the_hubs_instructions_are_one_sentence(tmp_path: Path, model: Path) -> None:
    options = _options(model, Path("alpaca_eval"), tmp_path / "out.json")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "cutlm", *options], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "alpaca_eval: the instructions cannot be fetched from the hub" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_judgment_is_put_into_the_prompt_that_the_model_was_trained_with(tmp_path, prompts):
    folder = save_tiny_model(tmp_path / "alpaca")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, "alpaca")
    tokenizer.chat_template = encoder.build_chat_template()  # as training saves it
    tokenizer.save_pretrained(folder)
    seen: list[list[int]] = []
    generate = generation._generate_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_generate_batch", lambda *args: (seen.extend(args[2]), generate(*args))[1])
        assert main(_options(folder, prompts, tmp_path / "out.json", "--judgment", "Perfect.")) == 0
    expected = [
        encoder.encode_prompt(f"{row['instruction']}\n{row['input']}".rstrip("\n"), "Perfect.") for row in PROMPTS
    ]
    assert sorted(seen) == sorted(expected)


def test_an_empty_judgment_is_refused(model, prompts, tmp_path, capsys):
    assert main(_options(model, prompts, tmp_path / "out.json", "--judgment", " ")) == 2
    assert "--judgment: expected text" in capsys.readouterr().err
