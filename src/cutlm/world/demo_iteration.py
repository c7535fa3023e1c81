"""One online iteration of the demo: generate, judge, blame, train, merge, each from files to files.

Every stage is what a user would run on a model of one's own; only the judge is the tiny world's. What is measured and
shown of it is left to `cutlm.world.demo`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from cutlm.blame.detector import BlameReport, FlagSettings, blame_file
from cutlm.blame.scoring import score_rows
from cutlm.blame.token_scores import TokenScores, read_token_scores
from cutlm.data.files import read_rows, write_rows
from cutlm.data.records import check_records
from cutlm.generation.local import Sampling, generate_file
from cutlm.inspect.terminal import Terminal
from cutlm.model.loading import fingerprint_model, load_model, load_tokenizer, load_trained
from cutlm.model.merging import merge_adapter
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig
from cutlm.training.trainer import CUTTrainer
from cutlm.world.judge import judge_task
from cutlm.world.tasks import Task

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
SETTINGS = FlagSettings(threshold=1.1, unlikelihood_weight=1.0, gamma=1.0, max_length=256)
_MAX_NEW_TOKENS = 40
_NUM_AVERAGED = 5
# The model is so small that its adapter may be a large part of it.
_LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass
class Iteration:
    """What came of an iteration.

    Attributes:
        num_responses: Generated.
        num_left_out: Of these, empty ones, of which nothing can be said.
        num_satisfactory: Of the others, those without a judgment.
        blame: What was found.
        losses: Of each optimizer step.
        difference: Largest change of a logit by merging, as a share of the largest logit.
        seconds: By stage.
        scores: What was trained on.
        tasks: What was asked for each of them.
    """

    num_responses: int = 0
    num_left_out: int = 0
    num_satisfactory: int = 0
    blame: BlameReport = field(default_factory=lambda: BlameReport([]))
    losses: list[float] = field(default_factory=list)
    difference: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    scores: list[TokenScores] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(scores.token_ids) for scores in self.scores)

    @property
    def blamed_share(self) -> float:
        """How many of these are blamed."""
        return self.blame.num_flagged / max(1, self.num_tokens)

    @property
    def ends_of_loss(self) -> tuple[float, float]:
        """The mean loss of the first few and of the last few steps."""
        return mean(self.losses[:_NUM_AVERAGED]), mean(self.losses[-_NUM_AVERAGED:])

    def describe(self) -> dict[str, Any]:
        """Its figures, fit for JSON."""
        first, last = self.ends_of_loss
        return {
            "num_responses": self.num_responses,
            "num_left_out": self.num_left_out,
            "num_satisfactory": self.num_satisfactory,
            "num_tokens": self.num_tokens,
            "num_blamed": self.blame.num_flagged,
            "num_steps": len(self.losses),
            "loss_start": first,
            "loss_end": last,
            "merge_difference": self.difference,
            "seconds": self.seconds,
        }


def run_iteration(
    folder: Path, model_path: Path, tasks: Sequence[Task], num_steps: int, seed: int, terminal: Terminal
) -> Iteration:
    """Runs one iteration; its files and the new model are in the folder.

    Args:
        folder: Where to write.
        model_path: The model to begin with.
        tasks: What to ask.
        num_steps: Of the training.
        seed: Of the order of training, and of the judge's wording.
        terminal: Where each stage prints its line.
    """
    result = Iteration(num_responses=len(tasks))
    with terminal.stage("generate") as stage:
        generate(folder / "responses.json", model_path, tasks)
        stage.text = f"{len(tasks)} responses to fresh instructions"
    result.seconds["generate"] = stage.seconds
    with terminal.stage("judge") as stage:
        result.tasks = judge(folder / "responses.json", folder / "records.jsonl", tasks, seed)
        check = check_records(folder / "records.jsonl")
        result.num_left_out = len(tasks) - len(check.records)
        result.num_satisfactory = check.num_satisfactory
        stage.text = (
            f"{check.num_satisfactory} satisfactory ({check.num_satisfactory / max(1, len(check.records)):.0%})"
        )
        stage.text += f", {check.num_unsatisfactory} told what is wrong"
        stage.text += f", {result.num_left_out} empty" if result.num_left_out else ""
    result.seconds["judge"] = stage.seconds
    with terminal.stage("blame") as stage:
        result.blame = blame(folder / "records.jsonl", folder / "scores.jsonl", model_path)
        counts = result.blame
        result.scores = read_token_scores(folder / "scores.jsonl")
        num_wrong = len(counts.judged)
        stage.text = f"{counts.num_flagged} of {result.num_tokens} tokens ({result.blamed_share:.1%})"
        stage.text += f", in {num_wrong - counts.num_without_flag} of these {num_wrong} responses"
    result.seconds["blame"] = stage.seconds
    with terminal.stage("train") as stage:
        result.losses = train(folder / "scores.jsonl", folder / "adapter", model_path, num_steps, seed)
        first, last = result.ends_of_loss
        stage.text = f"{len(result.losses)} steps, loss {first:.3f} -> {last:.3f}"
    result.seconds["train"] = stage.seconds
    with terminal.stage("merge") as stage:
        result.difference = merge_adapter(folder / "adapter", folder / "model").difference
        stage.text = f"into a model, its logits equal to {result.difference:.1%} of the largest"
    result.seconds["merge"] = stage.seconds
    return result


def generate(out: Path, model_path: Path, tasks: Sequence[Task]) -> None:
    """Writes the likeliest response to each task."""
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    generate_file(
        model,
        tokenizer,
        Encoder(tokenizer, "alpaca"),
        [{"instruction": task.instruction} for task in tasks],
        out,
        Sampling(_MAX_NEW_TOKENS, batch_size=64),
        generator=model_path.name,
        dataset="tiny world",
        fingerprint=fingerprint_model(model_path),
    )


def judge(responses: Path, out: Path, tasks: Sequence[Task], seed: int) -> list[Task]:
    """Writes records: what the oracle says about each response.

    Returns:
        The tasks that a record was made of; an empty response makes none.
    """
    rows, _ = read_rows(responses)
    judged = [(task, row.value["output"]) for task, row in zip(tasks, rows, strict=True) if row.value["output"].strip()]
    write_rows(
        out,
        (
            {
                "instruction": task.instruction,
                "output": response,
                "judgment": judge_task(task, response, seed=seed).judgment,
            }
            for task, response in judged
        ),
    )
    return [task for task, _ in judged]


def blame(records: Path, out: Path, model_path: Path) -> BlameReport:
    """Writes token scores of records, by a model that stays as it is."""
    check = check_records(records)
    model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
    return blame_file(
        check.records,
        check.locations,
        out,
        Encoder(tokenizer, "alpaca"),
        lambda rows, done: score_rows(model, rows, done=done, show_progress=sys.stderr.isatty()),
        SETTINGS,
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
        max_length=SETTINGS.max_length,
        seed=seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # its bar is one line for each step
    )
    trainer = CUTTrainer(
        model=load_model(model_path.resolve(), dtype="float32"),  # the adapter names its base model by this path
        args=args,
        train_dataset=read_token_scores(scores),
        processing_class=load_tokenizer(model_path),
        peft_config=LoraConfig(**_LORA),  # type: ignore[arg-type]
        callbacks=[_Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class _Progress(TrainerCallback):
    """A bar with the loss, in place of a line for each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
