"""Chunked log-probabilities against the dense formula, and the heads of real architectures."""

import logging
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from cutlm.errors import ConfigError, UserError
from cutlm.losses import guide
from cutlm.model.forward import check_head
from cutlm.model.loading import unwrap_peft
from cutlm.model.logprobs import (
    Head,
    choose_chunk_size,
    column_logprobs,
    find_top_columns,
    get_head,
    taught_logprobs,
    token_logprobs,
)


def dense_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """All logits [N, V] at once, in the dtype of the inputs, with a softmax in at least float32."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def draw(num_positions: int, vocab_size: int, width: int, seed: int, spread: float = 1.0) -> tuple[Tensor, ...]:
    """Random hidden states, head, bias, targets and upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(num_positions, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    target_ids = torch.randint(vocab_size, (num_positions,), generator=generator)
    upstream = torch.randn(num_positions, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, target_ids, upstream


def relative_error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


# ---- By hand ----


def test_log_prob_is_the_log_softmax_of_the_logits():
    # One state [1, 2] and a head of three rows: logits [1, 2, 3].
    hidden = torch.tensor([[1.0, 2.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    total = torch.tensor([1.0, 2.0, 3.0]).exp().sum().log()
    for target in range(3):
        got = token_logprobs(hidden, weight, torch.tensor([target]))
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx((target + 1 - total).item(), rel=1e-6)


# ---- Against the dense formula ----


@settings(max_examples=80, deadline=None)
@given(
    num_positions=st.integers(1, 9),
    vocab_size=st.integers(2, 23),
    width=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    chunk_size=st.sampled_from([1, 3, 9, None]),
    has_bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    trained=st.sets(st.sampled_from(["hidden", "weight", "bias"])),
)
def test_values_and_gradients_match_the_dense_formula(
    num_positions, vocab_size, width, seed, spread, chunk_size, has_bias, softcap, scale, trained
):
    hidden, weight, bias, target_ids, upstream = draw(num_positions, vocab_size, width, seed, spread)
    inputs = {"hidden": hidden, "weight": weight} | ({"bias": bias} if has_bias else {})
    ours = {name: value.float().requires_grad_(name in trained) for name, value in inputs.items()}
    # The rounded inputs, so that only the rounding of the computation is compared.
    truth = {name: value.detach().double().requires_grad_(name in trained) for name, value in ours.items()}

    got = token_logprobs(
        ours["hidden"], ours["weight"], target_ids, chunk_size, bias=ours.get("bias"), softcap=softcap, scale=scale
    )
    want = dense_logprobs(truth["hidden"], truth["weight"], target_ids, truth.get("bias"), softcap, scale)
    size = 1 + (spread * scale * width if softcap is None else softcap)  # magnitude of the logits that cancel
    assert got.tolist() == pytest.approx(want.tolist(), rel=1e-5, abs=2e-6 * size)

    names = [name for name in inputs if name in trained]
    assert got.requires_grad == bool(names)
    if not names:
        return
    got.backward(upstream.float())
    want.backward(upstream)
    for name in inputs:
        if name not in trained:
            assert ours[name].grad is None
            continue
        assert ours[name].grad.dtype == torch.float32
        bound = 1e-5 * size * max(1.0, truth[name].grad.abs().max().item())
        assert (ours[name].grad.double() - truth[name].grad).abs().max().item() <= bound


def test_chunk_size_does_not_change_values():
    hidden, weight, bias, target_ids, _ = (tensor.float() for tensor in draw(10, 31, 6, 0))
    target_ids = target_ids.long()
    whole = token_logprobs(hidden, weight, target_ids, 10, bias=bias)
    for chunk_size in (1, 3, 7, 100):
        torch.testing.assert_close(token_logprobs(hidden, weight, target_ids, chunk_size, bias=bias), whole)


@pytest.mark.parametrize("trains_head", [False, True])
def test_empty_input_gives_empty_output_and_zero_gradients(trains_head):
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(5, 4, requires_grad=trains_head)
    got = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,)
    got.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize(
    ("hidden", "weight"), [((3, 4), (5, 3)), ((3,), (5, 3)), ((1, 3, 4), (5, 4)), ((3, 4), (5, 4, 1))]
)
def test_shape_mismatch_of_hidden_and_head_is_refused(hidden, weight):
    with pytest.raises(ValueError, match="head_weight"):
        token_logprobs(torch.zeros(hidden), torch.zeros(weight), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("targets", [(2,), (3, 1), ()])
def test_shape_mismatch_of_targets_is_refused(targets):
    with pytest.raises(ValueError, match="target"):
        token_logprobs(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(targets, dtype=torch.long))


# ---- Memory ----


def test_frozen_head_saves_only_the_hidden_gradient():
    num_positions, vocab_size, width = 12, 50, 6
    hidden, weight, _, target_ids, _ = draw(num_positions, vocab_size, width, 1)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = token_logprobs(hidden, weight, target_ids, 4)
    assert saved == [(num_positions, width)]
    logps.sum().backward()
    assert weight.grad is None
    assert hidden.grad.shape == hidden.shape


def test_trained_head_saves_only_its_inputs():
    hidden, weight, bias, target_ids, _ = draw(12, 50, 6, 1)
    hidden, weight, bias = (tensor.float().requires_grad_() for tensor in (hidden, weight, bias))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        token_logprobs(hidden, weight, target_ids, 4, bias=bias)
    assert sorted(saved) == [(12,), (12, 6), (50,), (50, 6)]


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation allocates, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_full_logits_are_never_allocated(trains_head, softcap):
    num_positions, vocab_size, width, chunk_size = 64, 40, 5, 4
    hidden, weight, _, target_ids, _ = draw(num_positions, vocab_size, width, 2)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_(trains_head)
    with LargestOutput() as watch:
        token_logprobs(hidden, weight, target_ids, chunk_size, softcap=softcap, scale=2.0).sum().backward()
    assert watch.num_operations > num_positions // chunk_size
    assert watch.numel <= max(chunk_size * vocab_size, num_positions * width, vocab_size * width)
    assert watch.numel < num_positions * vocab_size / 4

    with LargestOutput() as watch:  # it does see the full logits of the dense formula
        dense_logprobs(hidden, weight, target_ids, softcap=softcap).sum().backward()
    assert watch.numel == num_positions * vocab_size


def test_default_chunk_holds_at_most_512_positions_and_256_mib_of_logits():
    assert [choose_chunk_size(2**bits) for bits in (10, 15, 17, 18, 20, 23)] == [512, 512, 512, 256, 64, 16]
    num_positions, vocab_size, chunk_size = 65, 2**20, 64
    hidden, weight, target_ids = torch.ones(num_positions, 1), torch.ones(vocab_size, 1), torch.zeros(num_positions)
    with LargestOutput() as watch:
        token_logprobs(hidden, weight, target_ids.long())
    assert watch.numel == chunk_size * vocab_size
    assert watch.numel * 4 == 256 * 2**20


# ---- bfloat16 ----


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_bfloat16_is_as_accurate_as_the_dense_formula(trains_head, is_autocast, softcap, spread):
    hidden, weight, _, target_ids, upstream = draw(256, 300, 64, 3, spread)
    rounded = [tensor.bfloat16() for tensor in (hidden, weight)]
    truth = [tensor.double().requires_grad_() for tensor in rounded]
    # Half the targets are likely tokens, for which a naive bfloat16 gradient loses 1 - p entirely.
    target_ids[::2] = (truth[0] @ truth[1].T).argmax(-1)[::2]
    want = dense_logprobs(*truth, target_ids, softcap=softcap)
    want.backward(upstream)

    def run(function):
        inputs = [tensor.float() if is_autocast else tensor.clone() for tensor in rounded]
        inputs[0].requires_grad_()
        inputs[1].requires_grad_(trains_head)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            logps = function(*inputs)
        logps.backward(upstream.float())
        assert logps.dtype == torch.float32
        return logps.detach(), inputs

    got, ours = run(lambda h, w: token_logprobs(h, w, target_ids, 50, softcap=softcap))
    dense, theirs = run(lambda h, w: dense_logprobs(h, w, target_ids, softcap=softcap))

    assert relative_error(got, want.detach()) <= 1.001 * relative_error(dense, want.detach())
    # One more rounding to bfloat16 for the gradient from the forward pass, and one per chunk for the head's.
    for mine, reference, exact, slack in zip(ours, theirs, truth, (1.15, 1.25), strict=True):
        if mine.requires_grad:
            assert mine.grad.dtype == mine.dtype
            error = relative_error(mine.grad, exact.grad)
            assert error <= slack * relative_error(reference.grad, exact.grad)
            assert error < 0.01


@pytest.mark.parametrize("trains_head", [False, True])
def test_float16_gradient_is_finite_over_a_large_vocabulary(trains_head):
    # 70,000 equally likely tokens: the sum of exponentials exceeds the largest float16, 65,504.
    hidden = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.linspace(-1, 1, 70_000).half()[:, None].repeat(1, 4).requires_grad_(trains_head)
    target_ids = torch.tensor([0, 69_999])
    logps = token_logprobs(hidden, weight, target_ids, 1)
    logps.sum().backward()
    assert logps.tolist() == pytest.approx([-math.log(70_000)] * 2, rel=1e-6)
    # d logp / d hidden is the target's row minus the mean row, which is about zero.
    assert torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(hidden.grad, weight.detach()[target_ids], atol=1e-2, rtol=0)
    assert weight.grad is None or torch.isfinite(weight.grad).all()


def test_hidden_states_are_cast_to_the_dtype_of_the_head():
    hidden, weight, _, target_ids, _ = draw(5, 9, 4, 4)
    hidden = hidden.float().requires_grad_()
    weight = weight.bfloat16()
    got = token_logprobs(hidden, weight, target_ids)
    torch.testing.assert_close(got, token_logprobs(hidden.bfloat16(), weight, target_ids))
    got.sum().backward()
    assert hidden.grad.dtype == torch.float32


# ---- The heads of real models ----

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
MODELS = {
    "Llama": SMALL,
    "Qwen2": SMALL | {"tie_word_embeddings": True},
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Gemma3Text": SMALL | {"head_dim": 8},
    "Cohere": SMALL | {"logit_scale": 0.25},
    "Cohere2": SMALL | {"logit_scale": 0.25},
    "Granite": SMALL | {"logits_scaling": 4.0},
    "Phi": SMALL,
    "GPTNeoX": SMALL,
    "GPT2": GPT2,
}


def make_named(name: str, **changes):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = getattr(transformers, f"{name}Config")(**(MODELS[name] | changes))
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name.removesuffix('Text')}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval()
        for parameter in model.parameters():  # biases and norms, which are initialized with zeros and ones
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_match_the_logits_of_real_architectures(name):
    model = make_named(name)
    head = get_head(model)
    ids = torch.tensor([[5, 3, 60, 11, 2, 40, 7]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        ours = token_logprobs(
            hidden, head.weight, ids[0, 1:], 4, bias=head.bias, softcap=head.softcap, scale=head.scale
        )
        logits = model(input_ids=ids).logits[0, :-1]
    assert ours.tolist() == pytest.approx(dense_from_logits(logits, ids[0, 1:]).tolist(), abs=1e-5)
    check_head(model)


def dense_from_logits(logits: Tensor, target_ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "softcap", "scale", "has_bias"),
    [
        ("Llama", None, 1.0, False),
        ("Gemma2", 3.0, 1.0, False),
        ("Cohere", None, 0.25, False),
        ("Granite", None, 0.25, False),
        ("Phi", None, 1.0, True),
        ("GPT2", None, 1.0, False),
    ],
)
def test_head_reads_logit_transforms_from_the_config(name, softcap, scale, has_bias):
    head = get_head(make_named(name))
    assert (head.softcap, head.scale, head.bias is not None) == (softcap, scale, has_bias)
    assert head.weight.shape == (64, 32)


def test_fully_trained_head_of_an_adapter_is_used():
    model = make_model(40)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    head = get_head(unwrap_peft(adapted))
    trained = [name for name, parameter in adapted.named_parameters() if parameter is head.weight]
    assert trained == ["base_model.model.lm_head.modules_to_save.default.weight"]
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.mul_(2.0)
    check_head(adapted)


def test_lora_on_the_head_is_refused():
    adapted = get_peft_model(make_model(40), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"^lora_target_modules:"):
        check_head(adapted)


@pytest.mark.parametrize("layer", [None, torch.nn.Identity()])
def test_model_without_a_linear_head_is_refused(layer):
    model = make_model(40)
    model.lm_head = layer
    with pytest.raises(ConfigError, match=f"got {type(layer).__name__}$"):
        get_head(model)


class DoubledLlama(LlamaForCausalLM):
    """Scales its logits by a factor that is not in the config."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_unknown_logit_transform_is_refused():
    model = DoubledLlama(make_model(40).config)
    with pytest.raises(UserError, match=r"^DoubledLlama: .* logits by [\d.]+, expected at most 0\.001"):
        check_head(model)


def test_check_head_restores_the_mode_of_the_model():
    model = make_model(40)
    for is_training in (True, False):
        model.train(is_training)
        check_head(model)
        assert model.training == is_training
        assert all(module.training == is_training for module in model.modules())


def test_head_has_no_transforms_by_default():
    head = Head(torch.zeros(2, 2))
    assert (head.bias, head.softcap, head.scale) == (None, None, 1.0)


# ---- Several columns ----


def dense_columns(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, column_ids: Tensor, bias: Tensor | None, **options: float | None
) -> Tensor:
    """The same as `column_logprobs`, from all logits [N, V] at once."""
    logits = (hidden @ weight.T + (0.0 if bias is None else bias)) * (options["scale"] or 1.0)
    if options["softcap"] is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logps = logits.log_softmax(-1)
    is_other = torch.ones_like(logps, dtype=torch.bool).scatter(1, column_ids, False)
    rest = torch.where(is_other, logps, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logps.gather(1, target_ids[:, None]), logps.gather(1, column_ids), rest], 1)


@settings(max_examples=60, deadline=None)
@given(
    num_positions=st.integers(1, 7),
    vocab_size=st.integers(4, 23),
    num_columns=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    chunk_size=st.sampled_from([1, 3, None]),
    has_bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 3.0]),
    trained=st.sets(st.sampled_from(["hidden", "weight", "bias"])),
)
def test_columns_match_the_dense_formula(
    num_positions, vocab_size, num_columns, seed, chunk_size, has_bias, softcap, scale, trained
):
    hidden, weight, bias, target_ids, _ = draw(num_positions, vocab_size, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    # Some columns repeat another one, as padding does, and some are the target.
    column_ids = torch.randint(vocab_size, (num_positions, num_columns), generator=generator)
    upstream = torch.randn(num_positions, num_columns + 2, generator=generator, dtype=torch.float64)
    inputs = {"hidden": hidden, "weight": weight} | ({"bias": bias} if has_bias else {})
    ours = {name: value.float().requires_grad_(name in trained) for name, value in inputs.items()}
    truth = {name: value.detach().double().requires_grad_(name in trained) for name, value in ours.items()}
    options = {"softcap": softcap, "scale": scale}

    got = column_logprobs(
        ours["hidden"], ours["weight"], target_ids, column_ids, chunk_size, bias=ours.get("bias"), **options
    )
    want = dense_columns(truth["hidden"], truth["weight"], target_ids, column_ids, truth.get("bias"), **options)
    assert got.dtype == torch.float32
    assert got.double().flatten().tolist() == pytest.approx(want.flatten().tolist(), rel=1e-4, abs=1e-4)
    if not (trained & set(inputs)):
        assert not got.requires_grad
        return
    got.backward(upstream.float())
    want.backward(upstream)
    for name in trained & set(inputs):
        bound = 1e-4 * max(1.0, truth[name].grad.abs().max().item())
        assert (ours[name].grad.double() - truth[name].grad).abs().max().item() <= bound


def test_the_rest_is_accurate_where_the_columns_have_nearly_all_of_the_mass():
    # Logits 0 and -20 three times: the rest is 3 exp(-20) = 6.2e-9, which 1 - p in float32 would make 0.
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [-20.0], [-20.0], [-20.0]])
    got = column_logprobs(hidden, weight, torch.tensor([0]), torch.tensor([[0]]))
    assert got[0, 2].item() == pytest.approx(math.log(3) - 20, rel=1e-6)
    got[0, 2].backward()
    assert hidden.grad.item() == pytest.approx(-20, rel=1e-5)


def test_columns_of_the_whole_vocabulary_leave_a_finite_rest():
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [1.0]])
    got = column_logprobs(hidden, weight, torch.tensor([0]), torch.tensor([[0, 1]]))
    assert got[0, 3].item() < -60
    got[0, :3].sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_only_taught_positions_get_columns():
    hidden, weight, bias, target_ids, _ = (tensor.float() for tensor in draw(5, 11, 4, 3))
    target_ids = target_ids.long()
    is_taught = torch.tensor([False, True, False, False, True])
    column_ids = torch.tensor([[1, 2], [3, 4]])
    hidden.requires_grad_()
    tokens, columns = taught_logprobs(hidden, weight, target_ids, is_taught, column_ids, 2, bias=bias)
    want = column_logprobs(hidden[is_taught], weight, target_ids[is_taught], column_ids, bias=bias)
    assert torch.equal(columns, want[:, 1:])
    whole = token_logprobs(hidden, weight, target_ids, bias=bias)
    torch.testing.assert_close(tokens, whole)
    (grad,) = torch.autograd.grad(tokens.sum(), hidden)
    (expected,) = torch.autograd.grad(whole.sum(), hidden)
    torch.testing.assert_close(grad, expected)


def test_no_taught_position_gives_no_columns():
    hidden, weight, _, target_ids, _ = (tensor.float() for tensor in draw(3, 11, 4, 3))
    nothing = torch.zeros(3, dtype=torch.bool), torch.zeros(0, 1, dtype=torch.long)
    tokens, columns = taught_logprobs(hidden.requires_grad_(), weight, target_ids.long(), *nothing)
    assert columns.shape == (0, 2)
    (tokens.sum() + columns.sum()).backward()
    torch.testing.assert_close(tokens, token_logprobs(hidden, weight, target_ids.long()))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_top_columns_are_those_of_the_guided_teacher(guidance):
    hidden, weight, _, target_ids, _ = (tensor.float() for tensor in draw(700, 13, 4, 5))
    reference = draw(700, 13, 4, 6)[0].float()
    logps = (hidden @ weight.T).log_softmax(-1)
    if guidance:
        logps = guide(logps, (reference @ weight.T).log_softmax(-1), guidance)
    options = {"target_ids": target_ids.long(), "guidance": guidance}
    ids, got = find_top_columns(hidden, weight, reference if guidance else None, num_columns=3, **options)
    torch.testing.assert_close(got, logps.topk(3).values)
    is_supported = got > -torch.inf
    torch.testing.assert_close(logps.gather(1, ids)[is_supported], got[is_supported])
    assert torch.equal(ids[~is_supported], ids[:, :1].expand(-1, 3)[~is_supported]), "no other tokens"
    ids, got = find_top_columns(hidden, weight, reference if guidance else None, num_columns=None, **options)
    assert torch.equal(ids[:, 0], target_ids.long())
    torch.testing.assert_close(got[:, 0], logps.gather(1, ids)[:, 0].clamp(min=-30))
