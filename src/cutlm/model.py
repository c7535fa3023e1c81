"""Models: load, quantize, adapt with LoRA, run over a micro-batch, merge.

Training is left to `cutlm.trainer`, generating to `cutlm.generation`.
"""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cutlm.errors import ConfigError, UserError
from cutlm.logprobs import get_head, token_logprobs

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

ADAPTER_CONFIG = "adapter_config.json"


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or a hub.

    Raises:
        UserError: There is none.
    """
    _check_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer can be loaded from it ({_first_line(error)})") from error


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: "BitsAndBytesConfig | None" = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Loads a causal language model from a folder or a hub. Code from a hub is never run.

    Args:
        path: A folder or a hub name.
        revision: Branch, tag or commit on the hub.
        dtype: "auto" for that of the checkpoint, or one by name.
        attn_implementation: As of `transformers`; None lets it choose.
        quantization: 8-bit or 4-bit loading by bitsandbytes.
        device: Where a quantized model goes; None for this process's own.

    Raises:
        UserError: There is none, or bitsandbytes is missing.
    """
    _check_folder(path)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # an adapter names its base model, and may be merged from elsewhere
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "revision": revision or "main",
    }
    if quantization is not None:
        check_bitsandbytes()
        kwargs |= {"quantization_config": quantization, "device_map": {"": device if device is not None else "cpu"}}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: no causal language model can be loaded from it ({_first_line(error)})") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{path}: an adapter, not a whole model; fold it in first: cutlm merge --adapter {path} --out DIR"
        )
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights for good at the first evaluation, into a form through which
        # no gradient flows, and training goes on without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def check_bitsandbytes() -> None:
    """Raises:
    UserError: 8-bit or 4-bit loading was asked for and bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_8bit and load_in_4bit need bitsandbytes; run: pip install 'cutlm[quantization]'")


def _check_folder(path: str | Path) -> None:
    """Says what a local path lacks before `transformers` takes it for the name of a repository on a hub."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{path}: expected a model folder, got a file")
    if folder.is_dir() and not any(folder.glob("*.json")):
        raise UserError(f"{path}: expected a model folder with a config.json, found none in it")
    is_name = not folder.is_absolute() and str(path).count("/") <= 1 and not str(path).startswith(".")
    if not folder.exists() and not is_name:
        raise UserError(f"{path}: no such folder; give a model folder, or a name on the hub such as owner/name")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def check_lora_targets(model: nn.Module, config: "PeftConfig") -> None:
    """Refuses LoRA targets that match nothing, and names the modules that exist.

    Raises:
        ConfigError: As said.
    """
    targets = getattr(config, "target_modules", None)
    if not targets or targets == "all-linear":  # PEFT's own choice
        return
    names = [name for name, module in model.named_modules() if module is not model]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [
            target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if missing:
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ConfigError(
            f"lora_target_modules: no module is named {', '.join(sorted(missing))}; this model's linear layers are"
            f" {', '.join(sorted(linear)) or 'none'}"
        )


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model inside a PEFT model, adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def score_batch(
    model: nn.Module, batch: Mapping[str, Any], chunk_size: int | None = None, *, needs_judged_grad: bool = True
) -> Tensor:
    """Log-probability of every response token of a micro-batch.

    Long sequences run through the body by themselves; short ones in groups of nearly one length, padded on the right,
    where no token of a causal model looks. So next to nothing is computed that is not needed, and what a sequence gets
    does not depend on what else is in the batch. The head sees response positions only.

    Args:
        model: A causal language model, bare or with an adapter.
        batch: As made by `CutCollator`.
        chunk_size: Positions per chunk of the head.
        needs_judged_grad: False where nothing is learned from the context with the judgment, which then costs a
            forward pass only.

    Returns:
        [R] float32, in the order of `batch["target_ids"]`.
    """
    language_model = unwrap_peft(model)
    sequences = batch["input_ids"].split(batch["sequence_lengths"])
    num_judged = batch.get("num_unsatisfactory", 0)
    judged = range(num_judged, 2 * num_judged)
    others = [index for index in range(len(sequences)) if index not in judged]
    limit = _GROUP_TOKENS["cuda" if batch["input_ids"].device.type == "cuda" else "cpu"]
    hidden: list[Tensor] = [batch["input_ids"]] * len(sequences)
    passes = [([*others, *judged], True)] if needs_judged_grad else [(others, True), ([*judged], False)]
    for indices, needs_grad in passes:
        with torch.set_grad_enabled(needs_grad and torch.is_grad_enabled()):
            for group in _group_by_length(indices, batch["sequence_lengths"], limit):
                ids = nn.utils.rnn.pad_sequence([sequences[index] for index in group], batch_first=True)
                states = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                for row, index in enumerate(group):
                    length = batch["sequence_lengths"][index]
                    hidden[index] = states[row, length - batch["response_lengths"][index] : length]
    head = get_head(language_model)
    return token_logprobs(
        torch.cat(hidden),
        head.weight,
        batch["target_ids"],
        chunk_size,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )


# Tokens that are enough to keep the device busy: a longer sequence gains nothing from company.
_GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}
_MAX_PADDING = 1 / 8


