"""The stages of an iteration: what each runs, what it leaves, and which figures are read from that.

    sample    instructions.jsonl        fresh ones, from one shuffled order of all
    generate  responses.jsonl           cutlm generate, by the model as it is
    judge     records.jsonl             cutlm judge
    refine    refined.jsonl             cutlm refine, where the objective learns from that
    blame     scores.jsonl              cutlm blame, where the detector is frozen
    train     adapter/ (or model/)      cutlm train, from train.yaml
    merge     model/                    cutlm merge; none where the whole model is trained
    evaluate  evaluation/               generate and judge on held-out instructions, and a command of the user's

Each file appears whole under its name or not at all, so one that is there is not made again. Which instructions are
drawn is settled by `cutlm.loop.pool`, whose judgments suffice by `cutlm.loop.judging`; what comes when is left to
`cutlm.loop.loop`.
"""

import hashlib
import json
import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from cutlm.data.files import open_atomic, read_rows, write_rows
from cutlm.data.records import check_records
from cutlm.loop.judging import ask_judge, count_records
from cutlm.loop.pool import make_pool
from cutlm.loop.runner import Runner, StageFailed, check_status
from cutlm.loop.settings import Plan

STAGES = ("sample", "generate", "judge", "refine", "blame", "train", "merge", "evaluate")
_NUM_AVERAGED = 3


@dataclass(frozen=True)
class Place:
    """Where an iteration's files stand, and the model that it begins with.

    Attributes:
        number: From 1; 0 is the model before the first, which is only evaluated.
        folder: The iteration's.
        model: The model's folder, or its name on a hub.
    """

    number: int
    folder: Path
    model: str

    @property
    def new_model(self) -> str:
        """The model that comes of it."""
        return str((self.folder / "model").resolve()) if self.number else self.model


def list_stages(plan: Plan, number: int) -> list[str]:
    """The stages of an iteration, in order."""
    skipped = set()
    if not plan.is_blaming:
        skipped.add("blame")
    if not plan.is_refining:
        skipped.add("refine")
    if not plan.is_adapting:
        skipped.add("merge")
    if not plan.arguments.eval_instructions and not plan.arguments.eval_command:
        skipped.add("evaluate")
    return [stage for stage in STAGES if stage not in skipped and (number or stage == "evaluate")]


def list_outputs(plan: Plan, place: Place, stage: str) -> list[Path]:
    """The files and folders that a stage leaves."""
    folder = place.folder
    names = {
        "sample": ["instructions.jsonl"],
        "generate": ["responses.jsonl", "responses.jsonl.failures.jsonl"],
        "judge": ["records.jsonl", "records.jsonl.failures.jsonl"],
        "refine": ["refined.jsonl"],
        "blame": ["scores.jsonl"],
        "train": ["train.yaml", "adapter" if plan.is_adapting else "model"],
        "merge": ["model"],
        "evaluate": [
            f"evaluation/{name}"
            for name in ("responses.jsonl", "records.jsonl", "records.jsonl.failures.jsonl", "figures.json")
        ],
    }[stage]
    return [folder / name for name in names]


def make_seed(plan: Plan, number: int, stage: str) -> int:
    """A seed of its own for each stage of each iteration."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed} {number} {stage}".encode()).digest()[:4]) // 2


def run_stage(plan: Plan, place: Place, stage: str, runner: Runner) -> dict[str, Any]:
    """Runs a stage to its end, or goes on with it.

    Returns:
        Its figures.

    Raises:
        StageFailed: A command of it failed.
        WaitingForPerson: It needs one.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    return {
        "sample": _sample,
        "generate": _generate,
        "judge": _judge,
        "refine": _refine,
        "blame": _blame,
        "train": _train,
        "merge": _merge,
        "evaluate": _evaluate,
    }[stage](plan, place, runner)


