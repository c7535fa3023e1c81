"""What the demo shows of its iterations: examples, tables, the curve and the page, and where everything lies.

How these look is left to `cutlm.inspect`, what is run to `cutlm.world.demo`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlm.blame.token_scores import TokenScores, read_token_scores
from cutlm.data.files import open_atomic, write_rows
from cutlm.inspect.page import PageRecord, Picture, Table, write_page
from cutlm.inspect.plots import Curves, draw_curves
from cutlm.inspect.terminal import Terminal
from cutlm.world.demo_iteration import Iteration, blame
from cutlm.world.families import FAMILIES
from cutlm.world.judge import judge_task
from cutlm.world.measure import rate_answers
from cutlm.world.tasks import Task

CURVE_FILE, PAGE_FILE = "curve.png", "page.html"
MEAN = "mean"


@dataclass(frozen=True)
class HeldOut:
    """Instructions that nothing is trained on, and what each model answers.

    Attributes:
        tasks: The instructions.
        answers: Of the base model and, so far, of each iteration's.
    """

    tasks: Sequence[Task]
    answers: list[list[str]]

    @property
    def accuracy(self) -> dict[str, list[float]]:
        """The share of right answers, by family and as the mean of the families, of each model."""
        shares = [rate_answers(self.tasks, answers) for answers in self.answers]
        return {family: [share[family] for share in shares] for family in FAMILIES} | {
            MEAN: [share["macro"] for share in shares]
        }

    @property
    def changes(self) -> dict[str, int]:
        """How many answers became right, stayed wrong, and became wrong, from the first model to the last."""
        first, last = (
            [judge_task(task, answer).judgment is None for task, answer in zip(self.tasks, answers, strict=True)]
            for answers in (self.answers[0], self.answers[-1])
        )
        pairs = list(zip(first, last, strict=True))
        return {
            "num_mended": pairs.count((False, True)),
            "num_still_wrong": pairs.count((False, False)),
            "num_spoiled": pairs.count((True, False)),
            "num_still_right": pairs.count((True, True)),
        }


def choose_example(iteration: Iteration, shown_families: set[str]) -> int | None:
    """The first response with a blamed token, of a family that was not shown yet where there is one."""
    fit = [
        place
        for place, scores in enumerate(iteration.scores)
        if any(scores.is_flagged) and scores.record.output.isprintable()
    ]
    fresh = [place for place in fit if iteration.tasks[place].family not in shown_families]
    return next(iter([*fresh, *fit]), None)


def print_start(terminal: Terminal, num_parameters: int, num_rounds: int, num_tasks: int) -> None:
    """Says what will happen."""
    terminal.print_heading("cutlm demo: a language model learns from what is said about its answers")
    terminal.print_text(
        f"A LLaMA of {num_parameters / 1e6:.1f} million parameters, with bad habits, answers {num_tasks} fresh"
        f" instructions in each of {num_rounds} iterations. A judge says in plain words what is wrong with an answer;"
        " the tokens that the judgment makes likelier are blamed, and unlearned, and all others learned. Every figure"
        " is measured as it is printed."
    )


def print_example(terminal: Terminal, task: Task, scores: TokenScores, after: str) -> dict[str, Any]:
    """Shows a response, what was said about it, and what the model answers after training.

    Returns:
        The same, fit for JSON.
    """
    record, judgment = scores.record, judge_task(task, after).judgment
    terminal.print_pairs(
        [
            ("instruction", record.instruction),
            ("response", scores),
            ("judgment", record.judgment or ""),
            ("afterwards", f"{after} ({'wrong' if judgment else 'right'})"),
        ]
    )
    return {
        "family": task.family,
        "instruction": record.instruction,
        "response": record.output,
        "judgment": record.judgment,
        "after": after,
        "after_judgment": judgment,
    }


def list_stages(accuracy: dict[str, list[float]]) -> list[str]:
    """The models by name: the base model, then the iterations."""
    return ["base", *map(str, range(1, len(accuracy[MEAN])))]


def list_rows(accuracy: dict[str, list[float]]) -> list[list[str]]:
    """The cells of the table of accuracy."""
    return [[name, *(f"{share:.0%}" for share in shares)] for name, shares in accuracy.items()]


def print_accuracy(terminal: Terminal, held_out: HeldOut) -> None:
    """Prints the table of accuracy, and what became of the answers one by one."""
    accuracy = held_out.accuracy
    terminal.print_heading(f"Right answers to {len(held_out.tasks)} held-out instructions, by iteration")
    terminal.print_table(["", *list_stages(accuracy)], list_rows(accuracy))
    terminal.print_text(_describe_changes(held_out.changes), indent=2)


def _describe_changes(changes: dict[str, int]) -> str:
    return (
        f"Wrong before and right now: {changes['num_mended']}; still wrong: {changes['num_still_wrong']}. Right before"
        f" and wrong now: {changes['num_spoiled']}; still right: {changes['num_still_right']}."
    )


def print_end(terminal: Terminal, out: Path, seconds: float) -> None:
    """Says where everything lies, and how to go on."""
    terminal.print_heading(f"Done in {seconds:.0f} seconds. Look at")
    for name, about in (
        (PAGE_FILE, "answers before and after, every token shaded"),
        (CURVE_FILE, "the table as a picture"),
        ("iteration-1", "what each stage wrote and read"),
    ):
        terminal.print_line(f"  {out / name!s:<{len(str(out)) + 13}} {about}")
    terminal.print_heading("With a model of your own, and what was said about its answers")
    terminal.print_line("  cutlm blame --model Qwen/Qwen3-1.7B --template chat --data YOUR.jsonl \\")
    terminal.print_line("      --out scores.jsonl")
    terminal.print_line("  cutlm train --config recipes/small-instruct.yaml --data scores.jsonl")


# ---- Curve and page ----


def write_report(out: Path, base: Path, held_out: HeldOut, iterations: Sequence[Iteration], num_examples: int) -> None:
    """Writes the curve, the page, and the held-out answers that these are made of.

    Args:
        out: The demo's folder.
        base: The base model, which blames the tokens that the page shows.
        held_out: Instructions and answers.
        iterations: What came of each.
        num_examples: On the page, of each family, at most.
    """
    accuracy = held_out.accuracy
    num_models = len(held_out.answers)
    curves = Curves(
        title=f"Right answers to {len(held_out.tasks)} held-out instructions",
        label="iteration",
        stages=list_stages(accuracy),
        lines={family: accuracy[family] for family in FAMILIES},
        mean=accuracy[MEAN],
        bar_title="Tokens blamed",
        bars=[part.blamed_share for part in iterations],
    )
    light = draw_curves(curves)
    with open_atomic(out / CURVE_FILE) as file:
        file.write(light)
    ends = [f"{name} from {shares[0]:.0%} to {shares[-1]:.0%}" for name, shares in accuracy.items()]
    examples = _make_examples(out / "held-out", base, held_out, num_examples)
    write_page(
        out / PAGE_FILE,
        examples,
        title="A language model learns from judgments of its answers",
        lead=[
            f"Answers of a tiny model before and after {num_models - 1} iterations of answering, being judged, and"
            " unlearning the tokens that the judgments flag. Nothing on this page was trained on.",
            f"Answers to {len(held_out.tasks)} held-out instructions. {_describe_changes(held_out.changes)}",
        ],
        sections=[
            Table("Correct answers by family and iteration", ["", *list_stages(accuracy)], list_rows(accuracy)),
            Picture(light, draw_curves(curves, is_dark=True), f"Correct answers by iteration: {', '.join(ends)}."),
        ],
    )


def _make_examples(folder: Path, base: Path, held_out: HeldOut, num_examples: int) -> list[PageRecord]:
    chosen = choose_flawed(held_out, num_examples)
    write_rows(
        folder / "answers.jsonl",
        (
            {"family": task.family, "instruction": task.instruction, "answers": list(answers)}
            for task, *answers in zip(held_out.tasks, *held_out.answers, strict=True)
        ),
    )
    if not chosen:
        return []
    first, last = held_out.answers[0], held_out.answers[-1]
    tasks = [held_out.tasks[place] for place in chosen]
    write_rows(
        folder / "records.jsonl",
        (
            {
                "instruction": task.instruction,
                "output": first[place],
                "judgment": judge_task(task, first[place]).judgment,
            }
            for task, place in zip(tasks, chosen, strict=True)
        ),
    )
    blame(folder / "records.jsonl", folder / "scores.jsonl", base)
    return [
        PageRecord((scores,), task.family, last[place], judge_task(task, last[place]).judgment)
        for task, place, scores in zip(tasks, chosen, read_token_scores(folder / "scores.jsonl"), strict=True)
    ]


def choose_flawed(held_out: HeldOut, num_examples: int) -> list[int]:
    """The first few instructions of each family that the base model answers wrongly.

    Where these have all become right and some other has not, the first such stands in the last one's place, so that
    what was not learned is seen too.
    """
    first, last = (
        [judge_task(task, answer).judgment is not None for task, answer in zip(held_out.tasks, answers, strict=True)]
        for answers in (held_out.answers[0], held_out.answers[-1])
    )
    chosen = []
    for family in FAMILIES:
        flawed = [
            place
            for place, task in enumerate(held_out.tasks)
            if task.family == family and first[place] and held_out.answers[0][place].strip()
        ]
        part = flawed[:num_examples]
        still_wrong = [place for place in flawed if last[place]]
        if still_wrong and still_wrong[0] not in part:
            part = [*part[:-1], still_wrong[0]]
        chosen += part
    return chosen
