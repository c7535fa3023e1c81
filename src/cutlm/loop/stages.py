"""The stages of an iteration: what each runs, the files it leaves and the metrics read from them.

    sample    instructions.jsonl    the next ones of one shuffled order of all instructions
    generate  responses.jsonl       cutlm generate, with the iteration's initial model
    judge     records.jsonl         cutlm judge
    compare   teacher_gain.json     cutlm judge --compare_prompts, if the objective has a teacher
    refine    refined.jsonl         cutlm refine, if the objective learns from refined responses
    blame     scores.jsonl          cutlm blame, if the detector is frozen or there is a teacher
    train     adapter/ or model/    cutlm train, with train.yaml
    merge     model/                cutlm merge, unless the whole model is trained
    evaluate  evaluation/           generate and judge on held-out instructions, and the user's eval_command

Each file appears under its name only when it is complete, so a stage that is resumed skips what exists.
"""

import hashlib
import json
import math
import random
import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from cutlm.data.files import SourceRow, read_rows, write_rows, write_text
from cutlm.data.records import InstructionRow, check_records, validate_row
from cutlm.errors import DataError, UserError
from cutlm.flagging.report import count_ineffective, read_sensitivity
from cutlm.judges.human import name_todo_files
from cutlm.judges.responses import EMPTY_RESPONSE, name_failures_file
from cutlm.loop.processes import run_shell, serve
from cutlm.loop.settings import Plan
from cutlm.model.card import name_model, update_card

_NUM_AVERAGED = 3
_ADVICE = "see its output above, fix the problem and run the same command again: complete work is kept"


class StageFailed(Exception):
    """A stage could not be completed; `status` is the exit status for the loop."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WaitingForPerson(Exception):
    """A person has to fill in the file `labels` first."""

    def __init__(self, labels: Path) -> None:
        super().__init__(str(labels))
        self.labels = labels


@dataclass(frozen=True)
class Iteration:
    """One iteration; number 0 is for the initial model, which is only evaluated."""

    number: int
    folder: Path
    model: str  # the one it starts with: a folder, or a name on the hub

    @property
    def new_model(self) -> str:
        """The model it ends with."""
        return str((self.folder / "model").resolve()) if self.number else self.model


@dataclass
class Runner:
    """Runs the commands of one stage."""

    plan: Plan
    log: Path
    lock: int  # file descriptor of the run folder's lock, inherited by every command
    run_command: Callable[..., int]  # `cutlm.loop.processes.run_command`
    commands: list[list[str]] = field(default_factory=list)  # the arguments of every `cutlm` command so far

    def run(self, arguments: list[str], launcher: str | None = None) -> int:
        """Run `cutlm` with arguments and return its exit status."""
        self.commands.append(arguments)
        return self.run_command(arguments, log=self.log, lock=self.lock, launcher=launcher)

    def make(self, out: Path, arguments: list[str]) -> None:
        """Run `cutlm` to write a file or folder, unless it exists; raise StageFailed if the command fails."""
        if not out.exists():
            arguments = [*arguments, "--out", str(out)]
            _check_status(self.run(arguments), arguments)

    def run_shell(self, command: str) -> int:
        """Run a shell command and return its exit status."""
        return run_shell(command, log=self.log, lock=self.lock)

    def serve(self, model: str) -> AbstractContextManager[None]:
        """A context in which the user's server_command, if there is one, serves the model."""
        arguments, url = self.plan.arguments, self.plan.server_url
        if not arguments.server_command or not url:
            return nullcontext()
        log = self.log.with_name("server.log")
        return serve(arguments.server_command, model, url, arguments.server_timeout, log, self.lock)


def _check_status(status: int, arguments: list[str]) -> None:
    if status:
        what = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
        raise StageFailed(f"cutlm {arguments[0]} {what}; {_ADVICE}", 2 if status == 2 else 1)


def list_stages(plan: Plan, number: int) -> list[str]:
    """List the stages of an iteration in order."""
    is_used = {"compare": plan.has_comparison, "refine": plan.has_refine, "blame": plan.has_blame}
    is_used["merge"] = plan.has_merge
    is_used["evaluate"] = bool(plan.arguments.eval_instructions or plan.arguments.eval_command)
    return [stage for stage in STAGES if is_used.get(stage, True) and (number or stage == "evaluate")]


