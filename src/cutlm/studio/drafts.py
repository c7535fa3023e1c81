"""First judgments by a judge on a server, which the reviewer corrects: those of the responses to be read next."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cutlm.errors import UserError
from cutlm.judges.server import judge_by_server
from cutlm.servers.client import Server
from cutlm.studio.items import Draft
from cutlm.studio.session import Session

# Responses that are judged ahead of the reviewer.
_NUM_AHEAD = 24


@dataclass(frozen=True)
class DraftJudge:
    """A judge on a server.

    Attributes:
        server: The server and the model on it.
        cache: The SQLite file of its answers.
        temperature: 0 for greedy decoding.
        max_tokens: The maximum length of an answer.
    """

    server: Server
    cache: Path
    temperature: float = 0.0
    max_tokens: int = 1024


class Drafter:
    """A thread that has the next responses judged.

    Args:
        session: The session whose drafts it adds.
        judge: The judge.
        announce: Called with the index of each item that has got a draft, and with None when there is a problem.
    """

    def __init__(self, session: Session, judge: DraftJudge, announce: Callable[[int | None], None]) -> None:
        self.problem: str | None = None  # why the judge gave no more drafts
        self.num_failed = 0  # responses that the judge gave no usable judgment of
        self._session, self._judge, self._announce = session, judge, announce
        self._position, self._asked = 0, set[int]()
        self._wanted, self._is_stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Drafter":
        self._wanted.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        self._wanted.set()  # a request under way ends with the process; its answer is asked for again

    def move_to(self, index: int) -> None:
        """Judge the responses from this one on."""
        self._position = index
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            while not self._is_stopped and self.problem is None and (batch := self._choose()):
                self._draft(batch)
            if self._is_stopped:
                return

    def _choose(self) -> list[int]:
        """The next open items without a draft, as many as the server answers at a time."""
        ahead = range(self._position, min(self._position + _NUM_AHEAD, len(self._session.items)))
        missing = [
            index
            for index in ahead
            if index not in self._session.drafts
            and index not in self._asked
            and self._session.get_verdict(index).state == "open"
        ]
        return missing[: self._judge.server.concurrency]

    def _draft(self, batch: list[int]) -> None:
        judge = self._judge
        self._asked.update(batch)
        try:
            outcome = judge_by_server(
                [self._session.items[index].response for index in batch],
                judge.server,
                judge.cache,
                temperature=judge.temperature,
                max_tokens=judge.max_tokens,
                show_progress=False,
            )
        except UserError as error:
            self.problem = str(error)
            self._announce(None)
            return
        for place, judgment in outcome.judgments.items():
            spans = tuple(outcome.wrong_spans.get(place, ()))
            self._session.drafts[batch[place]] = Draft(judgment, spans, source=judge.server.model)
            self._announce(batch[place])
        if outcome.failures:
            self.num_failed += len(outcome.failures)
            self._announce(None)
