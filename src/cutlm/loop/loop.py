"""The loop itself: which stage comes next, what of an earlier start holds, and where it stops.

Stages are `cutlm.loop.stages`, their processes `cutlm.loop.processes`. Killed at any point and started again, the
loop goes on with the stage that was not complete, and that stage with what it had finished.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cutlm.data.files import open_atomic, sync_directory
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.loop.manifest import Manifest, hash_file, read_versions
from cutlm.loop.pool import make_pool
from cutlm.loop.processes import lock_folder, run_command, run_shell, serve
from cutlm.loop.report import describe_seconds, write_report
from cutlm.loop.runner import Runner, StageFailed
from cutlm.loop.settings import Plan, find_differences
from cutlm.loop.stages import (
    STAGES,
    Place,
    count_again,
    list_outputs,
    list_remains,
    list_stages,
    make_seed,
    run_stage,
)

SETTINGS_FILE = "align.yaml"
# Runs `cutlm` with arguments: a log, the folder's lock, and maybe a launcher go with them.
Run = Callable[..., int]


@dataclass(frozen=True)
class Mark:
    """A stage of an iteration.

    Attributes:
        number: Of the iteration.
        stage: One of `STAGES`.
    """

    number: int
    stage: str

    @property
    def rank(self) -> tuple[int, int]:
        """By which marks are in order."""
        return self.number, STAGES.index(self.stage)


def name_iteration(folder: Path, number: int) -> Path:
    """The folder of an iteration."""
    return folder / f"iteration-{number}"


def list_places(plan: Plan) -> list[Place]:
    """All iterations, the model before the first one included."""
    locations = [Place(0, name_iteration(plan.folder, 0), _absolute(plan.model))]
    for number in range(1, plan.arguments.num_iterations + 1):
        locations.append(Place(number, name_iteration(plan.folder, number), locations[-1].new_model))
    return locations


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def read_mark(plan: Plan, option: str, text: str) -> Mark:
    """Reads `2.judge`; `judge`, of the iteration at hand; or `2`, its last stage for --until, its first for --from.

    Raises:
        ConfigError: There is no such stage.
    """
    number_text, _, stage = text.rpartition(".") if not text.isdecimal() else (text, "", "")
    number = int(number_text) if number_text.isdecimal() else None if number_text else _find_current(plan)
    known = list_stages(plan, number) if number is not None and number <= plan.arguments.num_iterations else []
    if known and not stage:
        stage = known[-1 if option == "--until" else 0]
    if number is None or stage not in known:
        raise ConfigError(
            f"{option}: expected a stage, such as judge, or one of an iteration, such as 2.judge; stages are"
            f" {', '.join(list_stages(plan, 1))}, iterations 1 to {plan.arguments.num_iterations}; got {text!r}"
        )
    return Mark(number, stage)


def _find_current(plan: Plan) -> int:
    """The first iteration that is not complete, or else the last."""
    for place in list_places(plan)[1:]:
        if set(list_stages(plan, place.number)) - set(Manifest(place.folder).stages):
            return place.number
    return plan.arguments.num_iterations


def run_loop(plan: Plan, *, until: Mark | None = None, start: Mark | None = None, run: Run = run_command) -> bool:
    """Runs what is not complete.

    Args:
        plan: What is to be done.
        until: The stage to stop after.
        start: The stage to begin anew with; what it and all later ones made is removed.
        run: Runs `cutlm` with arguments.

    Returns:
        Whether all of it is complete.

    Raises:
        UserError: The folder is of other settings, its files were changed, or another loop is at work there.
        StageFailed: A stage's command failed.
        WaitingForPerson: Responses wait to be judged.
        Interrupted: The loop was asked to stop.
    """
    with lock_folder(plan.folder) as lock:
        make_pool(plan)
        _check_settings(plan)
        locations = list_places(plan)
        if start is not None:
            _begin_anew(plan, locations, start)
        _check_outputs(plan, locations)
        for place in locations:
            for stage in list_stages(plan, place.number):
                _run_once(plan, place, stage, run, lock)
                if until == Mark(place.number, stage):
                    return False
        write_report(plan.folder, collect_figures(plan), is_drawing=True)
        return True


def _run_once(plan: Plan, place: Place, stage: str, run: Run, lock: int) -> None:
    """Runs a stage unless it is complete, and notes that it is."""
    manifest = Manifest(place.folder)
    if stage in manifest.stages:
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    print(f"iteration {place.number}, {stage}", flush=True)
    began = time.monotonic()
    commands: list[list[str]] = []
    log = place.folder / f"{stage}.log"

    def run_and_note(arguments: list[str], launcher: str | None = None) -> int:
        commands.append(arguments)
        return run(arguments, log=log, lock=lock, launcher=launcher)

    def serve_model(model: str) -> AbstractContextManager[None]:
        command = plan.arguments.server_command
        if not command:
            return nullcontext()
        assert plan.server is not None
        return serve(command, model, plan.server, plan.arguments.server_wait, place.folder / "server.log", lock)

    runner = Runner(run_and_note, functools.partial(run_shell, log=log, lock=lock), serve_model)
    try:
        figures = run_stage(plan, place, stage, runner)
    except StageFailed as error:
        raise StageFailed(f"iteration {place.number}, {stage}: {error}", error.status) from None
    seconds = time.monotonic() - began
    with open_atomic(place.folder / "config.yaml") as file:
        file.write(_to_yaml(plan.resolved))
    # A file that is not made where there is nothing to write, such as that of failures, is none of the outputs.
    outputs = [path for path in list_outputs(plan, place, stage) if path.exists()]
    seed = make_seed(plan, place.number, stage)
    manifest.record(stage, outputs, seconds=round(seconds, 3), seed=seed, commands=commands, figures=figures)
    write_report(plan.folder, collect_figures(plan), is_drawing=False)
    print(f"  done in {describe_seconds(seconds)}{_describe(figures)}", flush=True)


def _describe(figures: dict[str, Any]) -> str:
    named = {name.removeprefix("num_").replace("_", " "): value for name, value in figures.items() if value is not None}
    return "".join(f"; {name} {value:.4g}" for name, value in named.items())


def _to_yaml(values: dict[str, Any]) -> bytes:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def _check_settings(plan: Plan) -> None:
    """Refuses a folder of other settings; saves these.

    Raises:
        ConfigError: As said; all differences are named.
    """
    path = plan.folder / SETTINGS_FILE
    files = {name: getattr(plan.arguments, name) for name in ("instructions", "eval_instructions")}
    files |= {f"prompt_file of {name}": path for name, path in plan.prompt_files.items()}
    contents = {f"sha256_of_{name}": hash_file(path) for name, path in files.items() if path}
    if path.exists():
        before = _read_settings(path)
        hashes = {name: before.pop(name) for name in list(before) if name.startswith("sha256_of_")}
        problems = [
            f"{name.removeprefix('sha256_of_')}: this folder was begun with a file that held something else"
            for name in sorted(set(hashes) | set(contents))
            if hashes.get(name) != contents.get(name)
        ]
        problems += find_differences(before, plan.resolved)
        if problems:
            raise ConfigError(
                problems, hint=f"give what {path} holds to go on, or name another output_dir to begin anew"
            )
    elif any(child.name != ".lock" for child in plan.folder.iterdir()):
        raise UserError(f"output_dir: {plan.folder} is not empty and holds no {SETTINGS_FILE}; name another folder")
    with open_atomic(path) as file:
        file.write(_to_yaml(plan.resolved | contents))


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings that a folder was begun with.

    Raises:
        DataError: The file holds none.
    """
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise DataError(f"{path}: not the settings of a run; restore it, or name another output_dir to begin anew")
    return settings


