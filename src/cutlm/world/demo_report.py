"""The output of the demo: examples and tables in the terminal, the learning curve, and the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.flagging.report import read_sensitivity
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.page import PageRecord, Picture, Table, write_page
from cutlm.inspect.plots import Curves, draw_curves
from cutlm.inspect.terminal import Terminal
from cutlm.world.judge import judge_task, rate_answers
from cutlm.world.tasks import FAMILIES, Task

CURVE_FILE, PAGE_FILE, HELD_OUT_FOLDER = "curve.png", "page.html", "held-out"
MEAN = "mean"


@dataclass(frozen=True)
class HeldOut:
    """Instructions that nothing is trained on, with each model's answers."""

    tasks: Sequence[Task]
    answers: list[list[str]]  # of the base model, then of each iteration's model

    @property
    def accuracy(self) -> dict[str, list[float]]:
        """The share of right answers of each model, by family and as the mean over families."""
        shares = [rate_answers(self.tasks, answers) for answers in self.answers]
        return {MEAN if name == "macro" else name: [share[name] for share in shares] for name in (*FAMILIES, "macro")}

    def is_right(self, index: int, model: int) -> bool:
        """Whether a model (0: base, -1: last) answers a task correctly."""
        return judge_task(self.tasks[index], self.answers[model][index]).judgment is None

    @property
    def changes(self) -> dict[str, int]:
        """How many answers were right or wrong before (base model) and after (last model)."""
        counts = Counter((self.is_right(index, 0), self.is_right(index, -1)) for index in range(len(self.tasks)))
        return {
            "num_wrong_then_right": counts[False, True],
            "num_wrong_then_wrong": counts[False, False],
            "num_right_then_wrong": counts[True, False],
            "num_right_then_right": counts[True, True],
        }


# ---- Terminal ----


def print_start(terminal: Terminal, num_parameters: int, num_iterations: int, num_tasks: int) -> None:
    """Print what will happen."""
    terminal.print_heading("cutlm demo: a language model learns from written judgments")
    terminal.print_text(
        f"A LLaMA with {num_parameters / 1e6:.1f} million parameters and some bad habits answers {num_tasks} new"
        f" instructions in each of {num_iterations} iterations. A judge writes what is wrong with an answer. The tokens"
        " that this judgment makes more likely are flagged and unlearned; all others are learned. All numbers are"
        " measured in this run."
    )


def choose_example(tasks: Sequence[Task], scores: Sequence[TokenScores], shown_families: set[str]) -> int | None:
    """The index of the first response with a flagged token, if possible of a family that was not shown yet."""
    fit = [index for index, part in enumerate(scores) if any(part.is_flagged) and part.record.output.isprintable()]
    new = [index for index in fit if tasks[index].family not in shown_families]
    return next(iter([*new, *fit]), None)


def print_example(terminal: Terminal, task: Task, scores: TokenScores, after: str) -> dict[str, Any]:
    """Show a response, its judgment, and the model's answer after training; return the same as JSON."""
    record, judgment_after = scores.record, judge_task(task, after).judgment
    terminal.print_pairs(
        [
            ("instruction", record.instruction),
            ("response", scores),
            ("judgment", record.judgment or ""),
            ("afterwards", f"{after} ({'wrong' if judgment_after else 'right'})"),
        ]
    )
    return {
        "family": task.family,
        "instruction": record.instruction,
        "response": record.output,
        "judgment": record.judgment,
        "after": after,
        "after_judgment": judgment_after,
    }


def print_accuracy(terminal: Terminal, held_out: HeldOut) -> None:
    """Print the table of accuracy, and how many answers changed."""
    terminal.print_heading(f"Accuracy on {len(held_out.tasks)} held-out instructions, by iteration")
    terminal.print_table(*_tabulate(held_out.accuracy))
    terminal.print_text(_describe_changes(held_out.changes), indent=2)


