"""AlpacaEval: how often a model's responses are preferred to a reference's, by the metric of the package `alpaca-eval`.

Verdicts come from an annotator (`annotator.py`) or from a file. Pairs without a verdict are left out and counted; the
package writes null for answers that could not be parsed.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cutlm.data.files import read_rows
from cutlm.data.records import describe_value
from cutlm.errors import DataError
from cutlm.evaluation.annotator import DRAW, Pair
from cutlm.evaluation.paper import ALPACA_COLD_START, ALPACA_ONLINE, ALPACA_WARM_START, SOURCE
from cutlm.evaluation.shared import import_alpaca_eval
from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars
from cutlm.inspect.tables import escape_cell, format_table

PACKAGES = ("alpaca-eval", "pandas")
_TEXTS = ("instruction", "output_1", "output_2")
_PAPERS = (
    {f"{method}, cold start": value for method, value in ALPACA_COLD_START.items()}
    | {f"{method}, warm start": value for method, value in ALPACA_WARM_START.items()}
    | {f"CUT, online iteration {number}": value for number, value in enumerate(ALPACA_ONLINE, start=1)}
)


def read_annotations(path: str | Path, annotator: str) -> list[dict[str, Any]]:
    """Read the verdicts of an annotator as `alpaca-eval` writes them; raise DataError that names all malformed rows.

    Rows have `instruction`, `output_1` (the reference's), `output_2` (the model's) and `preference`: 1 to 2, 0 for a
    draw, or null.
    """
    rows, problems = read_rows(path)
    others: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row.value, dict):
            problems.append(f"{row.location}: expected an object, got {describe_value(row.value)}")
            continue
        for name in _TEXTS:
            if not isinstance(value := row.value.get(name), str):
                problems.append(f"{row.location}: field {name!r}: expected text, got {describe_value(value)}")
        value = row.value.get("preference")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and (value == 0 or 1 <= value <= 2)):
            expected, got = "a number from 1 to 2, 0 for a draw, or null", describe_value(value)
            problems.append(f"{row.location}: field 'preference': expected {expected}, got {got}")
        if (other := row.value.get("annotator")) not in (None, annotator):
            others[str(other)] += 1
    hint = f"{len(problems)} problems in {path}; fix them, no row was skipped" if problems else ""
    if others:
        names = ", ".join(f"{name} ({count} rows)" for name, count in others.most_common())
        problems.append(f"{path}: expected verdicts of {annotator}, got some of {names}; set --annotator to theirs")
    if problems:
        raise DataError(problems, hint=hint)
    if not rows:
        raise DataError(f"{path}: expected a JSON array or JSON Lines with at least one verdict, got none")
    return [row.value for row in rows]


def find_verdicts(annotations: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> list[float | None]:
    """Return the verdict on each pair from the rows with its texts, or None.

    Several rows with the same texts are used in turn, null ones last, and the last one for all further pairs.
    """
    known: dict[tuple[str, ...], list[float | None]] = defaultdict(list)
    for row in sorted(annotations, key=lambda row: row.get("preference") is None):
        known[tuple(row[name] for name in _TEXTS)].append(row.get("preference"))
    found = []
    for pair in pairs:
        verdicts = known.get((pair.instruction, pair.reference, pair.output), [None])
        found.append(verdicts.pop(0) if len(verdicts) > 1 else verdicts[0])
    return found


def measure_win_rate(preferences: Sequence[float | None], outputs: Sequence[str]) -> dict[str, Any]:
    """Compute the win rate of the model's responses and its standard error, in percent, with counts.

    Args:
        preferences: 1 to 2 for each pair; 2 means that the model's response is better; 0 is a draw and counts half;
            None is no verdict. Without any verdict, it raises DataError.
        outputs: The model's responses, for their mean length in characters.
    """
    judged = [DRAW if value == 0 else float(value) for value in preferences if value is not None]
    if not judged:
        raise DataError(f"expected verdicts on {len(preferences)} pairs, got none; there is nothing to measure")
    found = import_alpaca_eval("metrics").get_winrate([{"preference": value} for value in judged])
    error = float(found["standard_error"])
    return {
        "win_rate": float(found["win_rate"]),
        "standard_error": None if math.isnan(error) else error,
        "num_judged": int(found["n_total"]),
        "num_wins": int(found["n_wins"]),
        "num_losses": int(found["n_wins_base"]),
        "num_draws": int(found["n_draws"]),
        "num_without_verdict": len(preferences) - len(judged),
        "mean_length": mean(map(len, outputs)),
    }


def tabulate_win_rate(result: dict[str, Any], name: str, against: str) -> str:
    """Format the result of `measure_win_rate`, with `annotator`, as Markdown, with the paper's rows below.

    The names are those of the model and of the reference.
    """
    error = "" if result["standard_error"] is None else f"{result['standard_error']:.2f}"
    counts = [f"{result[f'num_{name}']:,}" for name in ("judged", "wins", "losses", "draws")]
    own = [name, f"{result['win_rate']:.2f}", error, *counts, f"{result['mean_length']:,.0f}"]
    table = format_table(
        ["model", "win rate", "standard error", "judged", "wins", "losses", "draws", "mean length"],
        [own, *([f"paper: {method}", f"{value:.2f}", *[""] * 6] for method, value in _PAPERS.items())],
    )
    return (
        f"# AlpacaEval\n\n{table}\n\nAgainst {escape_cell(against)}, by {result['annotator']};"
        f" {result['num_without_verdict']} pairs without a verdict are left out. The paper's rows"
        f" ({SOURCE}) are of LLaMA-2 13B against text_davinci_003, by alpaca_eval_gpt4."
    )


def draw_win_rate(result: dict[str, Any], name: str, against: str) -> bytes:
    """Draw the win rate with its standard error, the paper's below; see `tabulate_win_rate`."""
    rate, error = result["win_rate"], result["standard_error"]
    ends = (None, None) if error is None else (rate - error, rate + error)
    bars = [Bar(name, rate, *ends), *make_paper_bars(_PAPERS, "")]
    return draw_bars(f"AlpacaEval: win rate against {against}", bars, "percent, with the standard error")
