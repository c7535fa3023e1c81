"""Measures how well detectors find the wrong tokens of a small real model's responses: JSON and a table.

  python experiments/real/detection.py                      everything that is missing, about three hours on 2 cores
  python experiments/real/detection.py --parts chat alpaca  some parts

It needs the model of `make real-model`, and a folder with the published judgments and Shepherd. Responses, scores and
adapters are kept in a cache outside of the checkout, so that a stopped run resumes; the results of every finished part
are written at once.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contexts import draw_foreign, score_contexts
from detection_table import write_table
from ifeval import find_cache
from metrics import (
    CONTRASTS,
    THRESHOLD,
    Response,
    choose_threshold,
    flag_threshold_of_surprise,
    measure_scores,
    measure_sensitivity,
    score_surprise,
    score_words,
)
from planted_errors import plant_errors
from real_data import (
    answer_tasks,
    draw_tasks,
    judge_tasks,
    load_right_answers,
    plant_varied_errors,
    read_judged_responses,
    split_sources,
)
from teaching import teach_detector
from tiny_scale import measure_scale

from cutlm.data.files import open_atomic
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import TemplateName

FOLDER = Path(__file__).parent
PARTS = ("chat", "taught", "alpaca", "scale")
COMMAND = "python experiments/real/detection.py"
_SEED = 0
_PACKAGES = ("cutlm", "torch", "transformers", "peft")
# Fields of records by whose values average precision is reported.
_GROUPS = {"format": ["rule"], "planted": ["change", "style"]}


@dataclass(frozen=True)
class Size:
    """How much to measure.

    Attributes:
        num_tasks: Instructions with a format rule for the model to answer.
        max_per_rule: Responses that break a rule, of each rule.
        num_planted: Planted errors.
        num_steps: Steps of the taught detector.
    """

    num_tasks: int = 336
    max_per_rule: int = 30
    num_planted: int = 240
    num_steps: int = 64


@dataclass(frozen=True)
class Data:
    """What is measured, by kind, and what teaches a detector."""

    kinds: dict[str, list[JudgedRecord]]
    foreign: dict[str, list[list[str]]]
    teaching: list[JudgedRecord]

    @property
    def digest(self) -> str:
        """Identifies the measured records."""
        rows = [[record.model_dump(mode="json") for record in records] for records in self.kinds.values()]
        return hashlib.sha256(json.dumps([rows, list(self.foreign.values())]).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="detection.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = find_cache()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--model", type=Path, default=cache / "tests" / "SmolLM2-135M-Instruct-float32", metavar="DIR")
    parser.add_argument("--data", type=Path, default=FOLDER.parents[2] / "shared" / "data", metavar="DIR")
    parser.add_argument("--cache", type=Path, default=cache / "detection", metavar="DIR", help="unfinished work")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="output folder")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads (default: 2)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        measure(args.parts, args.model, args.data, args.cache, args.out, Size())
    except UserError as error:
        parser.error(str(error))
    print(f"The table and its JSON are in {args.out}")
    return 0


def measure(parts: Sequence[str], model: Path, data_folder: Path, cache: Path, out: Path, size: Size) -> None:
    """Measure parts and write results after each.

    Results of other parts are kept if they were measured on the same records.
    """
    if not model.is_dir():
        raise UserError(f"{model}: expected a model's folder; make it with `make real-model`, or name one with --model")
    data = gather_data(model, data_folder, cache, size)
    results = _read_results(out, data.digest)
    for part in parts:
        if part == "scale":
            results["scale"] = measure_scale(cache / "scale")
        else:
            template: TemplateName = "alpaca" if part == "alpaca" else "chat"
            for kind, records in data.kinds.items():
                if part == "taught":
                    responses = score_taught(model, template, data, kind, cache, size)
                else:
                    scores = score_contexts(model, template, records, data.foreign[kind], cache)
                    responses = _locate(model, template, records, scores)
                name = f"taught_{template}" if part == "taught" else template
                rows, sensitivity = measure_detectors(name, kind, responses, has_baselines=part == "chat")
                _replace(results["results"], rows, ("detector", "kind"))
                _replace(results["sensitivity"], [sensitivity], ("model", "kind"))
                _write_results(out, results, data.digest)
        _write_results(out, results, data.digest)


def gather_data(model: Path, folder: Path, cache: Path, size: Size) -> Data:
    """Make the records; the model answers the instructions with format rules, once."""
    answers = load_right_answers(folder)
    tasks = draw_tasks(answers, size.num_tasks, _SEED)
    responses = answer_tasks(model, [instruction for instruction, _ in tasks], cache)
    broken, followed = judge_tasks(tasks, responses, size.max_per_rule, _SEED)
    shared = read_judged_responses(folder / "smollm2-ifeval-records.jsonl")
    measured, others = split_sources(answers, _SEED)
    kinds = {"format": broken + shared, "planted": plant_errors(measured, size.num_planted, _SEED)}
    foreign = {
        "format": draw_foreign(kinds["format"], "rule", _SEED),
        "planted": draw_foreign(kinds["planted"], None, _SEED),
    }
    praised = [source.model_copy(update={"judgment": None}) for source in others[:150]]
    return Data(kinds, foreign, plant_varied_errors(others, _SEED) + praised + followed)


def score_taught(model: Path, template: TemplateName, data: Data, kind: str, cache: Path, size: Size) -> list[Response]:
    """Score each half of the records with a detector that learned from the other half."""
    records = data.kinds[kind]
    scored: dict[int, dict[str, np.ndarray]] = {}
    for half in (0, 1):
        others = [record for group in data.kinds.values() for record in group[1 - half :: 2]]
        adapter = teach_detector(model, template, others + data.teaching, cache, size.num_steps)
        indices = list(range(half, len(records), 2))
        scores = score_contexts(adapter, template, records, data.foreign[kind], cache, keep=indices)
        scored |= dict(zip(indices, scores, strict=True))
    return _locate(model, template, records, [scored[index] for index in range(len(records))])


def measure_detectors(
    name: str, kind: str, responses: Sequence[Response], *, has_baselines: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every contrast, and baselines; return their rows, and the row of sensitivity."""
    groups = _GROUPS[kind]
    rows = []
    for contrast_name, contrast in CONTRASTS.items():
        scores = [contrast(response.logps) for response in responses]
        auto = choose_threshold(contrast, responses)
        detector = name if contrast_name == "none" else f"{name}_{contrast_name}"
        measured = measure_scores(responses, scores, THRESHOLD, auto, groups)
        rows.append({"detector": detector, "kind": kind, **measured})
    if has_baselines:
        surprise = [score_surprise(response) for response in responses]
        measured = measure_scores(responses, surprise, flag_threshold_of_surprise(), None, groups)
        rows.append({"detector": "surprise", "kind": kind, **measured})
        words = [score_words(response) for response in responses]
        rows.append({"detector": "words", "kind": kind, **measure_scores(responses, words, THRESHOLD, None, groups)})
    return rows, {"model": name, "kind": kind, **measure_sensitivity(responses)}


def _locate(
    model: Path, template: TemplateName, records: Sequence[JudgedRecord], scores: Sequence[dict[str, np.ndarray]]
) -> list[Response]:
    encoder = Encoder(load_tokenizer(str(model)), template)
    return [
        Response(record, encoder.locate_tokens(record.output, encoder.encode_response(record.output)), logps)
        for record, logps in zip(records, scores, strict=True)
    ]


# ---- Results ----


def _read_results(out: Path, digest: str) -> dict[str, Any]:
    path = out / "detection.json"
    stored = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if stored.get("data") != digest:
        return {"results": [], "sensitivity": [], "scale": stored.get("scale", [])}
    return {name: stored[name] for name in ("results", "sensitivity", "scale")}


def _replace(rows: list[dict[str, Any]], new: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Put rows in place of those with the same keys."""
    for row in new:
        same = [index for index, old in enumerate(rows) if all(old[key] == row[key] for key in keys)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)


def _write_results(out: Path, results: dict[str, Any], digest: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": COMMAND,
        "data": digest,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {package: version(package) for package in _PACKAGES},
    }
    content = results | about
    with open_atomic(out / "detection.json") as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())
    write_table(out / "detection.md", content)


if __name__ == "__main__":
    sys.exit(main())
