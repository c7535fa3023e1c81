"""One run of `cutlm train`: load the data and the model, build the trainer, train, save, and print the next command."""

import dataclasses
import logging
import os
import random
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlm.data.doubts import describe_doubts
from cutlm.data.files import read_data
from cutlm.data.records import JudgedRecord, check_rows, raise_problems
from cutlm.data.sources import describe_sources, find_local_files
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.flagging.report import read_sensitivity
from cutlm.flagging.token_scores import (
    StoredScores,
    TokenScores,
    is_token_scores_row,
    list_records,
    open_token_scores,
    parse_token_scores,
)
from cutlm.model.card import Facts
from cutlm.model.loading import check_bitsandbytes, count_parameters, load_model, load_tokenizer
from cutlm.training.checkpoints import (
    SCORES_FILE,
    CheckpointingTrainer,
    check_output_dir,
    clear_output_dir,
    compare_settings,
    find_checkpoint,
    read_run_facts,
    save_settings,
)
from cutlm.training.config import Settings, check_libraries
from cutlm.training.dataset import ScoresFile
from cutlm.training.facts import describe_settings
from cutlm.training.trainer import CUTTrainer

_MAX_LOCATIONS_NAMED = 5

Prepare = Callable[[Sequence[Any]], Sequence[Any]]


def keep_rows(rows: Sequence[Any]) -> Sequence[Any]:
    """Train on the rows of a data file as they are."""
    return rows


@dataclass(frozen=True)
class LoadedData:
    """Files of data: their records or token scores, the locations (`data.jsonl:17`), and a hash of the content."""

    rows: Sequence[Any]
    locations: list[str]
    sha256: str

    @property
    def records(self) -> list[JudgedRecord]:
        """The records, also of token scores."""
        return list_records(self.rows)