def _check_outputs(plan: Plan, locations: list[Place]) -> None:
    """Refuses to go on from files that are not what was made.

    Raises:
        UserError: As said; all of them are named.
    """
    changes: list[str] = []
    others: set[str] = set()
    for place in locations:
        manifest = Manifest(place.folder)
        for stage, known in manifest.stages.items():
            changes += manifest.find_changes(stage)
            others |= {f"{name} {version}" for name, version in known["versions"].items()}
    others -= {f"{name} {version}" for name, version in read_versions().items()}
    if others:
        print(f"some stages were made with other versions than now: {', '.join(sorted(others))}")
    if changes:
        raise UserError(
            changes,
            hint="put them back; or keep an edit, and have all after it made anew: --from the stage that comes next",
        )


def _begin_anew(plan: Plan, locations: list[Place], start: Mark) -> None:
    """Removes what a stage and all later ones made; what was edited before it is taken as it is."""
    for place in reversed(locations):
        manifest = Manifest(place.folder)
        for stage in reversed(list_stages(plan, place.number)):
            if Mark(place.number, stage).rank >= start.rank:
                # The files first: a kill in between leaves a stage that says it is complete and is found out.
                for path in list_remains(plan, place, stage):
                    if path.exists():
                        print(f"removing {path}")
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        sync_directory(path.parent)
                manifest.forget(stage)
            elif stage in manifest.stages and (changes := manifest.find_changes(stage)):
                gone = [change for change in changes if change.endswith("any more")]
                if gone:
                    raise UserError(gone, hint=f"put them back, or begin with {place.number}.{stage}")
                print("".join(f"{change}; taken as it is now\n" for change in changes), end="")
                manifest.accept(stage, count_again(place, stage))


def collect_figures(plan: Plan) -> list[dict[str, Any]]:
    """What is known of each iteration that was begun: its number, its complete stages, their seconds and figures."""
    return list(_collect(plan))


def _collect(plan: Plan) -> Iterator[dict[str, Any]]:
    for place in list_places(plan):
        stages = Manifest(place.folder).stages
        named = list_stages(plan, place.number)
        if not named or (not stages and not place.folder.exists()):
            continue
        yield {
            "iteration": place.number,
            "stages": {
                stage: {
                    "state": _name_state(plan, place, stage, stages),
                    "seconds": stages.get(stage, {}).get("seconds"),
                    "figures": stages.get(stage, {}).get("figures", {}),
                }
                for stage in named
            },
        }


def _name_state(plan: Plan, place: Place, stage: str, stages: dict[str, Any]) -> str:
    if stage in stages:
        return "edited" if stages[stage].get("is_edited") else "done"
    return "begun" if any(path.exists() for path in list_remains(plan, place, stage)) else "-"
