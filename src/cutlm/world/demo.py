"""The demo (`cutlm demo`): all of cutlm on a model small enough to train on a CPU in seconds.

A base model with bad habits goes through three online iterations. In each one,

    generate   the model answers new instructions
    judge      a judge writes what is wrong with each answer
    blame      the frozen model flags the tokens that these judgments make likelier
    train      CUT trains a LoRA adapter: flagged tokens are unlearned, all others are learned
    merge      the adapter is folded into the weights, and the next iteration starts from the result

and is then tested on instructions that nothing is trained on. Every stage reads and writes files, as the commands of
the same names do for a model of your own; only the judge belongs to the tiny world (`cutlm.world.judge`).
"""

import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Final

from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from cutlm.data.files import open_atomic, read_rows, write_rows
from cutlm.data.records import check_records
from cutlm.errors import UserError
from cutlm.flagging.detector import BlameReport, FlagSettings, blame_file
from cutlm.flagging.scoring import score_rows
from cutlm.flagging.token_scores import TokenScores, read_token_scores
from cutlm.generation.files import generate_file
from cutlm.generation.local import Sampling
from cutlm.inspect.terminal import Stage, Terminal
from cutlm.model.loading import count_parameters, fingerprint_model, load_model, load_tokenizer, load_trained
from cutlm.model.merge import merge_adapter
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig
from cutlm.training.trainer import CUTTrainer
from cutlm.world.base import base_path
from cutlm.world.demo_report import (
    CURVE_FILE,
    HELD_OUT_FOLDER,
    MEAN,
    PAGE_FILE,
    HeldOut,
    choose_example,
    choose_wrong,
    print_accuracy,
    print_end,
    print_example,
    print_start,
    write_report,
)
from cutlm.world.judge import judge_task
from cutlm.world.measure import MAX_NEW_TOKENS, answer_tasks
from cutlm.world.tasks import Task, list_tasks

NUM_ITERATIONS = 3
TEMPLATE: Final = "alpaca"
FLAG_SETTINGS = FlagSettings(threshold=1.1, unlikelihood_weight=1.0, gamma=1.0, max_length=256)
LEARNING_RATE = 1e-3
BATCH_SIZE = 32
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SEED = 0

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Size:
    """How much the demo does.

    Attributes:
        num_tasks: New instructions in each iteration.
        num_steps: Optimizer steps in each iteration.
        num_held_out: Instructions to test on.
        num_examples: Maximum number of responses per family on the page.
    """

    num_tasks: int
    num_steps: int
    num_held_out: int
    num_examples: int


FULL = Size(num_tasks=280, num_steps=60, num_held_out=420, num_examples=5)
QUICK = Size(num_tasks=28, num_steps=3, num_held_out=35, num_examples=1)


