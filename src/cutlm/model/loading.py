"""Load models, tokenizers and adapters, check LoRA targets, and compile layers."""

import hashlib
import importlib.util
import inspect
import json
import logging
import pickle
import platform
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import GgufConfig

from cutlm.data.formats import describe_stand_in
from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
# A layer is compiled again for one row or several, with or without mask, dropout, gradients and gradients of its input.
# After 8 versions, torch's default, it would run uncompiled.
_MAX_COMPILED_VERSIONS = 32
# Fields whose type transformers takes for granted, so that another one ends in a TypeError.
_FIELD_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "config.json": {
        **dict.fromkeys(("model_type", "dtype", "torch_dtype"), (str,)),
        **dict.fromkeys(("quantization_config", "text_config", "auto_map", "id2label"), (dict,)),
    },
    "tokenizer_config.json": {
        "tokenizer_class": (str,),
        "auto_map": (dict, list),
        "added_tokens_decoder": (dict,),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict)),
    },
}
# Exceptions that the libraries raise for missing, damaged or unknown files.
_FILE_ERRORS = (
    OSError,  # transformers and huggingface_hub: a missing file, a config that is not JSON, no network
    ValueError,  # transformers: an unknown architecture; json: a damaged tokenizer_config.json
    ImportError,  # a model or tokenizer that needs a package which is not installed
    StrictDataclassError,  # a value of the wrong type in config.json
    SafetensorError,  # a truncated or damaged file of weights
    LookupError,  # transformers: an unknown activation in config.json, an entry missing from tokenizer.json
    ArithmeticError,  # transformers: a size of 0 in config.json
    RuntimeError,  # torch: sizes in config.json that do not fit each other; a damaged .bin file
    EOFError,  # torch: an empty .bin file
    pickle.UnpicklingError,  # torch: a .bin file with other content
    struct.error,  # transformers: a truncated GGUF file
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# One of several files of a model, such as model-00001-of-00002.gguf.
_GGUF_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", re.IGNORECASE)


@contextmanager
def _reading_files(path: str | Path, kind: str) -> Iterator[None]:
    """Turn a library's exception about the files of a model into a `UserError`; wrap library calls only."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # The tokenizers library raises plain `Exception` for a damaged tokenizer.json.
        if isinstance(error, UserError) or not (isinstance(error, _FILE_ERRORS) or type(error) is Exception):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: its {kind} needs Python code that comes with it, which cutlm never runs; expected a kind that"
                " transformers knows"
            ) from error
        raise UserError(f"{path}: cannot load a {kind} from it ({_first_line(error)})") from error


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a GGUF file or the hub; raise `UserError` if it is missing or damaged."""
    _check_path(path)
    with _reading_files(path, "tokenizer"):
        source, gguf = _split_gguf(path)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False, **gguf)
    tokenizer.init_kwargs.pop("gguf_file", None)
    # transformers reads `legacy` and does not save it, and the saved tokenizer would tokenize the start of a text, and
    # text after a special token, otherwise.
    if getattr(tokenizer, "legacy", None) is not None:
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    # It would be saved with the tokenizer, and other tools would ask to run code that is not saved.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Check that a tokenizer that was saved to a folder tokenizes and prompts as before.

    Raises:
        UserError: It does not, so that a trained model would be prompted otherwise than in training.
    """
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    probe = "Name a colour.\n\n  Just one: x_1 = 'é', 12 🙂"
    special = f"{probe}{tokenizer.eos_token or ''}{probe}"
    options: list[dict[str, Any]] = [{}, {"add_special_tokens": False}, {"split_special_tokens": True}]
    is_same = all(tokenizer(special, **each)["input_ids"] == saved(special, **each)["input_ids"] for each in options)
    if is_same and tokenizer.chat_template:
        messages = [{"role": "user", "content": probe}]
        prompts = [
            each.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for each in (tokenizer, saved)
        ]
        is_same = prompts[0] == prompts[1]
    if not is_same:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} tokenizes otherwise once it is saved and loaded, so the trained"
            " model would be prompted otherwise than in training; save it with a current version of transformers"
        )


def load_config(path: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model config from a folder, a file or the hub; raise `UserError` if it is missing or damaged."""
    if not Path(path).is_file() or find_gguf(path):
        _check_path(path)
    with _reading_files(path, "model config"):
        source, gguf = _split_gguf(path)
        return AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision or "main", **gguf)