def list_outputs(plan: Plan, iteration: Iteration, stage: str) -> list[Path]:
    """List the files and folders that a stage leaves; not all of them have to exist."""
    judged = ["records.jsonl", "records.jsonl.failures.jsonl"]
    names = {
        "sample": ["instructions.jsonl"],
        "generate": ["responses.jsonl", "responses.jsonl.failures.jsonl"],
        "judge": judged,
        "compare": ["teacher_gain.json", *(f"teacher_gain.json.{name}" for name in judged)],
        "refine": ["refined.jsonl", "refined.jsonl.failures.jsonl"],
        "blame": ["scores.jsonl", "scores.jsonl.report.json"],
        "train": ["train.yaml", "adapter" if plan.has_merge else "model"],
        "merge": ["model"],
        "evaluate": [f"evaluation/{name}" for name in ("responses.jsonl", *judged, "metrics.json")],
    }[stage]
    return [iteration.folder / name for name in names]


def list_leftovers(plan: Plan, iteration: Iteration, stage: str) -> list[Path]:
    """List everything to remove before a stage is run again: outputs, and partial work that it would resume."""
    if stage == "evaluate":  # the user's command may leave other files there, which belong to the same model
        return sorted(iteration.folder.glob("evaluation/*"))
    outputs = list_outputs(plan, iteration, stage)
    if stage == "generate":  # a person's judgments are of these responses
        outputs += name_todo_files(iteration.folder / "records.jsonl")
    return [*outputs, *(Path(f"{path}.partial") for path in outputs if path.suffix in (".json", ".jsonl"))]


def make_seed(plan: Plan, number: int, stage: str) -> int:
    """Derive the seed of a stage of an iteration."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed} {number} {stage}".encode()).digest()[:4]) // 2


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write settings atomically."""
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def recount_metrics(iteration: Iteration, stage: str) -> dict[str, Any]:
    """Recompute the metrics of a stage that can change when its files are edited."""
    if stage == "judge":
        return _count_judged(iteration.folder / "records.jsonl") or {}
    return _count_flagged(iteration.folder / "scores.jsonl") if stage == "blame" else {}


# ---- Sample ----


def order_instructions(plan: Plan) -> list[dict[str, Any]]:
    """Shuffle the instructions, each of them once and none that is evaluated on; UserError if there are too few."""
    arguments = plan.arguments
    rows = _read_instructions(str(arguments.instructions))
    held_out = _read_instructions(arguments.eval_instructions) if arguments.eval_instructions else []
    excluded = {_identify(row) for row in held_out}
    unique: dict[str, dict[str, Any]] = {}
    for row in rows:
        unique.setdefault(_identify(row), row)
    kept = [row for key, row in unique.items() if key not in excluded]
    num_needed = arguments.num_iterations * arguments.num_instructions
    if len(kept) < num_needed:
        repeated, left_out = len(rows) - len(unique), len(unique) - len(kept)
        raise UserError(
            f"{arguments.instructions}: expected {num_needed} instructions, {arguments.num_instructions} for each of"
            f" {arguments.num_iterations} iterations, got {len(kept)} ({repeated} repeated and {left_out} held-out ones"
            " left out); add more, or lower num_instructions or num_iterations"
        )
    return random.Random(f"{plan.seed} instructions").sample(kept, len(kept))


def _read_instructions(path: str) -> list[dict[str, Any]]:
    rows, problems = read_rows(path)
    for row in rows:
        validate_row(row, InstructionRow, problems)
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; fix them, no row was skipped")
    return [row.value for row in rows]


def _identify(row: dict[str, Any]) -> str:
    """Return a text by which instructions and conversations are the same."""
    return str(InstructionRow.model_validate(row).conversation)


