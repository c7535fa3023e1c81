"""Runs of the comparison: one method trained with one seed, or an online loop of them, and measured.

Training is the library's own, as any user's: `CUTTrainer`, or TRL's trainer for pairs. Which runs there are is
`cutlm.world.compare`'s affair.
"""

import copy
import dataclasses
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from cutlm.data.records import JudgedRecord
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig
from cutlm.training.pairs import PairTrainer
from cutlm.training.trainer import CUTTrainer
from cutlm.world.base import load_base
from cutlm.world.experience import Experience, draw_tasks, gather
from cutlm.world.measure import answer_tasks, measure_detection, rate_answers
from cutlm.world.methods import BATCH_SIZE, NUM_SAMPLES, Method, find_method
from cutlm.world.tasks import Task, list_tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

THRESHOLDS = (1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
TRAIN_SHARE = 2 / 3  # of the training tasks, drawn anew for each seed


@dataclasses.dataclass(frozen=True)
class Run:
    """What determines a run's result, together with the base model.

    Attributes:
        method: Name of the method.
        learning_rate: Peak; it falls linearly to 0.
        seed: Of the drawn tasks, their responses where these are drawn, and the order of training.
        split: "dev" or "test": what is measured.
        num_steps: Optimizer steps, in each iteration.
        num_iterations: Rounds of generating, judging and training on fresh tasks.
        num_responses: Judged responses to learn from, in all; None for those of a share of the training tasks.
        num_samples: Responses an instruction where they are drawn.
        num_eval: Tasks of the split to measure on; None for all.
        share: Of the training tasks, to learn from; None for two thirds in one iteration, and all in several.
        detects: Whether to measure the trained model as a detector, too.
    """

    method: str
    learning_rate: float
    seed: int
    split: str
    num_steps: int
    num_iterations: int = 1
    num_responses: int | None = None
    num_samples: int = NUM_SAMPLES
    num_eval: int | None = None
    share: float | None = None
    detects: bool = False


class _Counted:
    """Counts the tokens that pass through the model in training steps, whatever the trainer."""

    num_tokens = 0

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.num_tokens += len(inputs["input_ids"]) if mask is None else int(mask.sum())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class _CountedCUTTrainer(_Counted, CUTTrainer):
    pass


class _CountedPairTrainer(_Counted, PairTrainer):
    pass


def execute(run: Run) -> dict[str, Any]:
    """Trains and measures.

    Returns:
        `accuracy` by family and as "macro", one for each iteration; `seconds` of training (finding tokens to blame
        included) and `seconds_generating`; `tokens_generated`, `tokens_trained` (passed through the model in training
        steps), `tokens_blamed` (in the frozen detector's one pass), `num_responses`, `num_satisfactory`.
    """
    _quieten()
    method = find_method(run.method)
    base, tokenizer = _load_base()
    model = copy.deepcopy(base)
    tasks = list_tasks(run.split)[: run.num_eval]
    result: dict[str, Any] = {"accuracy": [], "num_responses": 0, "num_satisfactory": 0}
    costs = dict.fromkeys(("seconds", "seconds_generating", "tokens_generated", "tokens_trained", "tokens_blamed"), 0.0)
    if not run.num_steps:
        responses = answer_tasks(model, tokenizer, tasks, is_praised=method.is_praised)
        result["accuracy"].append(rate_answers(tasks, responses))
    for iteration, drawn in enumerate(_draw(run, method)):
        started = time.perf_counter()
        seed = 1000 * run.seed + iteration
        found = gather(model, tokenizer, drawn, method.data, run.num_samples, seed)
        costs["seconds_generating"] += time.perf_counter() - started
        costs["tokens_generated"] += found.num_tokens
        result["num_responses"] += found.num_responses
        result["num_satisfactory"] += sum(record.is_satisfactory for record in found.records)
        for name, cost in train(model, tokenizer, found, method, run, seed).items():
            costs[name] += cost
        responses = answer_tasks(model, tokenizer, tasks, is_praised=method.is_praised)
        result["accuracy"].append(rate_answers(tasks, responses))
    if run.detects:
        result["detection"] = detect(model, tokenizer, tasks)
    return result | costs


def _draw(run: Run, method: Method) -> list[list[Task]]:
    """The tasks of each iteration; none comes twice."""
    if not run.num_steps:
        return []
    tasks = list_tasks("train")
    if run.num_responses is not None:
        num_tasks = run.num_responses // (run.num_samples if method.data == "samples" else 1)
        return [draw_tasks(tasks, num_tasks / len(tasks), run.seed)]
    if run.num_iterations == 1:
        return [draw_tasks(tasks, run.share or TRAIN_SHARE, run.seed)]
    shuffled = draw_tasks(tasks, run.share or 1, run.seed)
    size = len(shuffled) // run.num_iterations
    return [shuffled[start : start + size] for start in range(0, size * run.num_iterations, size)]


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    experience: Experience,
    method: Method,
    run: Run,
    seed: int,
) -> dict[str, float]:
    """Trains the model in place, and tells what it cost."""
    records = experience.records
    if method.settings.get("detector") != "spans":
        records = [record.model_copy(update={"wrong_spans": None}) for record in records]
    is_pairs = "dpo" in method.settings.get("objective", "cut")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = CUTConfig(
            output_dir=folder,
            max_steps=run.num_steps,
            # A pair is two responses.
            per_device_train_batch_size=BATCH_SIZE // 2 if is_pairs else BATCH_SIZE,
            learning_rate=run.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(5, run.num_steps // 4),
            seed=seed,
            use_cpu=True,
            max_length=256,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **method.settings,
        )
        kind: Any = _CountedPairTrainer if is_pairs else _CountedCUTTrainer
        trainer = kind(model=model, args=args, train_dataset=records, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    costs = {"seconds": time.perf_counter() - started, "tokens_trained": float(trainer.num_tokens)}
    if method.settings.get("detector") == "frozen":
        costs["tokens_blamed"] = _count_blamed(records, tokenizer)
    return costs


def _count_blamed(records: Sequence[JudgedRecord], tokenizer: "PreTrainedTokenizerBase") -> float:
    encoder = Encoder(tokenizer, "alpaca")
    total = 0
    for record in records:
        if not record.is_satisfactory:
            prompts = [encoder.encode_prompt(record.instruction, judgment) for judgment in (None, record.judgment)]
            total += sum(map(len, prompts)) + 2 * len(encoder.encode_response(record.output)) - 2
    return float(total)


def detect(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", tasks: Sequence[Task]
) -> list[dict[str, Any]]:
    """How well a model finds the wrong tokens of the base model's responses, by threshold and family."""
    base, _ = _load_base()
    responses = answer_tasks(base, tokenizer, tasks)
    return [
        {
            "threshold": threshold,
            "family": family,
            "precision": counts.precision,
            "recall": counts.recall,
            "f1": counts.f1,
            "num_wrong": counts.num_true + counts.num_missed,
        }
        for threshold, by_family in measure_detection(model, tokenizer, tasks, responses, THRESHOLDS).items()
        for family, counts in by_family.items()
    ]


@cache
def _load_base() -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    return load_base()


def _quieten() -> None:
    """A run is one of hundreds; what it would log is in its result."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("cutlm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)


def start_worker(num_threads: int) -> None:
    """Prepares a process for runs."""
    torch.set_num_threads(num_threads)
    _quieten()