def has_fast_math(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices in a 16-bit dtype at least about as fast as in float32.

    CPUs without such units convert every operand, and are 8 to 10 times slower than in float32.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # oneDNN multiplies the matrices. A build of torch without it, as for macOS, has only slow kernels. All of these
    # functions are private to torch, so they may be missing.
    if not _ask(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported"):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # On x86, oneDNN also counts AVX-512 without 16-bit units, on which it is 5 times slower.
    has_units = _ask(torch.cpu, "_is_amx_tile_supported") or _ask(torch.cpu, "_is_avx512_bf16_supported")
    return has_units and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _ask(module: Any, name: str) -> bool:
    """The answer of a function of a module; False if this version of torch lacks the function."""
    try:
        return bool(getattr(module, name)())
    except AttributeError:
        return False


def choose_dtype(stored: torch.dtype, device: str | torch.device | None = None) -> torch.dtype:
    """Choose the dtype to compute in: the stored one, or float32 on a CPU that is faster in it.

    The first choice of float32 in a process is logged.

    Args:
        stored: The dtype of the checkpoint.
        device: Where the model will run; None for the CPU.
    """
    is_cpu = device is None or torch.device(device).type == "cpu"
    if not is_cpu or stored not in (torch.bfloat16, torch.float16) or has_fast_math(stored):
        return stored
    _say_float32()
    return torch.float32


@cache  # once per process
def _say_float32() -> None:
    logger.warning(
        "This CPU computes several times slower in bfloat16 and float16 than in float32, so models stored in these are"
        " loaded in float32, which takes twice the memory; set dtype to keep them."
    )


@cache
def warn_of_slow_autocast() -> None:
    """Say once per process if this CPU is slow under bfloat16 autocast."""
    if not has_fast_math(torch.bfloat16):
        logger.warning("bf16: this CPU computes bfloat16 several times slower than float32; leave bf16 out.")


def read_stored_dtypes(path: str | Path, *, revision: str | None = None) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """Read the dtype of a checkpoint, and of each of its weights and stored buffers, without loading them.

    Weights of a GGUF file count as float32, in which they are dequantized.
    """
    if find_gguf(path):
        return torch.float32, {}
    with _reading_files(path, "causal language model"):
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision or "main", dtype="auto", device_map="meta", trust_remote_code=False
        )
    return model.dtype, {name: value.dtype for name, value in model.state_dict().items()}


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: "BitsAndBytesConfig | None" = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a folder, a GGUF file or the hub. Code from the hub is never run.

    Args:
        path: A folder, a GGUF file (or a folder with one and no other weights), which is dequantized, or a name on the
            hub.
        revision: A branch, tag or commit on the hub.
        dtype: A dtype or its name; "auto" for the checkpoint's, or float32 on a CPU that is faster in it.
        attn_implementation: See `transformers`.
        quantization: Loads 8-bit or 4-bit weights.
        device: Where the model will run, None for the CPU. Only quantized weights are loaded there; others are on the
            CPU afterwards.

    Raises:
        UserError: The model does not exist, is damaged, lacks weights or has an encoder, or bitsandbytes is missing.

    Example:

        >>> model = load_model("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
    """
    _check_path(path)
    if is_adapter_folder(path):
        raise UserError(f"{path}: expected a model, got an adapter; first run: cutlm merge --adapter {path} --out DIR")
    if Path(path).exists():
        path = str(Path(path).resolve())  # adapters record this path of their base model
    folder, gguf = _split_gguf(path)
    source = {"revision": revision or "main", "trust_remote_code": False, **gguf}
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        if gguf:
            raise UserError(
                f"{path}: load_in_8bit and load_in_4bit cannot be used with a GGUF file; remove the setting"
            )
        check_bitsandbytes()
        kwargs |= {"quantization_config": quantization, "device_map": {"": device if device is not None else "cpu"}}
    with _reading_files(path, "causal language model"):
        config = AutoConfig.from_pretrained(folder, **source)
        if config.is_encoder_decoder:
            raise UserError(f"{path}: expected a causal language model, got one with an encoder, which would be lost")
        if gguf:
            kwargs |= {"quantization_config": GgufConfig(dequantize=True)}
            kwargs["dtype"] = torch.float32 if dtype == "auto" else dtype
        elif dtype == "auto" and quantization is None and getattr(config, "quantization_config", None) is None:
            stored = config.dtype or read_stored_dtypes(path, revision=revision)[0]
            kwargs["dtype"] = choose_dtype(stored, device)
        # Weights of another shape are reported below, together with the missing ones.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **source, **kwargs
        )
    model, info = loaded
    if gguf:
        # It is a plain model now, which can be trained and saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.name_or_path = model.name_or_path = str(path)
    if hasattr(model.config, "auto_map"):  # likewise
        del model.config.auto_map
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if missing:
        # transformers would initialize them at random.
        raise UserError(
            f"{path}: expected every weight of {type(model).__name__}, but {len(missing)} are missing or have another"
            f" shape, the first {missing[0]}; the model is of another kind or damaged"
        )
    for module in model.modules():
        # Otherwise, on CPUs with AVX-512, bitsandbytes repacks 4-bit weights at the first evaluation into a form that
        # passes no gradients, and later training would silently learn nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def find_gguf(path: str | Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only weights in a folder; None for other paths.

    Raises:
        UserError: The folder has several GGUF files and no other weights.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix.lower() == ".gguf" else None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not found or is_adapter_folder(path) or any(file for pattern in _WEIGHT_PATTERNS for file in path.glob(pattern)):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path}: expected one GGUF file, got {len(found)} ({names}); pass the path of one of them")
    return found[0]


def _split_gguf(path: str | Path) -> tuple[str, dict[str, str]]:
    """Split the path of a GGUF file into its folder and the argument of transformers that names it."""
    file = find_gguf(path)
    return (str(path), {}) if file is None else (str(file.parent), {"gguf_file": file.name})


def _check_gguf(file: Path) -> None:
    """Raises a `UserError` if transformers could not read a GGUF file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with file.open("rb") as opened:
        start = opened.read(1000)
    if not start.startswith(b"GGUF"):
        raise UserError(f"{file}: expected a GGUF file, got {describe_stand_in(start) or 'other content'}")
    if _GGUF_PART.search(file.name):
        raise UserError(f"{file}: expected a whole model, got one part of it; merge the parts with llama-gguf-split")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file}: reading a GGUF file needs the package gguf; run: pip install 'cutlm[gguf]'")


def check_bitsandbytes() -> None:
    """Raises a `UserError` if bitsandbytes, which 8-bit and 4-bit loading needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_8bit and load_in_4bit need bitsandbytes; run: pip install 'cutlm[quantization]'")


def _check_path(path: str | Path) -> None:
    """Check a local path, because `transformers` takes a missing folder for a name on the hub."""
    folder = Path(path)
    if gguf := find_gguf(path):
        _check_gguf(gguf)
        return
    if folder.is_file():
        raise UserError(f"{path}: expected a model folder or a GGUF file, got another file")
    if folder.is_dir() and not any(folder.glob("*.json")):
        raise UserError(f"{path}: expected a model folder, found no config.json in it")
    is_hub_name = not folder.is_absolute() and str(path).count("/") <= 1 and not str(path).startswith(".")
    if not folder.exists() and not is_hub_name:
        raise UserError(f"{path}: no such folder; pass a model folder or a name on the hub such as owner/name")
    _refuse_stand_ins(folder)
    for file in (folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        if file.is_file() and not file.read_bytes().lstrip().startswith(b"{"):
            raise UserError(f"{file}: expected a JSON object; restore the file")
    _check_field_types(folder)


def _check_field_types(folder: Path) -> None:
    """Raises a `UserError` for fields of another type than transformers takes for granted."""
    for name, types in _FIELD_TYPES.items():
        try:
            values = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue  # none, or damaged, which is reported when it is loaded
        for field, expected in types.items():
            if values.get(field) is not None and not isinstance(values[field], expected):
                names: dict[type, str] = {str: "text", dict: "an object", list: "a list"}
                kinds = " or ".join(names[kind] for kind in expected)
                got = json.dumps(values[field])[:80]
                raise UserError(f"{folder / name}: {field}: expected {kinds}, got {got}; restore the file")


def _refuse_stand_ins(folder: Path) -> None:
    """Raises a `UserError` for files of which only a Git LFS pointer or a web page was downloaded."""
    for pattern in ("*.safetensors", "*.json", "*.bin", "*.model"):
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                stand_in = describe_stand_in(file.read(1000))
            if stand_in:
                raise UserError(f"{path}: expected a file of a model, got {stand_in}")


def _first_line(error: Exception) -> str:
    """The first line of an error message, and the second if the first only introduces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")


def check_lora_targets(model: nn.Module, config: "PeftConfig") -> None:
    """Raises a `ConfigError` if a LoRA target matches no module, or an embedding tied to the head."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == "all-linear":  # PEFT chooses
        return
    modules = {name: module for name, module in model.named_modules() if module is not model}
    if isinstance(targets, str):
        matches = {targets: [name for name in modules if re.fullmatch(targets, name)]}
    else:
        matches = {end: [name for name in modules if f".{name}".endswith(f".{end}")] for end in sorted(targets)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if unmatched := [target for target, names in matches.items() if not names]:
        linear = {
            name.rpartition(".")[2]
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
        raise ConfigError(
            f"lora_target_modules: no module is named {', '.join(unmatched)}; this model's linear layers are"
            f" {', '.join(sorted(linear)) or 'none'}"
        )
    for target, names in matches.items():
        if any(modules[name] is embedding for name in names) and head is not None and head.weight is embedding.weight:
            raise ConfigError(
                f"lora_target_modules: {target} is tied to the model's head, so a LoRA on it cannot be merged; remove"
                " it, or train it in full with lora_modules_to_save"
            )


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model inside a PEFT model, with its adapter layers; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def compile_layers(model: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """Compile every decoder layer in place, for sequences of any length; see `torch.compile`.

    `score_batch` calls the layers without the model's own forward pass, which the Trainer would compile. Layers are
    compiled when they first run; all layers of a class share one compilation.
    """
    layers = find_layers(model)
    if not layers:
        raise ConfigError(
            f"torch_compile: {type(unwrap_peft(model)).__name__} does not declare its layers (_no_split_modules); set"
            " torch_compile: false"
        )
    # An older torch has no such option, and runs further versions of a layer uncompiled.
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": _MAX_COMPILED_VERSIONS} if has_limit else {}
    for layer in layers:
        layer.compile(dynamic=True, backend=backend or "inductor", mode=mode, **limit)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model, if it declares their class; otherwise none."""
    language_model = unwrap_peft(model)
    names = set(language_model._no_split_modules or ())
    return [module for module in language_model.modules() if type(module).__name__ in names]


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / _ADAPTER_CONFIG).is_file()


