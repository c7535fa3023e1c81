"""The paper's own setting in small: a real model learns from Shepherd's judgments, which people wrote.

  python experiments/real/alignment_shepherd.py --data shared/data

For each method, on records that it did not learn from: the sensitivity of the model (do its flags depend on the
judgment?), and the log-likelihood per token of the judged response and of the correct answer, before and after the
training. The result of each method is written at once; the command continues with the next one.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from alignment_runs import BASE, Method, Training, find_model_cache, load_aligned, measure_retention, train_adapter
from ifeval import find_cache

from cutlm.cli import main as run_cutlm
from cutlm.data.files import write_text
from cutlm.data.records import JudgedRecord, load_records
from cutlm.flagging.scoring import score_rows
from cutlm.flagging.sensitivity import Contrast, compute_sensitivity, pair_foreign
from cutlm.inspect.tables import format_table
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder

FOLDER = Path(__file__).parent
METHODS = (
    BASE,
    Method("cut", about="CUT as in the paper"),
    Method("cut_frozen", {"detector": "frozen"}, about="CUT, tokens flagged once by the model before alignment"),
    Method("hindsight", {"objective": "hindsight"}, about="likelihood given the judgment"),
    Method("likelihood", {"objective": "likelihood"}, about="likelihood of the judged responses"),
    Method("ilf_mle", {"objective": "ilf_mle"}, about="likelihood of the correct answers"),
)
_THRESHOLD = 1.1


@dataclass(frozen=True)
class Size:
    """How much to run.

    Attributes:
        num_held_out: Records to measure on.
        max_words: Maximum number of words of a record in all, so that a run takes minutes.
        learning_rate: Of every method.
        num_steps: Optimizer steps.
        batch_size: Records in each.
        seed: Seed of the training.
    """

    num_held_out: int = 64
    max_words: int = 200
    learning_rate: float = 1e-3
    num_steps: int = 25
    batch_size: int = 8
    seed: int = 1


def split_records(folder: Path, size: Size) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
    """Convert Shepherd's files, and draw the records to measure on; the others are for training."""
    with tempfile.TemporaryDirectory() as partial:
        converted = str(Path(partial) / "records.jsonl")
        if status := run_cutlm(["convert", "shepherd", str(folder), "--out", converted]):
            raise SystemExit(status)
        records = load_records(converted)
    records = [record for record in records if _count_words(record) <= size.max_words]
    # One instruction has several responses.
    instructions = sorted({record.full_instruction for record in records})
    random.Random("held out").shuffle(instructions)
    held_out: list[JudgedRecord] = []
    while len(held_out) < size.num_held_out:
        instruction = instructions.pop()
        held_out += [record for record in records if record.full_instruction == instruction]
    names = set(instructions)
    return [record for record in records if record.full_instruction in names], held_out[: size.num_held_out]


def _count_words(record: JudgedRecord) -> int:
    texts = (record.full_instruction, record.output, record.judgment or "", record.i_ans or "")
    return sum(len(text.split()) for text in texts)


def measure(model: Any, model_folder: Path, records: Sequence[JudgedRecord]) -> dict[str, Any]:
    """Measure the sensitivity and the mean log-likelihood per token of responses and correct answers."""
    encoder = Encoder(load_tokenizer(model_folder), "chat")
    foreign = pair_foreign([str(record.judgment) for record in records])
    rows = []
    for record, source in zip(records, foreign, strict=True):
        for judgment in (record.judgment, records[source].judgment):
            rows.append(
                {
                    "prompt_ids": encoder.encode_prompt(record.full_instruction),
                    "judged_prompt_ids": encoder.encode_prompt(record.full_instruction, judgment),
                    "response_ids": encoder.encode_response(record.output),
                }
            )
    logps = {}
    for batch in score_rows(model, rows, show_progress=False):
        for index, without, judged, *_ in batch:
            assert judged is not None
            logps[index] = (without.tolist(), judged.tolist())
    contrasts = [
        Contrast(*logps[index], logps[index + 1][1], encoder.count_template_tokens(rows[index]["response_ids"]))
        for index in range(0, len(rows), 2)
    ]
    sensitivity = compute_sensitivity(contrasts, _THRESHOLD)
    corrected = [record.model_copy(update={"output": record.i_ans}) for record in records if record.i_ans]
    num_tokens = sum(len(contrast.without) for contrast in contrasts)
    return {
        "sensitivity": asdict(sensitivity) if sensitivity else None,
        "response": sum(sum(contrast.without) for contrast in contrasts) / num_tokens,
        "response_given_judgment": sum(sum(contrast.own) for contrast in contrasts) / num_tokens,
        "correct_answer": measure_retention(model, model_folder, corrected),
    }


