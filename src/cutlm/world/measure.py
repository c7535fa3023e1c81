"""Measures a model on the tiny world: how often it is right, and how well judgments show its wrong tokens.

Only what the base model is held to is measured here; comparing methods is left to others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cutlm.data.records import PRAISE
from cutlm.evaluation.detection import Detection, count_detected
from cutlm.generation.local import Sampling, generate_responses
from cutlm.model.collator import CutCollator
from cutlm.model.forward import score_batch
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.spans import flag_spans
from cutlm.world.families import FAMILIES
from cutlm.world.judge import judge_task
from cutlm.world.tasks import Task

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 40
_BATCH_SIZE = 64
THRESHOLDS = (1.05, 1.1, 1.2, 1.5)


def measure_base(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", tasks: Sequence[Task]
) -> dict[str, Any]:
    """All that a base model is held to, as it stands in its folder's `metrics.json`."""
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


def answer_tasks(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", tasks: Sequence[Task], *, is_praised: bool = False
) -> list[str]:
    """The likeliest response to each task.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: What to ask.
        is_praised: Whether the prompt holds the judgment "Perfect.", which asks for a right answer.
    """
    encoder = Encoder(tokenizer, "alpaca")
    praise = PRAISE if is_praised else None
    encoded = [encoder.encode_prompt(task.instruction, praise) for task in tasks]
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=_BATCH_SIZE)
    return generate_responses(model, tokenizer, encoder, encoded, sampling)


def rate_answers(tasks: Sequence[Task], responses: Sequence[str]) -> dict[str, float]:
    """The share of right responses by family, and their mean as "macro"."""
    shares = {}
    for family in FAMILIES:
        verdicts = [
            judge_task(task, response) for task, response in zip(tasks, responses, strict=True) if task.family == family
        ]
        shares[family] = sum(verdict.judgment is None for verdict in verdicts) / max(1, len(verdicts))
    return shares | {"macro": sum(shares.values()) / len(shares)}


@torch.no_grad()
def measure_detection(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    responses: Sequence[str],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[float, dict[str, Detection]]:
    """How well the wrong tokens of unsatisfactory responses are flagged, by threshold and family.

    A token is flagged where the judgment makes it likelier by more than the threshold's factor; it is wrong where it
    overlaps the wrong turn, or ends the response where that is an empty span.
    """
    encoder, collate = Encoder(tokenizer, "alpaca"), CutCollator()
    tokens: dict[str, list[tuple[float, bool]]] = {family: [] for family in FAMILIES}
    for task, response in zip(tasks, responses, strict=True):
        verdict = judge_task(task, response)
        if verdict.judgment is None:
            continue
        ids = encoder.encode_response(response)
        row = {
            "prompt_ids": encoder.encode_prompt(task.instruction),
            "judged_prompt_ids": encoder.encode_prompt(task.instruction, verdict.judgment),
            "response_ids": ids,
        }
        without, with_judgment = score_batch(model, collate([row])).split(len(ids))
        is_wrong = flag_spans(encoder.locate_tokens(response, ids), verdict.wrong_spans)
        tokens[task.family] += zip((with_judgment - without).tolist(), is_wrong, strict=True)
    result: dict[float, dict[str, Detection]] = {}
    for threshold in thresholds:
        found = {family: count_detected(part, threshold) for family, part in tokens.items()}
        result[threshold] = found | {"micro": sum(found.values(), Detection(0, 0, 0))}
    return result
