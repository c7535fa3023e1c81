"""Estimate the memory of a training step from a model's config and a few settings, without loading anything.

All sizes are in bytes; a GB is 10^9 of them. The formulas hold for LLaMA's decoder layers: RMSNorm, attention that does
not store its weights (`sdpa`, flash) and a gated MLP. `tests/model/test_estimate.py` compares them with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlm.errors import ConfigError
from cutlm.model.logprobs import choose_chunk_size

GPU_SIZES = (24, 40, 80, 141)  # GB
USABLE = 0.9  # of a GPU's memory; the rest goes to CUDA itself and fragmentation
_FLOAT32, _BFLOAT16 = 4, 2
# The formulas leave out biases and norms of queries and keys. Architectures unlike LLaMA's differ by more than this.
_WEIGHTS_TOLERANCE = 0.05
# Bytes per weight. NF4 has one float32 scale for 64 weights, 8-bit one for each row, which is negligible.
_QUANTIZED = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    num_layers: int
    width: int  # of the hidden states
    inner_width: int  # of the MLP
    num_heads: int  # of the queries
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = False  # whether head and embedding share their weights

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each matrix of a layer, by its name in `lora_target_modules`."""
        width, inner, query, kv = self.width, self.inner_width, self.query_width, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (width, query),
            "k_proj": (width, kv),
            "v_proj": (width, kv),
            "o_proj": (query, width),
            "gate_proj": (width, inner),
            "up_proj": (width, inner),
            "down_proj": (inner, width),
        }

    @property
    def num_layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def num_other_weights(self) -> int:
        """Weights of embedding, head and norms."""
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.width
        return embeddings + (2 * self.num_layers + 1) * self.width

    @property
    def num_weights(self) -> int:
        return self.num_layers * self.num_layer_weights + self.num_other_weights


# The public configs of LLaMA-2.
SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 128, 32000),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 128, 32000),
}


