"""One thread that runs the models for the page.

A person types faster than a model scores. A request of a tab therefore overtakes its earlier request of the same kind:
one that waits is dropped, and one that runs stops at the next layer. Urgent work (shading) interrupts other work (the
gauge, scoring all responses again), which continues afterwards.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

URGENT, NORMAL, BACKGROUND = range(3)


@dataclass
class Job:
    """A piece of work for the thread.

    Attributes:
        run: Computes the result; raises `CancelledError` once its argument returns true.
        future: Gets the result, or is cancelled.
    """

    run: Callable[[Callable[[], bool]], Any]
    priority: int
    number: int
    future: "Future[Any]" = field(default_factory=Future)
    is_overtaken: threading.Event = field(default_factory=threading.Event)
    has_started: bool = False

    def cancel(self) -> None:
        """Stop it, or drop it if it has not started."""
        self.is_overtaken.set()
        self.future.cancel()


class Worker:
    """The thread that runs jobs, one at a time, the most urgent first.

    Example:

        >>> with Worker() as worker:
        ...     worker.submit(lambda is_overtaken: 1 + 1).result()
        2
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._latest: dict[str, Job] = {}  # by owner
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._is_stopped = True
            for job in [*self._jobs, *self._latest.values()]:
                job.cancel()
            self._condition.notify()
        self._thread.join(timeout=10)

    def submit(self, run: Callable[[Callable[[], bool]], Any], owner: str = "", priority: int = NORMAL) -> "Job":
        """Add a job; an earlier job of the same owner, unless it is "", is overtaken."""
        with self._condition:
            job = Job(run, priority, next(self._numbers))
            if owner:
                if (earlier := self._latest.get(owner)) is not None:
                    earlier.cancel()
                self._latest[owner] = job
                job.future.add_done_callback(lambda _: self._forget(owner, job))
            self._jobs.append(job)
            self._condition.notify()
        return job

    def _forget(self, owner: str, job: Job) -> None:
        if self._latest.get(owner) is job:
            self._latest.pop(owner, None)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._jobs and not self._is_stopped:
                    self._condition.wait()
                if self._is_stopped:
                    return
                job = min(self._jobs, key=lambda job: (job.priority, job.number))
                self._jobs.remove(job)
            if not job.has_started and not job.future.set_running_or_notify_cancel():
                continue
            job.has_started = True
            try:
                result = job.run(partial(self._is_to_stop, job))
            except CancelledError:
                if job.is_overtaken.is_set():
                    job.future.set_exception(CancelledError())
                else:  # for a more urgent one: its scores so far are kept, so it continues where it stopped
                    with self._condition:
                        self._jobs.append(job)
            except Exception as error:  # of the job; the thread continues, and the request reports it
                job.future.set_exception(error)
            else:
                job.future.set_result(result)

    def _is_to_stop(self, job: Job) -> bool:
        return job.is_overtaken.is_set() or any(other.priority < job.priority for other in self._jobs)
