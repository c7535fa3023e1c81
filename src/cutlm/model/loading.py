"""Models: load, quantize, adapt with LoRA, compile.

Running them over a micro-batch is left to `cutlm.model.forward`, training to `cutlm.training.trainer`, generating to
`cutlm.generation.local`.
"""

import hashlib
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

ADAPTER_CONFIG = "adapter_config.json"
# A compiled layer is made anew for one row or several, with a mask or none, gradients or none, dropout or none, and for
# an input that needs a gradient or not; torch gives up compiling after 8.
_MOST_COMPILED = 32


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or a hub.

    Raises:
        UserError: There is none.
    """
    _check_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except Exception as error:  # a damaged file may break a library anywhere
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
        UserError: There is none, weights of it are missing, it has an encoder, or bitsandbytes is missing.
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
        if _has_encoder(path, revision or "main"):
            raise UserError(f"{path}: expected a causal language model, got one with an encoder, which would be lost")
        # Of another shape is told of below, with what is missing.
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **asked, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a damaged file may break a library anywhere
        raise UserError(f"{path}: no causal language model can be loaded from it ({_first_line(error)})") from error
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{path}: an adapter, not a whole model; fold it in first: cutlm merge --adapter {path} --out DIR"
        )
    absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if absent:
        # They would be drawn at random.
        raise UserError(
            f"{path}: expected every weight of {type(model).__name__}; {len(absent)} are missing or of another shape,"
            f" the first {absent[0]}: this is another kind of model, or damaged"
        )
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights for good at the first evaluation, into a form through which
        # no gradient flows, and training goes on without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _has_encoder(path: str | Path, revision: str) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(path, revision=revision).is_encoder_decoder)
    except Exception:  # an adapter has no config; what else is wrong is said where the model is loaded
        return False


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
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def check_lora_targets(model: nn.Module, config: "PeftConfig") -> None:
    """Refuses LoRA targets that match nothing, and names the modules that exist; and an embedding that is the head too.

    Raises:
        ConfigError: As said.
    """
    targets = getattr(config, "target_modules", None)
    if not targets or targets == "all-linear":  # PEFT's own choice
        return
    modules = {name: module for name, module in model.named_modules() if module is not model}
    found: dict[str, list[str]] = {}  # by target, the modules that it matches
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        if isinstance(targets, str):
            found[target] = [name for name in modules if re.fullmatch(target, name)]
        else:
            found[target] = [name for name in modules if name == target or name.endswith(f".{target}")]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    missing = [target for target, names in found.items() if not names]
    if missing:
        linear = {
            name.rpartition(".")[2]
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
        raise ConfigError(
            f"lora_target_modules: no module is named {', '.join(missing)}; this model's linear layers are"
            f" {', '.join(sorted(linear)) or 'none'}"
        )
    for target, names in found.items():
        if any(modules[name] is embedding for name in names) and head is not None and head.weight is embedding.weight:
            raise ConfigError(
                f"lora_target_modules: {target} is the model's head too, with which LoRA on it could not be merged;"
                " leave it out, or train it whole by lora_modules_to_save"
            )


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model inside a PEFT model, adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def compile_layers(model: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """Compiles each decoder layer in place, for sequences of any length.

    Layers run from whichever forward pass they are called; the model's own, which the Trainer would compile, is not
    run by `cutlm.model.forward`. They are compiled when they first run, once for all of them.

    Args:
        model: A causal language model, bare or with an adapter.
        backend: As of `torch.compile`; None for its default.
        mode: Likewise.

    Raises:
        ConfigError: The model does not say which of its modules are layers.
    """
    language_model = unwrap_peft(model)
    names = set(language_model._no_split_modules or ())
    layers = [module for module in language_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"torch_compile: {type(language_model).__name__} does not say which of its modules are layers"
            " (_no_split_modules); train it without"
        )
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_COMPILED)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend or "inductor", mode=mode)


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


def list_rope_parameters(config: Any) -> list[dict[str, Any]]:
    """How a text model turns its positions by angles, for all its layers or for each kind of them."""
    known = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in known.values() if isinstance(value, dict) and "rope_type" in value]
    return by_kind or [known]


def count_parameters(model: nn.Module) -> Counter[str]:
    """Counts parameters as "trained" and "all"."""
    counts = Counter({"trained": 0, "all": 0})
    for parameter in model.parameters():
        counts["all"] += parameter.numel()
        counts["trained"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def fingerprint_model(path: str | Path) -> str:
    """Names the state of a model: its place and, for a folder, the sizes and times of its weight files."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors"))
    return f"{folder.resolve()} {hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"
