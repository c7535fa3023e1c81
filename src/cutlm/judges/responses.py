"""Responses in, judged records out: what all judges share of files.

Responses come in AlpacaEval's format, as `cutlm generate` writes it. Which judgment a response gets is left to the
judges; a response without one is no record, is not written among them, and is listed with the reason instead.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutlm.data.files import SourceRow, read_rows, sync_directory, write_rows
from cutlm.data.records import check_rows
from cutlm.errors import DataError
from cutlm.judges import Failure, Outcome, Response

# What is said about a response already: it would count beside the new judgment, or against it.
_SAID_BEFORE = ("judgment", "score", "wrong_spans")
_FIRST_FIELDS = ("instruction", "input", "output", "judgment")
EMPTY_RESPONSE = Failure("empty response", "there is no response to judge")


def read_responses(path: str | Path) -> list[Response]:
    """Reads responses: a JSON array or JSON Lines with `instruction`, optional `input`, and `output`.

    An empty `output`, which models do give, is no error: see `set_aside_empty`.

    Raises:
        DataError: The file cannot be read, or rows cannot be used; all of them are named.
    """
    rows, problems = read_rows(path)
    checked = [row if not _is_empty(row) else SourceRow(row.location, row.value | {"output": "-"}) for row in rows]
    problems += check_rows(checked).problems
    for row in rows:
        said = [name for name in _SAID_BEFORE if isinstance(row.value, dict) and row.value.get(name) is not None]
        if said:
            names = ", ".join(map(repr, said))
            problems.append(
                f"{row.location}: field {names}: expected a response that is not judged yet, got one that is; remove"
                " what was said about it"
            )
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; mend them, nothing was skipped")
    if not rows:
        raise DataError(f"{path}: no responses; expected a JSON array or JSON Lines with at least one")
    return [
        Response(row.location, row.value["instruction"], row.value.get("input") or "", row.value["output"], row.value)
        for row in rows
    ]


def _is_empty(row: SourceRow) -> bool:
    output = row.value.get("output") if isinstance(row.value, dict) else None
    return isinstance(output, str) and not output.strip()


def set_aside_empty(responses: Sequence[Response]) -> tuple[list[int], Outcome]:
    """The indices of responses that hold text, and an outcome in which the others have failed."""
    outcome = Outcome()
    kept = []
    for index, response in enumerate(responses):
        if response.output.strip():
            kept.append(index)
        else:
            outcome.failures[index] = EMPTY_RESPONSE
    return kept, outcome


def name_failures_file(out: str | Path) -> Path:
    """Where the failures of a run are listed."""
    return Path(f"{out}.failures.jsonl")


def write_outcome(responses: Sequence[Response], outcome: Outcome, out: str | Path) -> None:
    """Writes the records, in the order of the responses, and a list of failures where there are any.

    Killed on the way, it leaves files whose rows are fewer than the responses, or the whole earlier pair: a list of
    failures never stands beside records of another run.

    Args:
        responses: What was to be judged.
        outcome: A judgment or a failure for each; gets a note where records of an earlier run are removed.
        out: The file of records. Where not one judgment was had, there is none: no trainer takes an empty one.
    """
    assert len(outcome.judgments) + len(outcome.failures) == len(responses)
    failures_file = name_failures_file(out)
    judged, failed = sorted(outcome.judgments), sorted(outcome.failures)
    # First of all: an earlier list does not hold any more, and its number of rows may make up for what is missing.
    _remove(failures_file)
    if judged:
        write_rows(out, [_make_record_row(responses[index], outcome.judgments[index]) for index in judged])
    elif _remove(Path(out)):
        outcome.notes.append(f"{out} of an earlier run is removed")
    if failed:
        write_rows(failures_file, [_make_failure_row(responses[index], outcome.failures[index]) for index in failed])


def _remove(path: Path) -> bool:
    """Removes a file, on the disk too; says whether it was there."""
    if not path.exists():
        return False
    path.unlink()
    sync_directory(path.parent)
    return True


def _make_record_row(response: Response, judgment: str | None) -> dict[str, Any]:
    own = {
        "instruction": response.instruction,
        "input": response.input,
        "output": response.output,
        "judgment": judgment,
    }
    return own | {name: value for name, value in response.row.items() if name not in _FIRST_FIELDS}


def _make_failure_row(response: Response, failure: Failure) -> dict[str, Any]:
    return {
        "location": response.location,
        "kind": failure.kind,
        "reason": failure.reason,
        "instruction": response.instruction,
        "input": response.input,
        "output": response.output,
        "answer": failure.answer,
    }


def describe_outcome(outcome: Outcome, out: str | Path) -> str:
    """Counts of judgments and of failures by kind, fit to be printed."""
    num_judged = len(outcome.judgments)
    num_satisfactory = sum(judgment is None for judgment in outcome.judgments.values())
    lines = list(outcome.notes)
    if num_judged:
        lines.append(
            f"{num_judged} records in {out}: {num_satisfactory} satisfactory,"
            f" {num_judged - num_satisfactory} unsatisfactory"
        )
    else:
        lines.append(f"no judgment was had; {out} is not written")
    if outcome.failures:
        kinds = Counter(failure.kind for failure in outcome.failures.values()).most_common()
        named = ", ".join(f"{count} {kind}" for kind, count in kinds)
        lines.append(
            f"{len(outcome.failures)} responses have no judgment ({named}) and are not among the records; they are"
            f" listed in {name_failures_file(out)}"
        )
    return "\n".join(lines)
