"""At which sensitivity detection begins to work: the tiny world's base model after more and more steps of pretraining.

Each model is pretrained on its own, with its own schedule, so each is a finished model. All score the same responses:
those of the packaged base model to the development tasks.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from contexts import draw_foreign, score_contexts
from metrics import CONTRASTS, THRESHOLD, Response, choose_threshold, measure_scores, measure_sensitivity

from cutlm.data.records import JudgedRecord
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.world.base import answer_tasks, base_path, load_base
from cutlm.world.judge import judge_task
from cutlm.world.tasks import list_tasks

sys.path.append(str(Path(__file__).parents[1]))  # the script's own folder is on the path, the folder above it is not
from build_base import NUM_STEPS, build_base

STEPS = (50, 100, 200, 400, 800, 1600)


def judge_world_responses() -> list[JudgedRecord]:
    """The packaged base model's wrong responses to the development tasks, judged by the oracle."""
    model, tokenizer = load_base()
    tasks = list_tasks("dev")
    records = []
    for task, response in zip(tasks, answer_tasks(model, tokenizer, tasks), strict=True):
        verdict = judge_task(task, response)
        if verdict.judgment is not None and verdict.wrong_spans:
            row = {"instruction": task.instruction, "output": response, "judgment": verdict.judgment}
            records.append(JudgedRecord.model_validate(row | {"wrong_spans": verdict.wrong_spans}))
    return records


def measure_scale(cache: Path) -> list[dict[str, Any]]:
    """Sensitivity and detection by the number of pretraining steps."""
    cache.mkdir(parents=True, exist_ok=True)
    records = judge_world_responses()
    foreign = draw_foreign(records, None, 0)
    encoder = Encoder(load_tokenizer(str(base_path())), "alpaca")
    spans = [encoder.locate_tokens(record.output, encoder.encode_response(record.output)) for record in records]
    rows = []
    for num_steps in (*STEPS, NUM_STEPS):
        folder = base_path() if num_steps == NUM_STEPS else cache / f"base-{num_steps}"
        if num_steps != NUM_STEPS:
            num_threads = torch.get_num_threads()
            build_base(folder, 0, num_steps)
            torch.set_num_threads(num_threads)
        scores = score_contexts(folder, "alpaca", records, foreign, cache)
        responses = [
            Response(record, token_spans, logps)
            for record, token_spans, logps in zip(records, spans, scores.values(), strict=True)
        ]
        contrast = CONTRASTS["none"]
        ratios = [contrast(response.logps) for response in responses]
        found = measure_scores(responses, ratios, THRESHOLD, choose_threshold(contrast, responses), [])
        names = ("average_precision", "interval", "chance", "f1", "f1_auto")
        rows.append({"num_steps": num_steps, **measure_sensitivity(responses), **{name: found[name] for name in names}})
    return rows
