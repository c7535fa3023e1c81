"""Pairs of responses to the instructions of judged records: under the plain prompt and under a teacher's.

Responses are sampled at temperature 1, from the distribution that is taught. Greedy plain responses would be those that
are known to be unsatisfactory.
"""

import random
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord
from cutlm.errors import DataError
from cutlm.flagging.teacher import TeacherSettings, encode_teacher_generation_prompt
from cutlm.generation.files import describe_run
from cutlm.generation.local import Sampling, find_room, generate_with_journal
from cutlm.judges.responses import Response
from cutlm.prompting.encoding import Encoder, encode_each


def draw_records(records: Sequence[JudgedRecord], num_records: int, seed: int) -> list[int]:
    """Draw unsatisfactory records, whose responses a teacher corrects; return their indices in order.

    Raises:
        DataError: All records are satisfactory.
    """
    unsatisfactory = [index for index, record in enumerate(records) if not record.is_satisfactory]
    if not unsatisfactory:
        raise DataError("expected an unsatisfactory record to compare prompts on, got satisfactory ones only")
    rng = random.Random(f"compare {seed}")
    return sorted(rng.sample(unsatisfactory, min(num_records, len(unsatisfactory))))


def answer_under_both(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    records: Sequence[JudgedRecord],
    locations: Sequence[str],
    teacher: TeacherSettings,
    sampling: Sampling,
    journal: Journal,
) -> list[Response]:
    """Sample a response to each record's instruction under the plain prompt, then one to each under the teacher's.

    A response that cannot be separated from its thoughts is empty.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Encodes the prompts.
        records: Unsatisfactory records.
        locations: The location of each.
        teacher: Settings of the teacher's prompt.
        sampling: How to sample.
        journal: Keeps finished batches.
    """
    find_room(model, sampling.max_new_tokens)  # fails before a prompt is encoded
    plain = encode_each(lambda one: encoder.encode_generation_prompt(one.conversation), records, locations)
    taught = encode_each(lambda one: encode_teacher_generation_prompt(one, encoder, teacher), records, locations)
    generated = generate_with_journal(model, tokenizer, encoder, [*plain, *taught], sampling, journal)
    return [
        _make_response(records[index % len(records)], locations[index % len(records)], kind, text)
        for index, kind in enumerate(["plain"] * len(records) + ["teacher"] * len(records))
        for text in [generated.responses.get(index, "")]
    ]


def _make_response(record: JudgedRecord, location: str, kind: str, text: str) -> Response:
    row: dict[str, Any] = {"prompt_kind": kind}
    if record.messages is not None:
        row["messages"] = [*record.messages[:-1], {"role": "assistant", "content": text}]
        row |= {"tools": record.tools} if record.tools else {}
    return Response(f"{location} ({kind} prompt)", record.instruction, record.input, text, row)


def describe_answers(
    records: Sequence[JudgedRecord],
    teacher: TeacherSettings,
    sampling: Sampling,
    encoder: Encoder,
    fingerprint: str,
    model: nn.Module,
) -> dict[str, Any]:
    """Return the header of the journal of `answer_under_both`: all that its responses depend on."""
    inputs = [[record.model_dump(mode="json") for record in records], teacher.describe()]
    return describe_run(inputs, sampling, encoder.fingerprint, fingerprint, encoder.template_date, model)