def find_base_model(adapter: str | Path, base: str | None = None) -> str:
    """Return `base`, or by default the base model that the config of an adapter folder names, which must exist."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise UserError(f"{adapter}: no such folder; pass the output_dir of a training run with use_peft: true")
    config = folder / _ADAPTER_CONFIG
    if not config.is_file():
        got = "a full model, which needs no merging" if (folder / "config.json").is_file() else "no adapter"
        raise UserError(f"{adapter}: expected an adapter with {_ADAPTER_CONFIG}, got {got}")
    if base is not None:
        return base
    try:
        base = json.loads(config.read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise UserError(f"{config}: expected a JSON object; restore the file or train again") from None
    if not base or not isinstance(base, str):
        raise UserError(f"{config}: expected base_model_name_or_path, found none; pass --base")
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(f"{config}: its base model {base} does not exist; pass --base")
    return base


def load_adapter(model: PreTrainedModel, path: str | Path) -> nn.Module:
    """Load an adapter onto its base model; raise `UserError` if it does not fit, is damaged or lacks weights."""
    from peft import PeftModel, get_peft_model_state_dict

    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: no such file next to {_ADAPTER_CONFIG}; restore it or train again")
    _refuse_stand_ins(Path(path))
    try:
        with safe_open(file, "pt") as weights:
            stored = set(weights.keys())
        adapted = PeftModel.from_pretrained(model, str(path))
    except torch.OutOfMemoryError:
        raise
    # PEFT: a KeyError or TypeError for unknown entries of the config, a ValueError for target modules that the model
    # lacks; torch: a RuntimeError for weights of another shape.
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: the adapter does not fit its base model {model.name_or_path} ({error})") from error
    # LoRA only: other kinds of adapters do not save weights that they can recompute.
    differing = sorted(name for name in stored ^ set(get_peft_model_state_dict(adapted)) if "lora_" in name)
    if differing:
        raise UserError(
            f"{file}: {len(differing)} LoRA weights are missing or unknown, the first {differing[0]}; restore the file"
            " or train again"
        )
    return adapted


def load_own_tokenizer(path: str | Path, base: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model or adapter, or else its base model's."""
    return load_tokenizer(path if base is None or (Path(path) / "tokenizer_config.json").is_file() else base)


