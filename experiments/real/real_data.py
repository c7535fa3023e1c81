"""What detectors are measured on: a small model's own responses that break format rules, and planted errors."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from format_rules import NAMES, Rule, draw_rule, find_broken_spans, judge_response, recognize_rule, word_rule
from planted_errors import CHANGES, plant_errors

from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord, load_records
from cutlm.errors import UserError
from cutlm.generation.local import Sampling, generate_with_journal
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder

MAX_NEW_TOKENS = 96
_BATCH_SIZE = 64
# In characters.
_MAX_INSTRUCTION, _MAX_QUESTION, _MIN_ANSWER, _MAX_ANSWER = 220, 700, 60, 480


def load_right_answers(folder: Path) -> list[JudgedRecord]:
    """Responses that were judged to be right, one for each instruction, from the published judgments and Shepherd.

    Args:
        folder: Has `judgments/iter1.json`, `iter2.json`, `iter3.json` and `shepherd/human_data_raw.jsonl`.
    """
    paths = [folder / "judgments" / f"iter{number}.json" for number in (1, 2, 3)]
    shepherd = folder / "shepherd" / "human_data_raw.jsonl"
    missing = [str(path) for path in (*paths, shepherd) if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: file not found; name the folder of the data with --data")
    records = [record for path in paths for record in load_records(path) if record.is_satisfactory]
    for line in shepherd.read_text("utf-8").splitlines():
        entry = json.loads(line)
        row = entry["metadata"]
        # Answers about invented rules ("the dog likes the cow") all read the same.
        is_natural = entry["dataset"] != "proofwriter"
        if is_natural and (row["output_correct"] or "").strip() and row["context"].strip():
            records.append(JudgedRecord(instruction=row["context"].strip(), output=row["output_correct"].strip()))
    return list({record.full_instruction: record for record in records}.values())


# ---- Planted errors ----


def split_sources(answers: Sequence[JudgedRecord], seed: int) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
    """Divide short right answers into sources of the measured records and of those that teach a detector."""
    fitting = [
        answer
        for answer in answers
        if _MIN_ANSWER <= len(answer.output) <= _MAX_ANSWER and len(answer.full_instruction) <= _MAX_QUESTION
    ]
    shuffled = random.Random(f"sources {seed}").sample(fitting, len(fitting))
    return shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]


def plant_varied_errors(sources: Sequence[JudgedRecord], seed: int) -> list[JudgedRecord]:
    """Plant an error of each kind in every source that allows it, one in each copy, to teach a detector."""
    return [record for kind in CHANGES for record in plant_errors(sources, len(sources), seed, (kind,))]


# ---- Format rules ----


def draw_tasks(answers: Sequence[JudgedRecord], num_tasks: int, seed: int) -> list[tuple[str, Rule]]:
    """Draw instructions with one format rule each; every rule occurs equally often."""
    rng = random.Random(f"tasks {seed}")
    fitting = [answer for answer in answers if not answer.input and len(answer.instruction) <= _MAX_INSTRUCTION]
    tasks: list[tuple[str, Rule]] = []
    for answer in rng.sample(fitting, len(fitting)):
        if len(tasks) == num_tasks:
            break
        rule = draw_rule(list(NAMES)[len(tasks) % len(NAMES)], answer.instruction, answer.output, rng)
        if rule is not None:
            instruction = answer.instruction.strip()
            instruction += "" if instruction[-1] in ".?!:" else "."
            tasks.append((f"{instruction} {word_rule(rule, rng)}", rule))
    return tasks


def answer_tasks(model_path: Path, instructions: Sequence[str], cache: Path) -> list[str]:
    """Have a model answer instructions, greedily, or read what an earlier run generated."""
    header = {"model": str(model_path), "instructions": list(instructions), "max_new_tokens": MAX_NEW_TOKENS}
    digest = hashlib.sha256(json.dumps(header).encode()).hexdigest()
    journal = Journal(cache / f"responses-{digest[:16]}", header)
    if len(journal.lines) < len(instructions):
        model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
        encoder = Encoder(tokenizer, "chat")
        prompts = [encoder.encode_prompt(instruction) for instruction in instructions]
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=_BATCH_SIZE)
        responses = generate_with_journal(model, tokenizer, encoder, prompts, sampling, journal).responses
    else:
        responses = {line["index"]: line["output"] for line in journal.lines}
    return [responses.get(index, "") for index in range(len(instructions))]


def judge_tasks(
    tasks: Sequence[tuple[str, Rule]], responses: Sequence[str], max_per_rule: int, seed: int
) -> tuple[list[JudgedRecord], list[JudgedRecord]]:
    """Judge responses by their rules.

    Returns:
        Unsatisfactory records with spans, at most `max_per_rule` of each rule, and satisfactory ones.
    """
    rng = random.Random(f"judgments {seed}")
    broken: list[JudgedRecord] = []
    followed: list[JudgedRecord] = []
    counts = dict.fromkeys(NAMES.values(), 0)
    for (instruction, rule), response in zip(tasks, responses, strict=True):
        if not response.strip():
            continue
        judgment, spans = judge_response(rule, response, rng)
        row = {"instruction": instruction, "output": response, "judgment": judgment, "rule": rule.name}
        if judgment is None:
            followed.append(JudgedRecord.model_validate(row))
        elif counts[rule.name] < max_per_rule:
            counts[rule.name] += 1
            broken.append(JudgedRecord.model_validate(row | {"wrong_spans": spans}))
    return broken, followed


def read_judged_responses(path: Path) -> list[JudgedRecord]:
    """Read responses judged elsewhere that break one of the rules, with their own judgments and our spans."""
    records = []
    for record in load_records(path) if path.is_file() else []:
        rule = recognize_rule(record.judgment) if record.judgment else None
        spans = find_broken_spans(rule, record.output) if rule else []
        if rule and spans:
            row = {"instruction": record.instruction, "output": record.output, "judgment": record.judgment}
            records.append(JudgedRecord.model_validate(row | {"wrong_spans": spans, "rule": rule.name}))
    return records
