"""The routes of the studio: a page, its modules, and the requests that they send.

Handlers wait for locks, disks and models in threads, so the server always answers. `/api/events` is a stream of
server-sent events: what other tabs saved, drafts, and the losses of a training run.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cutlm.data.conversations import describe_message
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.prompting.spans import Span
from cutlm.studio.drafts import Drafter, DraftJudge
from cutlm.studio.items import Item, describe_words
from cutlm.studio.merge import make_row
from cutlm.studio.security import Access, Guard
from cutlm.studio.session import Change, Conflict, Session
from cutlm.studio.training import DETECTORS, Plan, Training, plan_training
from cutlm.studio.worker import BACKGROUND, URGENT, Job, Worker

if TYPE_CHECKING:
    from cutlm.studio.scoring import Models

_TITLE_LENGTH = 120
_KEEP_ALIVE = 15.0
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
# The files that the page loads, by the package that they are from.
_ASSETS = {
    "text.js": "cutlm.inspect",
    "tokens.js": "cutlm.inspect",
    "tokens.css": "cutlm.inspect",
    "studio.css": "cutlm.studio",
    "icon.svg": "cutlm.studio",
    "app.js": "cutlm.studio",
    "api.js": "cutlm.studio",
    "review.js": "cutlm.studio",
    "marks.js": "cutlm.studio",
    "diff.js": "cutlm.studio",
    "reports.js": "cutlm.studio",
}


class _Json(JSONResponse):
    """JSON in ASCII: text from data may have halves of surrogate pairs, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Broadcast:
    """Sends events to every page that is open."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, kind: str, content: Any = None) -> None:
        """Send an event from any thread."""
        if self._loop is None or self._loop.is_closed():
            return
        text = f"event: {kind}\ndata: {json.dumps(content)}\n\n"
        with suppress(RuntimeError):  # the loop is closing
            self._loop.call_soon_threadsafe(self._put, text)

    def _put(self, text: str) -> None:
        for queue in self._queues:
            queue.put_nowait(text)

    async def stream(self, is_ending: Callable[[], bool]) -> AsyncIterator[str]:
        """Yield the events of one page until the server ends."""
        self._loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield "retry: 1000\n\n"
            waited = 0.0
            while not is_ending():
                try:
                    yield await asyncio.wait_for(queue.get(), 0.5)
                    waited = 0.0
                except TimeoutError:
                    waited += 0.5
                    if waited >= _KEEP_ALIVE:
                        yield ": still here\n\n"
                        waited = 0.0
        finally:
            self._queues.discard(queue)


class Studio:
    """Shared state of the routes.

    Args:
        session: The verdicts.
        worker: The thread of the models.
        models: The models; None for text only.
        threshold: lambda of eq. 5 at the start.
        judge: A judge that writes drafts.
        config: A settings file for training.
    """

    def __init__(
        self,
        session: Session,
        worker: Worker,
        models: "Models | None",
        threshold: float,
        judge: DraftJudge | None = None,
        config: str | None = None,
    ) -> None:
        self.session, self.worker, self.models, self.threshold, self.config = session, worker, models, threshold, config
        self.broadcast = Broadcast()
        self.drafter = Drafter(session, judge, lambda index: self.broadcast.send("draft", index)) if judge else None
        self.training: Training | None = None
        self.is_ending: Callable[[], bool] = lambda: False
        self._starting = threading.Lock()  # a second click comes before the first one has started the run
        self._preparing: str | None = None  # the work in progress before or after a training run
        self._comparison: list[dict[str, Any]] | None = None
        self._problem: str | None = None
        self._run_threshold = threshold  # of the last training run

    # ---- Reading and judging ----

    def describe_session(self) -> dict[str, Any]:
        """Describe the session and list its responses."""
        session = self.session
        return {
            "reviewer": session.reviewer,
            "out": str(session.out),
            "models": self.models.names if self.models else [],
            "threshold": self.threshold,
            "hasJudge": self.drafter is not None,
            "items": [
                [_make_title(item), session.get_verdict(index).state, index in session.drafts, item.key]
                for index, item in enumerate(session.items)
            ],
            "pace": vars(session.measure_pace()),
            "judge": self._describe_judge(),
        }

    def _describe_judge(self) -> dict[str, Any] | None:
        if self.drafter is None:
            return None
        return {"problem": self.drafter.problem, "num_failed": self.drafter.num_failed}

    def describe_item(self, index: int) -> dict[str, Any]:
        """Describe a response, and have the next ones judged."""
        if self.drafter is not None:
            self.drafter.move_to(index)
        item = self.session.items[index]
        draft = self.session.drafts.get(index)
        conversation = item.conversation
        messages = [{"role": message["role"], "text": describe_message(message)} for message in conversation.messages]
        return {
            "index": index,
            "location": item.location,
            "messages": messages,
            "tools": [json.dumps(tool, ensure_ascii=False) for tool in conversation.tools],
            "output": item.output,
            "words": describe_words(item),
            "verdict": asdict(self.session.get_verdict(index)),
            "draft": draft and asdict(draft),
        }

    def save(self, index: int, content: bytes) -> Response:
        """Save a verdict."""
        try:
            change = Change.model_validate_json(content)
            saved = self.session.save(index, change)
        except ValidationError as error:
            return _refuse(f"not a verdict: {error.errors()[0]['msg']}", 422)
        except UserError as error:
            return _refuse(str(error), 422)
        except Conflict as conflict:
            return _Json({"verdict": asdict(conflict.verdict)}, 409)
        except OSError as error:
            return _refuse(f"the journal cannot be written ({error.strerror or error})", 507)
        self.broadcast.send(
            "saved", {"index": index, "state": saved.state, "revision": saved.revision, "tab": change.tab}
        )
        return _Json({"verdict": asdict(saved), "pace": vars(self.session.measure_pace())})

    # ---- Models ----

    def submit_score(self, index: int, judgment: str, tab: str) -> Job:
        """Have a response scored with a judgment."""
        item, models = self.session.items[index], self.models
        assert models is not None
        return self.worker.submit(
            lambda is_stopped: {"sides": models.score(item, judgment, is_stopped)}, f"{tab} score", URGENT
        )

    def submit_reaction(self, index: int, judgment: str, threshold: float, tab: str) -> Job:
        """Have the reaction of the model to a judgment measured."""
        from cutlm.studio.scoring import choose_foreign

        item, models = self.session.items[index], self.models
        assert models is not None
        foreign = choose_foreign(self.session.list_judgments(), index, item.key)

        def run(is_stopped: Callable[[], bool]) -> dict[str, Any]:
            reaction = models.measure_reaction(item, judgment, foreign, threshold, is_stopped)
            return {"num_foreign": len(foreign), "reaction": reaction}

        return self.worker.submit(run, f"{tab} reaction")

    # ---- Training ----

    def plan(self, detector: str, threshold: float) -> Plan:
        """Plan a training run.

        Raises:
            UserError: The detector is unknown.
        """
        if detector not in DETECTORS:
            raise UserError(f"detector: expected one of {', '.join(DETECTORS)}, got {detector!r}")
        return plan_training(self.session.out, self.models, detector, threshold, self.config)

    def start_training(self, detector: str, threshold: float) -> None:
        """Write the training data, and start a run.

        Raises:
            UserError: There is nothing to train on, or a run is under way.
        """
        with self._starting:
            if self._preparing is not None or (self.training is not None and self.training.is_running):
                raise UserError("a run is under way; stop it first")
            plan, models = self.plan(detector, threshold), self.models
            if models is None:
                raise UserError("the studio runs without a model; start it with --model, or run the command yourself")
            rows = self._list_rows()
            if not rows:
                raise UserError("no response has a verdict to train on; judge some first")
            self.session.write()
            self.training = self._comparison = self._problem = None
            self._run_threshold = float(threshold)
            if (scores := plan.scores) is None:
                self._start(plan)
            else:
                self._prepare(
                    "scoring the records",
                    lambda is_stopped: models.write_scores(scores, rows, self._run_threshold, is_stopped),
                    lambda _: self._start(plan),
                )

    def _start(self, plan: Plan) -> None:
        self.training = Training(plan, self._advance)

    def _list_rows(self) -> list[tuple[JudgedRecord, tuple[Span, ...]]]:
        """The records of this reviewer and the passages whose flags were removed."""
        verdicts = ((item, self.session.get_verdict(index)) for index, item in enumerate(self.session.items))
        return [
            (JudgedRecord.model_validate(make_row(item, verdict)), verdict.unflagged_spans)
            for item, verdict in verdicts
            if verdict.is_decided
        ]

    def _prepare(self, what: str, run: Callable[[Callable[[], bool]], Any], then: Callable[[Any], None]) -> None:
        """Run a long job of the models in the background, and then something with its result."""
        self._preparing = what

        def finish(future: Any) -> None:
            self._preparing = None
            try:
                then(future.result())
            except (CancelledError, asyncio.CancelledError):
                self._problem = "stopped"
            except Exception as error:
                self._problem = str(error)
                if not isinstance(error, UserError | OSError):  # a bug, or a GPU without memory
                    raise
            finally:
                self.broadcast.send("training")

        self.broadcast.send("training")
        self.worker.submit(run, "training", BACKGROUND).future.add_done_callback(finish)

    def _advance(self) -> None:
        """Tell the pages about the run; once it has trained a model, load it and score the responses again."""
        training, models = self.training, self.models
        is_trained = training is not None and training.exit_code == 0
        if training is None or models is None or not is_trained or self._preparing or self._comparison is not None:
            self.broadcast.send("training")
            return
        records = [record for record, _ in self._list_rows()]
        is_loaded = False

        def compare(is_stopped: Callable[[], bool]) -> list[dict[str, Any]]:
            nonlocal is_loaded
            if not is_loaded:  # it may be interrupted and called again
                models.add_trained(training.plan.folder)
                is_loaded = True
            return models.compare(records, self._run_threshold, is_stopped)

        self._prepare("scoring the responses again", compare, lambda result: setattr(self, "_comparison", result))

    def describe_training(self) -> dict[str, Any]:
        """Describe the run."""
        return {
            "run": self.training and self.training.describe(),
            "preparing": self._preparing,
            "comparison": self._comparison,
            "problem": self._problem,
            "models": self.models.names if self.models else [],
            "hasConfig": self.config is not None,
        }

    def close(self) -> None:
        if self.training is not None:
            self.training.close()


def make_app(studio: Studio, access: Access) -> Starlette:
    """Make the application."""

    async def show_page(request: Request) -> Response:
        return _read_asset("cutlm.studio", "page.html")

    async def show_asset(request: Request) -> Response:
        name = request.path_params["name"]
        return _read_asset(_ASSETS[name], name) if name in _ASSETS else _refuse("no such file", 404)

    async def show_icon(request: Request) -> Response:
        return _read_asset(_ASSETS["icon.svg"], "icon.svg")

    async def show_session(request: Request) -> Response:
        return _Json(await run_in_threadpool(studio.describe_session))

    async def handle_item(request: Request) -> Response:
        index = request.path_params["index"]
        if index >= len(studio.session.items):
            return _refuse("no such response", 404)
        if request.method == "GET":
            return _Json(await run_in_threadpool(studio.describe_item, index))
        return await run_in_threadpool(studio.save, index, await request.body())

    async def search(request: Request) -> Response:
        return _Json(await run_in_threadpool(studio.session.search, request.query_params.get("q", "")))

    async def score(request: Request) -> Response:
        values = await _read_object(request, {"index": int, "judgment": str, "tab": str})
        if isinstance(values, Response):
            return values
        if studio.models is None or not 0 <= values["index"] < len(studio.session.items):
            return _refuse("no model, or no such response", 404)
        return await _wait_for(request, studio.submit_score(values["index"], values["judgment"], values["tab"]))

    async def react(request: Request) -> Response:
        values = await _read_object(request, {"index": int, "judgment": str, "tab": str, "threshold": float})
        if isinstance(values, Response):
            return values
        if studio.models is None or not 0 <= values["index"] < len(studio.session.items):
            return _refuse("no model, or no such response", 404)
        arguments = [values[name] for name in ("index", "judgment", "threshold", "tab")]
        return await _wait_for(request, await run_in_threadpool(studio.submit_reaction, *arguments))

    async def show_summary(request: Request) -> Response:
        try:
            return _Json(await run_in_threadpool(studio.session.summarize))
        except UserError as error:
            return _refuse(str(error), 422)

    async def show_training(request: Request) -> Response:
        return _Json(studio.describe_training())

    async def plan(request: Request) -> Response:
        values = await _read_object(request, {"detector": str, "threshold": float})
        if isinstance(values, Response):
            return values
        try:
            return _Json({"command": studio.plan(values["detector"], values["threshold"]).command})
        except UserError as error:
            return _refuse(str(error), 422)

    async def train(request: Request) -> Response:
        values = await _read_object(request, {"detector": str, "threshold": float})
        if isinstance(values, Response):
            return values
        try:
            await run_in_threadpool(studio.start_training, values["detector"], values["threshold"])
        except UserError as error:
            return _refuse(str(error), 422)
        return _Json(studio.describe_training())

    async def stop_training(request: Request) -> Response:
        if studio.training is not None:
            studio.training.stop()
        return _Json(studio.describe_training())

    async def stream_events(request: Request) -> Response:
        return StreamingResponse(studio.broadcast.stream(studio.is_ending), media_type="text/event-stream")

    routes = [
        Route("/", show_page),
        Route("/static/{name}", show_asset),
        Route("/favicon.ico", show_icon),  # that browsers ask for while the first page, without an icon, forwards them
        Route("/api/session", show_session),
        Route("/api/items/{index:int}", handle_item, methods=["GET", "PUT"]),
        Route("/api/search", search),
        Route("/api/score", score, methods=["POST"]),
        Route("/api/reaction", react, methods=["POST"]),
        Route("/api/summary", show_summary),
        Route("/api/plan", plan, methods=["POST"]),
        Route("/api/training", show_training, methods=["GET"]),
        Route("/api/training", train, methods=["POST"]),
        Route("/api/training", stop_training, methods=["DELETE"]),
        Route("/api/events", stream_events),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, access=access)])


def _make_title(item: Item) -> str:
    return " ".join(item.row["instruction"].split())[:_TITLE_LENGTH]


def _read_asset(package: str, name: str) -> Response:
    return Response((files(package) / name).read_bytes(), media_type=_TYPES[Path(name).suffix])


def _refuse(problem: str, status: int) -> Response:
    return _Json({"problem": problem}, status)


async def _read_object(request: Request, kinds: dict[str, type]) -> Any:
    """Read a JSON object with these fields, or return the answer to a request that has none."""
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        values = None
    is_valid = isinstance(values, dict) and all(
        isinstance(values.get(name), (int, float) if kind is float else kind) and not isinstance(values[name], bool)
        for name, kind in kinds.items()
    )
    return values if is_valid else _refuse(f"expected an object with {', '.join(kinds)}", 422)


async def _wait_for(request: Request, job: Job) -> Response:
    """Wait for the result of a job, and cancel it if the page no longer waits for it."""
    result = asyncio.wrap_future(job.future)
    try:
        while not result.done():
            await asyncio.wait([result], timeout=0.1)
            if not result.done() and await request.is_disconnected():
                job.cancel()
                return Response(status_code=499)
        return _Json(result.result())
    except (CancelledError, asyncio.CancelledError):
        return _refuse("overtaken", 409)
    except UserError as error:
        return _refuse(str(error), 422)
