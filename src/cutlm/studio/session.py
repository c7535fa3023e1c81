"""The verdicts of one reviewer on the items: every change is saved at once, and the records follow soon after."""

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cutlm.data.files import SourceRow
from cutlm.data.praise import reads_like_praise
from cutlm.data.records import JudgedRecord, Text, is_praise, validate_row
from cutlm.errors import DataError, UserError
from cutlm.studio.items import Draft, Item
from cutlm.studio.journal import NO_VERDICT, STATES, Journal, State, Verdict, find_folder, lock_output, read_journals
from cutlm.studio.merge import Merged, Verdicts, compare_reviewers, make_row, merge_verdicts, write_merged

# Records are written once no change was made for so many seconds.
WRITE_DELAY = 2.0
# A longer break does not count for the pace.
_LONGEST_BREAK = 300.0
_NUM_FOR_PACE = 20

_Span = Annotated[tuple[int, int], Field(strict=False)]


class Change(BaseModel):
    """A verdict as the page sends it.

    Attributes:
        revision: The revision that the page has changed, by which a change in another tab is noticed.
        tab: The tab that sends it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    state: Literal["open", "satisfactory", "unsatisfactory", "skipped"]
    judgment: Text = ""
    wrong_spans: Annotated[tuple[_Span, ...], Field(strict=False)] = ()
    unflagged_spans: Annotated[tuple[_Span, ...], Field(strict=False)] = ()
    i_ans: Text | None = None
    revision: int
    tab: str


class Conflict(Exception):
    """Another tab has changed the verdict meanwhile; `verdict` is what it saved."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("changed in another tab")
        self.verdict = verdict


@dataclass(frozen=True)
class Pace:
    """How fast verdicts are decided, and how many are left."""

    num_decided: int
    num_left: int
    per_minute: float | None


