"""What each rank of `test_scale.py` runs: CUT on weights that FSDP2 shards over the ranks.

Each rank compares its loss and gradients with those of the whole model over the records of all ranks.
"""

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cutlm.losses import ALL_PARTS, combine_parts
from cutlm.model.collator import CutCollator
from cutlm.model.forward import ForwardLayout, run_inside, score_batch
from cutlm.model.loading import compile_layers, unwrap_peft
from cutlm.training.config import CUTConfig
from cutlm.training.trainer import compute_batch_loss, count_batch

VOCAB_SIZE = 60
START = list(range(30))
# The second rank has no unsatisfactory record. If the number of passes depended on the batch, it would make fewer.
RECORDS_OF_RANKS: list[list[dict[str, Any]]] = [
    [
        {"prompt_ids": [*START, 3], "judged_prompt_ids": [*START, 4, 5], "response_ids": [6, 7, 8]},
        {"prompt_ids": [9], "judged_prompt_ids": [9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "response_ids": [40, 41]},
        {"prompt_ids": [1, 2], "judged_prompt_ids": None, "response_ids": [9, 9]},
    ],
    [{"prompt_ids": [11, 12, 13], "judged_prompt_ids": None, "response_ids": [14, 15, 16, 17]}],
]
KINDS = ("full", "lora", "tied", "checkpointed", "compiled")
SHARDINGS = ("root", "separate head", "accelerate")
collate = CutCollator()


def make(kind: str) -> nn.Module:
    num_layers = 1 if kind == "compiled" else 2
    model = make_model(VOCAB_SIZE, tie_word_embeddings=kind == "tied", num_hidden_layers=num_layers).train()
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind not in ("lora", "compiled"):
        return model
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return adapted


def shard(model: nn.Module, sharding: str) -> nn.Module:
    if sharding == "accelerate":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator: Any = SimpleNamespace(
            state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0, device=torch.device("cpu")
        )
        return fsdp2_prepare_model(accelerator, model)
    language_model: Any = unwrap_peft(model)
    for layer in language_model.model.layers:
        fully_shard(layer)
    if sharding == "separate head":
        fully_shard(language_model.lm_head)
    return fully_shard(model)


def compute_loss(
    model: nn.Module,
    rows: list[dict[str, Any]],
    counts: tuple[float, float],
    layout: ForwardLayout,
    needs_judged_grad: bool,
) -> Tensor:
    """The share of some records in the loss of a step, as in `CUTTrainer.compute_loss`."""

    def score(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return score_batch(module, batch, needs_judged_grad=needs_judged_grad, layout=layout)

    batch = collate(rows)
    outputs = compute_batch_loss(run_inside(model, model, score, batch), batch, CUTConfig(use_cpu=True))
    return combine_parts(outputs.contrast, outputs.likelihood, *counts)


def collect_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}


def compare(kind: str, sharding: str, layout: ForwardLayout) -> None:
    every_row = list(itertools.chain(*RECORDS_OF_RANKS))
    counts = count_batch(collate(every_row), "token", ALL_PARTS)
    whole = make(kind)
    copied = copy.deepcopy(whole)
    if kind == "compiled":
        compile_layers(copied, backend="aot_eager")
    sharded = shard(copied, sharding)
    # A second step shows whether the first one left anything behind; another graph would have to be compiled.
    for needs_judged_grad in (True, kind == "compiled"):
        want = compute_loss(whole, every_row, counts, ForwardLayout(), needs_judged_grad)
        want.backward()
        loss = compute_loss(sharded, RECORDS_OF_RANKS[dist.get_rank()], counts, layout, needs_judged_grad)
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=0)
        wanted, got = collect_gradients(whole), collect_gradients(sharded)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), (kind, sharding, layout, name)
        assert len(wanted) == sum(weight.requires_grad for weight in whole.parameters())
        whole.zero_grad()
        sharded.zero_grad()
    if dist.get_rank() == 0:
        print(f"equal: {kind}, {sharding}, {layout.has_prefix_mask}", flush=True)


def list_comparisons() -> list[tuple[str, str, bool]]:
    """Kind of model, how it is sharded, and whether shared prefixes run once."""
    comparisons = list(itertools.product(KINDS, SHARDINGS, (False, True)))
    # A tied head cannot be sharded separately, because torch refuses one weight in two groups. Compiling takes long.
    return [
        (kind, sharding, has_prefix_mask)
        for kind, sharding, has_prefix_mask in comparisons
        if (kind, sharding) != ("tied", "separate head")
        and (kind != "compiled" or (sharding == "accelerate" and has_prefix_mask))
    ]


def main() -> int:
    """Compare sharded models with whole ones; prints a line for each comparison that passed."""
    dist.init_process_group("gloo")
    for kind, sharding, has_prefix_mask in list_comparisons():
        compare(kind, sharding, ForwardLayout(is_single_pass=True, has_prefix_mask=has_prefix_mask))
    dist.destroy_process_group()
    return 0
