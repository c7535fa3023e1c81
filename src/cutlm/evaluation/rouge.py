"""ROUGE of responses against references, by the package `rouge-score`, with bootstrap confidence intervals.

ROUGE knows the letters a to z and digits alone: a text in another script scores 0, whatever it says.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cutlm.data.records import JudgedRecord
from cutlm.evaluation.folder import need_extra
from cutlm.evaluation.paper import ROUGE_LSUM, SOURCE
from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars
from cutlm.inspect.tables import format_table
from cutlm.judges import Response

PACKAGES = ("rouge-score",)
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_TITLES = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")
_NUM_RESAMPLES = 1000
_RESAMPLES_AT_A_TIME = 50


def list_references(records: Sequence[JudgedRecord], locations: Sequence[str]) -> list[Response]:
    """What a response to each record's instruction should read: its improved response, or the response itself where
    it is satisfactory. Records with neither are left out."""
    references = []
    for record, place in zip(records, locations, strict=True):
        text = record.i_ans if record.i_ans and record.i_ans.strip() else record.output
        if text is record.i_ans or record.is_satisfactory:
            references.append(Response(place, record.instruction, record.input, text))
    return references


def measure_rouge(
    pairs: Sequence[tuple[str, str]], *, use_stemmer: bool = False, seed: int = 42
) -> dict[str, float | int]:
    """Measures responses.

    Args:
        pairs: Response and reference.
        use_stemmer: Whether words count as equal by their stems (English).
        seed: Of the resampling.

    Returns:
        For each kind the mean F-measure, 0 to 100, and as KIND_low and KIND_high its 95% interval by resampling the
        pairs; counts.

    Raises:
        UserError: The package is missing.
    """
    scorer = need_extra("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=use_stemmer)
    found = [scorer.score(reference, response) for response, reference in pairs]
    scores = np.array([[score[kind].fmeasure for kind in KINDS] for score in found]) * 100
    means, low, high = scores.mean(axis=0), *_resample(scores, seed)
    result: dict[str, float | int] = {}
    for place, kind in enumerate(KINDS):
        result[kind] = float(means[place])
        result[f"{kind}_low"] = float(low[place])
        result[f"{kind}_high"] = float(high[place])
    result["num_pairs"] = len(pairs)
    result["num_empty_responses"] = sum(not response.strip() for response, _ in pairs)
    result["num_unreadable_references"] = sum(not re.search("[a-z0-9]", reference.lower()) for _, reference in pairs)
    return result


def _resample(scores: Any, seed: int) -> tuple[Any, Any]:
    """The 95% interval of the mean of each column of [N, K]."""
    rng = np.random.default_rng(seed)
    means = [
        scores[rng.integers(len(scores), size=(_RESAMPLES_AT_A_TIME, len(scores)))].mean(axis=1)
        for _ in range(_NUM_RESAMPLES // _RESAMPLES_AT_A_TIME)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


def tabulate_rouge(result: dict[str, Any], name: str) -> str:
    """The figures as Markdown, the paper's rows below.

    Args:
        result: Of `measure_rouge`.
        name: Of the model.
    """
    own = [f"{result[kind]:.2f} ({result[f'{kind}_low']:.2f} to {result[f'{kind}_high']:.2f})" for kind in KINDS]
    theirs = [[f"paper: {method}", "", "", "", f"{value:.2f}"] for method, value in ROUGE_LSUM.items()]
    table = format_table(["model", *_TITLES], [[name, *own], *theirs])
    notes = [
        f"{result['num_pairs']:,} responses; means and 95% intervals by {_NUM_RESAMPLES:,} resamples. The"
        f" paper's rows ({SOURCE}) are of LLaMA-2 13B."
    ]
    if result["num_empty_responses"]:
        notes.append(f"{result['num_empty_responses']:,} responses are empty and score 0.")
    if result["num_unreadable_references"]:
        notes.append(
            f"{result['num_unreadable_references']:,} references hold no letter from a to z and no digit, which is all"
            " that ROUGE reads: their responses score 0."
        )
    return f"# ROUGE\n\n{table}\n\n{' '.join(notes)}"


def draw_rouge(result: dict[str, Any], name: str) -> bytes:
    """The figures with their intervals as a picture, the paper's below; see `tabulate_rouge`."""
    bars = [
        Bar(f"{name}: {title}", result[kind], result[f"{kind}_low"], result[f"{kind}_high"])
        for kind, title in zip(KINDS, _TITLES, strict=True)
    ]
    bars += make_paper_bars(ROUGE_LSUM, " (ROUGE-Lsum)")
    return draw_bars("ROUGE", bars, "F-measure, 0 to 100, with 95% intervals")
