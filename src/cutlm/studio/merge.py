"""The verdicts of all reviewers as records to train on, and how far reviewers agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from cutlm.data.files import sync_directory, write_rows
from cutlm.data.records import SATISFACTORY_SCORE
from cutlm.prompting.spans import Span
from cutlm.studio.items import Item
from cutlm.studio.journal import Verdict

_DISPUTED = ("reviewers", "judgment", "wrong_spans", "i_ans")

Verdicts = Mapping[str, Mapping[str, Verdict]]  # by reviewer, then by the key of the item


class Merged(NamedTuple):
    """Result of merging the verdicts of all reviewers.

    Attributes:
        rows: Records to train on, in the order of the items.
        disputed: A row for each response that some reviewers call satisfactory and others not; these give no record.
    """

    rows: list[dict[str, Any]]
    disputed: list[dict[str, Any]]


def merge_verdicts(items: Sequence[Item], verdicts: Verdicts) -> Merged:
    """Turn verdicts into records: one for each response and different judgment, with the names of its reviewers.

    Where reviewers disagree on whether a response is satisfactory, neither verdict is data.
    """
    merged = Merged([], [])
    for item in items:
        decided = {name: own[item.key] for name, own in verdicts.items() if item.key in own}
        decided = {name: verdict for name, verdict in decided.items() if verdict.is_decided}
        rows: list[dict[str, Any]] = []
        for name, verdict in decided.items():
            row = make_row(item, verdict)
            twin = next((other for other in rows if {**other, "reviewers": None} == {**row, "reviewers": None}), None)
            if twin is None:
                rows.append(row | {"reviewers": [name]})
            else:
                twin["reviewers"].append(name)
        if len({verdict.state for verdict in decided.values()}) > 1:
            given = [{name: row[name] for name in _DISPUTED if name in row} for row in rows]
            merged.disputed.append(item.row | {"location": item.location, "verdicts": given})
        else:
            merged.rows.extend(rows)
    return merged


def make_row(item: Item, verdict: Verdict) -> dict[str, Any]:
    """Make the record of a decided verdict."""
    is_wrong = verdict.state == "unsatisfactory"
    row: dict[str, Any] = {name: item.row[name] for name in ("instruction", "input", "output") if name in item.row}
    row["judgment"] = verdict.judgment if is_wrong else None
    if is_wrong and verdict.wrong_spans:
        row["wrong_spans"] = [list(span) for span in verdict.wrong_spans]
    if is_wrong and verdict.unflagged_spans:
        row["unflagged_spans"] = [list(span) for span in verdict.unflagged_spans]
    if verdict.i_ans is not None:
        row["i_ans"] = verdict.i_ans
    draft = item.draft
    if draft is not None and draft.score is not None and draft.judgment == row["judgment"]:
        # It belongs to this judgment. A high one would make the record satisfactory whatever the judgment says.
        row |= {} if is_wrong and draft.score >= SATISFACTORY_SCORE else {"score": draft.score}
    return row | {name: value for name, value in item.row.items() if name not in row}


def write_merged(out: str | Path, merged: Merged) -> None:
    """Write the records, and `OUT.disputed.jsonl`; a file without any row is removed."""
    for path, rows in ((Path(out), merged.rows), (name_disputed_file(out), merged.disputed)):
        if rows:
            write_rows(path, rows)
        elif path.exists():
            path.unlink()
            sync_directory(path.parent)


def name_disputed_file(out: str | Path) -> Path:
    """Name the file of the responses on whose verdicts reviewers disagree."""
    return Path(f"{out}.disputed.jsonl")


@dataclass(frozen=True)
class Agreement:
    """How far two reviewers agree.

    Attributes:
        reviewers: Their names.
        num_both: Responses that both have decided on.
        num_equal: Those of them that both call satisfactory, or both not.
        num_marked: Responses that both call unsatisfactory and at least one has marked passages in.
        span_overlap: Characters that both marked, as a share of those that at least one did; None without any.
        disputed: The indices of the items on which the verdicts differ.
    """

    reviewers: tuple[str, str]
    num_both: int
    num_equal: int
    num_marked: int
    span_overlap: float | None
    disputed: list[int]


def compare_reviewers(items: Sequence[Item], verdicts: Verdicts) -> list[Agreement]:
    """Compare every two reviewers who have decided on a response in common."""
    agreements = []
    for first, second in combinations(verdicts, 2):
        num_both = num_marked = num_shared = num_either = 0
        disputed = []
        for index, item in enumerate(items):
            one, other = verdicts[first].get(item.key), verdicts[second].get(item.key)
            if one is None or other is None or not (one.is_decided and other.is_decided):
                continue
            num_both += 1
            if one.state != other.state:
                disputed.append(index)
            elif one.state == "unsatisfactory" and (one.wrong_spans or other.wrong_spans):
                num_marked += 1
                marks = [_list_characters(verdict.wrong_spans) for verdict in (one, other)]
                num_shared, num_either = num_shared + len(marks[0] & marks[1]), num_either + len(marks[0] | marks[1])
        if num_both:
            overlap = num_shared / num_either if num_either else None
            num_equal = num_both - len(disputed)
            agreements.append(Agreement((first, second), num_both, num_equal, num_marked, overlap, disputed))
    return agreements


def _list_characters(spans: Sequence[Span]) -> set[int]:
    return {place for start, end in spans for place in range(start, max(end, start + 1))}