@dataclass(frozen=True)
class Plan:
    """How a model is trained."""

    num_tokens: int  # in one forward and backward pass, of all sequences together
    lora_r: int | None = 16  # None trains all weights
    lora_targets: Sequence[str] = ("gate_proj", "down_proj", "up_proj")
    lora_dropout: bool = True  # whether there is dropout before LoRA
    load_in: int | None = None  # bits of a quantized base model, 4 or 8
    weight_size: int = _BFLOAT16  # bytes per stored weight, unless quantized
    is_bf16: bool = True  # whether autocast or FSDP computes in bfloat16
    is_checkpointed: bool = True  # whether the backward pass recomputes activations
    num_gpus: int = 1
    is_sharded: bool = False  # whether FSDP2 or ZeRO-3 shards the weights over the GPUs

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return self.lora_r is None

    @property
    def compute_size(self) -> int:
        """Bytes per element in matrix products."""
        return _BFLOAT16 if self.is_bf16 else self.weight_size

    @property
    def trained_size(self) -> int:
        """Bytes per trained weight and its gradient; adapters are float32 on any base model."""
        return self.weight_size if self.is_full else _FLOAT32

    @property
    def stream_size(self) -> int:
        """Bytes per element of the hidden states between layers: as stored, or float32 with quantized weights."""
        if self.is_sharded and self.is_bf16:
            return _BFLOAT16
        return _FLOAT32 if self.load_in is not None else self.weight_size


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step."""

    weights: float  # as stored, and those that are gathered or cast for computing
    gradients: float  # and the buckets in which processes sum them
    optimizer: float  # Adam's two moments
    activations: float  # saved by the forward pass for the backward pass
    work: float  # temporary memory of what runs: the head, or the backward pass of a layer

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work


def read_shape(config: Any) -> Shape:
    """Read the shape from a `transformers` config and check it against the model's number of weights.

    Raises:
        ConfigError: The layers are unlike LLaMA's, or no model can be built from the config.
    """
    config = config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
    experts = [name for name in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, name, None)]
    if missing or experts:
        raise _refuse_layers(config, f"it has no {', '.join(missing)}" if missing else "it has experts")
    num_layers, width, inner, num_heads, vocab_size = sizes = [getattr(config, name) for name in names]
    if problems := [f"{name}: {value}" for name, value in zip(names, sizes, strict=True) if value < 1]:
        raise ConfigError(
            f"{config.model_type}: expected sizes of at least 1, got {', '.join(problems)}; fix the config"
        )
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or width // num_heads
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    shape = Shape(num_layers, width, inner, num_heads, num_kv_heads, head_dim, vocab_size, is_tied)
    num_real = _count_weights(config)
    if abs(shape.num_weights - num_real) > _WEIGHTS_TOLERANCE * num_real:
        raise _refuse_layers(config, f"it has {num_real:,} weights where LLaMA would have {shape.num_weights:,}")
    return shape


def _refuse_layers(config: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"{config.model_type}: expected a model with LLaMA's layers, for which the formulas hold, but {reason}; measure"
        " a step instead"
    )


def _count_weights(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes without memory; eager attention needs no further package
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # transformers: sizes that do not fit each other, a size of 0, an unknown activation, a missing package
    except (ValueError, RuntimeError, ArithmeticError, AssertionError, LookupError, ImportError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{config.model_type}: its config is invalid ({reason}); fix the config") from error
    return sum(weight.numel() for weight in model.parameters())


def estimate(shape: Shape, plan: Plan) -> Memory:
    """Estimate the peak of a training step on each GPU, while gradients of earlier micro-batches are held.

    Raises:
        ConfigError: Settings of the plan contradict each other or do not fit the shape.

    Example:

        >>> estimate(SHAPES["llama-2-7b"], Plan(num_tokens=4096)).total / 1e9  # GB
        16.17...
    """
    _check(shape, plan)
    stored, num_trained = _count_stored(shape, plan)
    share = plan.num_gpus if plan.is_sharded else 1
    weights = stored / share
    gradients = num_trained * plan.trained_size / share
    optimizer = 2 * gradients
    if plan.is_sharded:
        # The running layer and the one prefetched, embedding and head; one layer's gradients before they are sharded.
        weights += (2 * shape.num_layer_weights + shape.num_other_weights) * plan.compute_size
        gradients += shape.num_layer_weights * _FLOAT32 if plan.is_full else 0
    else:
        if plan.num_gpus > 1:
            gradients *= 2  # DDP's buckets
        if plan.is_bf16 and plan.weight_size == _FLOAT32:
            # The graph holds autocast's copies: of all layers, or of the one that is recomputed.
            num_layers = 1 if plan.is_checkpointed else shape.num_layers
            weights += (num_layers * shape.num_layer_weights + shape.vocab_size * shape.width) * _BFLOAT16
    return Memory(weights, gradients, optimizer, _measure_activations(shape, plan), _measure_work(shape, plan))


def _check(shape: Shape, plan: Plan) -> None:
    problems = []
    unknown = sorted(set(plan.lora_targets) - set(shape.matrices))
    if plan.lora_r is not None and unknown:
        problems.append(f"lora_target_modules: expected some of {', '.join(shape.matrices)}, got {', '.join(unknown)}")
    if plan.lora_r is not None and plan.lora_r < 1:
        problems.append(f"lora_r: expected a whole number of at least 1, got {plan.lora_r}")
    if plan.load_in is not None and plan.is_full:
        problems.append("load_in_4bit and load_in_8bit train an adapter; expected use_peft: true, got false")
    if plan.load_in is not None and plan.is_sharded:
        problems.append("load_in_4bit and load_in_8bit: expected neither with --fsdp, which cannot shard them")
    if plan.num_tokens < 1 or plan.num_gpus < 1:
        problems.append("max_tokens_per_batch, max_length, num_gpus: expected whole numbers of at least 1")
    if problems:
        raise ConfigError(problems)


def _count_stored(shape: Shape, plan: Plan) -> tuple[float, int]:
    """Bytes of all weights, and the number of trained ones."""
    stored: float = shape.num_weights * plan.weight_size
    if plan.load_in is not None:
        # PEFT's `prepare_model_for_kbit_training` casts the other weights to float32.
        num_quantized = shape.num_layers * shape.num_layer_weights
        stored = num_quantized * _QUANTIZED[plan.load_in] + shape.num_other_weights * _FLOAT32
    if plan.lora_r is None:
        return stored, shape.num_weights
    num_lora = shape.num_layers * sum(plan.lora_r * sum(shape.matrices[name]) for name in plan.lora_targets)
    return stored + num_lora * _FLOAT32, num_lora


def _measure_layer(shape: Shape, plan: Plan) -> float:
    """Bytes per token that a layer keeps for the backward pass."""
    size, is_full = plan.compute_size, plan.is_full
    # Both norms keep their input in float32, and if their weights are trained, also the normalized input.
    norms = 2 * _FLOAT32 * shape.width + (2 * plan.stream_size * shape.width if is_full else 0)
    # Queries, keys, values, the output and a float32 per head. Keys and values are repeated for all query heads.
    attention = size * 4 * shape.query_width + _FLOAT32 * shape.num_heads
    # The gate before and after its activation, and what it is multiplied with.
    kept = norms + attention + 3 * size * shape.inner_width
    # A trained matrix keeps its input. So does one with LoRA, together with the output of LoRA's first factor and a
    # byte per element for the mask of dropout. Matrices with the same input share it, unless dropout, a cast to LoRA's
    # float32 or autocast from float32 makes a copy for each.
    is_copied = plan.stream_size != size or (not is_full and (plan.lora_dropout or plan.is_bf16))
    mask = 1 if plan.lora_dropout and not is_full else 0
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        num_targets = sum(is_full or name in plan.lora_targets for name in group)
        num_copies = num_targets if is_copied else min(1, num_targets)
        if group == ("o_proj",) and (is_full or not is_copied):
            num_copies = 0  # its input is attention's output, which is kept anyway
        kept += shape.matrices[group[0]][0] * (num_copies * size + num_targets * mask)
        kept += num_targets * (plan.lora_r or 0) * size
    return kept


def _measure_activations(shape: Shape, plan: Plan) -> float:
    """Bytes kept by all layers, the last norm (its input) and the head (hidden states and their gradients)."""
    stream = plan.stream_size * shape.width
    layers = (stream if plan.is_checkpointed else _measure_layer(shape, plan)) * shape.num_layers
    last_norm = _FLOAT32 * shape.width + (stream if plan.is_full else 0)
    return plan.num_tokens * (layers + last_norm + 2 * shape.width * plan.compute_size)


def _measure_work(shape: Shape, plan: Plan) -> float:
    """Temporary bytes of the head on a chunk of positions, or of a layer's backward pass, whichever is more."""
    size, is_full = plan.compute_size, plan.is_full
    # Logits in float32, a copy in the dtype of the matrix product; for a trained head its gradient's sum and addend.
    num_positions = min(plan.num_tokens, choose_chunk_size(shape.vocab_size))
    head: float = num_positions * shape.vocab_size * (_FLOAT32 + (size if size != _FLOAT32 else 0))
    head += 2 * shape.vocab_size * shape.width * _FLOAT32 if is_full else 0
    # Gradients of three inner states of the MLP, of a layer's input and output, and of the largest trained matrix.
    layer: float = 3 * size * shape.inner_width + 2 * plan.stream_size * shape.width
    layer += _measure_layer(shape, plan) if plan.is_checkpointed else 0
    largest = max(inputs * outputs for inputs, outputs in shape.matrices.values()) if is_full else 0
    return max(head, plan.num_tokens * layer + largest * plan.trained_size)


def choose_gpus(memory: Memory) -> list[int]:
    """Return the common GPU sizes, in GB, that suffice."""
    return [size for size in GPU_SIZES if memory.total <= USABLE * size * 1e9]
