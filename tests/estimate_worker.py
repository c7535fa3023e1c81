"""Training runs for `test_estimate.py`, each in its own process, forked after the imports.

Prints a JSON line for each run with its peak memory above that of the loaded model.
"""

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from cutlm import CUTConfig, CUTTrainer

NUM_TOKENS, MICRO_BATCHES = 1024, 2


def read_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def train(kind: str, is_checkpointed: bool, shape: dict[str, int]) -> int:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    # A satisfactory record of 256 tokens is one sequence.
    row = {
        "prompt_ids": list(range(1, 65)),
        "judged_prompt_ids": None,
        "response_ids": list(range(1, 194)),
        "is_satisfactory": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = CUTConfig(
            output_dir=folder,
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=NUM_TOKENS // 256,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_tokens_per_batch=NUM_TOKENS,
            activation_checkpointing=is_checkpointed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"])
        trainer = CUTTrainer(model, args, [row] * 64, peft_config=lora if kind == "lora" else None)
        # The first pass also allocates work space of the matrix products, which is kept.
        trainer.compute_loss(trainer.model.train(), trainer.data_collator([row] * (NUM_TOKENS // 256))).backward()
        trainer.model.zero_grad()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = read_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        trainer.train()
    return read_memory("VmHWM") - before


if __name__ == "__main__":
    shape = json.loads(sys.argv[1])
    # The other two combinations take as long again, and have the same terms.
    for kind, is_checkpointed in (("lora", False), ("full", True)):
        if not (child := os.fork()):
            # What allocates once and for all, such as lazy imports, happens in a tiny run before the measured one.
            train(kind, is_checkpointed, shape | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 256})
            print(json.dumps([kind, is_checkpointed, train(kind, is_checkpointed, shape)]), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, (kind, is_checkpointed)
