"""Responses in, judged records out: the data types and files that all judges share.

Responses are in AlpacaEval's format, as `cutlm generate` writes it. A response without a judgment is not written among
the records; it is listed with the reason in `OUT.failures.jsonl`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutlm.data.conversations import Conversation, normalize_row
from cutlm.data.files import SourceRow, read_rows, sync_directory, write_rows
from cutlm.data.records import JudgedRecord, check_rows
from cutlm.data.sources import describe_sources
from cutlm.errors import DataError
from cutlm.prompting.spans import Span
from cutlm.servers.client import describe_commonest

# Fields of an earlier judgment, which would contradict the new one.
_JUDGMENT_FIELDS = ("judgment", "score", "wrong_spans")


@dataclass(frozen=True)
class Response:
    """A response to be judged."""

    location: str  # where it is from: `responses.jsonl:17`
    instruction: str
    input: str  # further material for the instruction, or ""
    output: str
    row: dict[str, Any] = field(default_factory=dict)  # all fields of the original row, see `normalize_row`

    @property
    def full_instruction(self) -> str:
        """The instruction and, if there is an input, a newline and the input; a conversation as plain text."""
        if messages := self.row.get("messages"):
            return Conversation(tuple(messages[:-1]), tuple(self.row.get("tools") or ())).to_text()
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def fields(self) -> dict[str, str]:
        """The fields that are judged, as they are written to files."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}

    @classmethod
    def from_record(cls, location: str, record: JudgedRecord, output: str | None = None) -> "Response":
        """Return the response of a record, or another one to the same instruction or conversation."""
        row = {name: value for name in ("messages", "tools") if (value := getattr(record, name))}
        return cls(location, record.instruction, record.input, output or record.output, row)


@dataclass(frozen=True)
class Failure:
    """Why a response has no judgment."""

    kind: str  # a few words, by which failures are counted
    reason: str  # a sentence
    answer: str = ""  # the judge's answer, if there was one


@dataclass
class Outcome:
    """The judgments of responses, by the index of the response."""

    judgments: dict[int, str | None] = field(default_factory=dict)  # None if nothing is wrong
    wrong_spans: dict[int, list[Span]] = field(default_factory=dict)  # of the responses whose wrong passages are known
    failures: dict[int, Failure] = field(default_factory=dict)  # why there is no judgment
    notes: list[str] = field(default_factory=list)  # sentences for the user


EMPTY_RESPONSE = Failure("empty response", "there is no response to judge")


def read_responses(
    sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> list[Response]:
    """Read responses, rows with `instruction`, optional `input`, and `output`; see `read_data`.

    An empty `output` is accepted, because models do produce it; see `set_aside_empty`.

    Raises:
        DataError: The file cannot be read, or rows are not valid; all of them are named.
    """
    return parse_responses(*read_rows(sources, columns), describe_sources(sources))


def parse_responses(rows: Sequence[SourceRow], problems: Sequence[str], source: str) -> list[Response]:
    """Parse the rows of a file of responses; `problems` were found while reading them."""
    problems = [*problems, *check_rows(SourceRow(row.location, _fill_empty(row.value)) for row in rows).problems]
    for row in rows:
        names = [name for name in _JUDGMENT_FIELDS if isinstance(row.value, dict) and row.value.get(name) is not None]
        if names:
            fields = ", ".join(map(repr, names))
            problems.append(f"{row.location}: field {fields}: expected a response without a judgment; remove it")
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {source}; fix them and try again")
    if not rows:
        raise DataError(f"{source}: no responses; expected at least one")
    return [make_response(row) for row in rows]


def make_response(row: SourceRow) -> Response:
    """Return a valid row as a response, with the conversation before it if it has one."""
    value = normalize_row(row.value, is_answered=True)
    return Response(row.location, value["instruction"], value.get("input") or "", value["output"], value)


def _fill_empty(value: Any) -> Any:
    output = value.get("output") if isinstance(value, dict) else None
    return value | {"output": "-"} if isinstance(output, str) and not output.strip() else value


def set_aside_empty(responses: Sequence[Response]) -> tuple[list[int], Outcome]:
    """Return the indices of the responses that are not empty, and an outcome in which the others have failed."""
    empty = [index for index, response in enumerate(responses) if not response.output.strip()]
    kept = [index for index, response in enumerate(responses) if response.output.strip()]
    return kept, Outcome(failures=dict.fromkeys(empty, EMPTY_RESPONSE))


def name_failures_file(out: str | Path) -> Path:
    return Path(f"{out}.failures.jsonl")


def write_outcome(responses: Sequence[Response], outcome: Outcome, out: str | Path) -> None:
    """Write the records, in the order of the responses, and a list of failures if there are any.

    If it is killed, the files have fewer rows than there are responses, or are both from the earlier run: a list of
    failures never accompanies records of another run. If every judgment fails, OUT is not written, because no trainer
    accepts an empty file; if there is one of an earlier run, it is removed and the outcome gets a note.
    """
    assert len(outcome.judgments) + len(outcome.failures) == len(responses)
    failures_file = name_failures_file(out)
    # First, because the rows of an earlier list could make up for missing records.
    _remove(failures_file)
    if outcome.judgments:
        write_rows(out, make_record_rows(responses, outcome))
    elif _remove(Path(out)):
        outcome.notes.append(f"removed {out} of an earlier run")
    if failures := sorted(outcome.failures.items()):
        write_rows(failures_file, [_make_row(responses[index], failure) for index, failure in failures])


def _remove(path: Path) -> bool:
    """Remove a file durably; return whether it existed."""
    if not path.exists():
        return False
    path.unlink()
    sync_directory(path.parent)
    return True


def make_record_rows(responses: Sequence[Response], outcome: Outcome) -> list[dict[str, Any]]:
    """Return the rows of the judged records, in the order of the responses.

    The main fields come first, then the other fields of the response.
    """
    rows = []
    for index, judgment in sorted(outcome.judgments.items()):
        response = responses[index]
        row: dict[str, Any] = response.fields | {"judgment": judgment}
        if spans := outcome.wrong_spans.get(index):
            row["wrong_spans"] = [list(span) for span in spans]
        rows.append(row | {name: value for name, value in response.row.items() if name not in row})
    return rows


def _make_row(response: Response, failure: Failure) -> dict[str, Any]:
    start = {"location": response.location, "kind": failure.kind, "reason": failure.reason}
    return start | response.fields | {"answer": failure.answer}


def describe_outcome(outcome: Outcome, out: str | Path) -> str:
    """Return the notes and the counts of judgments and of failures by kind, one per line."""
    num_judged = len(outcome.judgments)
    num_satisfactory = sum(judgment is None for judgment in outcome.judgments.values())
    counts = f"{num_satisfactory} satisfactory, {num_judged - num_satisfactory} unsatisfactory"
    if outcome.wrong_spans:
        counts += f" ({len(outcome.wrong_spans)} of them with wrong_spans)"
    result = (
        f"{num_judged} records in {out}: {counts}" if num_judged else f"every judgment failed; {out} was not written"
    )
    lines = [*outcome.notes, result]
    if outcome.failures:
        counter = Counter(failure.kind for failure in outcome.failures.values())
        kinds = ", ".join(f"{num} {kind}" for kind, num in counter.most_common())
        rest = f"they are listed in {name_failures_file(out)}, not among the records"
        lines.append(f"{len(outcome.failures)} responses have no judgment ({kinds}); {rest}")
        lines.append(describe_commonest(failure.reason for failure in outcome.failures.values()))
    return "\n".join(lines)