def run_demo(out: str | Path, size: Size = FULL, base: str | Path | None = None) -> dict[str, Any]:
    """Runs the demo and prints it.

    Args:
        out: The output folder; that of an earlier demo is replaced.
        size: How much to do.
        base: A base model of the tiny world; by default the one that comes with the package.

    Returns:
        The content of `result.json` in the output folder.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    prepare_folder(out)
    started = time.perf_counter()
    terminal = Terminal()
    with _quiet_libraries():
        result = {_IS_DEMO: True} | _run(out, size, base_path() if base is None else Path(base), terminal)
    result["seconds"] = round(time.perf_counter() - started, 1)
    _write_json(out / RESULT_FILE, result)
    print_end(terminal, out, result["seconds"])
    return result


def _run(out: Path, size: Size, base: Path, terminal: Terminal) -> dict[str, Any]:
    tasks, test_tasks = list_tasks("train"), list_tasks("test")[: size.num_held_out]
    held_out = HeldOut(test_tasks, [answer(base, test_tasks)])
    num_parameters = count_parameters(load_model(base, dtype="float32"))["all"]
    print_start(terminal, num_parameters, NUM_ITERATIONS, size.num_tasks)

    iterations: list[Iteration] = []
    examples: list[dict[str, Any]] = []
    model_path = base
    for number in range(1, NUM_ITERATIONS + 1):
        terminal.print_heading(f"Iteration {number} of {NUM_ITERATIONS}")
        folder = out / f"iteration-{number}"
        new_tasks = tasks[(number - 1) * size.num_tasks : number * size.num_tasks]
        iteration = run_iteration(folder, model_path, new_tasks, size.num_steps, _SEED + number, terminal)
        iterations.append(iteration)
        model_path = folder / "model"

        with iteration.stage("test", terminal) as stage:
            held_out.answers.append(answer(model_path, test_tasks))
            before, after = held_out.accuracy[MEAN][-2:]
            stage.text = f"accuracy on held-out instructions {before:.0%} -> {after:.0%}"

        index = choose_example(iteration.tasks, iteration.blame.scores, {example["family"] for example in examples})
        if index is not None:
            task, scores = iteration.tasks[index], iteration.blame.scores[index]
            examples.append(print_example(terminal, task, scores, after=answer(model_path, [task])[0]))

    print_accuracy(terminal, held_out)
    shown = choose_wrong(held_out, size.num_examples)
    shown_scores = blame_held_out(out / HELD_OUT_FOLDER, base, held_out, shown)
    write_report(out, held_out, shown, shown_scores, [iteration.flagged_share for iteration in iterations])
    return {
        "size": asdict(size),
        "settings": {"learning_rate": LEARNING_RATE, **asdict(FLAG_SETTINGS)},
        "num_parameters": num_parameters,
        "accuracy": held_out.accuracy,
        "changes": held_out.changes,
        "iterations": [iteration.describe() for iteration in iterations],
        "examples": examples,
    }


# ---- One iteration ----


@dataclass
class Iteration:
    """What happened in an iteration.

    Attributes:
        num_responses: Responses generated.
        num_empty: Empty responses, which are not judged.
        num_satisfactory: Judged responses without criticism.
        blame: The token scores that were trained on, with counts.
        losses: Loss of each optimizer step.
        merge_difference: Largest change of a logit by merging, as a share of the largest logit.
        seconds: Duration of each stage.
        tasks: The task of each judged response.
    """

    num_responses: int
    num_empty: int = 0
    num_satisfactory: int = 0
    blame: BlameReport = field(default_factory=lambda: BlameReport([]))
    losses: list[float] = field(default_factory=list)
    merge_difference: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, terminal: Terminal) -> Iterator[Stage]:
        """Times a stage, and prints its line at the end."""
        with terminal.stage(name) as stage:
            yield stage
        self.seconds[name] = stage.seconds

    @property
    def num_tokens(self) -> int:
        """Tokens of all judged responses."""
        return sum(len(scores.token_ids) for scores in self.blame.scores)

    @property
    def flagged_share(self) -> float:
        """The share of these tokens that is flagged."""
        return self.blame.num_flagged / max(1, self.num_tokens)

    @property
    def loss_ends(self) -> tuple[float, float]:
        """The mean loss of the first five and of the last five steps."""
        return mean(self.losses[:5]), mean(self.losses[-5:])

    def describe(self) -> dict[str, Any]:
        """The iteration's figures as JSON."""
        loss_start, loss_end = self.loss_ends
        return {
            "num_responses": self.num_responses,
            "num_empty": self.num_empty,
            "num_satisfactory": self.num_satisfactory,
            "num_tokens": self.num_tokens,
            "num_flagged": self.blame.num_flagged,
            "num_steps": len(self.losses),
            "loss_start": loss_start,
            "loss_end": loss_end,
            "merge_difference": self.merge_difference,
            "seconds": self.seconds,
        }


def run_iteration(
    folder: Path, model_path: Path, tasks: Sequence[Task], num_steps: int, seed: int, terminal: Terminal
) -> Iteration:
    """Runs one iteration. Its files and the new model (`model/`) are in the folder.

    Args:
        folder: The output folder.
        model_path: The model to start from.
        tasks: The instructions.
        num_steps: Optimizer steps.
        seed: Seed of the order of training and of the judge's wording.
        terminal: Where each stage prints its line.
    """
    responses, records, scores = folder / "responses.json", folder / "records.jsonl", folder / "scores.jsonl"
    result = Iteration(num_responses=len(tasks))

    with result.stage("generate", terminal) as stage:
        generate(responses, model_path, tasks)
        stage.text = f"{len(tasks)} answers to new instructions"

    with result.stage("judge", terminal) as stage:
        result.tasks = judge(responses, records, tasks, seed)
        check = check_records(records)
        result.num_empty = len(tasks) - len(check.records)
        result.num_satisfactory = check.num_satisfactory
        share = check.num_satisfactory / max(1, len(check.records))
        stage.text = f"{check.num_satisfactory} satisfactory ({share:.0%}), {check.num_unsatisfactory} criticized"
        stage.text += f", {result.num_empty} empty" if result.num_empty else ""

    with result.stage("blame", terminal) as stage:
        result.blame = blame(records, scores, model_path)
        num_criticized = len(result.blame.judged)
        num_with_flag = num_criticized - result.blame.num_without_flag
        stage.text = f"{result.blame.num_flagged} of {result.num_tokens} tokens flagged ({result.flagged_share:.1%})"
        stage.text += f" in {num_with_flag} of {num_criticized} answers"

    with result.stage("train", terminal) as stage:
        result.losses = train(scores, folder / "adapter", model_path, num_steps, seed)
        loss_start, loss_end = result.loss_ends
        stage.text = f"{len(result.losses)} steps, loss {loss_start:.3f} -> {loss_end:.3f}"

    with result.stage("merge", terminal) as stage:
        result.merge_difference = merge_adapter(folder / "adapter", folder / "model").difference
        stage.text = f"adapter folded in, logits agree within {result.merge_difference:.1%}"
    return result


