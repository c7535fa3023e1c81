"""Generate responses with vLLM in this process: the same prompts, end tokens, journal and answers as `local`.

The interface is that of vLLM 0.19.1, the first version that can be installed with transformers 5.23: `vllm.LLM`,
`SamplingParams`, `TokensPrompt` and `LoRARequest`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from cutlm.data.journal import Journal
from cutlm.errors import UserError
from cutlm.generation.local import Answer, AnswerReader, Generated, Sampling, find_room_in, fit_prompts
from cutlm.model.generation_config import list_end_ids
from cutlm.model.loading import find_base_model, find_gguf, is_adapter_folder
from cutlm.prompting.encoding import Encoder

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

# Prompts of a call, whose responses are lost if the run stops. The engine is not full at the end of each call.
_NUM_PROMPTS = 512
# Arguments with which a stopped run may be resumed otherwise: they set memory and speed, not the model.
_RESOURCES = (
    *("gpu_memory_utilization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs"),
    *("max_num_batched_tokens", "swap_space", "cpu_offload_gb", "enforce_eager"),
)
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allocates


@dataclass(frozen=True)
class Engine:
    """A model that vLLM has loaded.

    Attributes:
        llm: The engine.
        adapter: The LoRA adapter of its requests.
        generation_config: The model's own; None if it has none.
        context_limit: The length of its context in tokens.
        settings: Other settings that affect the answers: the dtype and further arguments.
    """

    llm: "LLM"
    adapter: "LoRARequest | None"
    generation_config: GenerationConfig | None
    context_limit: int
    settings: Mapping[str, Any]


def load_engine(path: str | Path, *, dtype: str = "auto", arguments: Mapping[str, Any] | None = None) -> Engine:
    """Load a model, or a LoRA adapter and its base model, into vLLM.

    Args:
        path: A model or adapter folder, or a hub name.
        dtype: dtype of the weights.
        arguments: Further arguments of `vllm.LLM`, such as `{"tensor_parallel_size": 2}`.

    Raises:
        UserError: vLLM is missing, or cannot load the model or the adapter.
    """
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError("--engine vllm: the package vllm is missing; run: pip install 'cutlm[vllm]'") from None
    if find_gguf(path):
        raise UserError(f"{path}: a GGUF file needs --engine transformers; set that, or leave --engine out")
    model, adapter = str(path), None
    options: dict[str, Any] = {"dtype": dtype}
    if is_adapter_folder(path):
        model = find_base_model(path)
        options |= {"enable_lora": True, "max_lora_rank": _choose_max_rank(Path(path))}
        adapter = LoRARequest("adapter", 1, str(Path(path).resolve()))
    try:
        llm = LLM(model=model, **options | dict(arguments or {}))
    except (ValueError, TypeError, RuntimeError) as error:  # unsupported by vLLM, or a failure of its process
        raise UserError(f"--engine vllm: {model} cannot be loaded ({' '.join(str(error).split())})") from error
    context_limit = llm.llm_engine.model_config.max_model_len
    settings = {name: value for name, value in (arguments or {}).items() if name not in _RESOURCES}
    return Engine(llm, adapter, _read_generation_config(model), context_limit, {"dtype": dtype} | settings)


def _choose_max_rank(folder: Path) -> int:
    """Return the smallest rank that vLLM allocates for an adapter; raise a `UserError` if it cannot run the adapter."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    ranks = [allowed for allowed in _LORA_RANKS if allowed >= rank]
    unknown = [name for name in ("use_dora", "modules_to_save", "target_parameters") if config.get(name)]
    if config.get("peft_type") != "LORA" or unknown or not ranks:
        what = ", ".join(unknown) or f"{config.get('peft_type')} of rank {rank}"
        raise UserError(
            f"{folder}: vLLM cannot run this adapter ({what}); run cutlm merge, and generate with the result"
        )
    return ranks[0]


def _read_generation_config(model: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # it has none
        return None


def generate_with_vllm(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    journal: Journal,
) -> Generated:
    """Generate the responses that a journal does not hold yet; see `generate_with_journal`."""
    from vllm.inputs import TokensPrompt

    generated = Generated.resume(journal)
    prompts = fit_prompts(prompts, find_room_in(engine.context_limit, sampling.max_new_tokens), encoder, generated)
    end_ids = list_end_ids(engine, tokenizer.eos_token_id, encoder.end_of_turn_id)
    reader = AnswerReader(end_ids, end_ids[0], tokenizer, encoder)
    missing = generated.list_missing(len(prompts))
    with journal:
        for start in range(0, len(missing), _NUM_PROMPTS):
            part = missing[start : start + _NUM_PROMPTS]
            outputs = engine.llm.generate(
                [TokensPrompt(prompt_token_ids=prompts[index]) for index in part],
                [_make_sampling_params(sampling, index, end_ids) for index in part],
                lora_request=engine.adapter,
            )
            lines = [
                _read_answer(reader, prompts[index], output, sampling.max_new_tokens).to_line(index)
                for index, output in zip(part, outputs, strict=True)
            ]
            journal.append(lines)
            for line in lines:
                generated.add(line)
    return generated


def _make_sampling_params(sampling: Sampling, index: int, end_ids: Sequence[int]) -> Any:
    """Return vLLM's form of `Sampling`: each prompt has its own random numbers, from the seed and its index."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=(sampling.seed + index) % 2**31,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(end_ids),
        detokenize=False,
    )


def _read_answer(reader: AnswerReader, prompt: Sequence[int], output: Any, max_new_tokens: int) -> Answer:
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length"):
        return Answer("", failure=f"vLLM ended the response with finish_reason {completion.finish_reason}")
    return reader.read(prompt, list(completion.token_ids), max_new_tokens)
