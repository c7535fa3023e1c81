"""Measure time and peak memory of cutlm's commands on a large number of short records.

  python benchmarks/size.py --num_records 256000 --json benchmarks/results/size.json

The records are the tiny world's, with a number in each, and the model is a LLaMA of one layer with random weights and
the tiny world's tokenizer, so that the memory is that of the libraries and the records. Each command is a process of
its own without a cache; its memory is that of its whole process tree. Results are written after each command.

    check          cutlm check
    preview        cutlm preview
    dry run        cutlm train --dry_run
    blame, killed  cutlm blame, killed when half of the records are scored
    blame          the same command again, which resumes
    foreign        cutlm blame --contrast foreign --num_foreign 1, on an eighth of the records
    inspect        cutlm inspect of the token scores
    train          cutlm train on the token scores, for ten steps
    frozen         cutlm train --detector frozen on the records, for ten steps"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from common import describe_machine, describe_options, write_results

COMMANDS = ("check", "preview", "dry run", "blame, killed", "blame", "foreign", "inspect", "train", "frozen")
_NUM_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, default=256_000)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--folder", metavar="DIR", help="where to write; it is kept (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_records(folder / "records.jsonl", args.num_records)
        write_records(folder / "some.jsonl", args.num_records // 8)
        write_model(folder / "model")
        rows = []
        for name in args.commands:
            rows.append({"command": name} | run_command(name, folder, args.num_records))
            known = {"machine": describe_machine(), "options": describe_options(args)}
            figures = {"num_records": args.num_records, "peak_gb": max(row["peak GB"] for row in rows)}
            write_results(rows, known | figures, args.json)


def write_records(path: Path, num_records: int) -> None:
    """Write judged records; a quarter of them is satisfactory."""
    with path.open("w", encoding="utf-8") as file:
        for record in _make_records(num_records):
            file.write(json.dumps(record) + "\n")


def _make_records(num_records: int) -> Iterator[dict[str, Any]]:
    from cutlm.world.judge import judge_task
    from cutlm.world.tasks import list_tasks

    tasks = sorted(list_tasks("train"), key=lambda task: task.family)
    known = []
    for place, task in enumerate(tasks):
        answered = tasks[place - (place % 4 > 0)]  # another task of the same kind, but for every fourth one
        response = answered.right_answers[0]
        known.append((task.instruction, response, judge_task(task, response).judgment))
    for number in range(num_records):
        instruction, response, judgment = known[number % len(known)]
        judgment = judgment and f"{judgment} ({number})"
        yield {"instruction": f"{instruction} ({number})", "output": response, "judgment": judgment}


def write_model(folder: Path) -> None:
    """Save a tiny model with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from cutlm.world.base import base_path

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"initializer_range": 0.3}  # so that some tokens are flagged
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_command(name: str, folder: Path, num_records: int) -> dict[str, Any]:
    """Run a command and measure it."""
    records, model, scores = (str(folder / part) for part in ("records.jsonl", "model", "scores.jsonl"))
    settings = ["--model_name_or_path", model, "--max_length", "256"]
    steps = ["--max_steps", str(_NUM_STEPS), "--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir"]
    options = ["--model", model, "--max_length", "256", "--overwrite"]
    foreign = ["--contrast", "foreign", "--num_foreign", "1"]
    frozen = [*settings, "--detector", "frozen"]
    commands = {
        "check": ["check", records],
        "preview": ["preview", "--data", records, *settings],
        "dry run": ["train", "--dry_run", "--data", records, "--output_dir", str(folder / "run"), *settings],
        "blame": ["blame", "--data", records, "--out", scores, *options],
        "foreign": [
            "blame",
            "--data",
            str(folder / "some.jsonl"),
            "--out",
            str(folder / "foreign.jsonl"),
            *options,
            *foreign,
        ],
        "inspect": ["inspect", "--scores", scores, "--out", str(folder / "page.html"), "--overwrite"],
        "train": ["train", "--data", scores, "--output_dir", str(folder / "trained"), *settings, *steps],
        "frozen": ["train", "--data", records, "--output_dir", str(folder / "frozen"), *frozen, *steps],
    }
    if name != "blame, killed":
        return measure(commands[name], folder)
    half = num_records // 2

    def is_half_done() -> bool:
        path = Path(f"{scores}.partial")
        return path.exists() and path.read_bytes().count(b"\n") > half

    return measure(commands["blame"], folder, is_half_done)


def measure(command: Sequence[str], folder: Path, is_to_kill: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Run a command of cutlm; measure its seconds and the peak memory of its process tree."""
    # Without a cache of rows that another command has filled.
    cache = tempfile.mkdtemp(dir=folder)
    environment = os.environ | {"HF_HOME": cache, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    began, before = time.perf_counter(), os.times()
    process = subprocess.Popen(
        [sys.executable, "-m", "cutlm", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = 0
    output: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=output.extend, args=(process.stdout,))
    reader.start()
    looked = began
    while process.poll() is None:
        peak = max(peak, _measure_tree(process.pid))
        if is_to_kill is not None and time.perf_counter() - looked > 2:
            looked = time.perf_counter()
            if is_to_kill():
                process.kill()
                is_to_kill = None
        time.sleep(0.05)
    reader.join()
    seconds, after = time.perf_counter() - began, os.times()
    if process.returncode > 0:
        raise RuntimeError(f"cutlm {' '.join(command)} failed:\n{b''.join(output).decode()}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "CPU seconds": cpu, "peak GB": peak / 1e9}


def _measure_tree(pid: int) -> int:
    """Memory of a process and its children, in bytes; what they share counts for each."""
    try:
        process = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    main()
