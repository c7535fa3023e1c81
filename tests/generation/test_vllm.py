"""`cutlm generate --engine vllm`: what it asks of vLLM, by a stand-in with the interface of vLLM 0.19, and resuming.

The names and kinds of arguments are those of `LLM.__init__` and `LLM.generate` (vllm/entrypoints/llm.py),
`SamplingParams` (vllm/sampling_params.py), `LoRARequest` (vllm/lora/request.py), `TokensPrompt` (vllm/inputs) and
`CompletionOutput` (vllm/outputs.py).
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypedDict

import pytest
import torch
from commands import list_options, write_lines
from peft import LoraConfig, get_peft_model

from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.generation import vllm as engine_module
from cutlm.world.base import base_path, load_base

PROMPTS = [{"instruction": f"Work out {number} plus 5."} for number in range(4)]


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Calls:
    """What a run asked of the stand-in, and how it ends its responses."""

    loaded: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    adapters: list[LoRARequest | None] = field(default_factory=list)
    finish_reason: str = "stop"
    fails_at_call: int = 0
    num_calls: int = 0


def install(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Put a package `vllm` in place that answers with the greedy tokens of the tiny world's base model."""
    model, _ = load_base(base_path())

    class LLM:
        def __init__(
            self, model: str, *, dtype: str = "auto", enable_lora: bool = False, max_lora_rank: int = 16,
            max_model_len: int | None = None, quantization: str | None = None, gpu_memory_utilization: float = 0.9,
        ) -> None:  # fmt: skip
            assert max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)
            if max_model_len == 0:
                raise RuntimeError("Engine core initialization failed. See root cause above.")
            calls.loaded.append({"model": model, "dtype": dtype, "enable_lora": enable_lora, "rank": max_lora_rank})
            length = max_model_len or json.loads((base_path() / "config.json").read_text())["max_position_embeddings"]
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))

        def generate(
            self, prompts: Sequence[TokensPrompt], sampling_params: Sequence[SamplingParams], *,
            use_tqdm: bool = True, lora_request: LoRARequest | None = None,
        ) -> list[Any]:  # fmt: skip
            calls.num_calls += 1
            if calls.num_calls == calls.fails_at_call:
                raise KeyboardInterrupt
            calls.adapters.append(lora_request)
            return [
                self._answer(prompt["prompt_token_ids"], params)
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

        def _answer(self, ids: list[int], params: SamplingParams) -> Any:
            calls.prompts.append(ids)
            calls.params.append(params)
            options = {"max_new_tokens": params.max_tokens, "do_sample": False, "eos_token_id": params.stop_token_ids}
            new_ids = model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist()  # type: ignore
            reason = calls.finish_reason if new_ids[-1] in (params.stop_token_ids or ()) else "length"
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new_ids), finish_reason=reason)])

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.inputs", "vllm.lora", "vllm.lora.request")}
    vars(modules["vllm"]).update(LLM=LLM, SamplingParams=SamplingParams)
    vars(modules["vllm.inputs"]).update(TokensPrompt=TokensPrompt)
    vars(modules["vllm.lora.request"]).update(LoRARequest=LoRARequest)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    install(monkeypatch, calls)
    return calls


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


def generate(prompts: Path, name: str, *options: object, model: Path | None = None) -> tuple[int, Path]:
    out = prompts.with_name(name)
    known = list_options(model=model or base_path(), prompts=prompts, out=out)
    return main(["generate", *known, *map(str, options)]), out


def read_outputs(path: Path) -> list[str]:
    return [row.value["output"] for row in read_rows(path)[0]]


def test_the_answers_are_those_of_the_local_engine(calls: Calls, prompts: Path) -> None:
    code, local = generate(prompts, "local.json", "--max_new_tokens", 12, "--device", "cpu")
    assert code == 0
    code, ours = generate(prompts, "vllm.json", "--max_new_tokens", 12, "--engine", "vllm")
    assert code == 0
    assert read_outputs(ours) == read_outputs(local)
    assert calls.loaded == [{"model": str(base_path()), "dtype": "auto", "enable_lora": False, "rank": 16}]
    assert calls.adapters == [None]


def test_the_sampling_is_passed_on(calls: Calls, prompts: Path) -> None:
    options = ["--temperature", 0.7, "--top_p", 0.9, "--seed", 5, "--max_new_tokens", 3, "--engine_args"]
    code, _ = generate(prompts, "out.json", *options, '{"max_model_len": 64}', "--engine", "vllm")
    assert code == 0
    assert [(each.temperature, each.top_p, each.max_tokens) for each in calls.params] == [(0.7, 0.9, 3)] * 4
    assert [each.seed for each in calls.params] == [5, 6, 7, 8]
    _, tokenizer = load_base(base_path())
    assert all(tokenizer.eos_token_id in (each.stop_token_ids or ()) for each in calls.params)


