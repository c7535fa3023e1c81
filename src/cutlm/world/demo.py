"""The demo (`cutlm demo`): all of cutlm on a model small enough to train on a CPU in seconds.

A base model with bad habits goes through three online iterations. In each one,

    generate   the model answers new instructions
    judge      a judge writes what is wrong with each answer
    blame      the frozen model flags the tokens that these judgments make more likely
    train      CUT trains a LoRA adapter: flagged tokens are unlearned, all others are learned
    merge      the adapter is folded into the weights, and the next iteration starts from the result

and is then tested on instructions that nothing is trained on. Every stage reads and writes files, as the commands of
the same names do for a model of your own; only the judge belongs to the tiny world (`cutlm.world.judge`).
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from cutlm.api import blame, generate
from cutlm.data.files import open_atomic, write_rows
from cutlm.data.records import JudgedRecord, check_records
from cutlm.errors import UserError, log_errors_only
from cutlm.flagging.detector import FlagSettings
from cutlm.flagging.token_scores import TokenScores, read_token_scores
from cutlm.inspect.terminal import Stage, Terminal
from cutlm.model.loading import count_parameters, load_model, load_tokenizer
from cutlm.model.merge import merge_adapter
from cutlm.training.config import CUTConfig
from cutlm.training.trainer import CUTTrainer
from cutlm.world.base import BATCH_SIZE, MAX_NEW_TOKENS, answer_tasks, base_path, load_base
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
from cutlm.world.tasks import Task, list_tasks

NUM_ITERATIONS = 3
FLAG_SETTINGS: dict[str, Any] = {"threshold": 1.1, "unlikelihood_weight": 1.0, "gamma": 1.0, "max_length": 256}
LEARNING_RATE = 1e-3
TRAIN_BATCH_SIZE = 32
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    num_tasks: int  # new instructions in each iteration
    num_steps: int  # optimizer steps in each iteration
    num_held_out: int  # instructions to test on
    num_examples: int  # maximum number of responses per family on the page


FULL = Size(num_tasks=280, num_steps=60, num_held_out=420, num_examples=5)
QUICK = Size(num_tasks=28, num_steps=3, num_held_out=35, num_examples=1)


def run_demo(out: str | Path, size: Size = FULL) -> dict[str, Any]:
    """Run the demo, print it, and return the content of `result.json`.

    The output folder may hold an earlier demo, which is replaced.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    prepare_folder(out)
    started = time.perf_counter()
    terminal = Terminal()
    with _quiet_libraries():
        result = {_IS_DEMO: True} | _run(out, size, terminal)
    result["seconds"] = round(time.perf_counter() - started, 1)
    _write_json(out / RESULT_FILE, result)
    print_end(terminal, out, result["seconds"])
    return result


def _run(out: Path, size: Size, terminal: Terminal) -> dict[str, Any]:
    tasks, test_tasks = list_tasks("train"), list_tasks("test")[: size.num_held_out]
    base = base_path()
    held_out = HeldOut(test_tasks, [answer_tasks(*load_base(base), test_tasks)])
    num_parameters = count_parameters(load_model(base, dtype="float32"))["all"]
    print_start(terminal, num_parameters, NUM_ITERATIONS, size.num_tasks)

    iterations: list[Iteration] = []
    examples: list[dict[str, Any]] = []
    model_path = base
    for number in range(1, NUM_ITERATIONS + 1):
        terminal.print_heading(f"Iteration {number} of {NUM_ITERATIONS}")
        folder = out / f"iteration-{number}"
        new_tasks = tasks[(number - 1) * size.num_tasks : number * size.num_tasks]
        iteration = run_iteration(folder, model_path, new_tasks, size.num_steps, number, terminal)
        iterations.append(iteration)
        model_path = folder / "model"
        with iteration.stage("test", terminal) as stage:
            model, tokenizer = load_base(model_path)
            held_out.answers.append(answer_tasks(model, tokenizer, test_tasks))
            before, after = held_out.accuracy[MEAN][-2:]
            stage.text = f"accuracy on held-out instructions {before:.0%} -> {after:.0%}"

        index = choose_example(iteration.tasks, iteration.scores, {example["family"] for example in examples})
        if index is not None:
            task = iteration.tasks[index]
            (answer,) = answer_tasks(model, tokenizer, [task])
            examples.append(print_example(terminal, task, iteration.scores[index], after=answer))

    print_accuracy(terminal, held_out)
    shown = choose_wrong(held_out, size.num_examples)
    shown_scores = blame_held_out(out / HELD_OUT_FOLDER, base, held_out, shown)
    write_report(out, held_out, shown, shown_scores, [iteration.flagged_share for iteration in iterations])
    return {
        "size": asdict(size),
        "settings": {"learning_rate": LEARNING_RATE, **asdict(FlagSettings(**FLAG_SETTINGS))},
        "num_parameters": num_parameters,
        "accuracy": held_out.accuracy,
        "changes": held_out.changes,
        "iterations": [iteration.figures | {"seconds": iteration.seconds} for iteration in iterations],
        "examples": examples,
    }


# ---- One iteration ----


@dataclass
class Iteration:
    """What happened in an iteration."""

    tasks: list[Task] = field(default_factory=list)  # those of the judged responses; empty ones are not judged
    scores: list[TokenScores] = field(default_factory=list)  # of the judged responses
    figures: dict[str, Any] = field(default_factory=dict)  # counts and losses, as in `result.json`
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    @contextmanager
    def stage(self, name: str, terminal: Terminal) -> Iterator[Stage]:
        """Time a stage, and print its line at the end."""
        with terminal.stage(name) as stage:
            yield stage
        self.seconds[name] = stage.seconds

    @property
    def flagged_share(self) -> float:
        return self.figures["num_flagged"] / max(1, self.figures["num_tokens"])


