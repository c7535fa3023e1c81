"""What `cutlm demo` prints: its steps, the table of before and after, and answers with the blamed words marked.

Every figure is handed in; nothing is measured here.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cutlm.records import JudgedRecord

_GROUPS = {
    "other_phrasing": "the records' subjects, asked in other words",
    "other_sentence": "things that no record is about",
    "other_capital": "countries that no record is about",
}
_BOLD, _RED, _DIM, _PLAIN = "\033[1m", "\033[31;4m", "\033[2m", "\033[0m"


class Report:
    """Prints to standard output: in colour to a terminal, unless NO_COLOR is set, and in plain text elsewhere."""

    def __init__(self) -> None:
        self._has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._num_steps = 0
        _print(self._paint("cutlm demo: a language model learns from what is said about its answers", _BOLD))

    def _paint(self, text: str, style: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._has_colour else text

    def _print_heading(self, text: str) -> None:
        self._num_steps += 1
        _print("\n" + self._paint(f"{self._num_steps}  {text}", _BOLD))

    def mark(self, tokens: Sequence[tuple[str, bool]]) -> str:
        """A response with its blamed tokens in colour, or in brackets.

        Args:
            tokens: The tokens' texts, and whether each is blamed.
        """
        runs: list[tuple[str, bool]] = []
        for text, is_blamed in tokens:
            if runs and runs[-1][1] == is_blamed:
                runs[-1] = (runs[-1][0] + text, is_blamed)
            else:
                runs.append((text, is_blamed))
        marked = ""
        for text, is_blamed in runs:
            words = text.lstrip(" ")
            if is_blamed and words:
                text = text[: -len(words)] + (self._paint(words, _RED) if self._has_colour else f"[{words}]")
            marked += text
        return marked

    def print_base(self, num_parameters: int, num_texts: int) -> None:
        """Says what the base model is."""
        self._print_heading("A base model with bad habits, which can read judgments")
        _print(
            f"   A LLaMA of {num_parameters / 1e6:.1f} million parameters, trained from nothing on {num_texts:,} texts."
        )

    def print_records(
        self, num_records: int, num_unsatisfactory: int, shown: JudgedRecord, tokens: Sequence[tuple[str, bool]]
    ) -> None:
        """Says what the records are, and shows one."""
        self._print_heading(f"{num_records} answers, {num_unsatisfactory} of them with a judgment of what is wrong")
        self._print_pairs(
            {"instruction": shown.instruction, "answer": self.mark(tokens), "judgment": shown.judgment or ""}
        )
        marks = "In red" if self._has_colour else "In brackets"
        _print(f"   {marks}: what the model blames, because the judgment makes it more likely.")

    def print_training(self, num_steps: int) -> None:
        """Says that training begins."""
        self._print_heading(f"Contrastive Unlikelihood Training: {num_steps} steps with LoRA")

    def print_merge(self, difference: float) -> None:
        """Says that the adapter was merged."""
        self._print_heading("The adapter merged into the base model, and asked what is not in the records")
        _print(f"   No logit changed by more than {difference:.0e} of the largest one in merging.")

    def print_table(self, num_flagged: int, before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> None:
        """Prints what was measured before training and, where given, after it beside it."""
        parts = [before] if after is None else [before, after]
        if after is None:
            _print()
        else:
            self._print_heading("Before and after")
        self._print_row("", *["before", "after"][: len(parts)])
        for name, label in (
            ("loss", "loss on the records"),
            ("loss_contrast", "  L1: blamed tokens down, the others up"),
            ("loss_likelihood", "  L2: good answers, and the judged under the judgment"),
            ("likelihood_flagged", f"likelihood of the {num_flagged} blamed tokens"),
            ("likelihood_others", "likelihood of all other tokens"),
        ):
            self._print_row(label, *("-" if part[name] is None else f"{part[name]:.3f}" for part in parts))
        _print("   right answers to what is not in the records:")
        for name, label in _GROUPS.items():
            if name in before["num_answers"]:
                cells = (f"{part['right_answers'][name]:.0%}" for part in parts)
                self._print_row(f"  {label} ({before['num_answers'][name]})", *cells)

    def _print_row(self, label: str, first: str, last: str = "") -> None:
        bold = self._paint(f"{last:>9}", _BOLD) if last else ""
        _print(f"   {label:<56}{first:>9}{bold}")

    def print_example(self, judged: JudgedRecord, tokens: Sequence[tuple[str, bool]], answer: str) -> None:
        """Prints an answer of the base model, its judgment, and the answer after training."""
        _print()
        self._print_pairs(
            {
                "instruction": judged.instruction,
                "before": self.mark(tokens),
                "judgment": judged.judgment or "",
                "after": self._paint(answer, _BOLD),
            }
        )

    def _print_pairs(self, pairs: Mapping[str, str]) -> None:
        for name, text in pairs.items():
            line = text.replace("\n", " ")
            _print(f"   {self._paint(f'{name:<13}', _DIM)}{line}")

    def print_end(self, out: Path, seconds: float) -> None:
        """Says where everything lies, and how to go on."""
        _print(
            f"\n{seconds:.0f} seconds in all. In {out}:\n"
            "   base, adapter, merged           the model before, what was learned, both in one\n"
            "   records.jsonl                   what it learned from\n"
            "   prompts.json, responses.json    what the merged model was asked, and answered\n"
            "   result.json                     the figures above\n"
        )
        _print(self._paint("With a model of your own, and what was said about its answers:", _BOLD))
        _print("   cutlm train --config recipes/small-instruct.yaml --data YOUR.jsonl --output_dir runs/mine")


def _print(text: str = "") -> None:
    # At once, for progress bars go to the other stream.
    print(text, flush=True)
