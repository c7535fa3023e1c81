"""Compute token log-probabilities from hidden states without holding the full logits.

The head (the output embedding) is applied to one chunk of positions at a time. With a frozen head, as under LoRA, the
gradient of the hidden states is computed in the forward pass from the chunk's logits and only scaled in the backward
pass: two matrix products in all. With a trained head, the backward pass recomputes each chunk's logits.

`token_logprobs` scores one token at each position, `column_logprobs` several and all others together,
`taught_logprobs` each where it is needed, and `find_top_columns` finds the most likely tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cutlm.errors import ConfigError
from cutlm.losses import guide

# Larger chunks are hardly faster (benchmarks/head.py).
_MAX_CHUNK_SIZE = 512
_MAX_LOGITS = 2**26  # 256 MiB of float32
# Smallest mass, relative to the most likely token, of all tokens that have no column; its logarithm is finite.
_MIN_REST = 1e-30
# Of a token to which the teacher gives no probability.
_MIN_LOGP = -30.0


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
    hidden, head_weight = _match(hidden, head_weight, target_ids)
    size = chunk_size or choose_chunk_size(head_weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, head_weight, bias, target_ids, size, softcap, scale)


def column_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    column_ids: Tensor,
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Log-probabilities of each target token, of K other tokens at its position, and of all but these K together.

    Memory is that of one chunk, as for `token_logprobs`; see there for the arguments. The backward pass recomputes each
    chunk's logits.

    Args:
        column_ids: [N, K], at each position the tokens to score. One may occur several times.

    Returns:
        [N, 1 + K + 1] float32: the target, the K tokens, and the logarithm of the probability of all other tokens.

    Example:

        >>> column_logprobs(torch.zeros(1, 4), torch.ones(8, 4), torch.tensor([0]), torch.tensor([[5, 6]])).exp()
        tensor([[0.1250, 0.1250, 0.1250, 0.7500]])
    """
    hidden, head_weight = _match(hidden, head_weight, target_ids)
    size = chunk_size or choose_chunk_size(head_weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return _ColumnLogprobs.apply(hidden, head_weight, bias, target_ids, column_ids, size, softcap, scale)


def taught_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    is_taught: Tensor,
    column_ids: Tensor,
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and at M of the N positions those of K other tokens.

    Args:
        is_taught: [N] bool, the M positions.
        column_ids: [M, K]; see `column_logprobs`, also for the other arguments.

    Returns:
        [N], and [M, K + 1] for the K tokens and all others together.
    """
    taught, others = is_taught.nonzero()[:, 0], (~is_taught).nonzero()[:, 0]
    plain = token_logprobs(hidden[others], head_weight, target_ids[others], chunk_size, **options)
    columns = column_logprobs(hidden[taught], head_weight, target_ids[taught], column_ids, chunk_size, **options)
    return torch.cat([columns[:, 0], plain])[torch.cat([taught, others]).argsort()], columns[:, 1:]


@torch.no_grad()
def find_top_columns(
    hidden: Tensor,
    head_weight: Tensor,
    reference: Tensor | None,
    *,
    target_ids: Tensor,
    guidance: float,
    num_columns: int | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The most likely tokens of a teacher at each position; see `cutlm.losses.guide`.

    Args:
        hidden: [N, H] hidden states in the teacher's context.
        head_weight: See `token_logprobs`, also for `bias`, `softcap` and `scale`.
        reference: [N, H] hidden states in the context that it is guided away from; None without guidance.
        target_ids: [N], the tokens of the response.
        guidance: beta.
        num_columns: K, the number of tokens; None for the token of the response alone, K = 1.

    Returns:
        Ids [N, K] and log-probabilities [N, K] float32, most likely first. Beyond the teacher's support they are padded
        by the first token and -inf.
    """
    hidden, head_weight = _match(hidden, head_weight, target_ids)
    num = 1 if num_columns is None else min(num_columns, len(head_weight))
    ids = torch.empty(len(hidden), num, dtype=torch.long, device=hidden.device)
    logps = torch.empty(len(hidden), num, dtype=torch.float32, device=hidden.device)

    def score(states: Tensor) -> Tensor:
        return _compute_logits(states.to(head_weight.dtype), head_weight, bias, softcap, scale)[0].log_softmax(-1)

    with torch.autocast(hidden.device.type, enabled=False):
        for part in _cut_chunks(len(hidden), choose_chunk_size(len(head_weight))):
            teacher = score(hidden[part])
            if reference is not None:
                teacher = guide(teacher, score(reference[part]), guidance)
            if num_columns is None:
                ids[part] = target_ids[part, None]
                logps[part] = teacher.gather(1, ids[part]).clamp(min=_MIN_LOGP)
            else:
                logps[part], found = teacher.topk(num, dim=-1)
                # Other tokens there would be left out of the student's tail.
                ids[part] = torch.where(logps[part] > -torch.inf, found, found[:, :1])
    return ids, logps


def _match(hidden: Tensor, head_weight: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Check the shapes, and give hidden states and head the dtype of their product."""
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"expected hidden [N, H] and head_weight [V, H], got {hidden.shape} and {head_weight.shape}")
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one target for each of {hidden.shape[0]} positions, got {tuple(target_ids.shape)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), head_weight.to(dtype)
    return hidden.to(head_weight.dtype), head_weight


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
        for part in _cut_chunks(len(hidden), chunk_size):
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
        chunk_size, softcap, scale = ctx.settings
        if ctx.is_head_frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None, None, None
        hidden, weight, bias, target_ids = ctx.saved_tensors

        def differentiate(part: slice) -> Tensor:
            _, raw, total = _score_chunk(hidden[part], weight, bias, target_ids[part], softcap, scale)
            raw *= (-grad[part] / total)[:, None]
            return raw

        grads = _backpropagate(differentiate, hidden, weight, bias, chunk_size, ctx.needs_input_grad)
        return *grads, None, None, None, None


class _ColumnLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        column_ids: Tensor,
        chunk_size: int,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        logps = torch.empty(len(hidden), column_ids.shape[1] + 2, dtype=torch.float32, device=hidden.device)
        for part in _cut_chunks(len(hidden), chunk_size):
            logits = _compute_logits(hidden[part], weight, bias, softcap, scale)[0]
            logits -= logits.amax(dim=-1, keepdim=True)
            logps[part, :1] = logits.gather(1, target_ids[part, None])
            logps[part, 1:-1] = logits.gather(1, column_ids[part])
            total, rest = _sum_rest(logits.exp_(), column_ids[part])
            logps[part, -1] = rest.log()
            logps[part] -= total.log()[:, None]
            del logits  # frees it before the next chunk
        ctx.settings = (chunk_size, softcap, scale)
        ctx.save_for_backward(hidden, weight, bias, target_ids, column_ids)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        chunk_size, softcap, scale = ctx.settings
        hidden, weight, bias, target_ids, column_ids = ctx.saved_tensors

        def differentiate(part: slice) -> Tensor:
            """The gradient of the raw logits [C, V].

            With p = softmax(logits) and g the upstream gradient, that of a token outside of the columns is
            p * g_rest / rest - p * sum(g), and that of a column p * -sum(g) + g_column; the target's own is added.
            """
            raw, slope = _compute_logits(hidden[part], weight, bias, softcap, scale)
            raw -= raw.amax(dim=-1, keepdim=True)
            raw.exp_()
            columns, own, all_own = column_ids[part], grad[part], grad[part].sum(-1)
            likelihoods = raw.gather(1, columns)
            total, rest = _sum_rest(raw, columns)
            raw *= (own[:, -1] / rest - all_own / total)[:, None]
            raw.scatter_(1, columns, likelihoods * (-all_own / total)[:, None])
            raw.scatter_add_(1, columns, own[:, 1:-1])
            raw.scatter_add_(1, target_ids[part, None], own[:, :1])
            return _scale_slope(raw, slope, scale)

        grads = _backpropagate(differentiate, hidden, weight, bias, chunk_size, ctx.needs_input_grad)
        return *grads, None, None, None, None, None


def _cut_chunks(num: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num, size))


def _backpropagate(
    differentiate: Callable[[slice], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, head and bias, from those of each chunk's raw logits [C, V]."""
    needs_hidden, needs_weight, needs_bias = needs[:3]
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    # Summed in float32, because bfloat16 rounding errors of the chunks would add up.
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
    for part in _cut_chunks(len(hidden), chunk_size):
        raw = differentiate(part)
        if grad_bias is not None:
            grad_bias += raw.sum(0)
        raw = raw.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden[part] = raw @ weight
        if grad_weight is not None:
            grad_weight += (raw.T @ hidden[part]).float()
        del raw
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _compute_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """A chunk's logits [C, V] in float32 and, if they are capped, the slope of the capping."""
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
    return logits, slope


def _scale_slope(raw: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """The gradient of the raw logits from that of the logits, in place."""
    if slope is not None:
        raw *= slope
    if scale != 1.0:
        raw *= scale
    return raw


def _sum_rest(likelihoods: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sum unnormalized probabilities [C, V]: all of them, and those without the columns, which are set to 0.

    A difference of the two sums would be inaccurate if the columns have nearly all of the mass.
    """
    total = likelihoods.sum(dim=-1)
    likelihoods.scatter_(1, columns, 0.0)
    return total, likelihoods.sum(dim=-1).clamp(min=_MIN_REST)


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
    logits, slope = _compute_logits(hidden, weight, bias, softcap, scale)
    rows = target_ids[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logits = logits.gather(1, rows)[:, 0]
    raw = logits.exp_()
    total = raw.sum(dim=-1)
    raw.scatter_add_(1, rows, -total[:, None])
    raw = _scale_slope(raw, slope, scale)
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