def describe_rows(rows: Sequence[dict[str, Any]], content: dict[str, Any]) -> str:
    """Make the table in Markdown."""
    header = ["method", "flag_signal", "pairwise", "judged response", "the same, given the judgment", "correct answer"]
    header += ["correct - judged"]
    cells = [
        [
            f"`{row['method']}` {row['about']}",
            "" if row["sensitivity"]["flag_signal"] is None else f"{row['sensitivity']['flag_signal']:.2f}",
            f"{row['sensitivity']['pairwise']:.2f}",
            *(f"{row[name]:.3f}" for name in ("response", "response_given_judgment", "correct_answer")),
            f"{row['correct_answer'] - row['response']:+.3f}",
        ]
        for row in rows
    ]
    size = content["size"]
    note = (
        f"Mean log-likelihood per token in nats, on {size['num_held_out']} records of other instructions. Every method"
        f" makes {size['num_steps']} steps of {size['batch_size']} records of at most {size['max_words']} words at"
        f" learning rate {size['learning_rate']:g}, one seed. Measured on {content['date']} with"
        f" `{content['command']}`."
    )
    return f"# Shepherd's judgments\n\n{format_table(header, cells)}\n\n{note}\n"


def main(argv: Sequence[str] | None = None, size: Size | None = None) -> int:
    """Run what is missing and write the table; `size` is for tests."""
    parser = argparse.ArgumentParser(
        prog="alignment_shepherd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = find_cache() / "tests" / "SmolLM2-135M-Instruct-float32"
    parser.add_argument("--data", type=Path, default=Path("shared/data"), metavar="DIR", help="folder with shepherd/")
    parser.add_argument("--model", type=Path, default=model, metavar="DIR", help="model folder (default: SmolLM2's)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no new run after N minutes")
    args = parser.parse_args(argv)
    size = size or Size()
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    file = args.out / "alignment_shepherd.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    facts = {"model": args.model.name, "size": asdict(size)}
    if {name: content.get(name) for name in facts} != facts:
        content = {"results": []} | facts
    train, held_out = split_records(args.data / "shepherd", size)
    for method in METHODS:
        if any(row["method"] == method.name for row in content["results"]):
            continue
        if end is not None and time.monotonic() > end:
            print("The time is up; the same command continues.")
            return 1
        print(f"{method.name} ...", flush=True)
        adapter, seconds = None, 0.0
        if method.settings is not None:
            training = Training(method, size.learning_rate, size.seed, size.num_steps, size.batch_size)
            adapter = find_model_cache(args.model) / "adapters" / training.make_key(train)
            seconds = train_adapter(args.model, train, training, adapter)
        row = {"method": method.name, "about": method.about, "seconds": round(seconds, 1)}
        row |= measure(load_aligned(args.model, adapter), args.model, held_out)
        content["results"].append(row)
        content |= {
            "date": date.today().isoformat(),
            "command": "python experiments/real/alignment_shepherd.py --data shared/data",
            "num_train": len(train),
        }
        write_text(file, json.dumps(content, indent=1) + "\n")
        write_text(args.out / "alignment_shepherd.md", describe_rows(content["results"], content))
    print((args.out / "alignment_shepherd.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