def _sample(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    pool, num = make_pool(plan), plan.arguments.num_instructions
    start = (place.number - 1) * num
    write_rows(place.folder / "instructions.jsonl", pool.rows[start : start + num])
    return {"num_instructions": num}


def _generate(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    out = place.folder / "responses.jsonl"
    seed = make_seed(plan, place.number, "generate")
    _answer(plan, runner, place.model, place.folder / "instructions.jsonl", out, seed)
    rows, _ = read_rows(out)
    failures = out.with_name(f"{out.name}.failures.jsonl")
    return {
        "num_responses": len(rows),
        "num_empty": sum(not row.value["output"].strip() for row in rows),
        "num_unanswered": len(read_rows(failures)[0]) if failures.exists() else 0,
    }


def _answer(plan: Plan, runner: Runner, model: str, prompts: Path | str, out: Path, seed: int, *further: str) -> None:
    if out.exists():
        return
    options = shlex.split(plan.arguments.generate)
    # Prompted as it is trained, whatever chat template the first model has. A server puts messages into the model's
    # own: later models carry that of training, and the first one's is meant by `chat`.
    template = str(plan.training["template"])
    is_carried = template == "chat" or model != plan.model
    has_judgment = any(option.partition("=")[0] == "--judgment" for option in options)
    fixed = [] if plan.server and is_carried and not has_judgment else ["--template", template]
    fixed += ["--max_failure_rate", str(plan.arguments.max_failure_rate)] if plan.server else []
    arguments = ["generate", "--model", model, "--prompts", str(prompts), "--out", str(out), *fixed, *options, *further]
    with runner.serve(model):
        check_status(runner.run([*arguments, "--seed", str(seed)]), arguments)
    assert out.exists()


def _judge(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    return ask_judge(plan, runner, str(plan.arguments.judge), place.folder / "responses.jsonl")


def _refine(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    out = place.folder / "refined.jsonl"
    if not out.exists():
        arguments = ["refine", "--model", place.model, "--data", str(place.folder / "records.jsonl"), "--out", str(out)]
        arguments += plan.refining
        arguments += ["--seed", str(make_seed(plan, place.number, "refine"))]
        check_status(runner.run(arguments), arguments)
    return {"num_refined": sum(record.i_ans is not None for record in check_records(out).records)}


def _blame(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    records, out = place.folder / "records.jsonl", place.folder / "scores.jsonl"
    if not out.exists():
        arguments = ["blame", "--model", place.model, "--data", str(records), "--out", str(out), *plan.blaming]
        check_status(runner.run(arguments), arguments)
    return _count_flags(out)


def _count_flags(scores: Path) -> dict[str, Any]:
    num_tokens = num_flagged = 0
    for row in read_rows(scores)[0]:
        if not row.value["is_satisfactory"]:
            num_tokens += len(row.value["is_flagged"])
            num_flagged += sum(row.value["is_flagged"])
    return {"num_tokens": num_tokens, "num_flagged": num_flagged}


def count_again(place: Place, stage: str) -> dict[str, Any]:
    """The figures of a stage whose files were edited, as far as editing changes them."""
    records = place.folder / "records.jsonl"
    if stage == "judge":
        return count_records(records) or {}
    return _count_flags(place.folder / "scores.jsonl") if stage == "blame" else {}


def _train(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    data = place.folder / (
        "scores.jsonl" if plan.is_blaming else "refined.jsonl" if plan.is_refining else "records.jsonl"
    )
    target = place.folder / ("adapter" if plan.is_adapting else "model")
    log = _read_state(target)
    if log is None:
        _refuse_nothing_to_learn(plan, place)
        config = place.folder / "train.yaml"
        settings = plan.training | {
            "model_name_or_path": place.model,
            "data": str(data),
            "output_dir": str(target),
            "seed": make_seed(plan, place.number, "train"),
        }
        with open_atomic(config) as file:
            file.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
        arguments = ["train", "--config", str(config)]
        if any(target.glob("checkpoint-*")) and not plan.training.get("save_only_model"):
            arguments += ["--resume_from_checkpoint", "last"]
        elif target.exists():
            arguments += ["--overwrite_output_dir", "true"]  # what a kill left before the first checkpoint
        check_status(runner.run(arguments, launcher=plan.arguments.launcher), arguments)
        log = _read_state(target)
        assert log is not None
    for path in target.glob("checkpoint-*"):
        shutil.rmtree(path)  # what it would take to go on; there is nothing to go on with
    lines = [line for line in log["log_history"] if "loss" in line]
    losses = [line["loss"] for line in lines]
    shares = [line["flagged_share"] for line in lines if "flagged_share" in line]
    return {
        "num_steps": log["global_step"],
        "loss_start": mean(losses[:_NUM_AVERAGED]) if losses else None,
        "loss_end": mean(losses[-_NUM_AVERAGED:]) if losses else None,
        "flagged_share": mean(shares) if shares else None,
    }


def _refuse_nothing_to_learn(plan: Plan, place: Place) -> None:
    """Raises:
    StageFailed: Nothing is wrong with any response, and `downsample` leaves out the others.
    """
    if plan.training.get("downsample") is None:
        return
    check = check_records(place.folder / "records.jsonl")
    if check.num_satisfactory == len(check.records):
        raise StageFailed(
            f"all {len(check.records)} responses are satisfactory, and downsample keeps none of them: there is nothing"
            f" left to learn from; {place.model} is the last model, or begin anew with harder instructions",
            2,
        )


def _read_state(target: Path) -> dict[str, Any] | None:
    """What the trainer wrote last, after the model itself; None where it has not, or was killed at it."""
    try:
        return json.loads((target / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _merge(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    out = place.folder / "model"
    if not out.exists():
        adapter = place.folder / "adapter"
        # Said, as the adapter names the place where its base was: the folder may have been moved since.
        arguments = ["merge", "--adapter", str(adapter), "--base", place.model, "--out", str(out)]
        check_status(runner.run(arguments), arguments)
    return {}


def _evaluate(plan: Plan, place: Place, runner: Runner) -> dict[str, Any]:
    folder = place.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    held_out = plan.arguments.eval_instructions
    if held_out:
        responses = folder / "responses.jsonl"
        # The same for every model: what differs between iterations is then the model alone.
        greedy = ("--temperature", "0", "--num_samples", "1")
        _answer(plan, runner, place.new_model, held_out, responses, plan.seed, *greedy)
        if plan.arguments.eval_judge:
            counts = ask_judge(plan, runner, plan.arguments.eval_judge, responses, cache="eval_judge")
        else:
            counts = ask_judge(plan, runner, str(plan.arguments.judge), responses)
        figures |= counts | {"share_satisfactory": counts["num_satisfactory"] / max(1, counts["num_judged"])}
    if plan.arguments.eval_command:
        out = folder / "figures.json"
        if not out.exists():
            # Under its name only when the command has ended well and it is what it should be.
            unproven = folder / "figures.json.partial"
            unproven.unlink(missing_ok=True)
            command = plan.arguments.eval_command.replace("{model}", shlex.quote(place.new_model))
            command = command.replace("{out}", shlex.quote(str(unproven)))
            status = runner.run_shell(command)
            if status:
                raise StageFailed(
                    f"eval_command ended with {status}; what it said stands above; mend it and start again, what is"
                    " finished is kept",
                    1,
                )
            values = _read_figures(unproven)
            with open_atomic(out) as file:
                file.write(json.dumps(values).encode())
            unproven.unlink()
        figures |= _read_figures(out)
    return figures


def _read_figures(path: Path) -> dict[str, float]:
    """Numbers by name; what else the file holds is left out."""
    try:
        values = json.loads(path.read_text("utf-8"))
        figures = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    except (OSError, ValueError, AttributeError):
        raise StageFailed(
            f"eval_command: expected a JSON object of figures in {path}, found none; have the command write it", 2
        ) from None
    endless = [name for name, value in figures.items() if not math.isfinite(value)]
    if endless:
        raise StageFailed(
            f"eval_command: expected numbers in {path}, got {', '.join(endless)} that are none; leave them out", 2
        )
    return figures


def list_remains(plan: Plan, place: Place, stage: str) -> list[Path]:
    """What a stage leaves: its outputs, and what it goes on with where it did not end."""
    if stage == "evaluate":
        # A command of the user's may keep more there, and it is of this model.
        return sorted(place.folder.glob("evaluation/*"))
    outputs = list_outputs(plan, place, stage)
    if stage == "generate":  # these would be lists of other responses
        outputs += [place.folder / f"records.jsonl.todo.{kind}" for kind in ("csv", "jsonl")]
    return [*outputs, *(Path(f"{path}.partial") for path in outputs if path.suffix == ".jsonl")]
