"""A taught detector: adapters that learn to read judgments, on two halves of the records that blame each other.

A model that was trained on a response finds it likely whatever the judgment says. So the records are split by their
instructions, an adapter is trained on each half (objective hindsight), and each blames the half that it has not seen.
"""

import os
import random
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from cutlm.data.files import write_rows
from cutlm.data.records import JudgedRecord, check_records, raise_problems
from cutlm.data.sources import describe_sources
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.token_scores import strip_scores
from cutlm.training.checkpoints import SETTINGS_FILE, read_run_facts
from cutlm.training.config import Settings
from cutlm.training.run import load_data, train


def split_halves(records: Sequence[JudgedRecord], seed: int) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
    """Split records into two halves of about the same size, each in the order of the records.

    All responses to an instruction are in the same half.

    Raises:
        DataError: A half would have no unsatisfactory record.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[str(record.conversation)].append(index)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    halves: tuple[list[int], list[int]] = ([], [])
    # Groups without an unsatisfactory record come last, so that both halves get some of the others.
    names.sort(key=lambda name: all(records[index].is_satisfactory for index in groups[name]))
    for name in names:
        min(halves, key=len).extend(groups[name])
    first, second = ([records[index] for index in sorted(half)] for half in halves)
    if any(all(record.is_satisfactory for record in half) for half in (first, second)):
        raise DataError(
            "expected unsatisfactory records of at least two instructions, one for each half, got fewer; add records"
        )
    return first, second


def train_detector(
    read: Callable[[Sequence[str]], Settings], options: Sequence[str], command: str = "train-detector"
) -> int:
    """Train the two adapters of a taught detector and print how to blame with them.

    Args:
        read: Reads the settings from options, of which the last ones count.
        options: The options of the command line.
        command: The command, for messages.

    Returns:
        The exit code.
    """
    # First, because reading the settings would wait for the other processes.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("train-detector runs in one process; start it without torchrun")
    data_args, model_args, config = read(options).parts
    if not model_args.use_peft:
        raise ConfigError("use_peft: expected true, because a taught detector is an adapter, got false")
    check = check_records(data_args.data, data_args.columns)
    raise_problems(check, describe_sources(data_args.data))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, records in enumerate(split_halves([strip_scores(one) for one in check.records], config.seed), start=1):
        half, out = folder / f"half-{number}.jsonl", folder / f"detector-{number}"
        write_rows(half, (record.model_dump(mode="json", exclude_unset=True) for record in records))
        settings = read([*options, "--data", str(half), "--output_dir", str(out)])
        if _is_trained(settings, half, out) and not data_args.overwrite_output_dir:
            print(f"{out} is trained already")
            continue
        settings.parts[0].columns = None  # the half has the names of records
        if not any(out.glob("checkpoint-*")):
            settings.parts[2].resume_from_checkpoint = None  # this half was not started
        code = train(settings, list(options), command)
        if code:
            return code
    print(f"Each half is blamed by the adapter that was trained on the other. Next:\n  {_suggest(folder, config)}")
    return 0


def _is_trained(settings: Settings, half: Path, out: Path) -> bool:
    """Whether a folder holds the adapter that these settings and records give."""
    try:
        found = (out / SETTINGS_FILE).read_text("utf-8")
    except OSError:
        return False
    ignored = ("resume_from_checkpoint", "overwrite_output_dir")

    def select(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(ignored)]

    is_same = select(found) == select(settings.to_yaml())
    has_data = read_run_facts(out).get("data_sha256") == load_data(str(half)).sha256
    return is_same and has_data and (out / "adapter_model.safetensors").is_file()


def _suggest(folder: Path, config: object) -> str:
    """The commands that blame with a taught detector."""
    template = f" --template {template}" if (template := getattr(config, "template", "alpaca")) != "alpaca" else ""
    if getattr(config, "judgment_role", "user") != "user":
        template += " --judgment_role system"
    lines = [
        f"cutlm blame --model {shlex.quote(str(folder / f'detector-{number}'))}"
        f" --data {shlex.quote(str(folder / f'half-{3 - number}.jsonl'))}{template} --contrast perfect"
        f" --out {shlex.quote(str(folder / f'scores-{3 - number}.jsonl'))}"
        for number in (1, 2)
    ]
    files = " ".join(shlex.quote(str(folder / f"scores-{number}.jsonl")) for number in (1, 2))
    return "\n  ".join([*lines, f"cat {files} > {shlex.quote(str(folder / 'scores.jsonl'))}"])
