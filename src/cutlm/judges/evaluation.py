"""How well a trained judge judges: its answers beside the judgments of held-out records, counted and written down.

Judging itself is left to `cutlm.judges.local`. ROUGE-L is that of the package `rouge-score`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cutlm.data.files import open_atomic, write_rows
from cutlm.data.records import JudgedRecord, check_records, raise_problems
from cutlm.errors import UserError
from cutlm.judges import Outcome, Response
from cutlm.judges.local import judge_locally


def evaluate_judge(model: str, data: str, folder: Path, **settings: Any) -> str:
    """Has a model judge the responses of judged records, and compares.

    Args:
        model: The judge's folder, an adapter or whole.
        data: A file of records that it was not trained on.
        folder: Where `evaluation.json`, `evaluation.md` and `judged.jsonl` go.
        **settings: As of `judge_locally`.

    Returns:
        The text of `evaluation.md`.

    Raises:
        UserError: The records or the model cannot be used, or rouge-score is missing.
    """
    scorer = _make_scorer()
    check = check_records(data)
    raise_problems(check, data)
    responses = [
        Response(place, record.instruction, record.input, record.output)
        for record, place in zip(check.records, check.locations, strict=True)
    ]
    judged = folder / "judged.jsonl"
    outcome, journal = judge_locally(responses, model, str(judged), **settings)
    rows = compare(check.records, outcome, scorer)
    figures = {"model": model, "data": data, **count(rows)}
    write_rows(judged, rows)
    text = write_table(figures)
    with open_atomic(folder / "evaluation.md") as file:
        file.write(text.encode())
    with open_atomic(folder / "evaluation.json") as file:  # the last one: where it is, all is there
        file.write((json.dumps(figures, indent=2) + "\n").encode())
    journal.remove()
    return text


def _make_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("rouge-score is missing; pip install 'cutlm[eval]' to have it") from None
    return RougeScorer(["rougeL"])


def compare(records: Sequence[JudgedRecord], outcome: Outcome, scorer: Any) -> list[dict[str, Any]]:
    """A row for each record: what was said, what should have been, and ROUGE-L where both object to the response.

    Args:
        records: The records.
        outcome: What the judge made of their responses, by their index.
        scorer: Of the package rouge-score.
    """
    rows = []
    for index, record in enumerate(records):
        failure = outcome.failures.get(index)
        said = outcome.judgments.get(index)
        row: dict[str, Any] = {
            "instruction": record.instruction,
            "input": record.input,
            "output": record.output,
            "judgment": None if record.is_satisfactory else record.judgment,
            "said": said,
            "is_satisfactory": record.is_satisfactory,
            "is_said_satisfactory": None if failure else said is None,
            "failure": failure and failure.kind,
            "answer": failure and failure.answer,
            "rouge_l": None,
        }
        if said is not None and not record.is_satisfactory:
            row["rouge_l"] = scorer.score(record.judgment, said)["rougeL"].fmeasure
        rows.append(row)
    return rows


def count(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of compared records.

    An answer that is no judgment is a wrong decision in `accuracy`, and left out of `accuracy_where_decided`. An
    unsatisfactory record without an objection to its response has ROUGE-L 0 in `rouge_l`, and is left out of
    `rouge_l_where_objected`.
    """
    cases = {
        f"{said}_truly_{truly}": sum(
            row["is_said_satisfactory"] is (said == "satisfactory")
            and row["is_satisfactory"] is (truly == "satisfactory")
            for row in rows
        )
        for said in ("satisfactory", "unsatisfactory")
        for truly in ("satisfactory", "unsatisfactory")
    }
    num_right = cases["satisfactory_truly_satisfactory"] + cases["unsatisfactory_truly_unsatisfactory"]
    num_decided = sum(cases.values())
    num_satisfactory = sum(row["is_satisfactory"] for row in rows)
    num_unsatisfactory = len(rows) - num_satisfactory
    rouges = [row["rouge_l"] for row in rows if row["rouge_l"] is not None]
    return {
        "num_records": len(rows),
        "num_satisfactory": num_satisfactory,
        "num_unsatisfactory": num_unsatisfactory,
        "accuracy": num_right / len(rows),
        "accuracy_where_decided": num_right / num_decided if num_decided else None,
        "majority_share": max(num_satisfactory, num_unsatisfactory) / len(rows),
        "cases": cases,
        "num_failures": len(rows) - num_decided,
        "failures": dict(Counter(row["failure"] for row in rows if row["failure"]).most_common()),
        "rouge_l": sum(rouges) / num_unsatisfactory if num_unsatisfactory else None,
        "rouge_l_where_objected": mean(rouges) if rouges else None,
        "num_objected": len(rouges),
    }


def write_table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    cases, kinds = figures["cases"], figures["failures"]
    num_failures = figures["num_failures"]
    named = f" ({', '.join(f'{num} {kind}' for kind, num in kinds.items())})" if kinds else ""
    lines = [
        f"{figures['num_records']} records: {figures['num_satisfactory']} satisfactory,"
        f" {figures['num_unsatisfactory']} unsatisfactory.",
        "",
        "| judged | truly satisfactory | truly unsatisfactory |",
        "|---|---:|---:|",
        *(
            f"| {said} | {cases[f'{said}_truly_satisfactory']} | {cases[f'{said}_truly_unsatisfactory']} |"
            for said in ("satisfactory", "unsatisfactory")
        ),
        "",
        "| figure | value |",
        "|---|---:|",
        f"| right decisions, of all records | {_show(figures['accuracy'])} |",
        f"| right decisions, of answers with one | {_show(figures['accuracy_where_decided'])} |",
        f"| share of the larger class | {_show(figures['majority_share'])} |",
        f"| answers that are no judgment | {num_failures}{named} |",
        f"| ROUGE-L on unsatisfactory records, 0 without an objection | {_show(figures['rouge_l'])} |",
        f"| ROUGE-L on the {figures['num_objected']} of them with one | {_show(figures['rouge_l_where_objected'])} |",
    ]
    return "\n".join(lines) + "\n"


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
