"""Estimate the memory of a training step from the shape of a model and a few settings, without loading weights.

Sizes are in bytes; a GB is 10^9 bytes. The formulas are for LLaMA's decoder layers: RMSNorm, attention that does not
store its weights (`sdpa`, flash) and a gated MLP. `tests/model/test_estimate.py` compares them with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlm.errors import ConfigError
from cutlm.model.logprobs import choose_chunk_size

GPU_SIZES = (24, 40, 80, 141)  # GB
# The rest of a GPU's memory is lost to the CUDA context and fragmentation.
USABLE = 0.9
_FLOAT32, _BFLOAT16 = 4, 2
# The formulas leave out biases and norms of head width; layers unlike LLaMA's differ by more than this.
_WEIGHTS_TOLERANCE = 0.05
# Bytes per weight: NF4 with a float32 scale per 64 weights; 8-bit, whose scales per row are negligible.
_QUANTIZED_SIZES = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        num_layers: Number of decoder layers.
        width: Width of the hidden states.
        inner_width: Width of the MLP.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        head_dim: Width of a head.
        vocab_size: Number of tokens.
        is_tied: Whether the output head is the embedding.
    """

    num_layers: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = False

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Number of inputs and outputs of each matrix of a layer, by its name in `lora_target_modules`."""
        width, inner, query, kv = self.width, self.inner_width, self.query_width, self.kv_width
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
        """Number of weights in the matrices of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def num_other_weights(self) -> int:
        """Number of weights in the embedding, the head and the norms."""
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.width
        return embeddings + (2 * self.num_layers + 1) * self.width

    @property
    def num_weights(self) -> int:
        return self.num_layers * self.num_layer_weights + self.num_other_weights


# From the public configs of LLaMA 2.
SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 128, 32000),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 128, 32000),
}


@dataclass(frozen=True)
class Plan:
    """The training settings that affect memory.

    Attributes:
        num_tokens: Tokens of all sequences in one forward and backward pass.
        lora_r: Rank of LoRA; None for full training.
        lora_targets: Matrices of a layer with LoRA.
        lora_dropout: Whether LoRA has dropout.
        load_in: Bits of a quantized base model, 4 or 8; None for no quantization.
        weight_size: Bytes of a stored weight that is not quantized.
        is_bf16: Whether to compute in bfloat16, with autocast or FSDP.
        is_checkpointed: Whether activations are recomputed in the backward pass.
        num_gpus: Number of GPUs.
        is_sharded: Whether weights are sharded over the GPUs with FSDP2 or ZeRO-3.
    """

    num_tokens: int
    lora_r: int | None = 16
    lora_targets: Sequence[str] = ("gate_proj", "down_proj", "up_proj")
    lora_dropout: bool = True
    load_in: int | None = None
    weight_size: int = _BFLOAT16
    is_bf16: bool = True
    is_checkpointed: bool = True
    num_gpus: int = 1
    is_sharded: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step.

    Attributes:
        weights: Stored weights, and those gathered or cast for computation.
        gradients: Gradients, and the buckets in which they are all-reduced.
        optimizer: Adam's two moments.
        activations: Activations that the forward pass saves for the backward pass.
        work: Temporary tensors of the part that runs, the head or a layer in its backward pass.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    work: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work


def read_shape(config: Any) -> Shape:
    """Reads the shape from a `transformers` config and compares it with the weights that such a model would have.

    Raises:
        ConfigError: The model's layers are not like LLaMA's, or its config is invalid.
    """
    config = config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
    experts = [name for name in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, name, None)]
    if missing or experts:
        raise _refuse_layers(config, f"has no {', '.join(missing)}" if missing else "has experts")
    num_layers, width, inner, num_heads, vocab_size = sizes = [getattr(config, name) for name in names]
    if problems := [f"{name}: {value}" for name, value in zip(names, sizes, strict=True) if value < 1]:
        raise ConfigError(
            f"{config.model_type}: expected sizes of at least 1, got {', '.join(problems)}; fix the config"
        )
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or width // num_heads
    tied = bool(getattr(config, "tie_word_embeddings", False))
    shape = Shape(num_layers, width, inner, num_heads, num_kv_heads, head_dim, vocab_size, tied)
    num_real = _count_weights(config)
    if abs(shape.num_weights - num_real) > _WEIGHTS_TOLERANCE * num_real:
        raise _refuse_layers(config, f"has {num_real:,} weights where they give {shape.num_weights:,}")
    return shape


