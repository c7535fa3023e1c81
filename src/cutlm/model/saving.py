"""Files of a saved model: a generation config that can be saved, and a record of the trained model's outputs.

The record is a probe: a few token ids and their log-probabilities. `cutlm merge` compares it with the merged model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from cutlm.data.files import write_text
from cutlm.errors import ConfigError, UserError

PROBE_FILE = "cutlm_probe.json"
_NUM_PROBE_TOKENS = 32


# ---- Generation configs ----


def repair_generation_config(model: Any) -> list[str]:
    """Give a model a generation config that transformers saves, if it has one that transformers refuses.

    Many published models have a temperature without `do_sample: true`. Sampling is then turned on, for which the other
    values were meant; fields that are still not valid are left out.

    Returns:
        The names of the fields that were left out.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return []
    kept: dict[str, Any] = {"do_sample": True}
    left_out = []
    for name, value in config.to_diff_dict().items():
        if name == "do_sample":
            continue
        if _is_valid(GenerationConfig.from_dict(kept | {name: value})):
            kept[name] = value
        else:
            left_out.append(name)
    unchanged = GenerationConfig.from_dict(kept | {"do_sample": config.do_sample})
    model.generation_config = unchanged if _is_valid(unchanged) else GenerationConfig.from_dict(kept)
    return left_out


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


# ---- The probe ----


@dataclass(frozen=True)
class Probe:
    """Log-probabilities of a trained model on a few tokens."""

    token_ids: list[int]
    logprobs: list[float]  # of each token but the first, given those before it
    dtype: str  # in which they were computed, such as "bfloat16"
    quantization: str | None  # of the base model during training, such as "4-bit"


def choose_probe_ids(model: Any) -> Tensor:
    """Draw the same random token ids for every model with a vocabulary of this size, as [1, T]."""
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (1, _NUM_PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the logits of a batch of token ids, in the dtype in which the model computes."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.cpu()


def select_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """[1, T, V] logits of [1, T] token ids -> [T - 1] log-probabilities of each token given those before it."""
    logprobs = logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)


def make_probe(model: Any, logits: Tensor, ids: Tensor) -> Probe:
    """Make the probe of a model from its logits."""
    is_4bit, is_8bit = (getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    quantization = "4-bit" if is_4bit else "8-bit" if is_8bit else None
    dtype = str(logits.dtype).removeprefix("torch.")
    return Probe(ids[0].tolist(), select_logprobs(logits, ids).tolist(), dtype, quantization)


def write_probe(folder: str | Path, probe: Probe) -> None:
    """Write a probe next to the adapter in a folder."""
    write_text(Path(folder) / PROBE_FILE, json.dumps(asdict(probe)))


def read_probe(folder: str | Path) -> Probe | None:
    """Read the probe of an adapter; None if it has none, as with adapters that other tools trained."""
    path = Path(folder) / PROBE_FILE
    if not path.is_file():
        return None
    try:
        probe = Probe(**json.loads(path.read_text("utf-8")))
        torch.tensor([probe.token_ids, [0.0, *probe.logprobs]], dtype=torch.float64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; restore it, or remove it to merge without comparing with it") from None
    return probe


# ---- Adapters whose initialization changes the base model ----


def changes_base(config: Any) -> bool:
    """Whether the initialization of an adapter changes the weights of its base model."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva", "mica", "true", "false")


def check_base_change(config: Any, *, is_new: bool, is_sharded: bool) -> None:
    """Raise a `ConfigError` if the changes of an initialization to the base model would not be saved.

    Args:
        config: The config of an adapter whose initialization changes the base model.
        is_new: Whether the adapter is yet to be added to the unchanged base model.
        is_sharded: Whether the weights are spread over processes.
    """
    init = str(config.init_lora_weights)
    can_convert = init.lower().startswith("pissa") or init.lower() == "olora"
    if can_convert and is_new and not is_sharded:
        return
    where = " in a model that is sharded over processes" if is_sharded else ""
    how = "" if is_new else "; pass the unchanged base model and a peft_config"
    raise ConfigError(
        f"init_lora_weights: {init} changes the base model, which is not saved with the adapter{where}; expected true,"
        f" gaussian, orthogonal, or (for a new adapter in a model that is not sharded) pissa or olora{how}"
    )


def convert_to_plain_lora(folder: str | Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite a saved adapter so that it belongs to the unchanged base model, at twice the rank.

    PiSSA and OLoRA subtract their first weights from the base model: W - s B0 A0. After training the weight is
    W + s (B A - B0 A0), which is a LoRA with [A; A0] and [B, -B0].

    Args:
        folder: The folder of the adapter.
        initial: The first weights, by the names in the adapter's file.
    """
    path, config_path = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
    weights = load_file(path)
    for name, first in initial.items():
        value = weights[name]
        first = first.to(value.dtype)
        weights[name] = torch.cat([value, first], 0) if ".lora_A." in name else torch.cat([value, -first], 1)
    config = json.loads(config_path.read_text("utf-8"))
    # The scaling is alpha / r, or alpha / sqrt(r) with rslora.
    factor = 2**0.5 if config.get("use_rslora") else 2
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
    for pattern, scale in (("rank_pattern", 2), ("alpha_pattern", factor)):
        config[pattern] = {name: scale * value for name, value in (config.get(pattern) or {}).items()}
    save_file(weights, path, metadata={"format": "pt"})
    write_text(config_path, json.dumps(config, indent=2))


def collect_initial_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a new adapter to the CPU, by the names in the adapter's file."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model)
    return {
        name: weight.detach().cpu().clone()
        for name, weight in weights.items()
        if ".lora_A." in name or ".lora_B." in name
    }
