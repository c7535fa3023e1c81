"""What methods learn from on the tiny world: a model's responses to tasks, judged by the oracle, with their cost."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cutlm.data.records import JudgedRecord
from cutlm.generation.local import Sampling, generate_responses
from cutlm.generation.refine import encode_requests
from cutlm.prompting.encoding import Encoder
from cutlm.world.judge import judge_task
from cutlm.world.measure import MAX_NEW_TOKENS
from cutlm.world.tasks import Task

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_BATCH_SIZE = 128


@dataclass(frozen=True)
class Experience:
    """Judged responses.

    Attributes:
        records: They carry the oracle's `wrong_spans`, which only what asks for them may use.
        num_responses: Responses generated and judged, refinements not counted.
        num_tokens: Response tokens generated, refinements included.
    """

    records: list[JudgedRecord]
    num_responses: int
    num_tokens: int


def gather(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    kind: str,
    num_samples: int,
    seed: int,
) -> Experience:
    """Lets a model answer tasks, and the oracle judge.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        tasks: What to ask.
        kind: "greedy", "samples" or "refined"; see `cutlm.world.methods.Method`.
        num_samples: Responses to each task where they are drawn.
        seed: Of drawing, and of the oracle's wording.
    """
    encoder = Encoder(tokenizer, "alpaca")
    is_sampled = kind == "samples"
    asked = [task for task in tasks for _ in range(num_samples if is_sampled else 1)]
    sampling = Sampling(MAX_NEW_TOKENS, temperature=float(is_sampled), seed=seed, batch_size=_BATCH_SIZE)
    prompts = [encoder.encode_prompt(task.instruction) for task in asked]
    responses = generate_responses(model, tokenizer, encoder, prompts, sampling)
    num_tokens = sum(len(encoder.encode_response(response)) for response in responses)
    records = []
    for task, response in zip(asked, responses, strict=True):
        if not response.strip():
            continue  # nothing that could be judged
        verdict = judge_task(task, response, seed=seed)
        records.append(
            JudgedRecord(
                instruction=task.instruction,
                output=response,
                judgment=verdict.judgment,
                wrong_spans=verdict.wrong_spans or None,
            )
        )
    if kind == "refined":
        wrong = [record for record in records if not record.is_satisfactory]
        answers = generate_responses(model, tokenizer, encoder, encode_requests(wrong, encoder), sampling)
        num_tokens += sum(len(encoder.encode_response(answer)) for answer in answers)
        refined = iter(record.model_copy(update={"i_ans": text}) for record, text in zip(wrong, answers, strict=True))
        records = [record if record.is_satisfactory else next(refined) for record in records]
    return Experience(records, len(responses), num_tokens)


def draw_tasks(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """A share of the tasks, in an order of its own for each seed."""
    return random.Random(f"tasks {seed}").sample(list(tasks), round(share * len(tasks)))