def _sample(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    num = plan.arguments.num_instructions
    start = (iteration.number - 1) * num
    write_rows(iteration.folder / "instructions.jsonl", order_instructions(plan)[start : start + num])
    return {"num_instructions": num}


# ---- Generate ----


def _generate(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    out = iteration.folder / "responses.jsonl"
    seed = make_seed(plan, iteration.number, "generate")
    _answer(plan, runner, iteration.model, iteration.folder / "instructions.jsonl", out, seed)
    rows, _ = read_rows(out)
    num_empty = sum(not row.value["output"].strip() for row in rows)
    return {"num_responses": len(rows), "num_empty": num_empty, "num_unanswered": len(_read_failures(out))}


def _read_failures(out: Path) -> list[SourceRow]:
    path = name_failures_file(out)
    return read_rows(path)[0] if path.exists() else []


def _answer(plan: Plan, runner: Runner, model: str, prompts: Path | str, out: Path, seed: int, *further: str) -> None:
    if out.exists():
        return
    options = shlex.split(plan.arguments.generate)
    # The prompt is that of training, whatever chat template the initial model has. A server applies the chat template
    # of the model it serves: later models are saved with that of training, the initial one only fits `chat`.
    template = str(plan.train_settings["template"])
    serves_template = template == "chat" or model != plan.model
    has_judgment = any(option.partition("=")[0] == "--judgment" for option in options)
    if plan.server_url and serves_template and not has_judgment:
        fixed = [option for option in plan.prompt_options if option.startswith("--chat_template_kwargs")]
    else:
        fixed = list(plan.prompt_options)
    if has_judgment and (role := plan.train_settings.get("judgment_role")):
        fixed += ["--judgment_role", role]
    fixed += ["--max_failure_rate", str(plan.arguments.max_failure_rate)]
    arguments = ["generate", "--model", model, "--prompts", str(prompts), *fixed, *options, *further]
    with runner.serve(model):
        runner.make(out, [*arguments, "--seed", str(seed)])


# ---- Judge ----


def _judge(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    return _judge_responses(plan, runner, str(plan.arguments.judge), iteration.folder / "responses.jsonl", "judge")


def _judge_responses(plan: Plan, runner: Runner, judge: str, responses: Path, cache_name: str) -> dict[str, Any]:
    """Judge responses into `records.jsonl` in the same folder, until few enough judgments are missing.

    All iterations share one cache of a paid judge's answers, so limits on spending hold for the whole run.
    """
    records, kind = responses.with_name("records.jsonl"), judge.split()[0]
    num_responses = len(read_rows(responses)[0])
    max_missing = plan.arguments.max_failure_rate * num_responses
    counts = _count_judged(records, num_responses)
    if counts is not None and counts["num_missing"] + counts["num_empty"] <= max_missing:
        return counts
    arguments = ["judge", "--responses", str(responses), "--out", str(records), "--judge", *shlex.split(judge)]
    arguments += _share_cache(plan, shlex.split(judge), cache_name)
    arguments += ["--overwrite"] * records.exists()
    labels = [path for path in name_todo_files(records) if path.exists()] if kind == "human" else []
    if labels:  # of both formats, the one that was edited last
        arguments += ["--labels", str(max(labels, key=lambda path: path.stat().st_mtime_ns))]
    status = runner.run(arguments)
    counts = _count_judged(records, num_responses)
    if status == 0 and counts is None and kind == "human":
        raise WaitingForPerson(name_todo_files(records)[1])
    if status not in (0, 1) or counts is None:
        _check_status(status or 1, arguments)
    assert counts is not None
    if (num_without := counts["num_missing"] + counts["num_empty"]) > max_missing:
        empty = f" ({counts['num_empty']} of them are empty)" if counts["num_empty"] else ""
        retry = "" if kind == "local" else "run the same command again to retry these only, or "
        raise StageFailed(
            f"{num_without} of {num_responses} responses have no judgment{empty}, more than max_failure_rate"
            f" {plan.arguments.max_failure_rate:g}; {name_failures_file(records)} lists the reasons; {retry}raise"
            " max_failure_rate",
            status=1,
        )
    return counts


def _count_judged(records: Path, num_responses: int | None = None) -> dict[str, Any] | None:
    """Count records and failures; None if they do not add up to `num_responses` (checked unless it is None)."""
    if not records.exists():
        return None
    check = check_records(records)
    kinds = [row.value.get("kind") for row in _read_failures(records)]
    if num_responses is not None and len(check.records) + len(kinds) != num_responses:
        return None  # killed between writing the two files, which come from different attempts
    num_empty = kinds.count(EMPTY_RESPONSE.kind)
    return {
        "num_judged": len(check.records),
        "num_satisfactory": check.num_satisfactory,
        "num_missing": len(kinds) - num_empty,
        "num_empty": num_empty,
    }


# ---- Compare, refine and blame ----


def _compare(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    """Measure the gain of the teacher's prompt; the loop continues without a verdict, because training needs none."""
    records, out = iteration.folder / "records.jsonl", iteration.folder / "teacher_gain.json"
    if not out.exists() and not all(record.is_satisfactory for record in check_records(records).records):
        judge = shlex.split(str(plan.arguments.judge))
        arguments = ["judge", "--compare_prompts", "--responses", str(records), "--out", str(out)]
        arguments += ["--model", iteration.model, *plan.comparison_options, "--judge", *judge]
        arguments += _share_cache(plan, judge, "judge")
        arguments += ["--seed", str(make_seed(plan, iteration.number, "compare"))]
        status = runner.run(arguments)
        # Without any verdict there are no records, but a list of failures.
        judged = Path(f"{out}.records.jsonl")
        if status not in (0, 1) or not (judged.exists() or name_failures_file(judged).exists()):
            _check_status(status, arguments)
    found = json.loads(out.read_text("utf-8")) if out.exists() else {}
    names = ("teacher_gain", "share_plain", "share_teacher", "mean_length_plain", "mean_length_teacher")
    low, high = found.get("interval", (None, None))
    counts = {"num_records": found.get("num_records", 0), "num_missing": found.get("num_missing", 0)}
    return {**counts, **{name: found.get(name) for name in names}, "gain_low": low, "gain_high": high}


def _share_cache(plan: Plan, judge: list[str], name: str) -> list[str]:
    """The option of a paid judge by which all its runs share one cache, unless it names another one."""
    if judge[0] != "http" or any(argument.partition("=")[0] == "--cache" for argument in judge):
        return []
    return ["--cache", str(plan.folder / f"{name}.cache.sqlite")]


def _refine(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    records, out = iteration.folder / "records.jsonl", iteration.folder / "refined.jsonl"
    if not out.exists() and all(record.is_satisfactory for record in check_records(records).records):
        write_rows(out, [row.value for row in read_rows(records)[0]])  # `cutlm refine` refuses to do nothing
    if not out.exists():
        arguments = ["refine", "--model", iteration.model, "--data", str(records), *plan.refine_options]
        arguments += ["--seed", str(make_seed(plan, iteration.number, "refine")), "--out", str(out)]
        status = runner.run(arguments)
        if status != 1 or not out.exists():  # 1 with a file: no response was improved
            _check_status(status, arguments)
    return {"num_refined": sum(bool(record.i_ans) for record in check_records(out).records)}


def _blame(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    records, out = iteration.folder / "records.jsonl", iteration.folder / "scores.jsonl"
    runner.make(out, ["blame", "--model", iteration.model, "--data", str(records), *plan.blame_options])
    return _count_flagged(out)


def _count_flagged(scores: Path) -> dict[str, Any]:
    flags = [row.value["is_flagged"] for row in read_rows(scores)[0] if not row.value["is_satisfactory"]]
    counts = {"num_tokens": sum(map(len, flags)), "num_flagged": sum(map(sum, flags))}
    sensitivity = read_sensitivity(scores)
    known = {} if sensitivity is None else {"flag_signal": sensitivity.flag_signal, "pairwise": sensitivity.pairwise}
    num_ineffective = count_ineffective(scores)
    return counts | known | ({} if num_ineffective is None else {"num_ineffective": num_ineffective})


# ---- Train and merge ----


def _train(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    folder = iteration.folder
    judged = folder / "records.jsonl"
    data = folder / "scores.jsonl" if plan.has_blame else folder / "refined.jsonl" if plan.has_refine else judged
    target = folder / ("adapter" if plan.has_merge else "model")
    state = _read_trainer_state(target)
    if state is None:
        records = [] if plan.train_settings.get("downsample") is None else check_records(judged).records
        if records and all(record.is_satisfactory for record in records):
            raise StageFailed(
                f"all {len(records)} responses are satisfactory, and downsample keeps none of those; use"
                f" {iteration.model} as the final model, or start a new run with harder instructions",
                status=2,
            )
        config = folder / "train.yaml"
        settings = plan.train_settings | {"model_name_or_path": iteration.model, "data": str(data)}
        settings |= {"output_dir": str(target), "seed": make_seed(plan, iteration.number, "train")}
        write_yaml(config, settings)
        arguments = ["train", "--config", str(config)]
        if any(target.glob("checkpoint-*")) and not plan.train_settings.get("save_only_model"):
            arguments += ["--resume_from_checkpoint", "last"]
        elif target.exists():  # killed before the first checkpoint
            arguments += ["--overwrite_output_dir", "true"]
        _check_status(runner.run(arguments, plan.arguments.launcher), arguments)
        state = _read_trainer_state(target)
        assert state is not None
    for path in target.glob("checkpoint-*"):
        shutil.rmtree(path)
    judge = plan.parse_options("judge", str(plan.arguments.judge))
    about = {"iteration": iteration.number, "judge": judge["judge"]}
    if judge.get("judge_model"):
        about["judge_model"] = name_model(judge["judge_model"])
    name = f"{plan.folder.resolve().name}-iteration-{iteration.number}"
    update_card(target, name=name, iteration=about)
    logged = [line for line in state["log_history"] if "loss" in line]
    losses = [line["loss"] for line in logged]
    shares = [line["flagged_share"] for line in logged if "flagged_share" in line]
    start: dict[str, Any] = next((line for line in state["log_history"] if "pairwise" in line), {})
    return {
        "num_steps": state["global_step"],
        "loss_start": mean(losses[:_NUM_AVERAGED]) if losses else None,
        "loss_end": mean(losses[-_NUM_AVERAGED:]) if losses else None,
        "flagged_share": mean(shares) if shares else None,
        **{name: start[name] for name in ("flag_signal", "pairwise") if name in start},
    }


def _read_trainer_state(target: Path) -> dict[str, Any] | None:
    """Read the file that the trainer writes last; None if training is not complete."""
    try:
        return json.loads((target / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _merge(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    adapter = iteration.folder / "adapter"
    # --base, because the path in the adapter is wrong if the run folder was moved.
    runner.make(iteration.folder / "model", ["merge", "--adapter", str(adapter), "--base", iteration.model])
    return {}


# ---- Evaluate ----


def _evaluate(plan: Plan, iteration: Iteration, runner: Runner) -> dict[str, Any]:
    folder = iteration.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    arguments = plan.arguments
    metrics: dict[str, Any] = {}
    if arguments.eval_instructions:
        responses = folder / "responses.jsonl"
        # Greedy and with one seed for all models, so that only the model differs between iterations.
        greedy = ("--temperature", "0", "--num_samples", "1")
        _answer(plan, runner, iteration.new_model, arguments.eval_instructions, responses, plan.seed, *greedy)
        cache = "eval_judge" if arguments.eval_judge else "judge"
        counts = _judge_responses(plan, runner, str(arguments.eval_judge or arguments.judge), responses, cache)
        metrics |= counts | {"share_satisfactory": counts["num_satisfactory"] / max(1, counts["num_judged"])}
    if arguments.eval_command:
        metrics |= _run_eval_command(arguments.eval_command, iteration.new_model, folder / "metrics.json", runner)
    if iteration.number:  # the initial model is not ours
        measured = {name: value for name, value in metrics.items() if not name.startswith("num_")}
        update_card(iteration.new_model, evaluation=measured)
    return metrics


def _run_eval_command(command: str, model: str, out: Path, runner: Runner) -> dict[str, float]:
    if not out.exists():
        # `out` is written only after the command has succeeded and the content is valid.
        partial = out.with_name(f"{out.name}.partial")
        partial.unlink(missing_ok=True)
        command = command.replace("{model}", shlex.quote(model)).replace("{out}", shlex.quote(str(partial)))
        if status := runner.run_shell(command):
            raise StageFailed(f"eval_command exited with {status}; {_ADVICE}", 1)
        write_text(out, json.dumps(_read_metrics(partial)))
        partial.unlink()
    return _read_metrics(out)


def _read_metrics(path: Path) -> dict[str, float]:
    """Read the numbers in a JSON object; other values are ignored."""
    try:
        metrics = {
            name: value
            for name, value in json.loads(path.read_text("utf-8")).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    except (OSError, ValueError, AttributeError):
        raise StageFailed(f"eval_command: expected a JSON object of metrics in {path}; fix the command", 2) from None
    if non_finite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        names = ", ".join(non_finite)
        raise StageFailed(f"eval_command: expected finite numbers in {path}, got non-finite {names}; leave them out", 2)
    return metrics


# In order. Each runs a stage, or resumes it, and returns its metrics; raises StageFailed or WaitingForPerson.
STAGES: dict[str, Callable[[Plan, Iteration, Runner], dict[str, Any]]] = {
    "sample": _sample,
    "generate": _generate,
    "judge": _judge,
    "compare": _compare,
    "refine": _refine,
    "blame": _blame,
    "train": _train,
    "merge": _merge,
    "evaluate": _evaluate,
}
