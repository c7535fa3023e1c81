"""Measure time and memory of training on judged records: released style, cutlm, the floor, and TRL's trainers.

  python benchmarks/train_step.py --records records.json

    released   computed as by the released code: both contexts of every record (dummy rows for satisfactory ones) in one
               batch, padded to the longest, float32 probabilities of the whole vocabulary at every position, copied for
               each part of the loss, and eager attention, the default of transformers at the time
    cutlm      `CUTTrainer` with detector current, as in `cutlm train`
    frozen     `CUTTrainer` on token scores: known flags, the plain context only
    floor      only the body, forward and backward over the same tokens, and the head's two matrix products at the
               response positions
    dpo, sft   TRL's `DPOTrainer` and `SFTTrainer` on the same prompts and responses (pairs of equal length)

Each variant trains LoRA of rank 16 on the MLP, or with --all_linear on all layers, of the same model on the first
unsatisfactory records of a file (by default synthetic records), one step per micro-batch. Loading and encoding are not
measured. Variants take turns; results are medians. Runs after the first turn that would exceed --limit are skipped."""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import add_shape_arguments, make_model, make_parser, make_tokenizer, read_peak_bytes, run_benchmark

VARIANTS = ("released", "cutlm", "frozen", "floor", "dpo", "sft")
_TARGETS = ["gate_proj", "up_proj", "down_proj"]
# Without the sensitivity of the model, which is measured once before training.
_SETTINGS: dict[str, Any] = {
    "threshold": 1.1,
    "unlikelihood_weight": 1.0,
    "gamma": 0.0,
    "sensitivity_records": 0,
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--records", metavar="FILE", help="judged records (default: synthetic)")
    parser.add_argument("--num_records", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4, help="records per micro-batch (default: 4)")
    parser.add_argument("--template", choices=("alpaca", "chat"), default="alpaca")
    parser.add_argument("--num_tokens", type=int, help="tokens of every synthetic record (default: varying)")
    parser.add_argument("--bf16", action="store_true", help="use autocast, and on a GPU bfloat16 weights")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument(
        "--torch_compile",
        action="store_true",
        help="compile all variants but released in a first run that is not timed",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add_shape_arguments(parser)
    parser.add_argument("--limit", type=float, default=540, help="seconds for all turns (default: 540)")
    args = parser.parse_args()
    run_benchmark(
        args,
        args.variants,
        lambda args: RUNS[args.variant](args),
        summarize,
        prepare=prepare,
        limit=args.limit,
    )


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for variant, result in results.items():
        known = {"seconds": result.get("failed"), "peak GB": ""}
        if "failed" not in result:
            known = {"seconds": result["seconds"], "peak GB": result["peak"] / 1e9}
        rows.append({"variant": variant} | known)
    return rows, compare(results)


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the time or memory of two variants."""
    figures = {}
    for name, one, other, unit in (
        ("speedup_over_released_style", "released", "cutlm", "seconds"),
        ("memory_ratio_over_released_style", "released", "cutlm", "peak"),
        ("time_over_floor", "cutlm", "floor", "seconds"),
        ("time_over_trl_dpo", "cutlm", "dpo", "seconds"),
        ("time_over_trl_sft", "cutlm", "sft", "seconds"),
        ("frozen_time_over_trl_sft", "frozen", "sft", "seconds"),
    ):
        if unit in results.get(one, {}) and unit in results.get(other, {}):
            figures[name] = results[one][unit] / results[other][unit]
    return figures


# ---- Shared by the variants ----


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the tokenizer and records for the processes of the variants.

    Returns:
        The number of tokens of both contexts of all records, and of those in responses.
    """
    records = _read_records(args)
    fields = ("instruction", "input", "output", "judgment")
    texts = [str(record.get(name) or "") for record in records for name in fields]
    tokenizer = make_tokenizer(texts, args.vocab_size)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained(folder)
    chosen = [record for record in records if record["judgment"] is not None][: args.num_records]
    if len(chosen) < args.num_records:
        sys.exit(f"expected {args.num_records} unsatisfactory records, got {len(chosen)}; set --num_records")
    (folder / "records.json").write_text(json.dumps(chosen))
    rows = _encode(args, tokenizer, chosen)
    prompts = [len(row["prompt_ids"]) + len(row["judged_prompt_ids"]) for row in rows]
    num_responses = sum(2 * len(row["response_ids"]) for row in rows)
    return {"num_tokens": sum(prompts) + num_responses, "num_response_tokens": num_responses}


def _read_records(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.records:
        from cutlm import load_records

        return [
            record.model_dump(include={"instruction", "input", "output"})
            | {"judgment": None if record.is_satisfactory else record.judgment}
            for record in load_records(args.records)
        ]
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(4000)]

    def write(shortest: int, longest: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(shortest, longest))) + "."

    if args.num_tokens:
        # A word has about three tokens.
        num = args.num_tokens // 3
        shape = {"instruction": write(num // 4, num // 4), "input": "", "output": write(num // 2, num // 2)}
        return [shape | {"judgment": write(num // 8, num // 8)} for _ in range(args.num_records)]
    # About the lengths of records of an online iteration.
    return [
        {"instruction": write(10, 60), "input": "", "output": write(120, 480), "judgment": write(20, 80)}
        for _ in range(args.num_records)
    ]


def _load(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], Any]:
    """Load the tokenizer and the records, and make the model without adapter."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    folder = Path(args.folder)
    return AutoTokenizer.from_pretrained(folder), json.loads((folder / "records.json").read_text()), make_model(args)


def adapt(model: Any, args: argparse.Namespace) -> Any:
    """Add the adapter, for a training loop without trainer."""
    from peft import get_peft_model

    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, make_adapter(args.all_linear)).train()


def make_adapter(is_on_all_layers: bool = False) -> Any:
    from peft import LoraConfig

    targets = "all-linear" if is_on_all_layers else _TARGETS
    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def _encode(args: argparse.Namespace, tokenizer: Any, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from cutlm.data.records import JudgedRecord
    from cutlm.prompting.encoding import Encoder
    from cutlm.prompting.rows import encode_records

    encoder = Encoder(tokenizer, args.template)
    judged = [JudgedRecord(**record) for record in records]
    return encode_records(judged, [""] * len(judged), encoder, 100_000).rows.to_list()


def make_settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Settings of every trainer."""
    import torch

    return {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": args.bf16,
        "activation_checkpointing": args.activation_checkpointing,
        "torch_compile": args.torch_compile,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }


def time_trainer(trainer: Any) -> dict[str, Any]:
    if trainer.args.torch_compile:
        trainer.train()
        trainer.state.log_history.clear()
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began  # logging the loss has synchronized with the GPU
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "peak": read_peak_bytes(), "first_loss": losses[0]}


def time_loop(args: argparse.Namespace, model: Any, batches: Sequence[Any], find_loss: Any) -> dict[str, Any]:
    """Time a training loop without trainer."""
    import torch

    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    losses = []
    began = time.perf_counter()
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            loss = find_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"seconds": time.perf_counter() - began, "peak": read_peak_bytes(), "first_loss": losses[0]}


def add_flags(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a frozen detector. Every tenth token is flagged; which ones does not affect the cost."""
    flags = [index % 10 == 0 for index in range(len(row["response_ids"]))]
    known = {"judged_prompt_ids": None, "is_satisfactory": False}
    return row | known | {"is_flagged": flags, "weights": list(map(float, flags))}


# ---- The variants ----


def run_cutlm(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm import CUTConfig, CUTTrainer

    tokenizer, records, model = _load(args)
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(**make_settings(args, folder), **_SETTINGS, template=args.template, max_length=100_000)
        trainer = CUTTrainer(
            model, config, records, processing_class=tokenizer, peft_config=make_adapter(args.all_linear)
        )
        return time_trainer(trainer)


def run_frozen(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm import CUTConfig, CUTTrainer

    tokenizer, records, model = _load(args)
    rows = [add_flags(row) for row in _encode(args, tokenizer, records)]
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(
            **make_settings(args, folder), **_SETTINGS, detector="frozen", template=args.template, max_length=100_000
        )
        trainer = CUTTrainer(model, config, rows, peft_config=make_adapter(args.all_linear))
        return time_trainer(trainer)


def run_released(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer, records, model = _load(args)
    model.set_attn_implementation("eager")
    rows = _encode(args, tokenizer, records)
    batches = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
    return time_loop(args, adapt(model, args), batches, find_released_loss)


def find_released_loss(model: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """CUT's loss computed as by the released code, with several copies of the probabilities of the whole vocabulary.

    Both contexts are rows of one batch, padded to the longest. Each part of the loss copies the probabilities, and the
    likelihood also their logarithms.
    """
    import torch

    judged = [row["judged_prompt_ids"] or row["prompt_ids"] for row in rows]
    plain = [row["prompt_ids"] for row in rows]  # including dummy rows for satisfactory records
    inputs, labels = _pad([*judged, *plain], [*rows, *rows], model.device)
    probs = model(**inputs).logits.float().softmax(-1)
    half, vocab_size = len(rows), probs.shape[-1]
    labels = labels[:, 1:]
    logs = probs[:half, :-1].contiguous().view(-1, vocab_size).log()
    likelihood = torch.nn.functional.nll_loss(logs, labels[:half].reshape(-1))
    is_judged = torch.tensor([row["judged_prompt_ids"] is not None for row in rows], device=model.device)
    if not is_judged.any():
        return likelihood
    shifted = probs[:, :-1].contiguous().gather(2, labels.clamp(min=0)[..., None])[..., 0]
    with_judgment = shifted[:half][(labels[:half] >= 0) & is_judged[:, None]]
    without = shifted[half:][(labels[half:] >= 0) & is_judged[:, None]]
    is_flagged = with_judgment.detach() > _SETTINGS["threshold"] * without.detach()
    contrast = torch.where(is_flagged, 1.0 - without, without).clamp(min=1e-5).log()
    contrast = torch.where(is_flagged, _SETTINGS["unlikelihood_weight"] * contrast, contrast)
    return (likelihood - contrast.mean()) / 2


def _pad(prompts: Sequence[list[int]], rows: Sequence[dict[str, Any]], device: Any) -> tuple[dict[str, Any], Any]:
    import torch

    ids = [[*prompt, *row["response_ids"]] for prompt, row in zip(prompts, rows, strict=True)]
    width = max(map(len, ids))
    inputs = torch.tensor([[*one, *[0] * (width - len(one))] for one in ids])
    labels = torch.tensor(
        [
            [*[-100] * len(prompt), *row["response_ids"], *[-100] * (width - len(prompt) - len(row["response_ids"]))]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    )
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    return {"input_ids": inputs.to(device), "attention_mask": mask.to(device)}, labels.to(device)


def run_floor(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm.model.collator import CutCollator
    from cutlm.model.loading import compile_layers

    tokenizer, records, model = _load(args)
    rows = _encode(args, tokenizer, records)
    batches = [CutCollator()(rows[start : start + args.batch_size]) for start in range(0, len(rows), args.batch_size)]
    adapted = adapt(model, args)
    if args.torch_compile:
        compile_layers(adapted)
        time_loop(args, adapted, batches, find_floor)
    return time_loop(args, adapted, batches, find_floor)


def find_floor(model: Any, batch: dict[str, Any]) -> Any:
    """An arbitrary number that depends on every response position, at the lowest cost."""
    import torch

    inner = model.get_base_model()
    weight = inner.lm_head.weight
    states = []
    sequences = batch["input_ids"].to(model.device).split(batch["sequence_lengths"])
    for ids, length in zip(sequences, batch["response_lengths"], strict=True):
        states.append(inner.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -length:])
    hidden = torch.cat(states)
    with torch.no_grad():
        slopes = torch.cat([(part @ weight.T) @ weight for part in hidden.split(512)])
    return (hidden * slopes).sum() * 1e-6


def run_dpo(args: argparse.Namespace) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    # Reversing the words keeps the number of tokens nearly the same.
    return _run_trl(
        args,
        DPOTrainer,
        DPOConfig,
        lambda prompt, response: {
            "prompt": prompt,
            "chosen": response,
            "rejected": " ".join(response.split(" ")[::-1]),
        },
    )


def run_sft(args: argparse.Namespace) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    return _run_trl(
        args,
        SFTTrainer,
        SFTConfig,
        lambda prompt, response: {"prompt": prompt, "completion": response},
        completion_only_loss=True,
    )


def _run_trl(
    args: argparse.Namespace,
    trainer_class: Any,
    config_class: Any,
    make_row: Callable[[str, str], Any],
    **settings: Any,
) -> dict[str, Any]:
    from datasets import Dataset

    from cutlm.prompting.encoding import Encoder

    tokenizer, records, model = _load(args)
    encoder = Encoder(tokenizer, args.template)
    rows = []
    for record in records:
        instruction = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
        rows.append(make_row(encoder.render(instruction).text, record["output"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            args=config_class(**make_settings(args, folder), max_length=None, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=make_adapter(args.all_linear),
        )
        return time_trainer(trainer)


RUNS = {
    "released": run_released,
    "cutlm": run_cutlm,
    "frozen": run_frozen,
    "floor": run_floor,
    "dpo": run_dpo,
    "sft": run_sft,
}

if __name__ == "__main__":
    main()