def print_end(terminal: Terminal, out: Path, seconds: float) -> None:
    """Print where the results are and what to do next."""
    files = {
        PAGE_FILE: "answers before and after, every token shaded",
        CURVE_FILE: "accuracy by iteration",
        "iteration-1": "the files of each stage",
    }
    terminal.print_heading(f"Done in {seconds:.0f} seconds. The results are in")
    width = max(len(str(out / name)) for name in files)
    for name, about in files.items():
        terminal.print_line(f"  {out / name!s:<{width}}  {about}")
    terminal.print_heading("To do the same with a model and judgments of your own")
    terminal.print_line("  cutlm blame --model Qwen/Qwen3-1.7B --template chat --data YOUR.jsonl \\")
    terminal.print_line("      --out scores.jsonl")
    terminal.print_line("  cutlm train --config recipes/small-instruct.yaml --data scores.jsonl")


def _tabulate(accuracy: dict[str, list[float]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracy."""
    rows = [[name, *(f"{share:.0%}" for share in shares)] for name, shares in accuracy.items()]
    return ["", *_name_models(accuracy)], rows


def _name_models(accuracy: dict[str, list[float]]) -> list[str]:
    return ["base", *map(str, range(1, len(accuracy[MEAN])))]


def _describe_changes(changes: dict[str, int]) -> str:
    return (
        f"Wrong answers that became right: {changes['num_wrong_then_right']}, still wrong:"
        f" {changes['num_wrong_then_wrong']}. Right answers that became wrong: {changes['num_right_then_wrong']}, still"
        f" right: {changes['num_right_then_right']}."
    )


# ---- Curve and page ----


def choose_wrong(held_out: HeldOut, num_examples: int) -> list[int]:
    """The indices of the first few instructions of each family that the base model answers wrongly.

    If the last model answers all of these correctly but is wrong elsewhere in the family, the last one is replaced by
    the first that is still wrong, so that failures are shown too.
    """
    chosen = []
    for family in FAMILIES:
        wrong = [
            index
            for index, task in enumerate(held_out.tasks)
            if task.family == family and held_out.answers[0][index].strip() and not held_out.is_right(index, 0)
        ]
        still_wrong = [index for index in wrong if not held_out.is_right(index, -1)]
        part = wrong[:num_examples]
        if still_wrong and still_wrong[0] not in part:
            part[-1] = still_wrong[0]
        chosen += part
    return chosen


def write_report(
    out: Path, held_out: HeldOut, indices: Sequence[int], scores: Sequence[TokenScores], flagged_shares: Sequence[float]
) -> None:
    """Write the learning curve and the page.

    The page shows the held-out answers at some indices, with the scores of the base model's answers. The share of
    flagged tokens of each iteration is part of the curve.
    """
    accuracy = held_out.accuracy
    curves = Curves(
        title=f"Accuracy on {len(held_out.tasks)} held-out instructions",
        label="iteration",
        stages=_name_models(accuracy),
        lines={family: accuracy[family] for family in FAMILIES},
        mean=accuracy[MEAN],
        bar_title="Flagged tokens",
        bars=flagged_shares,
    )
    light = draw_curves(curves)
    with open_atomic(out / CURVE_FILE) as file:
        file.write(light)

    records = []
    for index, part in zip(indices, scores, strict=True):
        task, after = held_out.tasks[index], held_out.answers[-1][index]
        records.append(PageRecord((part,), task.family, after, judge_task(task, after).judgment))
    ends = ", ".join(f"{name} from {shares[0]:.0%} to {shares[-1]:.0%}" for name, shares in accuracy.items())
    write_page(
        out / PAGE_FILE,
        records,
        title="A language model learns from written judgments",
        lead=[
            f"A tiny model with bad habits, before and after {len(flagged_shares)} iterations in which it answers, is"
            " judged, and unlearns the tokens that the judgments flag. Nothing on this page was trained on.",
            f"{len(held_out.tasks)} held-out instructions: {_describe_changes(held_out.changes)}",
        ],
        sections=[
            Table("Accuracy by family and iteration", *_tabulate(accuracy)),
            Picture(light, draw_curves(curves, is_dark=True), f"Accuracy by iteration: {ends}."),
        ],
        sensitivities=[read_sensitivity(out / HELD_OUT_FOLDER / "scores.jsonl")],
    )
