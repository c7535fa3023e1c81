"""One run of the comparison: a method, trained with one seed on the tiny world's base model, and measured.

Training is the library's own: `CUTTrainer`, or TRL's trainer for pairs. Only the learning rate is tuned: every method
gets the same grid, from which `compare.py` chooses on the development tasks.
"""

import copy
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from measure import measure_detection
from methods import NUM_SAMPLES, Method, find_method
from noise import add_noise
from torch import nn
from transformers import PrinterCallback

from cutlm.data.records import JudgedRecord
from cutlm.generation.files import encode_refinement_prompts
from cutlm.generation.local import Sampling, generate_responses
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig
from cutlm.training.pairs import PairTrainer
from cutlm.training.trainer import CUTTrainer
from cutlm.world.base import MAX_NEW_TOKENS, answer_tasks, load_base
from cutlm.world.judge import judge_task, rate_answers
from cutlm.world.tasks import Task, list_tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

BATCH_SIZE = 32  # responses
TRAIN_SHARE = 2 / 3  # of the training tasks; each seed draws its own
THRESHOLDS = (1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
_GENERATION_BATCH_SIZE = 128


# ---- Runs ----


@dataclass(frozen=True)
class Run:
    """What determines the result of a run, together with the base model and the code.

    Attributes:
        method: Name of the method.
        learning_rate: Peak; it decays linearly to 0.
        seed: Seed of the drawn tasks, the sampled responses, the wording of judgments and the order of training.
        split: The split to measure on, "dev" or "test".
        num_steps: Optimizer steps in each iteration.
        num_iterations: Rounds of generating, judging and training on new tasks.
        num_responses: Judged responses to learn from in total; None for those of a share of the training tasks.
        num_samples: Responses per instruction if they are sampled.
        num_eval: Tasks of the split to measure on; None for all.
        share: Share of the training tasks to learn from; None for two thirds, or for all over several iterations.
        detects: Whether to measure the trained model as a detector, too.
        noise: Share of the judgments that are replaced.
        noise_kind: How; see `noise.NOISES`.
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
    noise: float = 0.0
    noise_kind: str | None = None


def execute(run: Run) -> dict[str, Any]:
    """Train and measure.

    Returns:
        `accuracy` by family and as "macro", one for each iteration; `seconds` of training (including the frozen
        detector) and `seconds_generating`; `tokens_generated`, `tokens_trained` (passed through the model in training
        steps), `tokens_scored` (passed through it without gradients, padding included: for flags, by a frozen teacher
        or reference), `num_responses`, `num_satisfactory`.
    """
    method = find_method(run.method)
    base, tokenizer = _load_base()
    model = copy.deepcopy(base)
    tasks = list_tasks(run.split)[: run.num_eval]
    result: dict[str, Any] = {"accuracy": [], "num_responses": 0, "num_satisfactory": 0}
    costs = dict.fromkeys(("seconds", "seconds_generating", "tokens_generated", "tokens_trained", "tokens_scored"), 0.0)
    if not run.num_steps:
        responses = answer_tasks(model, tokenizer, tasks, is_praised=method.is_praised)
        result["accuracy"].append(rate_answers(tasks, responses))
    for iteration, drawn in enumerate(draw_iterations(run)):
        started = time.perf_counter()
        seed = 1000 * run.seed + iteration
        experience = gather(model, tokenizer, drawn, method.data, run.num_samples, seed)
        costs["seconds_generating"] += time.perf_counter() - started
        costs["tokens_generated"] += experience.num_tokens
        result["num_responses"] += experience.num_responses
        result["num_satisfactory"] += sum(record.is_satisfactory for record in experience.records)
        records = experience.records
        if method.is_shuffled:
            records = add_noise(records, 1.0, "foreign", seed)
        if run.noise_kind is not None:
            records = add_noise(records, run.noise, run.noise_kind, seed)
        for name, cost in train(model, tokenizer, records, method, run, seed).items():
            costs[name] += cost
        responses = answer_tasks(model, tokenizer, tasks, is_praised=method.is_praised)
        result["accuracy"].append(rate_answers(tasks, responses))
    if run.detects:
        result["detection"] = detect(model, tokenizer, tasks)
    return result | costs


@cache
def _load_base() -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    return load_base()


# ---- What a run learns from ----


def draw_iterations(run: Run) -> list[list[Task]]:
    """The tasks of each iteration; none occurs twice."""
    if not run.num_steps:
        return []
    tasks = list_tasks("train")
    if run.num_responses is not None:
        num_tasks = run.num_responses // (run.num_samples if find_method(run.method).data == "samples" else 1)
        return [draw_tasks(tasks, num_tasks / len(tasks), run.seed)]
    if run.num_iterations == 1:
        return [draw_tasks(tasks, run.share or TRAIN_SHARE, run.seed)]
    shuffled = draw_tasks(tasks, run.share or 1, run.seed)
    size = len(shuffled) // run.num_iterations
    return [shuffled[start : start + size] for start in range(0, size * run.num_iterations, size)]


def draw_tasks(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """A share of the tasks, drawn by seed, in random order."""
    return random.Random(f"tasks {seed}").sample(list(tasks), round(share * len(tasks)))


@dataclass(frozen=True)
class Experience:
    """Judged responses.

    Attributes:
        records: They carry the oracle's `wrong_spans`, which only methods that ask for them may use.
        num_responses: Responses generated and judged, not counting refinements.
        num_tokens: Response tokens generated, including refinements.
    """

    records: list[JudgedRecord]
    num_responses: int
    num_tokens: int


def gather(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    kind: str,
    num_samples: int,
    seed: int,
) -> Experience:
    """Has a model answer tasks and the oracle judge the answers.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: The tasks.
        kind: "greedy", "samples" or "refined"; see `Method`.
        num_samples: Responses per task if they are sampled.
        seed: Seed of sampling and of the wording of judgments.
    """
    encoder = Encoder(tokenizer, "alpaca")
    is_sampled = kind == "samples"
    asked = [task for task in tasks for _ in range(num_samples if is_sampled else 1)]
    sampling = Sampling(MAX_NEW_TOKENS, temperature=float(is_sampled), seed=seed, batch_size=_GENERATION_BATCH_SIZE)
    prompts = [encoder.encode_prompt(task.instruction) for task in asked]
    responses = generate_responses(model, tokenizer, encoder, prompts, sampling)
    num_tokens = sum(len(encoder.encode_response(response)) for response in responses)
    records = []
    for task, response in zip(asked, responses, strict=True):
        if not response.strip():
            continue  # an empty response cannot be judged
        verdict = judge_task(task, response, seed=seed)
        records.append(
            JudgedRecord(
                instruction=task.instruction,
                output=response,
                judgment=verdict.judgment,
                wrong_spans=verdict.wrong_spans or None,
            )
        )
    if kind == "refined":
        wrong = [record for record in records if not record.is_satisfactory]
        answers = generate_responses(model, tokenizer, encoder, encode_refinement_prompts(wrong, encoder), sampling)
        num_tokens += sum(len(encoder.encode_response(answer)) for answer in answers)
        refined = iter(record.model_copy(update={"i_ans": text}) for record, text in zip(wrong, answers, strict=True))
        records = [record if record.is_satisfactory else next(refined) for record in records]
    return Experience(records, len(responses), num_tokens)


# ---- Training ----


class _TokenCounter:
    """Counts the tokens that pass through the model in training steps, whatever the trainer."""

    num_tokens = 0

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.num_tokens += len(inputs["input_ids"]) if mask is None else int(mask.sum())
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class _CountingCUTTrainer(_TokenCounter, CUTTrainer):
    pass


class _CountingPairTrainer(_TokenCounter, PairTrainer):
    pass


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[JudgedRecord],
    method: Method,
    run: Run,
    seed: int,
) -> dict[str, float]:
    """Train the model in place and return the costs."""
    if method.settings.get("detector") != "spans":
        records = [record.model_copy(update={"wrong_spans": None}) for record in records]
    is_pairs = "dpo" in method.settings.get("objective", "cut")
    num_scored = 0

    def count_scored(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal num_scored
        if not torch.is_grad_enabled():
            num_scored += inputs[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(count_scored)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = CUTConfig(
            output_dir=folder,
            max_steps=run.num_steps,
            per_device_train_batch_size=BATCH_SIZE // 2 if is_pairs else BATCH_SIZE,  # a pair is two responses
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
        trainer_class: Any = _CountingPairTrainer if is_pairs else _CountingCUTTrainer
        trainer = trainer_class(model=model, args=args, train_dataset=list(records), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    hook.remove()
    model.eval()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens_trained": float(trainer.num_tokens),
        "tokens_scored": float(num_scored),
    }


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
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "num_wrong": found.num_true + found.num_missed,
        }
        for threshold, by_family in measure_detection(model, tokenizer, tasks, responses, THRESHOLDS).items()
        for family, found in by_family.items()
    ]
