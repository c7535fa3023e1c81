"""ROUGE of responses against references, with bootstrap confidence intervals, by the package `rouge-score`.

ROUGE only knows the letters a to z and digits: text in any other script scores 0.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cutlm.data.records import JudgedRecord
from cutlm.evaluation.paper import ROUGE_LSUM, SOURCE
from cutlm.evaluation.shared import need_extra
from cutlm.inspect.plots import Bar, draw_bars, make_paper_bars
from cutlm.inspect.tables import format_table
from cutlm.judges import Response

PACKAGES = ("rouge-score",)
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_TITLES = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")
_NUM_RESAMPLES = 1000
_BATCH_SIZE = 50


def list_references(records: Sequence[JudgedRecord], locations: Sequence[str]) -> list[Response]:
    """List the improved response of each record, or its response if satisfactory; skip records with neither."""
    references = []
    for record, location in zip(records, locations, strict=True):
        improved = record.i_ans if record.i_ans and record.i_ans.strip() else None
        if improved is not None or record.is_satisfactory:
            references.append(Response.from_record(location, record, improved))
    return references


def make_prompt_row(reference: Response) -> dict[str, Any]:
    """Return the row of a prompt that a reference answers: an instruction or a conversation."""
    row: dict[str, Any] = {"instruction": reference.instruction, "input": reference.input}
    if messages := reference.row.get("messages"):
        row = {"messages": messages[:-1]} | ({"tools": tools} if (tools := reference.row.get("tools")) else {})
    return row


def measure_rouge(
    pairs: Sequence[tuple[str, str]], *, use_stemmer: bool = False, seed: int = 42
) -> dict[str, float | int]:
    """Compute the mean F-measure of each kind, 0 to 100, with the ends KIND_low and KIND_high of its 95% interval.

    Args:
        pairs: Responses and references.
        use_stemmer: Whether words with the same stem match (English).
        seed: Seed of the bootstrap.
    """
    scorer = need_extra("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=use_stemmer)
    found = [scorer.score(reference, response) for response, reference in pairs]
    scores = np.array([[score[kind].fmeasure for kind in KINDS] for score in found]) * 100
    low, high = _bootstrap_interval(scores, seed)
    result: dict[str, float | int] = {}
    for kind, *values in zip(KINDS, scores.mean(axis=0), low, high, strict=True):
        result |= {f"{kind}{suffix}": float(value) for suffix, value in zip(("", "_low", "_high"), values, strict=True)}
    result["num_pairs"] = len(pairs)
    result["num_empty_responses"] = sum(not response.strip() for response, _ in pairs)
    result["num_unreadable_references"] = sum(not re.search("[a-z0-9]", reference.lower()) for _, reference in pairs)
    return result


def _bootstrap_interval(scores: Any, seed: int) -> Any:
    """The 95% interval of the mean of each column of [N, K]."""
    rng, shape = np.random.default_rng(seed), (_BATCH_SIZE, len(scores))
    means = [scores[rng.integers(len(scores), size=shape)].mean(axis=1) for _ in range(_NUM_RESAMPLES // _BATCH_SIZE)]
    return np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)


def tabulate_rouge(result: dict[str, Any], name: str) -> str:
    """Report the result of `measure_rouge` for the model `name` as Markdown, with the paper's values below."""
    own = [f"{result[kind]:.2f} ({result[f'{kind}_low']:.2f} to {result[f'{kind}_high']:.2f})" for kind in KINDS]
    papers = [[f"paper: {method}", "", "", "", f"{value:.2f}"] for method, value in ROUGE_LSUM.items()]
    table = format_table(["model", *_TITLES], [[name, *own], *papers])
    notes = [
        f"{result['num_pairs']:,} responses; means with 95% intervals from {_NUM_RESAMPLES:,} bootstrap samples. The"
        f" paper's values ({SOURCE}) are for LLaMA-2 13B."
    ]
    if result["num_empty_responses"]:
        notes.append(f"{result['num_empty_responses']:,} responses are empty and score 0.")
    if result["num_unreadable_references"]:
        count = f"{result['num_unreadable_references']:,}"
        notes.append(f"{count} references have no letter from a to z and no digit, so their responses score 0.")
    return f"# ROUGE\n\n{table}\n\n{' '.join(notes)}"


def draw_rouge(result: dict[str, Any], name: str) -> bytes:
    """Draw the values with their intervals, with the paper's below; see `tabulate_rouge`."""
    bars = [
        Bar(f"{name}: {title}", result[kind], result[f"{kind}_low"], result[f"{kind}_high"])
        for kind, title in zip(KINDS, _TITLES, strict=True)
    ]
    bars += make_paper_bars(ROUGE_LSUM, " (ROUGE-Lsum)")
    return draw_bars("ROUGE", bars, "F-measure, 0 to 100, with 95% intervals")
