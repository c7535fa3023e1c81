"""Weights sharded over ranks give the gradient of the whole model; and the recipes for Accelerate."""

from pathlib import Path

import fsdp_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from commands import run_ranks
from torch import nn

from cutlm.model.forward import run_inside
from cutlm.training.trainer import _keep_outputs_exact

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def test_sharded_weights_give_the_loss_and_gradient_of_the_whole_model() -> None:
    first, second = run_ranks(fsdp_worker.main)
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr[-4000:] + second.stderr[-4000:]
    compared = [line for line in first.stdout.splitlines() if line.startswith("equal: ")]
    assert compared == [f"equal: {', '.join(map(str, names))}" for names in fsdp_worker.list_comparisons()]


def test_hooks_of_the_module_run_around_a_function_run_inside_it() -> None:
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    assert run_inside(module, module, lambda inner, factor: factor * 2, 3) == 6
    assert seen == ["before", "after"]
    assert "forward" not in vars(module)


def test_fsdp_does_not_round_log_probabilities_to_bfloat16() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16, "Accelerate's default"
    # Its two values nearest to -10.02 are -10 and -10.0625.
    assert torch.tensor(-10.02).bfloat16().item() == -10
    _keep_outputs_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype, policy.reduce_dtype) == (torch.bfloat16, None, torch.float32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("fsdp2-offload", DistributedType.FSDP),
        ("zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_each_recipe(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 8, "bf16")
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
        # With any other type the Trainer saves no model at the end.
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        # The Trainer refuses it together with `activation_checkpointing` of the training settings.
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
        assert config.fsdp_config["fsdp_offload_params"] is (name == "fsdp2-offload")
    if kind == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_init_flag"] is True
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