def _refuse_layers(config: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"{config.model_type}: the formulas are for layers like LLaMA's, but this model {reason}; measure a step"
        " instead"
    )


def _count_weights(config: Any) -> int:
    """Counts the weights of the model that a config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # no memory, and no attention package
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # transformers: sizes that do not fit each other, a size of 0, an unknown activation, a missing package
    except (ValueError, RuntimeError, ArithmeticError, AssertionError, LookupError, ImportError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{config.model_type}: its config is invalid ({reason}); fix the config") from error
    return sum(weight.numel() for weight in model.parameters())


def estimate(shape: Shape, plan: Plan) -> Memory:
    """Estimates the peak memory of a training step on each GPU.

    The peak is in the last micro-batch, when gradients of earlier ones are already in memory.

    Raises:
        ConfigError: The plan contradicts itself or the shape.

    Example:

        >>> estimate(SHAPES["llama-2-7b"], Plan(num_tokens=4096)).total / 1e9  # GB
        16.17...
    """
    _check(shape, plan)
    share = plan.num_gpus if plan.is_sharded else 1
    stored, num_trained = _count_stored(shape, plan)
    compute_size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    weights = stored / share
    gradients = num_trained * _gradient_size(plan) / share
    optimizer = 2 * num_trained * _gradient_size(plan) / share
    if plan.is_sharded:
        # The running layer and the prefetched one, embedding and head; a layer's gradients before they are reduced.
        gathered = 2 * shape.num_layer_weights + shape.num_other_weights
        weights += gathered * compute_size
        gradients += (shape.num_layer_weights if plan.lora_r is None else 0) * _FLOAT32
    else:
        if plan.num_gpus > 1:
            gradients *= 2  # DDP's buckets
        if plan.is_bf16 and plan.weight_size == _FLOAT32:
            # Autocast's copies, which the graph holds: of all layers, or of the one being recomputed.
            num_layers = 1 if plan.is_checkpointed else shape.num_layers
            weights += (num_layers * shape.num_layer_weights + shape.vocab_size * shape.width) * _BFLOAT16
    return Memory(weights, gradients, optimizer, _estimate_saved(shape, plan), _estimate_work(shape, plan))


def _check(shape: Shape, plan: Plan) -> None:
    problems = []
    unknown = sorted(set(plan.lora_targets) - set(shape.matrices))
    if plan.lora_r is not None and unknown:
        problems.append(f"lora_target_modules: expected some of {', '.join(shape.matrices)}, got {', '.join(unknown)}")
    if plan.lora_r is not None and plan.lora_r < 1:
        problems.append(f"lora_r: expected a whole number of at least 1, got {plan.lora_r}")
    if plan.load_in is not None and plan.lora_r is None:
        problems.append("load_in_4bit and load_in_8bit train an adapter; expected use_peft: true, got false")
    if plan.load_in is not None and plan.is_sharded:
        problems.append(
            "load_in_4bit and load_in_8bit: expected neither with --fsdp; quantized weights cannot be sharded"
        )
    if plan.num_tokens < 1 or plan.num_gpus < 1:
        problems.append("max_tokens_per_batch, max_length, num_gpus: expected whole numbers of at least 1")
    if problems:
        raise ConfigError(problems)


def _gradient_size(plan: Plan) -> int:
    # Adapters are float32 on any base model.
    return plan.weight_size if plan.lora_r is None else _FLOAT32


def _count_stored(shape: Shape, plan: Plan) -> tuple[float, int]:
    """Bytes of all weights, and the number of trained ones."""
    num_in_layers = shape.num_layers * shape.num_layer_weights
    if plan.load_in is not None:
        # PEFT's `prepare_model_for_kbit_training` casts the other weights to float32.
        stored = num_in_layers * _QUANTIZED_SIZES[plan.load_in] + shape.num_other_weights * _FLOAT32
    else:
        stored = shape.num_weights * plan.weight_size
    if plan.lora_r is None:
        return stored, shape.num_weights
    num_lora = shape.num_layers * sum(plan.lora_r * sum(shape.matrices[name]) for name in plan.lora_targets)
    return stored + num_lora * _FLOAT32, num_lora


def _estimate_layer(shape: Shape, plan: Plan) -> float:
    """Bytes per token that a layer saves for its backward pass.

    - Both norms save their input in float32, 2 * 4 * width; with trained weights also their normalized input.
    - Attention saves queries, keys, values, its output, and a float32 for each head. Keys and values are repeated for
      all query heads, because a mask (of contexts that share a prefix) needs it.
    - The MLP saves its gate before and after the activation, and the other factor: 3 * inner_width.
    - A trained matrix saves its input. One under LoRA saves its input after dropout, the dropout mask (a byte per
      element; a float on a CPU) and the output of its first factor. Matrices with the same input share it unless
      dropout, a cast to LoRA's float32 or autocast from float32 makes a copy for each.
    """
    size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    stream = _stream_size(plan)
    attention = size * 4 * shape.query_width + _FLOAT32 * shape.num_heads
    kept = 2 * _FLOAT32 * shape.width + attention + 3 * size * shape.inner_width
    is_full = plan.lora_r is None
    if is_full:
        kept += 2 * stream * shape.width  # the norms' weights
    is_copied = stream != size or (not is_full and (plan.lora_dropout or plan.is_bf16))
    mask = 1 if plan.lora_dropout and not is_full else 0
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for group in groups:
        targets = [name for name in group if is_full or name in plan.lora_targets]
        num_copies = len(targets) if is_copied else min(1, len(targets))
        if group == ("o_proj",) and (is_full or not is_copied):  # attention saves its output already
            num_copies = 0
        if group == ("down_proj",) and is_full:
            num_copies = min(1, num_copies)
        inputs = shape.matrices[group[0]][0]
        kept += inputs * (num_copies * size + len(targets) * mask) + len(targets) * (plan.lora_r or 0) * size
    return kept


def _stream_size(plan: Plan) -> int:
    """Bytes of an element of the hidden states between layers, which are float32 with quantized weights."""
    if plan.is_sharded and plan.is_bf16:
        return _BFLOAT16
    return _FLOAT32 if plan.load_in is not None else plan.weight_size


def _estimate_saved(shape: Shape, plan: Plan) -> float:
    """Bytes saved by all layers, by the last norm, and by the head (hidden states and their gradients)."""
    size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    stream = _stream_size(plan) * shape.width
    layers = (stream if plan.is_checkpointed else _estimate_layer(shape, plan)) * shape.num_layers
    last_norm = _FLOAT32 * shape.width + (stream if plan.lora_r is None else 0)
    return plan.num_tokens * (layers + last_norm + 2 * shape.width * size)


def _estimate_work(shape: Shape, plan: Plan) -> float:
    """Bytes at work at a time: the head on a chunk of positions, or a layer in its backward pass, whichever is more."""
    size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    is_full = plan.lora_r is None
    # Logits in float32 and a copy in the dtype of the matrix product; for a trained head a gradient and its summand.
    num_positions = min(plan.num_tokens, choose_chunk_size(shape.vocab_size))
    head: float = num_positions * shape.vocab_size * (_FLOAT32 + (size if size != _FLOAT32 else 0))
    head += 2 * shape.vocab_size * shape.width * _FLOAT32 if is_full else 0
    # Gradients of three inner states of the MLP, of a layer's input and output, and of the largest trained matrix.
    layer: float = 3 * size * shape.inner_width + 2 * _stream_size(plan) * shape.width
    layer += _estimate_layer(shape, plan) if plan.is_checkpointed else 0
    largest = max(inputs * outputs for inputs, outputs in shape.matrices.values()) if is_full else 0
    return max(head, plan.num_tokens * layer + largest * _gradient_size(plan))


def choose_gpus(memory: Memory) -> list[int]:
    """The common GPU sizes, in GB, that are large enough."""
    return [size for size in GPU_SIZES if memory.total <= USABLE * size * 1e9]