# ---- Its stages ----


def generate(out: Path, model_path: Path, tasks: Sequence[Task]) -> None:
    """Writes the model's greedy response to each task."""
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    generate_file(
        model,
        tokenizer,
        Encoder(tokenizer, TEMPLATE),
        [{"instruction": task.instruction} for task in tasks],
        out,
        Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=64),
        generator=model_path.name,
        dataset="tiny world",
        fingerprint=fingerprint_model(model_path),
    )


def judge(responses: Path, out: Path, tasks: Sequence[Task], seed: int) -> list[Task]:
    """Writes records: each response with the oracle's judgment.

    Returns:
        The task of each record. Empty responses are left out.
    """
    rows, _ = read_rows(responses)
    judged = [(task, row.value["output"]) for task, row in zip(tasks, rows, strict=True) if row.value["output"].strip()]
    write_rows(out, (make_record(task, response, seed) for task, response in judged))
    return [task for task, _ in judged]


def make_record(task: Task, response: str, seed: int = 0) -> dict[str, Any]:
    """A judged response as a row of a file of records."""
    judgment = judge_task(task, response, seed=seed).judgment
    return {"instruction": task.instruction, "output": response, "judgment": judgment}


def blame(records: Path, out: Path, model_path: Path) -> BlameReport:
    """Writes token scores: the log-probabilities of each token with and without the judgment, and its flag."""
    check = check_records(records)
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    return blame_file(
        check.records,
        check.locations,
        out,
        Encoder(tokenizer, TEMPLATE),
        lambda rows, done: score_rows(model, rows, done=done, show_progress=sys.stderr.isatty()),
        FLAG_SETTINGS,
        detector=fingerprint_model(model_path),
        backend={"dtype": "float32"},
    )


def train(scores: Path, adapter: Path, model_path: Path, num_steps: int, seed: int) -> list[float]:
    """Trains an adapter on token scores and saves it.

    Returns:
        The loss of each step.
    """
    args = CUTConfig(
        output_dir=str(adapter),
        max_steps=num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(5, num_steps // 4),
        max_length=FLAG_SETTINGS.max_length,
        seed=seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the trainer's own bar would print a line for each step
    )
    trainer = CUTTrainer(
        model=load_model(model_path.resolve(), dtype="float32"),  # the adapter stores this path of its base model
        args=args,
        train_dataset=read_token_scores(scores),
        processing_class=load_tokenizer(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LORA_MODULES),
        callbacks=[_ProgressBar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class _ProgressBar(TrainerCallback):
    """A bar that shows the loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


# ---- The test ----


def answer(model_path: Path, tasks: Sequence[Task]) -> list[str]:
    """A model's greedy responses."""
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    return answer_tasks(model, tokenizer, tasks)  # type: ignore[arg-type]


def blame_held_out(folder: Path, base: Path, held_out: HeldOut, indices: Sequence[int]) -> list[TokenScores]:
    """Writes all held-out answers, and scores those of the base model at some indices."""
    rows = (
        {"family": task.family, "instruction": task.instruction, "answers": answers}
        for task, *answers in zip(held_out.tasks, *held_out.answers, strict=True)
    )
    write_rows(folder / "answers.jsonl", rows)
    if not indices:
        return []
    records = (make_record(held_out.tasks[index], held_out.answers[0][index]) for index in indices)
    write_rows(folder / "records.jsonl", records)
    return blame(folder / "records.jsonl", folder / "scores.jsonl", base).scores


# ---- Output folder and library noise ----

_IS_DEMO = "is_cutlm_demo"
_OWN_FOLDERS = (*(f"iteration-{number}" for number in range(1, NUM_ITERATIONS + 1)), HELD_OUT_FOLDER)
_OWN_FILES = (CURVE_FILE, PAGE_FILE, RESULT_FILE)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences logs that repeat the lines of the stages, and progress bars of steps that are instant here."""
    logger = logging.getLogger("cutlm")
    level, has_bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT causes it, and a user cannot avoid it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        if has_bars:
            transformers_logging.enable_progress_bar()
        logger.setLevel(level)


def prepare_folder(out: Path) -> None:
    """Makes the folder, and removes the files of an earlier demo from it, complete or not.

    Raises:
        UserError: The folder holds something other than a demo.
    """
    if out.is_file():
        raise UserError(f"--out {out}: expected a folder, got a file; choose another name")
    if out.is_dir() and any(out.iterdir()):
        if not _is_demo(out):
            raise UserError(
                f"--out {out}: expected a new folder or an earlier demo, got other files; choose another one"
            )
        for name in _OWN_FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _OWN_FILES:
            (out / name).unlink(missing_ok=True)
    _write_json(out / RESULT_FILE, {_IS_DEMO: True})


def _is_demo(out: Path) -> bool:
    try:
        result = json.loads((out / RESULT_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get(_IS_DEMO) is True


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open_atomic(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
