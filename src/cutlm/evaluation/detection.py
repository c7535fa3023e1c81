"""How well flags find the wrong tokens: precision, recall and F1 by threshold, and average precision.

A token is wrong if it overlaps one of the record's `wrong_spans`, or if an empty span points to it. It is flagged if
the judgment multiplies its probability by more than the threshold (eq. 5 of the paper). Only tokens of unsatisfactory
responses with known wrong spans count, but not those that the chat template writes, which are never flagged.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.tables import format_table
from cutlm.prompting.spans import flag_spans

THRESHOLDS = (1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Detection:
    """Counts of tokens."""

    num_true: int  # wrong and flagged
    num_false: int  # flagged but not wrong
    num_missed: int  # wrong but not flagged

    @property
    def precision(self) -> float:
        return self.num_true / max(1, self.num_true + self.num_false)

    @property
    def recall(self) -> float:
        return self.num_true / max(1, self.num_true + self.num_missed)

    @property
    def f1(self) -> float:
        return 2 * self.num_true / max(1, 2 * self.num_true + self.num_false + self.num_missed)

    def __add__(self, other: "Detection") -> "Detection":
        return Detection(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Evidence:
    """Tokens to measure detection with."""

    # By group of records (None without groups), each token's log p(y_t|x,j) - log p(y_t|x), and whether it is wrong.
    tokens: dict[str | None, list[tuple[float, bool]]] = field(default_factory=dict)
    num_records: int = 0  # that the tokens come from
    left_out: Counter[str] = field(default_factory=Counter)  # numbers of other records, by reason

    @property
    def all_tokens(self) -> list[tuple[float, bool]]:
        return [token for tokens in self.tokens.values() for token in tokens]


def gather_evidence(scores: Iterable[TokenScores], name_group: Callable[[TokenScores], str] | None = None) -> Evidence:
    """Find each token's log ratio and whether it is wrong, by the groups of the records, if `name_group` is given."""
    evidence = Evidence()
    for score in scores:
        record = score.record
        if record.is_satisfactory:
            evidence.left_out["satisfactory"] += 1
        elif not record.wrong_spans:
            evidence.left_out["without wrong_spans"] += 1
        elif (ratios := score.log_ratios) is None:
            evidence.left_out["without log-probs"] += 1
        else:
            evidence.num_records += 1
            start = score.num_template_tokens
            pairs = zip(ratios[start:], flag_spans(score.spans[start:], record.wrong_spans), strict=True)
            evidence.tokens.setdefault(name_group(score) if name_group else None, []).extend(pairs)
    return evidence


def count_detected(tokens: Iterable[tuple[float, bool]], threshold: float) -> Detection:
    """Count tokens, given as log ratio and whether wrong, at a threshold (lambda of eq. 5; 0 flags all tokens)."""
    least = math.log(threshold) if threshold > 0 else -math.inf
    counts = Counter((ratio > least, is_wrong) for ratio, is_wrong in tokens)
    return Detection(counts[True, True], counts[True, False], counts[False, True])


def compute_average_precision(tokens: Iterable[tuple[float, bool]]) -> float | None:
    """Compute average precision: the mean over wrong tokens of the precision at the threshold that just flags them.

    Tokens with equal ratios are flagged together. For a random order it is about the share of wrong tokens. None if no
    token is wrong.
    """
    by_ratio: dict[float, list[bool]] = defaultdict(list)
    for ratio, is_wrong in tokens:
        by_ratio[ratio].append(is_wrong)
    total, num_true, num_flagged = 0.0, 0, 0
    for ratio in sorted(by_ratio, reverse=True):
        num_new = sum(by_ratio[ratio])
        num_true += num_new
        num_flagged += len(by_ratio[ratio])
        total += num_new * num_true / num_flagged
    return total / num_true if num_true else None


def measure_detection(evidence: Evidence, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """Measure detection at each threshold, for each group and, as the group None, for all tokens.

    Returns:
        The content of result.json. Precision is None if no token is flagged.
    """
    names = sorted(name for name in evidence.tokens if name is not None)
    groups: dict[str | None, list[tuple[float, bool]]] = {name: evidence.tokens[name] for name in names}
    groups[None] = evidence.all_tokens
    rows: list[dict[str, Any]] = []
    for threshold in thresholds:
        for name, tokens in groups.items():
            counts = count_detected(tokens, threshold)
            num_flagged = counts.num_true + counts.num_false
            precision = counts.precision if num_flagged else None
            rates = {"precision": precision, "recall": counts.recall, "f1": counts.f1}
            rows.append({"threshold": threshold, "group": name, **rates, "num_flagged": num_flagged})
    best = max((row for row in rows if row["group"] is None), key=lambda row: row["f1"])
    return {
        "average_precision": compute_average_precision(groups[None]),
        "best_threshold": best["threshold"],
        "best_f1": best["f1"],
        "num_records": evidence.num_records,
        "num_tokens": len(groups[None]),
        "num_wrong": sum(is_wrong for _, is_wrong in groups[None]),
        "left_out": dict(evidence.left_out),
        "average_precision_by_group": {name: compute_average_precision(groups[name]) for name in names},
        "thresholds": rows,
    }


def tabulate_detection(result: dict[str, Any]) -> str:
    """Report the result of `measure_detection` as Markdown."""
    whole = [row for row in result["thresholds"] if row["group"] is None]
    table = format_table(
        ["threshold", "precision", "recall", "F1", "flagged tokens"],
        [[f"{row['threshold']:g}", *_show_rates(row), f"{row['num_flagged']:,}"] for row in whole],
    )
    parts = [f"# Detection of wrong tokens\n\n{table}"]
    if by_group := result["average_precision_by_group"]:
        best = [row for row in result["thresholds"] if row["threshold"] == result["best_threshold"]]
        header = [f"at {result['best_threshold']:g}", "precision", "recall", "F1", "average precision"]
        groups = [row for row in best if row["group"] is not None]
        cells = [[row["group"], *_show_rates(row), _show(by_group[row["group"]])] for row in groups]
        parts.append(format_table(header, cells))
    left_out = "".join(f", {number} {reason}" for reason, number in result["left_out"].items())
    parts.append(
        f"Average precision {_show(result['average_precision'])}; best F1 {result['best_f1']:.3f} at threshold"
        f" {result['best_threshold']:g}. {result['num_wrong']:,} of {result['num_tokens']:,} tokens of"
        f" {result['num_records']:,} records are wrong; left out: {left_out.removeprefix(', ') or 'none'}."
    )
    return "\n\n".join(parts)


def _show_rates(row: dict[str, Any]) -> list[str]:
    return [_show(row[name]) for name in ("precision", "recall", "f1")]


def _show(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def plot_detection(axes: Any, rows: Sequence[dict[str, Any]], name: str = "", color: str = "#0072b2") -> None:
    """Draw precision and recall over thresholds on matplotlib axes.

    The rows have `threshold`, `precision` (or None) and `recall`; `name` is for the legend.
    """
    thresholds = [row["threshold"] for row in rows]
    for rate, style in (("recall", "o-"), ("precision", "s--")):
        label = f"{name}: {rate}" if name else rate
        values = [math.nan if row[rate] is None else row[rate] for row in rows]
        axes.plot(thresholds, values, style, color=color, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("threshold")
    axes.legend()
