"""How much memory a training step takes, from the shape of a model and a few settings; nothing is loaded.

All sizes are bytes, a GB is 10^9 of them. The formulas are those of a decoder layer as LLaMA has it: RMSNorm, attention
without its matrix of weights (`sdpa`, flash), an MLP with a gate; `tests/model/test_estimate.py` holds them against
measured peaks. Printing is left to `cutlm.cli.estimate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlm.errors import ConfigError
from cutlm.model.logprobs import choose_chunk_size

GPU_SIZES = (24, 40, 80, 141)  # GB
# Of a GPU's memory, what CUDA itself and the gaps between blocks leave.
USABLE = 0.9
_FLOAT32, _BFLOAT16 = 4, 2
# Biases and norms of a head's width are left out of the formulas; other layers than LLaMA's differ by more.
_WEIGHTS_TOLERANCE = 0.05
# NF4 with one float32 scale for 64 weights; 8-bit with a scale for each row, which is next to nothing.
_QUANTIZED = {4: 0.5 + 4 / 64, 8: 1.0}


@dataclass(frozen=True)
class Shape:
    """What of a model's config counts.

    Attributes:
        num_layers: Decoder layers.
        width: Of the hidden states.
        inner_width: Of the MLP.
        num_heads: Of the queries.
        num_kv_heads: Of the keys and values.
        head_dim: Width of a head.
        vocab_size: Tokens.
        is_tied: Whether the head is the embedding.
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
        """Inputs and outputs of each matrix of a layer, by the name that LoRA knows it by."""
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
        """In the matrices of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def num_other_weights(self) -> int:
        """In the embedding, the head and the norms."""
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
    """How it is trained.

    Attributes:
        num_tokens: That go forward and backward at a time, of all sequences together.
        lora_r: Rank of LoRA; None trains all weights.
        lora_targets: Matrices of a layer that LoRA adapts.
        lora_dropout: Whether there is dropout before LoRA.
        load_in: Bits of a quantized base model, 4 or 8; None: not quantized.
        weight_size: Bytes of a weight that is not quantized, as it is stored.
        is_bf16: Whether it is computed in bfloat16, by autocast or FSDP.
        is_checkpointed: Whether activations are made again on the way back.
        num_gpus: That share the work.
        is_sharded: Whether they share the weights too, by FSDP2 or ZeRO-3.
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
        weights: As stored, with those that are gathered or cast for computing.
        gradients: Of what is trained, with the buckets by which processes add them up.
        optimizer: Adam's two moments in float32.
        activations: What the forward pass keeps for the backward pass.
        work: What is needed beside for the part that runs: the head, or a layer on its way back.
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
    """Reads the shape out of a `transformers` config, and holds it against the model, of which nothing is loaded.

    Raises:
        ConfigError: The model has no layers as LLaMA has them, or the config is of no model.
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
            f"{config.model_type}: expected sizes of at least 1, got {', '.join(problems)}; mend the config"
        )
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or width // num_heads
    tied = bool(getattr(config, "tie_word_embeddings", False))
    shape = Shape(num_layers, width, inner, num_heads, num_kv_heads, head_dim, vocab_size, tied)
    num_real = _count_weights(config)
    if abs(shape.num_weights - num_real) > _WEIGHTS_TOLERANCE * num_real:
        what = f"they give {shape.num_weights:,} weights where the model has {num_real:,}"
        raise _refuse_layers(config, what)
    return shape


def _refuse_layers(config: Any, what: str) -> ConfigError:
    return ConfigError(
        f"{config.model_type}: the formulas are for layers as LLaMA has them, and {what}; measure a step instead"
    )


def _count_weights(config: Any) -> int:
    """How many weights the model of a config has."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes alone, without memory; attention that needs no further package
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # each model has checks and words of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{config.model_type}: no language model can be made of its config ({reason}); check the values in it"
        ) from error
    return sum(weight.numel() for weight in model.parameters())


def estimate(shape: Shape, plan: Plan) -> Memory:
    """Estimates the peak of a training step on each GPU, gradients of earlier micro-batches being there already.

    Raises:
        ConfigError: A plan at odds with itself or the shape.
    """
    _check(shape, plan)
    share = plan.num_gpus if plan.is_sharded else 1
    stored, num_trained = _count_stored(shape, plan)
    compute_size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    weights = stored / share
    gradients = num_trained * _gradient_size(plan) / share
    optimizer = 2 * num_trained * _gradient_size(plan) / share
    if plan.is_sharded:
        # The layer that runs and the one fetched meanwhile; embedding and head; a layer's gradients before they go.
        gathered = 2 * shape.num_layer_weights + shape.num_other_weights
        weights += gathered * compute_size
        gradients += (shape.num_layer_weights if plan.lora_r is None else 0) * _FLOAT32
    else:
        if plan.num_gpus > 1:
            gradients *= 2  # DDP's buckets
        if plan.is_bf16 and plan.weight_size == _FLOAT32:
            # Autocast's copies, held by the graph: of all layers, or of the one that is made again.
            num_layers = 1 if plan.is_checkpointed else shape.num_layers
            weights += (num_layers * shape.num_layer_weights + shape.vocab_size * shape.width) * _BFLOAT16
    return Memory(weights, gradients, optimizer, _measure_kept(shape, plan), _measure_work(shape, plan))


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
        problems.append("load_in_4bit and load_in_8bit: expected none with --fsdp; quantized weights are not spread")
    if plan.num_tokens < 1 or plan.num_gpus < 1:
        problems.append("max_tokens_per_batch, max_length, num_gpus: expected whole numbers of at least 1")
    if problems:
        raise ConfigError(problems)