def run_iteration(
    folder: Path, model_path: Path, tasks: Sequence[Task], num_steps: int, seed: int, terminal: Terminal
) -> Iteration:
    """Run one iteration. Its files and the new model (`model/`) are in the folder.

    The seed decides the order of training and the judge's wording.
    """
    records = folder / "records.jsonl"
    result = Iteration()
    figures = result.figures

    with result.stage("generate", terminal) as stage:
        responses = generate_answers(folder / "responses.json", model_path, tasks)
        stage.text = f"{len(tasks)} answers to new instructions"

    with result.stage("judge", terminal) as stage:
        judged = [(task, response) for task, response in zip(tasks, responses, strict=True) if response.strip()]
        result.tasks = [task for task, _ in judged]
        write_rows(records, (make_record(task, response, seed) for task, response in judged))
        check = check_records(records)
        num_empty = len(tasks) - len(check.records)
        figures |= {"num_responses": len(tasks), "num_empty": num_empty, "num_satisfactory": check.num_satisfactory}
        share = check.num_satisfactory / max(1, len(check.records))
        stage.text = f"{check.num_satisfactory} satisfactory ({share:.0%}), {check.num_unsatisfactory} criticized"
        stage.text += f", {num_empty} empty" if num_empty else ""

    with result.stage("blame", terminal) as stage:
        result.scores = blame_records(folder / "scores.jsonl", model_path, check.records)
        figures["num_tokens"] = sum(len(scores.token_ids) for scores in result.scores)
        figures["num_flagged"] = sum(sum(scores.is_flagged) for scores in result.scores)
        num_with_flag = sum(any(scores.is_flagged) for scores in result.scores)
        stage.text = f"{figures['num_flagged']} of {figures['num_tokens']} tokens flagged ({result.flagged_share:.1%})"
        stage.text += f" in {num_with_flag} of {check.num_unsatisfactory} answers"

    with result.stage("train", terminal) as stage:
        losses = train(folder / "scores.jsonl", folder / "adapter", model_path, num_steps, seed)
        loss_start, loss_end = mean(losses[:5]), mean(losses[-5:])
        figures |= {"num_steps": len(losses), "loss_start": loss_start, "loss_end": loss_end}
        stage.text = f"{len(losses)} steps, loss {loss_start:.3f} -> {loss_end:.3f}"

    with result.stage("merge", terminal) as stage:
        # The largest change of a log-probability since training, as a share of the largest one.
        figures["merge_difference"] = merge_adapter(folder / "adapter", folder / "model").difference
        stage.text = f"adapter folded in, log-probabilities agree within {figures['merge_difference']:.1%}"
    return result


# ---- Its stages ----


def generate_answers(out: Path, model_path: Path, tasks: Sequence[Task]) -> list[str]:
    """Write and return the model's greedy response to each task."""
    rows = generate(
        model_path,
        [task.instruction for task in tasks],
        template="alpaca",
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
        dtype="float32",
        device="cpu",
        out=out,
    )
    return [row["output"] for row in rows]


def make_record(task: Task, response: str, seed: int = 0) -> dict[str, Any]:
    """A response with the oracle's judgment, as a row of a file of records."""
    judgment = judge_task(task, response, seed=seed).judgment
    return {"instruction": task.instruction, "output": response, "judgment": judgment}


def blame_records(out: Path, model_path: Path, records: Sequence[JudgedRecord]) -> list[TokenScores]:
    """Write and return the log-probabilities of each token with and without the judgment, and its flag."""
    return blame(model_path, records, template="alpaca", dtype="float32", device="cpu", out=out, **FLAG_SETTINGS)


def train(scores: Path, adapter: Path, model_path: Path, num_steps: int, seed: int) -> list[float]:
    """Train an adapter on token scores, save it, and return the loss of each step."""
    args = CUTConfig(
        output_dir=str(adapter),
        max_steps=num_steps,
        per_device_train_batch_size=TRAIN_BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(5, num_steps // 4),
        max_length=FLAG_SETTINGS["max_length"],
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


def blame_held_out(folder: Path, base: Path, held_out: HeldOut, indices: Sequence[int]) -> list[TokenScores]:
    """Write all held-out answers, and score those of the base model at some indices."""
    all_answers = zip(held_out.tasks, *held_out.answers, strict=True)
    write_rows(
        folder / "answers.jsonl",
        ({"family": task.family, "instruction": task.instruction, "answers": part} for task, *part in all_answers),
    )
    if not indices:
        return []
    rows = [make_record(held_out.tasks[index], held_out.answers[0][index]) for index in indices]
    return blame_records(folder / "scores.jsonl", base, [JudgedRecord.model_validate(row) for row in rows])


# ---- Output folder and library noise ----

_IS_DEMO = "is_cutlm_demo"
_OWN_FOLDERS = (*(f"iteration-{number}" for number in range(1, NUM_ITERATIONS + 1)), HELD_OUT_FOLDER)
_OWN_FILES = (CURVE_FILE, PAGE_FILE, RESULT_FILE)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence logs that repeat the lines of the stages, and progress bars of steps that are instant here."""
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with log_errors_only("cutlm"):
            yield
    finally:
        if has_bars:
            transformers_logging.enable_progress_bar()


def prepare_folder(out: Path) -> None:
    """Make the folder, and remove the files of an earlier demo from it, complete or not."""
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
