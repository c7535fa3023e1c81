"""One round of alignment in Python, on the tiny world: generate, judge, blame, train, merge, generate again.

    python examples/python_api.py [FOLDER]

It takes less than half a minute on two CPU cores. For a model of your own, replace `base`, the instructions and the
judge.
"""

import sys
from pathlib import Path

from peft import LoraConfig
from transformers import AutoTokenizer

from cutlm import CUTConfig, CUTTrainer, blame, generate, judge, merge
from cutlm.world.base import base_path
from cutlm.world.judge import judge as oracle
from cutlm.world.tasks import list_tasks


def align(folder: Path, num_instructions: int = 200, num_epochs: int = 3) -> tuple[float, float]:
    """Align the tiny world's base model once.

    Returns:
        The share of satisfactory responses to held-out instructions, before and after.
    """
    base = str(base_path())
    instructions = [task.instruction for task in list_tasks("train")[:num_instructions]]
    held_out = [task.instruction for task in list_tasks("test")[:num_instructions]]
    settings = {"template": "alpaca", "max_new_tokens": 48, "device": "cpu"}

    # The model answers, and a judge says what is wrong: here a Python function, for you perhaps a server.
    records, failures = judge(generate(base, instructions, **settings), rules=oracle)
    num_satisfactory = sum(record.is_satisfactory for record in records)
    print(f"{len(records)} records, {num_satisfactory} satisfactory; {len(failures)} responses without a judgment")

    # Which tokens does each judgment object to?
    scores = blame(base, records, threshold=1.1, device="cpu")
    print("flagged:", [token for token, flag in zip(scores[0].tokens, scores[0].is_flagged, strict=True) if flag])

    # Train on the flags with LoRA, merge, and compare.
    trainer = CUTTrainer(
        model=base,
        args=CUTConfig(
            output_dir=str(folder / "adapter"),
            num_train_epochs=num_epochs,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=scores,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    merged = merge(folder / "adapter", folder / "merged", base=base)

    before, after = (
        judge(generate(model, held_out, **settings), rules=oracle).records for model in (base, str(merged))
    )
    shares = tuple(sum(record.is_satisfactory for record in judged) / len(judged) for judged in (before, after))
    print(f"satisfactory responses to {len(held_out)} held-out instructions: {shares[0]:.0%} -> {shares[1]:.0%}")
    return shares[0], shares[1]


if __name__ == "__main__":
    align(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/python_api"))