def _gradient_size(plan: Plan) -> int:
    # Adapters are float32 on any base model.
    return plan.weight_size if plan.lora_r is None else _FLOAT32


def _count_stored(shape: Shape, plan: Plan) -> tuple[float, int]:
    """Bytes of all weights, and how many of them are trained."""
    num_in_layers = shape.num_layers * shape.num_layer_weights
    if plan.load_in is not None:
        # What is not quantized is made float32 (PEFT's `prepare_model_for_kbit_training`).
        stored = num_in_layers * _QUANTIZED[plan.load_in] + shape.num_other_weights * _FLOAT32
    else:
        stored = shape.num_weights * plan.weight_size
    if plan.lora_r is None:
        return stored, shape.num_weights
    num_lora = shape.num_layers * sum(plan.lora_r * sum(shape.matrices[name]) for name in plan.lora_targets)
    return stored + num_lora * _FLOAT32, num_lora


def _measure_layer(shape: Shape, plan: Plan) -> float:
    """What a layer keeps for its way back, for each token.

    - Both norms keep their input in float32: 2 * 4 * width; where their weights are trained, also what these multiply.
    - Attention keeps queries, keys, values, its output, and a float32 for each head. Keys and values are repeated for
      all query heads, as a mask asks for (of contexts that share their beginning, where activations are checkpointed).
    - The MLP keeps its gate before and after the activation, and what it is multiplied with: 3 * inner_width.
    - A matrix that is trained keeps its input, and so does one under LoRA, after dropout, which keeps a mask of a byte
      (on a CPU, of a float), and what its first factor makes of it. Inputs are kept once for matrices that read one and
      the same, unless dropout, a cast to LoRA's float32 or autocast from float32 makes a copy for each.
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
        # Attention's output is kept anyway, where it is not copied.
        targets = [name for name in group if is_full or name in plan.lora_targets]
        num_copies = len(targets) if is_copied else min(1, len(targets))
        if group == ("o_proj",) and (is_full or not is_copied):
            num_copies = 0
        if group == ("down_proj",) and is_full:
            num_copies = min(1, num_copies)
        inputs = shape.matrices[group[0]][0]
        kept += inputs * (num_copies * size + len(targets) * mask) + len(targets) * (plan.lora_r or 0) * size
    return kept


def _stream_size(plan: Plan) -> int:
    """Bytes of an element of the hidden states between layers: as stored, and float32 beside quantized weights."""
    if plan.is_sharded and plan.is_bf16:
        return _BFLOAT16
    return _FLOAT32 if plan.load_in is not None else plan.weight_size


def _measure_kept(shape: Shape, plan: Plan) -> float:
    """What all layers keep, the last norm its input, and the head the hidden states and their gradients."""
    size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    stream = _stream_size(plan) * shape.width
    layers = (stream if plan.is_checkpointed else _measure_layer(shape, plan)) * shape.num_layers
    last_norm = _FLOAT32 * shape.width + (stream if plan.lora_r is None else 0)
    return plan.num_tokens * (layers + last_norm + 2 * shape.width * size)


def _measure_work(shape: Shape, plan: Plan) -> float:
    """What is at work at a time: the head on a chunk of positions, or a layer on its way back, whichever is more."""
    size = _BFLOAT16 if plan.is_bf16 else plan.weight_size
    is_full = plan.lora_r is None
    # Logits in float32, and a copy in the dtype of the matrix product; for a trained head a sum and an addend of it.
    num_positions = min(plan.num_tokens, choose_chunk_size(shape.vocab_size))
    head: float = num_positions * shape.vocab_size * (_FLOAT32 + (size if size != _FLOAT32 else 0))
    head += 2 * shape.vocab_size * shape.width * _FLOAT32 if is_full else 0
    # Gradients of three inner states of the MLP and of a layer's input and output, and of the largest trained matrix.
    layer: float = 3 * size * shape.inner_width + 2 * _stream_size(plan) * shape.width
    layer += _measure_layer(shape, plan) if plan.is_checkpointed else 0
    largest = max(inputs * outputs for inputs, outputs in shape.matrices.values()) if is_full else 0
    return max(head, plan.num_tokens * layer + largest * _gradient_size(plan))


def choose_gpus(memory: Memory) -> list[int]:
    """Which of the common sizes of GPU, in GB, hold it."""
    return [size for size in GPU_SIZES if memory.total <= USABLE * size * 1e9]