def _group_by_length(indices: Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Groups sequences, longest first, so that a group's padded tokens stay within `limit` and are few."""
    group: list[int] = []
    num_tokens = 0
    for index in sorted(indices, key=lambda index: -lengths[index]):
        if group:
            size = (len(group) + 1) * lengths[group[0]]
            if size > limit or size > (1 + _MAX_PADDING) * (num_tokens + lengths[index]):
                yield group
                group, num_tokens = [], 0
        group.append(index)
        num_tokens += lengths[index]
    if group:
        yield group


def run_inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(module, *args)` inside the forward pass of what wraps the module.

    DistributedDataParallel and FSDP prepare parameters and gradients only around their own forward; this lends it
    to a computation that is not the module's forward.

    Args:
        wrapper: The wrapped module, or the module itself.
        module: The module inside.
        function: What to call.
        *args: Its further arguments.
    """
    if wrapper is module:
        return function(module, *args)
    had_own_forward = "forward" in module.__dict__
    forward = module.forward

    def restore() -> None:
        if had_own_forward:
            module.forward = forward
        else:
            module.__dict__.pop("forward", None)

    def call(*inner_args: Any) -> Any:
        restore()
        return function(module, *inner_args)

    module.forward = call
    try:
        return wrapper(*args)
    finally:
        restore()


def check_head(model: nn.Module) -> None:
    """Compares our log-probs of a few tokens with the model's own logits.

    A model that does something to its logits which `get_head` does not know would otherwise be trained on wrong
    probabilities without a word.

    Raises:
        UserError: They differ.
    """
    language_model = unwrap_peft(model)
    device = language_model.device
    if device.type == "meta" or any(hasattr(weight, "ds_id") for weight in language_model.parameters()):
        return  # its weights are on other processes, or nowhere yet
    num_tokens = min(8, language_model.config.get_text_config().vocab_size)
    ids = torch.arange(num_tokens, device=device)
    batch = {
        "input_ids": ids[:-1],
        "target_ids": ids[1:],
        "sequence_lengths": [num_tokens - 1],
        "response_lengths": [num_tokens - 1],
    }
    was_training = language_model.training
    language_model.eval()
    try:
        with torch.no_grad():
            ours = score_batch(language_model, batch)
            logits = language_model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    finally:
        language_model.train(was_training)
    theirs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.1
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance and torch.isfinite(theirs).all():
        raise UserError(
            f"{type(language_model).__name__}: log-probs from the head's weight differ from the model's own logits by"
            f" {difference:.3g} (at most {tolerance} expected); the model treats its logits in a way that cutlm does"
            " not know"
        )


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def find_base_model(adapter: str | Path, base: str | None = None) -> str:
    """The base model of an adapter folder: the one given, or else the one that the folder names.

    Raises:
        UserError: The folder is missing, is no adapter, or names no base model or one that is gone.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        raise UserError(f"{adapter}: no such folder; give the output_dir of a training with use_peft")
    if not is_adapter_folder(folder):
        what = "a whole model: nothing to merge" if (folder / "config.json").is_file() else "no adapter"
        raise UserError(f"{adapter}: expected an adapter folder with {ADAPTER_CONFIG}, this one holds {what}")
    if base is not None:
        return base
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise UserError(f"{folder / ADAPTER_CONFIG}: not a JSON object; train again or restore the file") from None
    if not base or not isinstance(base, str):
        raise UserError(f"{folder / ADAPTER_CONFIG}: names no base model; give it by --base")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{folder / ADAPTER_CONFIG}: its base model {base} does not exist; give it by --base")
    return base


def load_adapter(model: PreTrainedModel, path: str | Path) -> nn.Module:
    """Puts an adapter on its base model.

    Raises:
        UserError: It does not fit, or its file is damaged or lacks weights.
    """
    from peft import PeftModel, get_peft_model_state_dict

    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{path}: expected {file.name} beside its {ADAPTER_CONFIG}, found none; train again or restore it"
        )
    try:
        with safe_open(file, "pt") as weights:
            stored = set(weights.keys())
        adapted = PeftModel.from_pretrained(model, str(path))
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: the adapter does not fit its base model {model.name_or_path} ({error})") from error
    # Of LoRA alone: other kinds save what they can make again.
    differing = sorted(name for name in stored ^ set(get_peft_model_state_dict(adapted)) if "lora_" in name)
    if differing:
        raise UserError(
            f"{file}: {len(differing)} weights are missing or unknown, the first is {differing[0]}; train again or"
            " restore the file"
        )
    return adapted


def load_own_tokenizer(path: str | Path, base: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside a model or adapter, or else its base model's."""
    if base is not None and not (Path(path) / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    return load_tokenizer(path)


def load_trained(
    path: str | Path, *, dtype: str | torch.dtype = "auto", base: str | None = None, device: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads a model to be used: a whole one, or an adapter on its base.

    Returns:
        The model in evaluation mode, and the tokenizer it was trained with.
    """
    model: nn.Module
    if is_adapter_folder(path):
        base = find_base_model(path, base)
        model = load_adapter(load_model(base, dtype=dtype), path)
    else:
        model = load_model(path, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        nn.Module.to(model, device)  # a PEFT model and a whole one alike
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not to be had here ({_first_line(error)})") from error
    return model.eval(), load_own_tokenizer(path, base)


def count_parameters(model: nn.Module) -> Counter[str]:
    """Counts parameters as "trained" and "all"."""
    counts = Counter({"trained": 0, "all": 0})
    for parameter in model.parameters():
        counts["all"] += parameter.numel()
        counts["trained"] += parameter.numel() if parameter.requires_grad else 0
    return counts