def train(settings: Settings, options: list[str], command: str = "train", prepare: Prepare = keep_rows) -> int:
    """Train, save, and print how to continue.

    Args:
        settings: Data, model and training settings.
        options: The command line options, for the message after an interruption.
        command: The command, for messages.
        prepare: Turns the rows of a data file into training rows; by default they are used unchanged.

    Returns:
        The exit code: 0; 1 if the model was saved, but not pushed; or 128 plus the signal that stopped the run.
    """
    data_args, model_args, config = settings.parts
    is_main = int(os.environ.get("RANK", "0")) == 0
    is_evaluated = config.eval_strategy != "no" or config.eval_on_start
    if is_evaluated and not (data_args.eval_data or data_args.eval_split):
        advice = f"{config.objective} has none; remove it" if config.is_of_pairs else "set eval_data or eval_split"
        raise ConfigError(f"eval_strategy, eval_on_start: expected records to evaluate on; {advice}")
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.output_dir, str(config.resume_from_checkpoint))
    is_own = checkpoint is not None and Path(checkpoint).parent.resolve() == Path(config.output_dir).resolve()
    if is_main and not is_own:
        check_output_dir(config.output_dir, data_args.overwrite_output_dir)
    check_libraries(config)
    data = load_data(data_args.data, data_args.columns)
    if is_main:
        warn_of_doubts(data)
        _warn_of_noise(data_args.data, data)
    run_facts = {"data_sha256": data.sha256, "num_processes": int(os.environ.get("WORLD_SIZE", "1"))}
    if checkpoint is not None:
        if is_main:
            compare_settings(settings, run_facts, Path(checkpoint).parent)
        if config.template == "chat" and config.template_date is None:
            config.template_date = read_run_facts(Path(checkpoint).parent).get("template_date")
    with _log_to_stdout():
        trainer = build_trainer(settings, data, prepare)
    trainer.facts = _add_facts(trainer.facts, settings, data)
    if not len(trainer.get_train_dataloader()):
        raise ConfigError("dataloader_drop_last: the records fill no batch; set a smaller per_device_train_batch_size")
    trainer.try_saving()
    if is_main:
        if not is_own:
            clear_output_dir(config.output_dir)  # only now, because building the trainer may fail
        counts = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        print(f"training {counts['trained']:,} of {counts['all']:,} parameters; output in {config.output_dir}")
        if checkpoint is not None:
            print(f"resuming from {checkpoint}")
        save_settings(
            settings,
            run_facts | {"template_date": trainer.template_date, "objective": config.objective},
            Path(config.output_dir),
        )
        sys.stdout.flush()
    with _stop_on_signals(trainer, is_main) as signals, _log_to_stdout():
        trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if signals and state.global_step < state.max_steps:
        if is_main:
            program = "cutlm" if config.world_size == 1 else f"torchrun --nproc_per_node {config.world_size} -m cutlm"
            print(
                f"Stopped at step {state.global_step} of {state.max_steps}; saved"
                f" {config.output_dir}/checkpoint-{state.global_step}. Resume with:\n"
                f"  {program} {command} {shlex.join(_remove_resume(options))} --resume_from_checkpoint last",
                flush=True,
            )
        return 128 + signals[0]
    if not state.global_step:
        raise ConfigError("num_train_epochs, max_steps: expected at least one step, got none; nothing was saved")
    trainer.save_model(push=False)
    trainer.save_state()
    status = 0
    if config.push_to_hub:
        try:
            pushed = trainer.push_saved()
            if is_main:
                print(f"Pushed to {pushed.repo_url}")
        except UserError as error:  # the trained model is saved
            print(f"cutlm {command}: {error}", file=sys.stderr)
            status = 1
    if is_main:
        out = shlex.quote(config.output_dir)
        kind = "adapter" if model_args.use_peft else "model"
        then = f"cutlm merge --adapter {out} --out {out}-merged"
        if command == "train-judge":
            then = f"cutlm judge --responses FILE --judge local --judge_model {out} --out FILE"
        elif command == "train-detector":
            then = f"cutlm blame --model {out} --data FILE --out FILE"
        elif not model_args.use_peft:
            then = f"cutlm generate --model {out} --prompts FILE --out FILE"
        print(f"Trained {state.global_step} steps; the {kind} is in {config.output_dir}. Next:\n  {then}")
    return status


def _add_facts(facts: Mapping[str, Any], settings: Settings, data: LoadedData) -> Facts:
    """Add to the facts of a model card what only a run of files knows."""
    known = describe_settings(settings)
    paths = [path for source in settings.parts[0].data for path in find_local_files(source)]
    measured = [found for path in paths if isinstance(data.rows[0], TokenScores) and (found := read_sensitivity(path))]
    return {
        "sensitivity": dataclasses.asdict(measured[0]) if len(measured) == 1 else None,
        **facts,
        "data": {**facts.get("data", {}), "sha256": data.sha256},
        "settings": {**known["settings"], **facts["settings"]},
        "datasets": known["datasets"],
    }


