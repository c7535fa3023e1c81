"""Time and memory of training on judged records: released style, cutlm, the floor, and TRL's trainers.

  python benchmarks/train_step.py --records records.json

    released   a twin of the released code, naive as that is: both contexts of every record (dummy rows for satisfactory
               ones) in one batch, padded to the longest of all, probabilities of the whole vocabulary in float32 at
               every position, copied for each part, and attention as the transformers of its day had it, "eager"
    cutlm      `CUTTrainer` with detector current, as `cutlm train` runs it
    frozen     the same on token scores: known flags, the plain context only
    floor      the body alone, forward and backward over the same tokens, and the head's two matrix products at the
               response positions; nothing else
    dpo, sft   TRL's `DPOTrainer` and `SFTTrainer` on the same prompts and responses (pairs of one length)

Each trains LoRA of rank 16 on the MLP of one and the same model over the first unsatisfactory records of a file
(made-up ones where none is given), a step a micro-batch. The clock runs while it trains: loading and encoding are not
in it. Variants take turns, and medians over the turns are told; what no longer fits into --limit is left out of a
turn."""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import (
    add_run_arguments,
    add_shape_arguments,
    describe_machine,
    describe_options,
    make_model,
    make_tokenizer,
    read_peak_bytes,
    take_turns,
    write_results,
)

