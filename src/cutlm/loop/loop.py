"""Decides which stage is next, notes which are complete, and checks that nothing has changed in between.

`manifest.json` in the folder of an iteration lists its complete stages with checksums of their files. A loop that was
killed at any point resumes with the first stage that is not listed.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from cutlm.data.files import hash_sources, sync_directory, write_text
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.loop.processes import lock_folder, run_command
from cutlm.loop.report import format_seconds, write_report
from cutlm.loop.settings import SETTINGS_FILE, Plan, find_differences
from cutlm.loop.stages import (
    STAGES,
    Iteration,
    Runner,
    StageFailed,
    list_leftovers,
    list_outputs,
    list_stages,
    make_seed,
    order_instructions,
    recount_metrics,
    write_yaml,
)
from cutlm.model.card import CARD_FILE

_PACKAGES = ("cutlm", "torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True)
class StageRef:
    """A stage of an iteration, such as `2.judge`."""

    number: int
    stage: str

    def is_before(self, other: "StageRef") -> bool:
        """Whether this stage runs before another one."""
        order = list(STAGES)
        return (self.number, order.index(self.stage)) < (other.number, order.index(other.stage))


def list_iterations(plan: Plan) -> list[Iteration]:
    """List all iterations, starting with number 0 for the initial model."""
    model, iterations = plan.model, []
    for number in range(plan.arguments.num_iterations + 1):
        iterations.append(Iteration(number, plan.folder / f"iteration-{number}", model))
        model = iterations[-1].new_model
    return iterations


def read_stage_ref(plan: Plan, option: str, text: str) -> StageRef:
    """Read `2.judge`, `judge` (of the current iteration) or `2` (its last stage for --until, its first for --from)."""
    number_text, _, stage = (text, "", "") if text.isdecimal() else text.rpartition(".")
    number = int(number_text) if number_text.isdecimal() else None if number_text else _find_current(plan)
    known = list_stages(plan, number) if number is not None and number <= plan.arguments.num_iterations else []
    if known and not stage:
        stage = known[-1 if option == "--until" else 0]
    if number is None or stage not in known:
        raise ConfigError(
            f"{option}: expected a stage, such as judge, or a stage of an iteration, such as 2.judge, got {text!r};"
            f" stages are {', '.join(list_stages(plan, 1))}, iterations 1 to {plan.arguments.num_iterations}"
        )
    return StageRef(number, stage)


def _find_current(plan: Plan) -> int:
    """Return the number of the first iteration that is not complete, or else of the last."""
    for iteration in list_iterations(plan)[1:]:
        if set(list_stages(plan, iteration.number)) - Manifest(iteration.folder).stages.keys():
            return iteration.number
    return plan.arguments.num_iterations


# ---- Manifest ----


class Manifest:
    """The complete stages of the iteration in a folder: `stages` has a record of each, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.stages = json.loads(self.path.read_text("utf-8"))["stages"]
                is_valid = all(
                    isinstance(stage["versions"], dict)
                    and isinstance(stage["metrics"], dict)
                    and all({"size", "mtime_ns", "sha256"} <= file.keys() for file in stage["outputs"].values())
                    for stage in self.stages.values()
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                is_valid = False
            if not is_valid:
                raise DataError(f"{self.path}: not a manifest; restore it, or set another output_dir to start over")

    def record(self, stage: str, outputs: Iterable[Path], **known: Any) -> None:
        """Mark a stage as complete, with checksums of its files and anything else to remember."""
        files: list[Path] = []
        for path in outputs:
            inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            files += [file for file in inside if file.name != CARD_FILE]  # gets results of later stages
        self.stages[stage] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": read_versions(),
            **known,
            "outputs": {str(path.relative_to(self.folder)): _describe_file(path) for path in files},
        }
        self._save()

    def forget(self, stage: str) -> None:
        """Mark a stage as not complete."""
        if self.stages.pop(stage, None) is not None:
            self._save()

    def find_changes(self, stage: str) -> tuple[list[str], list[str]]:
        """Return a sentence for each file of a complete stage that was edited, and for each that is missing."""
        edited, missing = [], []
        for name, known in self.stages[stage]["outputs"].items():
            path = self.folder / name
            if not path.is_file():
                missing.append(f"{path}: missing, although this run has written it")
                continue
            stat = path.stat()
            # A file of the same size and modification time is not read again.
            is_same = (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"])
            if not is_same and (stat.st_size != known["size"] or _hash_file(path) != known["sha256"]):
                edited.append(f"{path}: changed since this run has written it")
        return edited, missing

    def accept_edits(self, stage: str, metrics: dict[str, Any]) -> None:
        """Take the files of a stage as they are now, with the metrics that have changed."""
        known = self.stages[stage]
        outputs = {name: _describe_file(self.folder / name) for name in known["outputs"]}
        self.stages[stage] = known | {"is_edited": True, "metrics": known["metrics"] | metrics, "outputs": outputs}
        self._save()

    def _save(self) -> None:
        write_text(self.path, json.dumps({"stages": self.stages}, indent=2, ensure_ascii=False) + "\n")


def _describe_file(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _hash_file(path)}


def _hash_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def read_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the results depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


# ---- The loop ----


def run_loop(
    plan: Plan,
    *,
    until: StageRef | None = None,
    start: StageRef | None = None,
    run: Callable[..., int] = run_command,
) -> bool:
    """Run everything that is not complete, and return whether the whole plan is complete.

    `until` is the stage to stop after, `start` one to run again with all later ones, whose files are removed. Tests
    replace `run`. Raise StageFailed, WaitingForPerson, Interrupted, or UserError if the folder belongs to
    other settings or another running loop, or if its files were changed.
    """
    with lock_folder(plan.folder) as lock:
        order_instructions(plan)  # fails if there are too few
        _check_settings(plan)
        iterations = list_iterations(plan)
        if start is not None:
            _discard_from(plan, iterations, start)
        _check_outputs(iterations)
        for iteration in iterations:
            for stage in list_stages(plan, iteration.number):
                _run_if_incomplete(plan, iteration, stage, run, lock)
                if until == StageRef(iteration.number, stage):
                    return False
        write_report(plan.folder, collect_metrics(plan), draws_plots=True)
        return True


def _run_if_incomplete(plan: Plan, iteration: Iteration, stage: str, run: Callable[..., int], lock: int) -> None:
    manifest = Manifest(iteration.folder)
    if stage in manifest.stages:
        return
    iteration.folder.mkdir(parents=True, exist_ok=True)
    print(f"iteration {iteration.number}, {stage}", flush=True)
    started = time.monotonic()
    runner = Runner(plan, iteration.folder / f"{stage}.log", lock, run)
    try:
        metrics = STAGES[stage](plan, iteration, runner)
    except StageFailed as error:
        raise StageFailed(f"iteration {iteration.number}, {stage}: {error}", error.status) from None
    seconds = time.monotonic() - started
    write_yaml(iteration.folder / "config.yaml", plan.resolved)
    outputs = [path for path in list_outputs(plan, iteration, stage) if path.exists()]
    seed = make_seed(plan, iteration.number, stage)
    manifest.record(stage, outputs, seconds=round(seconds, 3), seed=seed, commands=runner.commands, metrics=metrics)
    write_report(plan.folder, collect_metrics(plan), draws_plots=False)
    shown = {name.removeprefix("num_").replace("_", " "): value for name, value in metrics.items()}
    text = "".join(f"; {name} {value:.4g}" for name, value in shown.items() if value is not None)
    print(f"  done in {format_seconds(seconds)}{text}", flush=True)


def _check_settings(plan: Plan) -> None:
    """Save the settings, unless the folder belongs to other ones; raise ConfigError with all differences."""
    path = plan.folder / SETTINGS_FILE
    files = {name: getattr(plan.arguments, name) for name in ("instructions", "eval_instructions")}
    files |= {f"prompt_file of {name}": path for name, path in plan.prompt_files.items()}
    hashes = {f"sha256_of_{name}": hash_sources(path) for name, path in files.items() if path}
    if path.exists():
        before = _read_settings(path)
        hashes_before = {name: before.pop(name) for name in list(before) if name.startswith("sha256_of_")}
        problems = [
            f"{name.removeprefix('sha256_of_')}: this run was started with a file of other content"
            for name in sorted(hashes_before.keys() | hashes.keys())
            if hashes_before.get(name) != hashes.get(name)
        ]
        problems += find_differences(before, plan.resolved, plan.parse_options)
        if problems:
            hint = f"use the settings in {path} to resume, or set another output_dir to start over"
            raise ConfigError(problems, hint=hint)
    elif any(not child.name.startswith(".") for child in plan.folder.iterdir()):  # a lock, or what a killed loop left
        raise UserError(f"output_dir: {plan.folder} is not empty and has no {SETTINGS_FILE}; set another output_dir")
    write_yaml(path, plan.resolved | hashes)


def _read_settings(path: Path) -> dict[str, Any]:
    settings = None
    with suppress(yaml.YAMLError, UnicodeDecodeError):
        settings = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise DataError(f"{path}: not the settings of a run; restore it, or set another output_dir to start over")
    return settings


def _check_outputs(iterations: list[Iteration]) -> None:
    """Raises UserError if files of complete stages were changed."""
    changes: list[str] = []
    versions: set[tuple[str, str]] = set()
    for manifest in (Manifest(iteration.folder) for iteration in iterations):
        for stage, known in manifest.stages.items():
            edited, missing = manifest.find_changes(stage)
            changes += [*edited, *missing]
            versions |= known["versions"].items()
    if others := versions - read_versions().items():
        print(f"some stages ran with other versions: {', '.join(sorted(map(' '.join, others)))}")
    if changes:
        hint = "restore them; or keep an edit and redo everything after it with --from the next stage"
        raise UserError(changes, hint=hint)


def _discard_from(plan: Plan, iterations: list[Iteration], start: StageRef) -> None:
    """Remove the files of a stage and all later ones; accepts edits of files before it."""
    for iteration in reversed(iterations):
        manifest = Manifest(iteration.folder)
        for stage in reversed(list_stages(plan, iteration.number)):
            if not StageRef(iteration.number, stage).is_before(start):
                # Files before manifest: after a kill in between, the missing files of a complete stage are noticed.
                for path in list_leftovers(plan, iteration, stage):
                    if path.exists():
                        print(f"removing {path}")
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        sync_directory(path.parent)
                manifest.forget(stage)
            elif stage in manifest.stages:
                edited, missing = manifest.find_changes(stage)
                if missing:
                    raise UserError(missing, hint=f"restore them, or use --from {iteration.number}.{stage}")
                if edited:
                    print("".join(f"{change}; the edit is kept\n" for change in edited), end="")
                    manifest.accept_edits(stage, recount_metrics(iteration, stage))


def collect_metrics(plan: Plan) -> list[dict[str, Any]]:
    """Collect the number, and each stage's state, seconds and metrics, of all iterations that have started."""
    collected = []
    for iteration in list_iterations(plan):
        complete = Manifest(iteration.folder).stages
        stages = {}
        for stage in list_stages(plan, iteration.number) if iteration.folder.exists() else []:
            known = complete.get(stage, {})
            state = "edited" if known.get("is_edited") else "done"
            if not known:
                has_begun = any(path.exists() for path in list_leftovers(plan, iteration, stage))
                state = "started" if has_begun else "-"
            stages[stage] = {"state": state, "seconds": known.get("seconds"), "metrics": known.get("metrics", {})}
        if stages:
            collected.append({"iteration": iteration.number, "stages": stages})
    return collected
