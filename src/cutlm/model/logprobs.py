"""Compute token log-probabilities from hidden states without holding the full logits.

The head (the output embedding) is applied to one chunk of positions at a time. With a frozen head, as under LoRA, the
gradient of the hidden states is computed in the forward pass from the chunk's logits and only scaled in the backward
pass: two matrix products in all. With a trained head, the backward pass recomputes each chunk's logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cutlm.errors import ConfigError

# Larger chunks are hardly faster (benchmarks/head.py).
_MAX_CHUNK_SIZE = 512
_MAX_LOGITS = 2**26  # 256 MiB of float32


@dataclass(frozen=True)
class Head:
    """The last step of a causal language model: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H], as in `nn.Linear`.
        bias: [V], or None.
        softcap: c of Gemma's soft-capping, c * tanh(logits / c); None for no capping.
        scale: A factor on the logits, before the capping.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


def choose_chunk_size(vocab_size: int) -> int:
    """Number of positions per chunk: 512, or as many as have at most 256 MiB of float32 logits, but at least 16."""
    return min(_MAX_CHUNK_SIZE, max(16, _MAX_LOGITS // vocab_size))


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Log-probability of each target token, from the hidden state at the position before it.

    The matrix products run in the dtype of the head (under autocast, in its dtype), everything else in float32.

    Args:
        hidden: [N, H], the last hidden states at the positions to score.
        head_weight: [V, H]; gets a gradient only if it requires one.
        target_ids: [N], integer token ids.
        chunk_size: Positions per chunk; None for `choose_chunk_size`.
        bias: [V] or None.
        softcap: c of c * tanh(logits / c), or None.
        scale: A factor on the logits, before the capping.

    Returns:
        [N] float32, in nats.

    Raises:
        ValueError: The shapes do not match.

    Example:

        >>> token_logprobs(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 5]))  # uniform: -log 8
        tensor([-2.0794, -2.0794])
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"expected hidden [N, H] and head_weight [V, H], got {hidden.shape} and {head_weight.shape}")
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one target for each of {hidden.shape[0]} positions, got {tuple(target_ids.shape)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    elif hidden.dtype != head_weight.dtype:
        hidden = hidden.to(head_weight.dtype)
    size = chunk_size or choose_chunk_size(head_weight.shape[0])
    with torch.autocast(device, enabled=False):
        return _TokenLogprobs.apply(hidden, head_weight, bias, target_ids, size, softcap, scale)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        chunk_size: int,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        is_head_frozen = needs_hidden and not needs_weight and not needs_bias
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if is_head_frozen else None
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            logps[part], raw, total = _score_chunk(hidden[part], weight, bias, target_ids[part], softcap, scale)
            if slopes is not None:
                slopes[part] = (raw.to(weight.dtype) @ weight) * (-1.0 / total)[:, None]
            del raw  # frees it before the next chunk
        ctx.settings = (chunk_size, softcap, scale)
        ctx.is_head_frozen = is_head_frozen
        ctx.save_for_backward(*((slopes,) if is_head_frozen else (hidden, weight, bias, target_ids)))
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        chunk_size, softcap, scale = ctx.settings
        if ctx.is_head_frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None, None, None
        hidden, weight, bias, target_ids = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed in float32, because bfloat16 rounding errors of the chunks would add up.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            _, raw, total = _score_chunk(hidden[part], weight, bias, target_ids[part], softcap, scale)
            raw *= (-grad[part] / total)[:, None]
            if grad_bias is not None:
                grad_bias += raw.sum(0)
            raw = raw.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = raw @ weight
            if grad_weight is not None:
                grad_weight += (raw.T @ hidden[part]).float()
            del raw
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _score_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's log-probabilities [C] and their gradient with respect to the raw logits, -raw / total[:, None].

    With e = exp(logits - max) and s = sum(e): d logp / d logits = onehot - e / s = -(e - s * onehot) / s. The division
    is applied to the matrix product's result, which saves a pass over [C, V]. The onehot is subtracted in float32,
    because 1 - p of a likely token would be lost in bfloat16.

    Returns:
        Log-probabilities [C], raw [C, V] and total [C].
    """
    logits = hidden @ weight.T
    logits = logits.float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap is not None:
        logits /= softcap
        logits.tanh_()
        slope = 1.0 - logits.square()
        logits *= softcap
    rows = target_ids[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logits = logits.gather(1, rows)[:, 0]
    raw = logits.exp_()
    total = raw.sum(dim=-1)
    raw.scatter_add_(1, rows, -total[:, None])
    if slope is not None:
        raw *= slope
    if scale != 1.0:
        raw *= scale
    logps = target_logits - total.log()
    if hidden.dtype != torch.float32:
        # One more pass over [C, V], but one rounding less, and no overflow in float16 with a large vocabulary.
        raw /= total[:, None]
        total = torch.ones_like(total)
    return logps, raw, total


def find_head_layer(model: nn.Module) -> nn.Module:
    """The output embedding of a `transformers` causal language model.

    Raises:
        ConfigError: The model has none.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"model: expected a linear output head, got {type(layer).__name__}")
    return layer


def get_head(model: nn.Module) -> Head:
    """Read the head of a `transformers` causal language model and how the model transforms its logits.

    Raises:
        ConfigError: The model has no linear output embedding in floating point, or a LoRA adapter on it.
    """
    layer: Any = find_head_layer(model)
    if hasattr(layer, "modules_to_save") and hasattr(layer, "active_adapters"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if hasattr(layer, "base_layer"):
        raise ConfigError(
            "lora_target_modules: cutlm does not support LoRA on the output head; remove it, or train the head in full"
            " with lora_modules_to_save"
        )
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ConfigError(f"model: expected a linear output head in floating point, got {type(layer).__name__}")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        scale *= float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Head(weight, getattr(layer, "bias", None), softcap, scale)
