"""Token scores to show on a page, and helpers that read that page, for the tests of `cutlm inspect`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report_scores import make_scores

from cutlm.data.records import JudgedRecord
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.page import PageRecord, write_page
from cutlm.losses import flag_tokens
from cutlm.prompting.spans import flag_spans

OUTPUTS = (
    "The capital is Sydney, a large city.",
    "Canberra is the capital.",
    "12 + 34 = 47, and so on.",
    "Hello world! Sydney is not the capital.",
    "A new line.",
)


def make_rows(seed: int = 0) -> list[TokenScores]:
    """Five records: the second is satisfactory, the others have `wrong_spans`, except the fourth."""
    rows = []
    for index, output in enumerate(OUTPUTS):
        judgment = None if index == 1 else f"Number {index} is wrong."
        scores = make_scores(output, judgment, seed=seed + index)
        record = JudgedRecord(
            instruction=f"Task {index}?",
            output=output,
            judgment=judgment,
            wrong_spans=None if index in (1, 3) else ((4, 11),),  # type: ignore[arg-type]
        )
        without, judged = (
            None if logps is None else [round(logp, 6) for logp in logps]  # as `cutlm blame` does
            for logps in (scores.logps_without, scores.logps_with)
        )
        rows.append(flag(replace(scores, record=record, logps_without=without, logps_with=judged), 1.1))
    return rows


def flag(scores: TokenScores, threshold: float) -> TokenScores:
    """Flags tokens by eq. 5."""
    if scores.logps_with is None or scores.logps_without is None or scores.record.is_satisfactory:
        return replace(scores, is_flagged=[False] * len(scores.tokens), weights=[0.0] * len(scores.tokens))
    without, judged = (torch.tensor(logps, dtype=torch.float64) for logps in (scores.logps_without, scores.logps_with))
    flags = flag_tokens(without, judged, threshold=threshold, unlikelihood_weight=1.0, gamma=1.0)
    return replace(scores, is_flagged=flags.is_flagged.tolist(), weights=flags.weights.tolist())


def describe(rows: list[TokenScores]) -> list[str]:
    """The counts that the page must show."""
    num_flagged = sum(sum(scores.is_flagged) for scores in rows)
    wrong = [scores for scores in rows if not scores.record.is_satisfactory]
    num_tokens = sum(len(scores.tokens) for scores in wrong)
    known = [scores for scores in wrong if scores.record.wrong_spans]
    truths = [flag_spans(scores.spans, scores.record.wrong_spans or ()) for scores in known]
    hits = sum(
        a and b
        for scores, truth in zip(known, truths, strict=True)
        for a, b in zip(scores.is_flagged, truth, strict=True)
    )
    num_found = sum(sum(scores.is_flagged) for scores in known)
    num_wrong = sum(map(sum, truths))
    share = f"{100 * hits / num_found:.1f}%" if num_found else "\u2013"
    return [
        f"{num_flagged} token{'' if num_flagged == 1 else 's'} flagged ({100 * num_flagged / num_tokens:.1f}%)",
        f"{sum(not any(scores.is_flagged) for scores in wrong)} unsatisfactory without a flag",
        f"precision {share} ({hits} of {num_found})",
        f"recall {100 * hits / num_wrong:.1f}% ({hits} of {num_wrong})",
    ]


def write(folder: Path, *files: list[TokenScores], unpaired: tuple[int, ...] = (), **options: Any) -> Path:
    names = ("before.jsonl", "after.jsonl")[: len(files)]
    path = folder / "report.html"
    records = [PageRecord(scores) for scores in zip(*files, strict=True)]
    write_page(path, records, names=names, num_unpaired=unpaired, **options)
    return path


def read_figures(page: Any, line: int = 0) -> list[str]:
    return page.locator("#figures p").nth(line).locator("span:not(.side)").all_inner_texts()


def list_flagged(page: Any, record: int) -> list[str]:
    return page.locator(f"article[data-index='{record}'] .flagged").evaluate_all("all => all.map(e => e.textContent)")


def list_pieces(scores: TokenScores) -> list[str]:
    """Texts of the flagged tokens."""
    spans = zip(scores.spans, scores.is_flagged, strict=True)
    return [scores.record.output[start:end] for (start, end), is_flagged in spans if is_flagged]
