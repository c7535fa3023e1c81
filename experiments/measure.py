"""How well flags find the wrong tokens of a model's responses on the tiny world, and the metrics of a base model."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from cutlm.evaluation.detection import Detection, count_detected
from cutlm.model.collator import CutCollator
from cutlm.model.forward import score_batch
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.spans import flag_spans
from cutlm.world.base import answer_tasks
from cutlm.world.judge import judge_task, rate_answers
from cutlm.world.tasks import FAMILIES, Task

THRESHOLDS = (1.05, 1.1, 1.2, 1.5)


@torch.no_grad()
def measure_detection(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    responses: Sequence[str],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[float, dict[str, Detection]]:
    """Compare flags with wrong tokens in unsatisfactory responses, by threshold and family, and over all as "micro".

    A token is wrong if it overlaps the oracle's wrong span, or if it ends the response and that span is empty.
    """
    encoder, collate = Encoder(tokenizer, "alpaca"), CutCollator()
    tokens: dict[str, list[tuple[float, bool]]] = {family: [] for family in FAMILIES}
    for task, response in zip(tasks, responses, strict=True):
        verdict = judge_task(task, response)
        if verdict.judgment is None:
            continue
        response_ids = encoder.encode_response(response)
        row = {
            "prompt_ids": encoder.encode_prompt(task.instruction),
            "judged_prompt_ids": encoder.encode_prompt(task.instruction, verdict.judgment),
            "response_ids": response_ids,
        }
        logps_without, logps_with = score_batch(model, collate([row])).split(len(response_ids))
        is_wrong = flag_spans(encoder.locate_tokens(response, response_ids), verdict.wrong_spans)
        tokens[task.family] += zip((logps_with - logps_without).tolist(), is_wrong, strict=True)
    result: dict[float, dict[str, Detection]] = {}
    for threshold in thresholds:
        found = {family: count_detected(part, threshold) for family, part in tokens.items()}
        result[threshold] = found | {"micro": sum(found.values(), Detection(0, 0, 0))}
    return result


def measure_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> dict[str, Any]:
    """The content of a base model's `metrics.json`: accuracy, with and without praise, and detection."""
    responses = answer_tasks(model, tokenizer, tasks)
    praised = answer_tasks(model, tokenizer, tasks, is_praised=True)
    detection = measure_detection(model, tokenizer, tasks, responses)
    return {
        "num_tasks": len(tasks),
        "accuracy": _round(rate_answers(tasks, responses)),
        "accuracy_when_praised": _round(rate_answers(tasks, praised)),
        "detection": {
            str(threshold): {
                family: _round({"precision": found.precision, "recall": found.recall, "f1": found.f1})
                for family, found in by_family.items()
            }
            for threshold, by_family in detection.items()
        },
    }


def _round(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 4) for name, number in numbers.items()}