VARIANTS = ("released", "cutlm", "frozen", "floor", "dpo", "sft")
_TARGETS = ["gate_proj", "up_proj", "down_proj"]
_SETTINGS: dict[str, Any] = {"threshold": 1.1, "unlikelihood_weight": 1.0, "gamma": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", metavar="FILE", help="judged records (default: made up)")
    parser.add_argument("--num_records", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4, help="records of a micro-batch (default: 4)")
    parser.add_argument("--template", choices=("alpaca", "chat"), default="alpaca")
    parser.add_argument("--num_tokens", type=int, help="of every record, made up (default: as they come)")
    parser.add_argument("--bf16", action="store_true", help="by autocast; on a GPU the weights, too")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument(
        "--torch_compile",
        action="store_true",
        help="compile all but released style, in a first round that is not timed",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add_shape_arguments(parser)
    parser.add_argument(
        "--limit", type=float, default=540, help="seconds within which turns after the first must fit (default: 540)"
    )
    add_run_arguments(parser, num_repeats=3)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(RUNS[args.variant](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        counts = prepare(args, Path(folder))
        results = take_turns(args.variants, args.repeats, folder, limit=args.limit)
    figures = compare(results)
    rows = []
    for variant, result in results.items():
        known = {"seconds": result.get("failed"), "peak GB": ""}
        if "failed" not in result:
            known = {"seconds": result["seconds"], "peak GB": result["peak"] / 1e9}
        rows.append({"variant": variant} | known)
    known = {"machine": describe_machine(), "options": describe_options(args), "results": results}
    write_results(rows, figures | counts | known, args.json)


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times the time, or memory, of one variant another takes."""
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


# ---- The same for all ----


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Tokenizer and records, to be read by every variant's process.

    Returns:
        Tokens of both contexts of all records, and of these the responses'.
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
        sys.exit(f"expected {args.num_records} unsatisfactory records, got {len(chosen)}; give --num_records")
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
        # A word is about three tokens of this vocabulary's.
        num = args.num_tokens // 3
        shape = {"instruction": write(num // 4, num // 4), "input": "", "output": write(num // 2, num // 2)}
        return [shape | {"judgment": write(num // 8, num // 8)} for _ in range(args.num_records)]
    # About the lengths of an online iteration's records.
    return [
        {"instruction": write(10, 60), "input": "", "output": write(120, 480), "judgment": write(20, 80)}
        for _ in range(args.num_records)
    ]


def _load(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], Any]:
    """Tokenizer, records and the model in float32, without its adapter."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    folder = Path(args.folder)
    return AutoTokenizer.from_pretrained(folder), json.loads((folder / "records.json").read_text()), make_model(args)


def adapt(model: Any, args: argparse.Namespace) -> Any:
    """The model with its adapter, for a bare loop."""
    from peft import get_peft_model

    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, make_adapter()).train()


def make_adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=_TARGETS, task_type="CAUSAL_LM")


def _encode(args: argparse.Namespace, tokenizer: Any, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from cutlm.data.records import JudgedRecord
    from cutlm.prompting.encoding import Encoder

    encoder = Encoder(tokenizer, args.template)
    rows = []
    for record in records:
        encoded = encoder.encode_record(JudgedRecord(**record), 100_000)
        assert encoded is not None
        rows.append({name: getattr(encoded, name) for name in ("prompt_ids", "judged_prompt_ids", "response_ids")})
    return rows


def make_settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Of every trainer."""
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
    seconds = time.perf_counter() - began  # the last line of the log has waited for the GPU
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "peak": read_peak_bytes(), "first_loss": losses[0]}


def time_loop(args: argparse.Namespace, model: Any, batches: Sequence[Any], find_loss: Any) -> dict[str, Any]:
    """A bare loop: a loss, its gradient, a step."""
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


# ---- The variants ----


def run_cutlm(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm import CUTConfig, CUTTrainer

    tokenizer, records, model = _load(args)
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(**make_settings(args, folder), **_SETTINGS, template=args.template, max_length=100_000)
        trainer = CUTTrainer(model, config, records, processing_class=tokenizer, peft_config=make_adapter())
        return time_trainer(trainer)


def run_frozen(args: argparse.Namespace) -> dict[str, Any]:
    from cutlm import CUTConfig, CUTTrainer

    tokenizer, records, model = _load(args)
    rows = [
        # Every tenth token is taken for inappropriate: what they are changes nothing of the cost.
        row
        | {
            "is_flagged": [place % 10 == 0 for place in range(len(row["response_ids"]))],
            "weights": [float(place % 10 == 0) for place in range(len(row["response_ids"]))],
            "judged_prompt_ids": None,
            "is_satisfactory": False,
        }
        for row in _encode(args, tokenizer, records)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = CUTConfig(
            **make_settings(args, folder), **_SETTINGS, detector="frozen", template=args.template, max_length=100_000
        )
        trainer = CUTTrainer(model, config, rows, peft_config=make_adapter())
        return time_trainer(trainer)


def run_released(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer, records, model = _load(args)
    model.set_attn_implementation("eager")
    rows = _encode(args, tokenizer, records)
    batches = [rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
    return time_loop(args, adapt(model, args), batches, find_released_loss)


def find_released_loss(model: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """CUT's loss as the released code takes it, with the size of the vocabulary at every position, many times over.

    Both contexts are rows of one batch, padded to the longest of all of them. Each part of the loss has a copy of the
    probabilities of its own, the likelihood's another one of their logarithms.
    """
    import torch

    judged = [row["judged_prompt_ids"] or row["prompt_ids"] for row in rows]
    plain = [row["prompt_ids"] for row in rows]  # dummies for satisfactory records
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
    """A number of no meaning that depends on every response position, at the least cost."""
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
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, records, model = _load(args)
    rows = _make_completions(args, tokenizer, records)
    # The same words in another order: as many tokens, but for a few.
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(row["completion"].split(" ")[::-1])}
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**make_settings(args, folder), max_length=None)
        trainer = DPOTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=make_adapter(),
        )
        return time_trainer(trainer)


def run_sft(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, records, model = _load(args)
    rows = _make_completions(args, tokenizer, records)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(**make_settings(args, folder), max_length=None, completion_only_loss=True)
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=make_adapter(),
        )
        return time_trainer(trainer)


def _make_completions(
    args: argparse.Namespace, tokenizer: Any, records: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    from cutlm.prompting.encoding import Encoder

    encoder = Encoder(tokenizer, args.template)
    rows = []
    for record in records:
        instruction = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
        rows.append({"prompt": encoder.render(instruction).text, "completion": record["output"]})
    return rows


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