def load_trained(
    path: str | Path, *, dtype: str | torch.dtype = "auto", base: str | None = None, device: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model, or an adapter on its base model, for inference, with the tokenizer it was trained with.

    A `base` of None is the one that the adapter names; a `device` of None is a GPU if there is one.

    Raises:
        UserError: The model cannot be loaded, or the device is not available.
    """
    model: nn.Module
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _using_device(device):
        torch.zeros(1).to(device)  # before the model is loaded, which takes long
    if is_adapter_folder(path):
        base = find_base_model(path, base)
        model = load_adapter(load_model(base, dtype=dtype, device=device), path)
    else:
        model = load_model(path, dtype=dtype, device=device)
    with _using_device(device):
        nn.Module.to(model, device)  # the same for a PEFT model and others
    return model.eval(), load_own_tokenizer(path, base)


@contextmanager
def _using_device(device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # torch: an unknown device, one it is not built for, or one that lacks a dtype, as MPS lacks float64
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--device {device}: not available ({_first_line(error)})") from error


def list_rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a text config: one dict for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]
    return by_layer_type or [parameters]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters as "trained" and "all"."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return {"trained": sum(size for size, is_trained in sizes if is_trained), "all": sum(size for size, _ in sizes)}


def fingerprint_model(path: str | Path) -> str:
    """Identify the state of a model: its path, and if it is local a hash of the sizes and times of its weight files."""
    folder = Path(path)
    if not folder.exists():
        return str(path)
    files = [file] if (file := find_gguf(path)) else folder.glob("*.safetensors")
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return f"{folder.resolve()} {hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"
