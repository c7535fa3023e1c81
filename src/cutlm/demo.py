"""The whole of cutlm on a model so small that a CPU trains it: what `cutlm demo` does.

A base model is made on the spot, measured on the packaged records, trained on them by CUT with LoRA, merged, and
asked what the records do not contain. After the base model, all of it is what any model goes through. The world is
left to `cutlm.demo_world`, the base model to `cutlm.demo_base`, measuring to `cutlm.demo_measure`, the printed text to
`cutlm.demo_report`.
"""

import json
import random
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from cutlm.config import CUTConfig
from cutlm.demo_base import BATCH_SIZE, make_model, make_tokenizer, pretrain
from cutlm.demo_measure import (
    MAX_LENGTH,
    OBJECTIVE,
    choose_examples,
    measure,
    rate_answers,
    score_records,
    split_blamed,
)
from cutlm.demo_report import Report
from cutlm.demo_world import RECORDS_FILE, judge, list_held_out, make_corpus
from cutlm.encoding import Encoder
from cutlm.errors import UserError
from cutlm.generation import Sampling, fingerprint_model, generate_file, generate_responses
from cutlm.jsonl import open_atomic, write_rows
from cutlm.merging import merge_adapter
from cutlm.model import count_parameters, load_model, load_trained
from cutlm.records import JudgedRecord, load_records
from cutlm.trainer import CUTTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULT_FILE = "result.json"
_IS_DEMO = "is_cutlm_demo"
_OWN_FOLDERS = ("base", "adapter", "merged")
_OWN_FILES = ("records.jsonl", "prompts.json", "responses.json", "responses.json.partial", RESULT_FILE)
_SEED = 0
_SAMPLING = Sampling(max_new_tokens=24, batch_size=64)


@dataclass(frozen=True)
class Size:
    """How much is done: steps of pretraining and of CUT, records of the packaged file, held-out instructions."""

    num_pretraining_steps: int
    num_steps: int
    num_records: int
    num_held_out: int


FULL = Size(num_pretraining_steps=440, num_steps=100, num_records=240, num_held_out=320)
QUICK = Size(num_pretraining_steps=24, num_steps=2, num_records=24, num_held_out=16)


def run_demo(out: str | Path, size: Size = FULL) -> dict[str, Any]:
    """Runs the demo and prints it.

    Args:
        out: The folder to make; one of an earlier demo is replaced.
        size: How much to do.

    Returns:
        What stands in the folder's `result.json`.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    prepare_folder(out)
    transformers_logging.disable_progress_bar()  # loading and saving take no second here
    started = time.perf_counter()
    report = Report()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for it; nothing that a user could change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            result = {_IS_DEMO: True} | _run(out, size, report)
    finally:
        transformers_logging.enable_progress_bar()
    result["seconds"] = round(time.perf_counter() - started, 1)
    _write_json(out / RESULT_FILE, result)
    report.print_end(out, result["seconds"])
    return result


def _run(out: Path, size: Size, report: Report) -> dict[str, Any]:
    documents = make_corpus(size.num_pretraining_steps * BATCH_SIZE, _SEED)
    tokenizer = make_tokenizer(documents)
    base = make_model(tokenizer, _SEED)
    encoder = Encoder(tokenizer, "alpaca")
    report.print_base(count_parameters(base)["all"], len(documents))
    pretrain(base, tokenizer, documents, _SEED)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    records = load_records(RECORDS_FILE)[: size.num_records]
    write_rows(out / "records.jsonl", (record.model_dump(exclude_unset=True) for record in records))
    held_out = list_held_out()
    held_out = [held_out[i] for i in sorted(random.Random(_SEED).sample(range(len(held_out)), size.num_held_out))]
    prompts = [{"instruction": instruction} for _, instruction in held_out]
    write_rows(out / "prompts.json", prompts)
    encoded = [encoder.encode_prompt(str(row["instruction"])) for row in prompts]
    answers = generate_responses(base, tokenizer, encoder, encoded, _SAMPLING)
    scores = score_records(base, encoder, records)
    is_flagged = scores.cut.is_flagged  # fixed here: the same tokens are measured after training
    before = measure(scores, is_flagged) | rate_answers(held_out, answers)
    num_flagged = int(is_flagged.sum())
    shown = next(record for record in records if not record.is_satisfactory)
    num_unsatisfactory = sum(not record.is_satisfactory for record in records)
    report.print_records(len(records), num_unsatisfactory, shown, split_blamed(base, encoder, shown))
    report.print_table(num_flagged, before)

    report.print_training(size.num_steps)
    train_adapter(out, tokenizer, records, size.num_steps)
    merge = merge_adapter(out / "adapter", out / "merged")
    report.print_merge(merge.difference)
    merged, merged_tokenizer = load_trained(out / "merged", device="cpu")
    generate_file(
        merged,
        merged_tokenizer,
        Encoder(merged_tokenizer, "chat"),  # by the chat template it carries, as any other tool prompts it
        prompts,
        out / "responses.json",
        _SAMPLING,
        generator="merged",
        dataset="demo",
        fingerprint=fingerprint_model(out / "merged"),
    )
    new_answers = [row["output"] for row in json.loads((out / "responses.json").read_text("utf-8"))]
    after = measure(score_records(merged, encoder, records), is_flagged) | rate_answers(held_out, new_answers)
    report.print_table(num_flagged, before, after)
    for index in choose_examples(held_out, answers):
        judgment = judge(held_out[index][0], answers[index])
        record = JudgedRecord(instruction=held_out[index][1], output=answers[index], judgment=judgment)
        report.print_example(record, split_blamed(base, encoder, record), new_answers[index])
    return {"num_flagged": num_flagged, "before": before, "after": after}


def prepare_folder(out: Path) -> None:
    """Makes the folder, or removes what an earlier demo, finished or not, left in it.

    Raises:
        UserError: It holds something, and not a demo.
    """
    if out.is_file():
        raise UserError(f"{out}: expected a folder to make, got a file")
    if out.is_dir() and any(out.iterdir()):
        try:
            is_demo = json.loads((out / RESULT_FILE).read_text("utf-8"))[_IS_DEMO] is True
        except (OSError, ValueError, TypeError, KeyError):
            is_demo = False
        if not is_demo:
            raise UserError(f"{out}: is not empty and holds no earlier demo; name another folder by --out")
        for name in _OWN_FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _OWN_FILES:
            (out / name).unlink(missing_ok=True)
    _write_json(out / RESULT_FILE, {_IS_DEMO: True})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open_atomic(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def train_adapter(
    out: Path, tokenizer: "PreTrainedTokenizerBase", records: Sequence[JudgedRecord], num_steps: int
) -> None:
    """Trains a LoRA adapter of the base model by CUT, and saves it."""
    args = CUTConfig(
        output_dir=str(out / "adapter"),
        max_steps=num_steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=3,
        max_length=MAX_LENGTH,
        seed=_SEED,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OBJECTIVE,  # type: ignore[arg-type]
    )
    trainer = CUTTrainer(
        model=load_model((out / "base").resolve()),  # the adapter names its base model by this path
        args=args,
        train_dataset=records,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["gate_proj", "up_proj", "down_proj"]),
        callbacks=[_Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()


class _Progress(TrainerCallback):
    """A bar with the loss, in place of a line for each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="   training", unit="step", ncols=80)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss_contrast" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