class Session:
    """The verdicts of one reviewer. All methods may be called from any thread.

    Args:
        items: The responses.
        out: The file of records; journals are in `OUT.studio`.
        journal: The reviewer's journal, open.

    Raises:
        DataError: The journals have verdicts on responses that are not among the items.
    """

    def __init__(self, items: Sequence[Item], out: str | Path, journal: Journal) -> None:
        self.items, self.out, self.reviewer = items, Path(out), journal.path.stem
        self.drafts: dict[int, Draft] = {index: item.draft for index, item in enumerate(items) if item.draft}
        self._journal, self._lock = journal, threading.RLock()
        self._changed, self._stopped = threading.Event(), threading.Event()
        known = {item.key for item in items}
        unknown = {key for own in read_journals(out).values() for key in own} - known
        if unknown:
            raise DataError(
                f"{find_folder(out)}: {len(unknown)} responses were judged that are not among the {len(items)} to read;"
                " name the file they are from, or another --out"
            )
        self._writer = threading.Thread(target=self._write_soon, daemon=True)
        self.problem: str | None = None  # why the records could not be written

    def __enter__(self) -> "Session":
        self.write()
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._changed.set()
        self._writer.join()
        self.write()

    def get_verdict(self, index: int) -> Verdict:
        return self._journal.verdicts.get(self.items[index].key, NO_VERDICT)

    def save(self, index: int, change: Change) -> Verdict:
        """Save a verdict and return it. Praise as a judgment makes it satisfactory.

        Raises:
            Conflict: The verdict has another revision than the one that was changed.
            DataError: It is not valid.
            OSError: The journal cannot be written.
        """
        item = self.items[index]
        state: State = change.state
        if state == "unsatisfactory" and is_praise(change.judgment):
            state = "satisfactory"
        verdict = Verdict(state, change.judgment, change.wrong_spans, change.unflagged_spans, change.i_ans)
        length = len(item.output)
        for start, end in (*verdict.wrong_spans, *verdict.unflagged_spans):
            if not 0 <= start <= end <= length:
                raise DataError(f"spans: expected 0 <= start <= end <= {length}, got {[start, end]}")
        if state == "unsatisfactory" and not change.judgment.strip():
            raise DataError("judgment: expected what is wrong with the response, got nothing")
        problems: list[str] = []
        if verdict.is_decided:
            validate_row(SourceRow("the verdict", make_row(item, verdict)), JudgedRecord, problems)
        if problems:
            raise DataError(problems)
        with self._lock:
            before = self.get_verdict(index)
            if before.revision != change.revision:
                raise Conflict(before)
            if before == replace(verdict, revision=before.revision, time=before.time):
                return before
            saved = self._journal.append(item.key, verdict)
        self._changed.set()
        return saved

    def merge(self) -> tuple[Merged, Verdicts]:
        """Merge the verdicts of all reviewers."""
        verdicts = read_journals(self.out)
        with self._lock:
            verdicts[self.reviewer] = dict(self._journal.verdicts)
        return merge_verdicts(self.items, verdicts), verdicts

    def write(self) -> Merged:
        """Write the records of all reviewers."""
        with lock_output(self.out):
            merged, _ = self.merge()
            write_merged(self.out, merged)
        return merged

    def _write_soon(self) -> None:
        while not self._stopped.is_set():
            self._changed.wait()
            while self._changed.is_set() and not self._stopped.is_set():
                self._changed.clear()
                self._stopped.wait(WRITE_DELAY)
            try:
                self.write()
                self.problem = None
            except (OSError, UserError) as error:
                self.problem = str(error)

    def count_states(self) -> Counter[State]:
        """Count the items by the state of their verdicts."""
        return Counter(self.get_verdict(index).state for index in range(len(self.items)))

    def measure_pace(self) -> Pace:
        """Measure how fast the last verdicts were decided, without long breaks."""
        with self._lock:
            decided = [verdict for verdict in self._journal.verdicts.values() if verdict.state != "open"]
        times = sorted(verdict.time for verdict in decided)[-_NUM_FOR_PACE:]
        gaps: list[float] = [later - earlier for earlier, later in pairwise(times)]
        gaps = [gap for gap in gaps if gap <= _LONGEST_BREAK]
        is_recent = bool(times) and time.time() - times[-1] <= _LONGEST_BREAK
        seconds = math.fsum(gaps)
        per_minute = 60 * len(gaps) / seconds if is_recent and len(gaps) > 1 and seconds else None
        return Pace(len(decided), len(self.items) - len(decided), per_minute)

    def search(self, query: str) -> list[int]:
        """Find the items whose conversation, response, judgment or draft contains a text, in any letter case."""
        query = query.strip().casefold()
        found = []
        for index, item in enumerate(self.items):
            draft = self.drafts.get(index)
            texts = [item.conversation.to_text(), item.output, self.get_verdict(index).judgment]
            texts.append((draft and draft.judgment) or "")
            if any(query in text.casefold() for text in texts):
                found.append(index)
        return found

    def list_judgments(self) -> dict[int, str]:
        """List the texts of unsatisfactory judgments, by the index of the item; of drafts where nothing is decided."""
        found = {}
        for index in range(len(self.items)):
            verdict, draft = self.get_verdict(index), self.drafts.get(index)
            if verdict.state == "unsatisfactory":
                found[index] = verdict.judgment
            elif verdict.state == "open" and draft is not None and draft.judgment and not is_praise(draft.judgment):
                found[index] = draft.judgment
        return found

    def summarize(self) -> dict[str, Any]:
        """Describe the work of all reviewers: counts, agreement, and the records that follow."""
        merged, verdicts = self.merge()
        reviewers = []
        for name, own in verdicts.items():
            states = Counter(own[item.key].state for item in self.items if item.key in own)
            counts: dict[str, Any] = {state: states[state] for state in STATES}
            reviewers.append({"name": name} | counts)
        num_satisfactory = sum(row["judgment"] is None for row in merged.rows)
        doubtful = [
            index
            for index in range(len(self.items))
            if self.get_verdict(index).state == "unsatisfactory" and reads_like_praise(self.get_verdict(index).judgment)
        ]
        return {
            "out": str(self.out),
            "num_items": len(self.items),
            "num_records": len(merged.rows),
            "num_satisfactory": num_satisfactory,
            "num_disputed": len(merged.disputed),
            "num_drafts": sum(not self.get_verdict(index).is_decided for index in list(self.drafts)),
            "reviewers": reviewers,
            "agreements": [vars(agreement) for agreement in compare_reviewers(self.items, verdicts)],
            "doubtful": doubtful,
            "problem": self.problem,
        }
