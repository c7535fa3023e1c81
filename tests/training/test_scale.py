"""Several processes that share one model: FSDP2 gives the gradient of the whole model; recipes for Accelerate."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import make_model
from torch import nn

from cutlm import CUTConfig, CUTTrainer
from cutlm.errors import ConfigError
from cutlm.model.forward import run_inside
from cutlm.training.trainer import _keep_outputs_exact

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = ("full", "lora", "tied", "checkpointed", "compiled")
ROW = {"prompt_ids": [1, 2], "judged_prompt_ids": [1, 2, 3], "response_ids": [4, 5], "is_satisfactory": False}


def test_sharded_weights_give_the_loss_and_gradient_of_the_whole_model() -> None:
    worker = Path(__file__).parents[1] / "fsdp_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    result = subprocess.run([*command, ",".join(KINDS)], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    # Three layouts, with a common beginning run once or not; a tied head has no layout of its own, and compiled layers
    # are tried in one.
    assert result.stdout.count("the same: ") == 2 * (3 + 3 + 2 + 3 + 1), result.stdout


def test_hooks_on_the_module_itself_run_around_a_lent_forward() -> None:
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    assert run_inside(module, module, lambda inner, factor: factor * 2, 3) == 6
    assert seen == ["before", "after"]
    assert "forward" not in vars(module)


def test_accelerates_mixed_precision_would_round_log_probs_and_ours_does_not() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    # The two nearest to -10 are 0.0625 apart: -10 and -10.0625.
    assert torch.tensor(-10.02).bfloat16().item() == -10
    _keep_outputs_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype, policy.reduce_dtype) == (torch.bfloat16, None, torch.float32)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_launch_asks_for_is_known_before_anything_is_loaded(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not CUTConfig(use_cpu=True).is_sharded
    monkeypatch.setenv(variable, "true")
    args: Any = SimpleNamespace(fsdp=None, deepspeed=None)
    assert CUTConfig.is_sharded.fget(args)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="max_tokens_per_batch: expected none under FSDP and DeepSpeed"):
        CUTConfig(use_cpu=True, max_tokens_per_batch=100)


def test_tokens_are_not_blamed_by_weights_that_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    args = CUTConfig(use_cpu=True, detector="frozen", report_to="none")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ConfigError, match=r"^detector: frozen needs the whole model before training, .* run cutlm blame"
    ):
        CUTTrainer(make_model(10), args, [ROW])


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
        # With another one, the Trainer saves no model at the end.
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        # The Trainer refuses it together with `activation_checkpointing` of the training settings.
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
        assert config.fsdp_config["fsdp_offload_params"] is (name == "fsdp2-offload")
    if kind == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_init_flag"] is True
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
