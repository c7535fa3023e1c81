"""How well a trained judge agrees with the judgments of held-out records."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cutlm.data.files import open_atomic, write_rows
from cutlm.data.records import JudgedRecord, check_records, raise_problems
from cutlm.data.sources import describe_sources
from cutlm.errors import UserError
from cutlm.judges.local import judge_locally
from cutlm.judges.responses import Outcome, Response

_CLASSES = ("satisfactory", "unsatisfactory")


def evaluate_judge(
    model: str, data: Sequence[str], folder: Path, columns: Mapping[str, str] | None = None, **settings: Any
) -> str:
    """Judge the responses of a file of records with a model and compare its judgments with theirs.

    Writes `evaluation.json`, `evaluation.md` and `judged.jsonl` to a folder and returns the text of `evaluation.md`.
    The settings are those of `judge_locally`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("rouge-score is not installed; run: pip install 'cutlm[eval]'") from None
    check = check_records(data, columns)
    raise_problems(check, describe_sources(data))
    pairs = zip(check.records, check.locations, strict=True)
    responses = [Response.from_record(location, record) for record, location in pairs]
    judged = folder / "judged.jsonl"
    outcome, journal = judge_locally(responses, model, str(judged), **settings)
    rows = compare_judgments(check.records, outcome, RougeScorer(["rougeL"]))
    metrics = {"model": model, "data": describe_sources(data), **compute_metrics(rows)}
    text = format_metrics(metrics)
    write_rows(judged, rows)
    with open_atomic(folder / "evaluation.md") as file:
        file.write(text.encode())
    with open_atomic(folder / "evaluation.json") as file:  # last: if it exists, the others do
        file.write((json.dumps(metrics, indent=2) + "\n").encode())
    journal.remove()
    return text


def compare_judgments(records: Sequence[JudgedRecord], outcome: Outcome, scorer: Any) -> list[dict[str, Any]]:
    """Return a row per record: both judgments, and their ROUGE-L if both object to the response."""
    rows = []
    for index, record in enumerate(records):
        failure, said = outcome.failures.get(index), outcome.judgments.get(index)
        has_rouge = said is not None and not record.is_satisfactory
        rows.append(
            {
                "instruction": record.instruction,
                "input": record.input,
                "output": record.output,
                "judgment": None if record.is_satisfactory else record.judgment,
                "said": said,
                "is_satisfactory": record.is_satisfactory,
                "is_said_satisfactory": None if failure else said is None,
                "failure": failure and failure.kind,
                "answer": failure and failure.answer,
                "rouge_l": scorer.score(record.judgment, said)["rougeL"].fmeasure if has_rouge else None,
            }
        )
    return rows


def compute_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the metrics of compared records.

    An answer without a judgment is wrong in `accuracy` and left out of `accuracy_where_decided`. An unsatisfactory
    record that the judge does not object to is 0 in `rouge_l` and left out of `rouge_l_where_objected`.
    """
    pairs = Counter((row["is_said_satisfactory"], row["is_satisfactory"]) for row in rows)
    cases = {
        f"{said}_truly_{truly}": pairs[said == "satisfactory", truly == "satisfactory"]
        for said in _CLASSES
        for truly in _CLASSES
    }
    num_correct = cases["satisfactory_truly_satisfactory"] + cases["unsatisfactory_truly_unsatisfactory"]
    num_decided, num_satisfactory = sum(cases.values()), sum(row["is_satisfactory"] for row in rows)
    num_unsatisfactory = len(rows) - num_satisfactory
    rouges = [row["rouge_l"] for row in rows if row["rouge_l"] is not None]
    return {
        "num_records": len(rows),
        "num_satisfactory": num_satisfactory,
        "num_unsatisfactory": num_unsatisfactory,
        "accuracy": num_correct / len(rows),
        "accuracy_where_decided": num_correct / num_decided if num_decided else None,
        "majority_share": max(num_satisfactory, num_unsatisfactory) / len(rows),
        "cases": cases,
        "num_failures": len(rows) - num_decided,
        "failures": dict(Counter(row["failure"] for row in rows if row["failure"]).most_common()),
        "rouge_l": sum(rouges) / num_unsatisfactory if num_unsatisfactory else None,
        "rouge_l_where_objected": mean(rouges) if rouges else None,
        "num_objected": len(rouges),
    }


def format_metrics(metrics: dict[str, Any]) -> str:
    cases = metrics["cases"]
    kinds = ", ".join(f"{num} {kind}" for kind, num in metrics["failures"].items())
    failures = f"{metrics['num_failures']} ({kinds})" if kinds else metrics["num_failures"]
    values = {
        "accuracy, all records": metrics["accuracy"],
        "accuracy, answers with a judgment": metrics["accuracy_where_decided"],
        "share of the larger class": metrics["majority_share"],
        "answers without a judgment": failures,
        "ROUGE-L on unsatisfactory records, 0 without an objection": metrics["rouge_l"],
        f"ROUGE-L on the {metrics['num_objected']} of them with one": metrics["rouge_l_where_objected"],
    }
    lines = [
        f"{metrics['num_records']} records: {metrics['num_satisfactory']} satisfactory,"
        f" {metrics['num_unsatisfactory']} unsatisfactory.",
        "",
        "| judged | truly satisfactory | truly unsatisfactory |",
        "|---|---:|---:|",
        *(
            f"| {said} | {cases[f'{said}_truly_satisfactory']} | {cases[f'{said}_truly_unsatisfactory']} |"
            for said in _CLASSES
        ),
        "",
        "| metric | value |",
        "|---|---:|",
    ]
    for name, value in values.items():
        lines.append(f"| {name} | {'–' if value is None else f'{value:.3f}' if isinstance(value, float) else value} |")
    return "\n".join(lines) + "\n"
