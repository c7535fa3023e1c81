"""Measures how well detectors find the wrong tokens of a small real model's responses: JSON and a table.

  python experiments/real/detection.py                      everything that is missing, about three hours on 2 cores
  python experiments/real/detection.py --parts chat alpaca  some parts
  python experiments/real/detection.py --minutes 30         as far as it gets; run it again to continue

It needs the model of `make real-model`, and a folder with the published judgments and Shepherd. Responses, scores and
adapters are kept in a cache outside of the checkout, so that a stopped run resumes; the results of every finished part
are written at once.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contexts import Logps, draw_foreign, score_contexts
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
# Planted errors first, because the model generates no responses for them.
KINDS = ("planted", "format")
_SEED = 0
_NUM_PRAISED = 150
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
    """The records, made when they are needed: the model generates responses for the format rules only.

    Attributes:
        model: The model's folder.
        folder: The folder of published data.
        cache: Where the model's responses are kept.
        size: How many to make.
    """

    model: Path
    folder: Path
    cache: Path
    size: Size

    @cached_property
    def _answers(self) -> list[JudgedRecord]:
        return load_right_answers(self.folder)

    @cached_property
    def _sources(self) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
        return split_sources(self._answers, _SEED)

    @cached_property
    def _judged(self) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
        """Responses that break their format rule, and others."""
        tasks = draw_tasks(self._answers, self.size.num_tasks, _SEED)
        responses = answer_tasks(self.model, [instruction for instruction, _ in tasks], self.cache)
        return judge_tasks(tasks, responses, self.size.max_per_rule, _SEED)

    @cached_property
    def planted(self) -> list[JudgedRecord]:
        """Right answers with one planted error."""
        return plant_errors(self._sources[0], self.size.num_planted, _SEED)

    @cached_property
    def format(self) -> list[JudgedRecord]:
        """The model's own responses that break a format rule."""
        return self._judged[0] + read_judged_responses(self.folder / "smollm2-ifeval-records.jsonl")

    @cached_property
    def teaching(self) -> list[JudgedRecord]:
        """Further records that teach a detector: planted errors in other answers, and satisfactory responses."""
        sources = self._sources[1]
        praised = [source.model_copy(update={"judgment": None}) for source in sources[:_NUM_PRAISED]]
        return plant_varied_errors(sources, _SEED) + praised + self._judged[1]

    def get(self, kind: str) -> list[JudgedRecord]:
        """The measured records of a kind."""
        return self.planted if kind == "planted" else self.format


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
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="stop scoring after this, and report what is done"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads (default: 2)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        measure(args.parts, args.model, args.data, args.cache, args.out, Size(), deadline)
    except UserError as error:
        parser.error(str(error))
    print(f"The table and its JSON are in {args.out}")
    return 0


def measure(
    parts: Sequence[str],
    model: Path,
    data_folder: Path,
    cache: Path,
    out: Path,
    size: Size,
    deadline: float = math.inf,
) -> None:
    """Measure parts and write results after each.

    Results of other parts are kept if they were measured on the same records. After the deadline (`time.monotonic`),
    what is begun is reported on the records that are scored.
    """
    if not model.is_dir():
        raise UserError(f"{model}: expected a model's folder; make it with `make real-model`, or name one with --model")
    data = Data(model, data_folder, cache, size)
    results = _read_results(out)
    for part, kind in [(name, kind) for name in parts for kind in (["scale"] if name == "scale" else KINDS)]:
        if time.monotonic() > deadline:
            break
        if part == "scale":
            results["scale"] = measure_scale(cache / "scale")
            _write_results(out, results)
            continue
        template: TemplateName = "alpaca" if part == "alpaca" else "chat"
        name = f"taught_{template}" if part == "taught" else part
        records = data.get(kind)
        foreign = draw_foreign(records, "rule" if kind == "format" else None, _SEED)
        if part == "taught":
            halves = [[record for other in KINDS for record in data.get(other)[half::2]] for half in (0, 1)]
            halves = [half + data.teaching for half in halves]
            scores = score_taught(model, template, records, foreign, halves, cache, size.num_steps, deadline)
        else:
            scores = score_contexts(model, template, records, foreign, cache, deadline=deadline)
        if not scores:
            break
        responses = _locate(model, template, [records[index] for index in scores], list(scores.values()))
        rows, sensitivity = measure_detectors(name, kind, responses, has_baselines=part == "chat")
        digest = _hash_records(records, foreign)
        if results["data"].get(kind) != digest:
            for table in ("results", "sensitivity"):
                results[table] = [row for row in results[table] if row["kind"] != kind]
            results["data"][kind] = digest
        _replace(results["results"], rows, ("detector", "kind"))
        _replace(results["sensitivity"], [sensitivity], ("model", "kind"))
        _write_results(out, results)


def score_taught(
    model: Path,
    template: TemplateName,
    records: Sequence[JudgedRecord],
    foreign: Sequence[Sequence[str]],
    halves: Sequence[Sequence[JudgedRecord]],
    cache: Path,
    num_steps: int,
    deadline: float = math.inf,
) -> dict[int, Logps]:
    """Score the records at even places with a detector that learned from the second half, and the others vice versa."""
    scored: dict[int, Logps] = {}
    for half in (0, 1):
        if time.monotonic() > deadline:
            break
        adapter = teach_detector(model, template, halves[1 - half], cache, num_steps)
        indices = list(range(half, len(records), 2))
        scored |= score_contexts(adapter, template, records, foreign, cache, keep=indices, deadline=deadline)
    return dict(sorted(scored.items()))


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
    model: Path, template: TemplateName, records: Sequence[JudgedRecord], scores: Sequence[Logps]
) -> list[Response]:
    encoder = Encoder(load_tokenizer(str(model)), template)
    return [
        Response(record, encoder.locate_tokens(record.output, encoder.encode_response(record.output)), logps)
        for record, logps in zip(records, scores, strict=True)
    ]


# ---- Results ----


def _hash_records(records: Sequence[JudgedRecord], foreign: Sequence[Sequence[str]]) -> str:
    rows = [record.model_dump(mode="json") for record in records]
    return hashlib.sha256(json.dumps([rows, foreign]).encode()).hexdigest()


def _read_results(out: Path) -> dict[str, Any]:
    path = out / "detection.json"
    stored = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    empty: dict[str, Any] = {"results": [], "sensitivity": [], "scale": [], "data": {}}
    return {name: stored.get(name, value) for name, value in empty.items()}


def _replace(rows: list[dict[str, Any]], new: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Put rows in place of those with the same keys."""
    for row in new:
        same = [index for index, old in enumerate(rows) if all(old[key] == row[key] for key in keys)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)


def _write_results(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": COMMAND,
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