def test_responses_end_where_the_model_itself_stops(calls: Calls, prompts: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base_path(), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert generate(prompts, "out.json", "--max_new_tokens", 3, "--engine", "vllm", model=model)[0] == 0
    assert all({7, 9} <= set(each.stop_token_ids or ()) for each in calls.params)


def test_prompts_are_truncated_to_the_length_that_vllm_is_given(calls: Calls, prompts: Path) -> None:
    options = ["--max_new_tokens", 3, "--engine", "vllm", "--engine_args", '{"max_model_len": 8}']
    assert generate(prompts, "out.json", *options)[0] == 0
    assert {len(ids) for ids in calls.prompts} == {5}


def test_a_response_that_vllm_did_not_finish_is_a_failure(calls: Calls, prompts: Path) -> None:
    calls.finish_reason = "abort"
    code, out = generate(prompts, "out.json", "--engine", "vllm")
    assert (code, out.exists()) == (1, False)
    assert len(read_rows(Path(f"{out}.failures.jsonl"))[0]) == 4


def test_a_stopped_run_resumes(calls: Calls, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_NUM_PROMPTS", 3)
    calls.fails_at_call = 2
    assert generate(prompts, "out.json", "--engine", "vllm")[0] == 130
    assert generate(prompts, "out.json", "--engine", "vllm")[0] == 0
    assert len(calls.prompts) == 4  # each prompt once
    assert len(read_outputs(prompts.with_name("out.json"))) == 4


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--dtype", "float32"], 2),
        (["--engine_args", '{"quantization": "fp8"}'], 2),
        (["--engine_args", '{"gpu_memory_utilization": 0.5}'], 0),
    ],
)
def test_a_stopped_run_resumes_with_the_same_weights_only(
    calls: Calls, prompts: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str], expected: int
) -> None:
    monkeypatch.setattr(engine_module, "_NUM_PROMPTS", 3)
    calls.fails_at_call = 2
    assert generate(prompts, "out.json", "--engine", "vllm")[0] == 130
    assert generate(prompts, "out.json", "--engine", "vllm", *changed)[0] == expected


def save_adapter(folder: Path, **settings: Any) -> Path:
    model, tokenizer = load_base(base_path())
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    get_peft_model(model, config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base_path())}))
    return folder


def test_an_adapter_is_requested_on_its_base_model(calls: Calls, prompts: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    assert generate(prompts, "out.json", "--engine", "vllm", model=adapter)[0] == 0
    assert calls.loaded == [{"model": str(base_path()), "dtype": "auto", "enable_lora": True, "rank": 8}]
    assert calls.adapters == [LoRARequest("adapter", 1, str(adapter))]


def test_an_adapter_that_vllm_cannot_run_is_refused(calls: Calls, prompts: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", use_dora=True)
    assert generate(prompts, "out.json", "--engine", "vllm", model=adapter)[0] == 2
    assert not calls.loaded


@pytest.mark.parametrize(
    "options",
    [
        ["--engine", "vllm", "--base_url", "http://localhost:1/v1"],
        ["--engine", "vllm", "--batch_size", "4"],
        ["--engine", "vllm", "--device", "cpu"],
        ["--engine_args", "{}"],
        ["--engine", "vllm", "--engine_args", "[]"],
        ["--engine", "vllm", "--engine_args", '{"no_such_argument": 1}'],
        ["--engine", "vllm", "--engine_args", '{"max_model_len": 0}'],
        ["--engine", "vllm", "--max_new_tokens", "0"],
        ["--engine", "vllm", "--temperature", "-1"],
    ],
)
def test_options_that_do_not_fit_are_refused_before_loading(calls: Calls, prompts: Path, options: list[str]) -> None:
    assert generate(prompts, "out.json", *options)[0] == 2
    assert not calls.loaded


def test_a_missing_package_is_named(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert generate(prompts, "out.json", "--engine", "vllm")[0] == 2
    assert "cutlm[vllm]" in capsys.readouterr().err


def test_vllm_itself_gives_greedy_answers(prompts: Path) -> None:
    pytest.importorskip("vllm")
    assert generate(prompts, "local.json", "--max_new_tokens", 12, "--dtype", "float32")[0] == 0
    assert generate(prompts, "vllm.json", "--max_new_tokens", 12, "--dtype", "float32", "--engine", "vllm")[0] == 0
    assert read_outputs(prompts.with_name("vllm.json")) == read_outputs(prompts.with_name("local.json"))