def load_data(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> LoadedData:
    """Read files of records or of token scores, once; see `read_data`.

    Raises:
        DataError: They cannot be read, or mix the two.
    """
    if not columns and (stored := open_token_scores(sources)) is not None:
        return LoadedData(stored, stored.locations, stored.sha256)
    found, name = read_data(sources, columns), describe_sources(sources)
    rows, problems = found.rows, found.problems
    if rows and is_token_scores_row(rows[0].value):
        scores = parse_token_scores(name, rows, problems)
        return LoadedData(list(scores), [row.location for row in rows], found.sha256)
    mixed = next((row for row in rows if is_token_scores_row(row.value)), None)
    if mixed is not None:
        raise DataError(
            f"{mixed.location}: expected a record, as in the first row, got token scores, whose flags would be ignored;"
            " put records and token scores into separate files"
        )
    check = check_rows(rows)
    check.problems.extend(problems)
    raise_problems(check, name)
    return LoadedData(check.records, check.locations, found.sha256)


def warn_of_doubts(data: LoadedData) -> None:
    """Print which records are valid, but probably wrong."""
    for doubt in describe_doubts(data.records, data.locations, _MAX_LOCATIONS_NAMED):
        print(f"warning: {doubt}")


def _warn_of_noise(sources: Sequence[str], data: LoadedData) -> None:
    """Print that the flags of token scores are mostly noise, if the report next to a file of them says so."""
    paths = [path for source in sources for path in find_local_files(source)]
    for path in paths if isinstance(data.rows[0], TokenScores) else ():
        sensitivity = read_sensitivity(path)
        if sensitivity is not None and (noise := sensitivity.describe_noise()):
            print(f"warning: {path}: {noise}" if len(paths) > 1 else f"warning: {noise}")


def build_trainer(settings: Settings, data: LoadedData, prepare: Prepare = keep_rows) -> CheckpointingTrainer:
    """Load the tokenizer and the model and build the trainer of the objective."""
    data_args, model_args, config = settings.parts
    rows = prepare(data.rows)
    train_indices, eval_indices = split_rows(len(rows), data_args.eval_split, config.seed)
    eval_rows = select_rows(rows, eval_indices)
    if data_args.eval_data:
        eval_data = load_data(data_args.eval_data, data_args.columns)
        if config.process_index == 0:
            warn_of_doubts(eval_data)
        eval_rows = prepare(eval_data.rows)
    if config.is_of_pairs and len(eval_rows):
        raise ConfigError(f"eval_data, eval_split: not used by objective {config.objective}; remove them")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        check_bitsandbytes()
    path = model_args.model_name_or_path
    tokenizer = load_tokenizer(path, revision=model_args.model_revision)
    model = load_model(
        path,
        revision=model_args.model_revision,
        dtype=model_args.load_dtype,
        attn_implementation=model_args.attn_implementation,
        quantization=model_args.quantization,
        device=config.device,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": select_rows(rows, train_indices),
        "processing_class": tokenizer,
        "peft_config": model_args.make_adapter_config(),
        "locations": [data.locations[index] for index in train_indices],
    }
    if config.is_of_pairs:
        from cutlm.training.pairs import PairTrainer  # only this needs TRL, whose import takes half a second

        return PairTrainer(**common)
    scores_file = None
    if (config.has_frozen_detector or config.has_teacher) and not isinstance(rows[0], TokenScores):
        scores_file = ScoresFile(Path(config.output_dir) / SCORES_FILE, data_args.overwrite_output_dir)
    return CUTTrainer(**common, eval_dataset=eval_rows if len(eval_rows) else None, scores_file=scores_file)


def split_rows(num_rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw a share of the rows to evaluate on; both parts keep the order of the file."""
    num_eval = round(share * num_rows)
    if share and not 0 < num_eval < num_rows:
        raise DataError(f"eval_split: {share} of {num_rows} records leaves none on one side; set another share")
    chosen = set(random.Random(seed).sample(range(num_rows), num_eval))
    return [index for index in range(num_rows) if index not in chosen], sorted(chosen)


def select_rows(rows: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Return some of the rows."""
    return rows.select(indices) if isinstance(rows, StoredScores) else [rows[index] for index in indices]


@contextmanager
def _log_to_stdout() -> Iterator[None]:
    """Print cutlm's log messages between the rest of the output."""
    logger, handler = logging.getLogger("cutlm"), logging.StreamHandler(sys.stdout)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextmanager
def _stop_on_signals(trainer: CheckpointingTrainer, is_main: bool) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM save first; yields a list that receives the number of the signal."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.request_stop()
        if is_main:
            print("\nStopping after this step is saved (press Ctrl-C again to stop at once)", flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_resume(options: list[str]) -> list[str]:
    """The options without those that say how to start."""
    kept: list[str] = []
    is_kept = True
    for option in options:
        if option.startswith("--"):
            is_kept = option.partition("=")[0] not in ("--overwrite_output_dir", "--resume_from_checkpoint")
        if is_kept:
            kept.append(option)
    return kept
