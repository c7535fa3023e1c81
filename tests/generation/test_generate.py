"""Generation by a local model: its greedy answers, in AlpacaEval's format, and resuming."""

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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MambaConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

import cutlm.generation.local as generation
from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.data.journal import Journal
from cutlm.generation import progress
from cutlm.prompting.encoding import Encoder

PROMPTS: list[dict[str, Any]] = [
    {"instruction": "Name a city." + " Please." * (index % 4), "input": "In Europe" if index == 2 else ""}
    for index in range(7)
]
KILLED = """
import os, signal, sys
from cutlm.data.journal import Journal
original, num_calls = Journal.append, 0
def killing(*args):
    global num_calls
    num_calls += 1
    if num_calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
Journal.append = killing
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
    """Greedy decoding of one token at a time without a KV cache."""
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


def test_answers_are_greedy_and_in_the_order_of_the_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    assert main(_options(model, prompts, tmp_path / "out.json")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in PROMPTS]
    assert [row["output"] for row in rows] == [_answer_alone(model, row) for row in PROMPTS]
    assert {row["generator"] for row in rows} == {"tiny"}
    assert {row["dataset"] for row in rows} == {"prompts"}
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}
    assert rows[2]["input"] == "In Europe"
    assert not (tmp_path / "out.json.partial").exists()


def test_it_stops_at_the_end_of_turn_token_and_counts_unfinished_responses(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    model = make_model(len(tokenizer))
    model.lm_head.weight.data[:] = 0  # all tokens are equally likely, and argmax takes the first of the vocabulary
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    assert main(_options(tmp_path / "endless", prompts, tmp_path / "a.json")) == 0
    assert "7 of them stopped at 12 tokens" in capsys.readouterr().out
    model.model.norm.weight.data[:] = 0
    model.model.norm.weight.data[0] = 0.0
    model.config.eos_token_id = model.generation_config.eos_token_id = 0  # that first token now ends a response
    model.save_pretrained(tmp_path / "silent")
    tokenizer.save_pretrained(tmp_path / "silent")
    assert main(_options(tmp_path / "silent", prompts, tmp_path / "b.json")) == 0
    assert "0 of them stopped at 12 tokens" in capsys.readouterr().out
    assert {row["output"] for row in json.loads((tmp_path / "b.json").read_text())} == {""}


def test_a_killed_run_resumes_and_gives_what_an_uninterrupted_one_gives(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = _options(model, prompts, tmp_path / "whole.json", "--temperature", "1.0")
    assert main(whole) == 0
    options = _options(model, prompts, tmp_path / "killed.json", "--temperature", "1.0")
    result = subprocess.run([sys.executable, "-c", KILLED, *options], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    partial = tmp_path / "killed.json.partial"
    assert len(partial.read_text().splitlines()) == 1 + 4, "two batches of two"
    assert not (tmp_path / "killed.json").exists()
    with open(partial, "a") as file:  # as after a power failure
        file.write('{"index": 5, "outp')
    assert main(options) == 0
    assert "4 responses are from the run that was stopped" in capsys.readouterr().out
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_greedy_ignores_the_generation_config_of_the_model(tmp_path: Path, model: Path, prompts: Path) -> None:
    other = tmp_path / "tiny"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.generation_config.repetition_penalty = 5.0
    loaded.generation_config.no_repeat_ngram_size = 2
    loaded.generation_config.suppress_tokens = list(range(20, 300))
    loaded.generation_config.begin_suppress_tokens = list(range(300, 400))
    loaded.generation_config.forced_eos_token_id = 5
    loaded.generation_config.max_length = 3
    loaded.generation_config.num_return_sequences = 2
    loaded.generation_config.num_beams = 2
    loaded.save_pretrained(other)
    AutoTokenizer.from_pretrained(model).save_pretrained(other)
    assert main(_options(model, prompts, tmp_path / "a.json")) == 0
    assert main(_options(other, prompts, tmp_path / "b.json")) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_prompts_are_never_overwritten(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = prompts.read_bytes()
    assert main(_options(model, prompts, prompts, "--overwrite")) == 2
    assert "got one of the inputs" in capsys.readouterr().err
    assert prompts.read_bytes() == before


def test_a_partial_file_of_another_kind_is_refused(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json.partial").write_text("[]\n")
    assert main(_options(model, prompts, tmp_path / "out.json")) == 2
    assert "not the partial file of a stopped run" in capsys.readouterr().err


def test_a_missing_device_is_an_error(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_options(model, prompts, tmp_path / "out.json", "--device", "bogus")) == 2
    assert "--device bogus: not available" in capsys.readouterr().err


def test_the_seed_determines_the_samples(model: Path, prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(_options(model, prompts, tmp_path / f"{name}.json", "--temperature", "1", "--seed", seed)) == 0
    a, b, c = ((tmp_path / f"{name}.json").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_other_settings_cannot_resume_a_stopped_run(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _options(model, prompts, tmp_path / "out.json")
    append, num_calls = Journal.append, iter(range(9))

    def interrupt(*args: Any) -> Any:
        if next(num_calls) == 1:
            raise KeyboardInterrupt
        return append(*args)

    monkeypatch.setattr(Journal, "append", interrupt)
    assert main(options) == 130
    before = (tmp_path / "out.json.partial").read_bytes()
    for name, value in (("sampling", ["--temperature", "0.5"]), ("dtype", ["--dtype", "bfloat16"])):
        assert main([*options, *value]) == 2
        assert f"({name} differ)" in capsys.readouterr().err
    assert (tmp_path / "out.json.partial").read_bytes() == before
    monkeypatch.undo()
    other = ["--temperature", "0.5"]
    assert main([*options, *other, "--overwrite"]) == 0
    assert main([*_options(model, prompts, tmp_path / "new.json"), *other]) == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "new.json").read_bytes()
    assert not (tmp_path / "out.json.partial").exists()


def test_an_existing_file_is_not_replaced_without_overwrite(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").write_text("precious")
    assert main(_options(model, prompts, tmp_path / "out.json")) == 2
    assert "out.json: exists" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "precious"


def test_bad_prompts_are_all_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "ok"}\n{"text": "x"}\n[1]\n{"instruction": "x", "input": 3}\nnot json\n')
    assert main(_options(model, path, tmp_path / "out.json")) == 2
    message = capsys.readouterr().err
    assert "bad.jsonl:2: field 'instruction' is missing; the object has 'text'" in message
    assert (
        "bad.jsonl:3: expected an object with the fields instruction, input, dataset, messages, tools, got a list"
        in message
    )
    assert "bad.jsonl:4: field 'input': expected a string or null, got a number (3)" in message
    assert "bad.jsonl:5: not JSON" in message


def test_a_model_without_a_chat_template_needs_the_option(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    assert main(_options(folder, prompts, tmp_path / "out.json")) == 2
    assert "set --template alpaca" in capsys.readouterr().err
    assert main(_options(folder, prompts, tmp_path / "out.json", "--template", "alpaca")) == 0


def test_all_sampling_options_out_of_range_are_named(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "-1", "--top_p", "2", "--batch_size", "0"]
    assert main([*_options(model, prompts, tmp_path / "out.json"), *options]) == 2
    message = capsys.readouterr().err
    for name in ("temperature: expected", "top_p: expected", "batch_size: expected"):
        assert name in message


@pytest.mark.parametrize("command", ["generate", "refine", "chat"])
def test_sampling_options_are_checked_before_the_model_is_loaded(
    command: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Hi.", "output": "Bye.", "judgment": "Rude."}))
    files = {"generate": ["--prompts", str(prompts)], "refine": ["--data", str(records)], "chat": []}[command]
    out = [] if command == "chat" else ["--out", str(tmp_path / "out.json")]
    assert main([command, "--model", str(tmp_path / "missing"), *files, *out, "--top_p", "2"]) == 2
    assert "top_p: expected" in capsys.readouterr().err


def test_prompts_longer_than_the_context_are_truncated_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    make_model(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"instruction": "word " * 100}, {"instruction": "Hi."}]))
    assert main(_options(tmp_path / "short", path, tmp_path / "out.json")) == 0
    assert "1 prompts were truncated" in capsys.readouterr().out
    monkeypatch.setattr("cutlm.generation.files.encode_each", lambda *_: pytest.fail("encoded"))
    assert main([*_options(tmp_path / "short", path, tmp_path / "b.json"), "--max_new_tokens", "64"]) == 2
    assert "expected fewer than the model's context of 64" in capsys.readouterr().err


def test_the_instructions_of_alpaca_eval_are_downloaded_by_name(
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


def test_a_failed_download_is_one_sentence(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: Any, **options: Any) -> None:
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.chdir(tmp_path)
    assert main(_options(model, Path("alpaca_eval"), tmp_path / "out.json")) == 2
    assert "alpaca_eval: cannot download the instructions from the hub (no network)" in capsys.readouterr().err


def test_a_judgment_is_part_of_the_prompt_as_in_training(tmp_path, prompts):
    folder = save_tiny_model(tmp_path / "alpaca")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, "alpaca")
    tokenizer.chat_template = encoder.build_chat_template()  # as training saves it
    tokenizer.save_pretrained(folder)
    seen: list[list[int]] = []
    generate = generation._generate_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation, "_generate_rows", lambda *args: (seen.extend(row.prompt for row in args[2]), generate(*args))[1]
        )
        assert main(_options(folder, prompts, tmp_path / "out.json", "--judgment", "Perfect.")) == 0
    expected = [
        encoder.encode_prompt(f"{row['instruction']}\n{row['input']}".rstrip("\n"), "Perfect.") for row in PROMPTS
    ]
    assert sorted(seen) == sorted(expected)


def test_an_empty_judgment_is_refused(model, prompts, tmp_path, capsys):
    assert main(_options(model, prompts, tmp_path / "out.json", "--judgment", " ")) == 2
    assert "--judgment: expected text" in capsys.readouterr().err


# ---- Padding ----


def test_a_padding_token_without_an_embedding_is_not_used(tmp_path, prompts, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    assert main(_options(tmp_path / "tiny", prompts, tmp_path / "a.json")) == 0
    assert main(_options(model, prompts, tmp_path / "b.json")) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


SIZES = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(**SIZES, intermediate_size=64, num_attention_heads=4, initializer_range=0.2)
RWKV = RwkvConfig(**SIZES, attention_hidden_size=32)
GRIFFIN = RecurrentGemmaConfig(
    **SIZES | {"num_hidden_layers": 3}, num_attention_heads=2, lru_width=32, head_dim=16, initializer_range=0.2
)
MAMBA = MambaConfig(**SIZES, state_size=4)


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (LLAMA, "float32", True),
        (LLAMA, "bfloat16", True),
        (MAMBA, "float32", True),
        (RWKV, "float32", False),
        (RWKV, "bfloat16", False),
        (GRIFFIN, "float32", False),
    ],
)
def test_a_model_that_padding_misleads_is_found(config: Any, dtype: str, expected: bool) -> None:
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    own = loaded.generation_config
    prompts = [[(number * 7 + 3) % 600 for number in range(length)] for length in (40, 9)]
    assert generation.supports_padding(loaded, prompts) is expected
    assert loaded.generation_config is own


def test_a_model_that_padding_misleads_answers_one_prompt_at_a_time(
    tmp_path: Path, prompts: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    AutoModelForCausalLM.from_config(RWKV).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    assert main(_options(folder, prompts, tmp_path / "a.json", "--batch_size", "4")) == 0
    assert "RwkvForCausalLM generates responses one at a time" in caplog.text
    assert main(_options(folder, prompts, tmp_path / "b.json", "--batch_size", "1")) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


# ---- Progress ----


def test_the_bar_moves_within_a_batch(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float] = []
    update = progress.tqdm.update

    def watch(self: Any, n: float = 1) -> Any:
        if self.desc.startswith("generating"):  # not a bar of transformers
            shown.append(self.n)
        return update(self, n)

    monkeypatch.setattr(progress.tqdm, "update", watch)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0)
    assert main(_options(model, prompts, tmp_path / "out.json", "--batch_size", "7")) == 0
    assert len(set(shown)) > 10, "at each layer of the prompts and at each token"
    assert shown == sorted(shown)
    assert shown[-1] == 7


def test_no_bar_is_shown_if_tqdm_is_disabled(model: Path, prompts: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TQDM_DISABLE": "1"}
    options = _options(model, prompts, tmp_path / "out.json")
    result = subprocess.run(
        [sys.executable, "-m", "cutlm", *options], env=environment, capture_output=True, text=True, check=True
    )
    assert "generating" not in result.stderr


def test_conversations_are_answered_and_kept(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", chat=True)
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Name a city."},
    ]
    answered = [*turns, {"role": "assistant", "content": "Sydney."}]
    rows = [{"messages": turns, "tools": [tool]}, {"messages": answered}, {"prompt": turns[-1:]}, {"prompt": "Hi."}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--out", str(out), "--device", "cpu"]
    assert main(["generate", *arguments, "--template", "chat", "--max_new_tokens", "4"]) == 0
    found = [row.value for row in read_rows(out)[0]]
    assert [row["instruction"] for row in found] == ["Name a city.", "Name a city.", "Name a city.", "Hi."]
    assert [row.get("messages") for row in found] == [
        [*turns, {"role": "assistant", "content": found[0]["output"]}],
        [*turns, {"role": "assistant", "content": found[1]["output"]}],
        None,
        None,
    ]
    assert [row.get("tools") for row in found] == [[tool], None, None, None]
    # The model saw the earlier turns: the same last message alone has another answer.
    assert found[0]["output"] == found[1]["output"] != found[2]["output"]
