"""Make the pictures in docs/evaluation.md: the result.png of each command.

  python docs/evaluation_pictures.py --annotations cut-13b.annotations.json

AlpacaEval uses the published verdicts, the other commands the tiny world's base model. Takes a minute on a CPU. The
results remain in a temporary folder, which is printed.
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from cutlm.cli import main as run_command
from cutlm.data.files import write_rows
from cutlm.world.base import base_path
from cutlm.world.tasks import FAMILIES, list_tasks

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from corpus import draw_mistake

DOCS = Path(__file__).parent
SPLIT = "dev"


def run(*command: str) -> None:
    if run_command(list(command)):
        raise SystemExit(f"cutlm {' '.join(command)} failed")


def measure_alpaca(folder: Path, annotations: str) -> None:
    run("eval", "alpaca", "--annotations", annotations, "--out", str(folder / "alpaca"))


def measure_rouge(folder: Path, model: str) -> None:
    """Compare the base model's responses with right answers."""
    references = folder / "references.jsonl"
    write_rows(
        references, ({"instruction": task.instruction, "output": task.right_answers[0]} for task in list_tasks(SPLIT))
    )
    options = ["--max_new_tokens", "40", "--batch_size", "64", "--device", "cpu"]
    run("eval", "rouge", "--model", model, "--references", str(references), *options, "--out", str(folder / "rouge"))


def measure_harness(folder: Path, model: str) -> None:
    """Make a benchmark per task family: is the right answer more likely than a wrong one?"""
    tasks = folder / "tasks"
    tasks.mkdir()
    rng = random.Random(0)
    for family in FAMILIES:
        data = tasks / f"{family}.jsonl"
        write_rows(
            data,
            (
                {"question": task.instruction, "choices": [task.right_answers[0], draw_mistake(task, rng)]}
                for task in list_tasks(SPLIT)
                if task.family == family
            ),
        )
        task = {"task": family, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task |= {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
        (tasks / f"{family}.yaml").write_text(yaml.safe_dump(task))
    options = ["--include_path", str(tasks), "--tasks", ",".join(FAMILIES), "--device", "cpu"]
    run("eval", "harness", "--model", model, *options, "--out", str(folder / "harness"))


def measure_detection(folder: Path, model: str) -> None:
    """Compare the flags of the oracle's judgments with the true wrong spans."""
    tasks, responses, records, marked, scores = (
        str(folder / f"{name}.jsonl") for name in ("dev", "responses", "records", "marked", "scores")
    )
    run("world", "tasks", "--split", SPLIT, "--out", tasks)
    run("generate", "--model", model, "--prompts", tasks, "--out", responses, "--max_new_tokens", "40")
    rules = ["--judge", "rules", "--rules", "cutlm.world.judge:judge"]
    run("judge", "--responses", responses, *rules, "--out", records)
    run("world", "mark", "--records", records, "--out", marked)
    run("blame", "--model", model, "--data", marked, "--out", scores)
    run("eval", "detection", "--scores", scores, "--by", "family", "--out", str(folder / "detection"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, metavar="FILE", help="the published GPT-4 verdicts on CUT 13B")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="evaluation-pictures-"))
    model = str(base_path())
    measure_alpaca(folder, args.annotations)
    measure_rouge(folder, model)
    measure_harness(folder, model)
    measure_detection(folder, model)
    for name in ("alpaca", "rouge", "harness", "detection"):
        shutil.copyfile(folder / name / "result.png", DOCS / f"eval-{name}.png")
    print(f"{DOCS}/eval-*.png were made from {folder}")


if __name__ == "__main__":
    main()
