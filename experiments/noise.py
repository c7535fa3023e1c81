"""Noisy judges: a share of the judgments is wrong or says nothing; and what might help against that."""

import random
from collections.abc import Sequence
from typing import Any

from torch import nn

from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.flagging.scoring import score_rows
from cutlm.prompting.encoding import Encoder

# Of unsatisfactory responses: the judgment of another one, praise, or a judgment that names nothing; "flipped": of any
# response, praise if it is unsatisfactory, else a judgment that names nothing.
NOISES = ("foreign", "praise", "vague", "flipped")
VAGUE = ("This is not right.", "The response has a problem.", "This does not do what was asked for.")
_NUM_FOREIGN = 4


def add_noise(records: Sequence[JudgedRecord], share: float, kind: str, seed: int) -> list[JudgedRecord]:
    """Replace a share of the judgments.

    Args:
        records: Judged responses.
        share: The share of the unsatisfactory responses, or with kind "flipped" of all responses.
        kind: How judgments are wrong; see `NOISES`.
        seed: Seed of the choice.
    """
    rng = random.Random(f"noise {kind} {seed}")
    judged = [index for index, record in enumerate(records) if not record.is_satisfactory]
    candidates = list(range(len(records))) if kind == "flipped" else judged
    noisy = list(records)
    for index in rng.sample(candidates, round(share * len(candidates))):
        record = records[index]
        if kind == "foreign":
            others = [other for other in judged if records[other].judgment != record.judgment]
            judgment = records[rng.choice(others)].judgment
        elif kind == "praise" or (kind == "flipped" and not record.is_satisfactory):
            judgment = PRAISE
        else:
            judgment = rng.choice(VAGUE)
        noisy[index] = record.model_copy(update={"judgment": judgment, "wrong_spans": None})
    return noisy


def measure_effects(
    model: nn.Module, encoder: Encoder, records: Sequence[JudgedRecord], seed: int
) -> dict[int, tuple[float, float]]:
    """Compare the effect of each judgment on the model with that of judgments of other responses.

    Args:
        model: The detector.
        encoder: Its tokenizer and template.
        records: Judged responses.
        seed: Seed of the choice of other judgments.

    Returns:
        For each unsatisfactory record, by its index, the share of other judgments whose largest log ratio is smaller
        than its own one's, and the share of its summed positive log ratios that exceeds the mean of theirs.
    """
    rng = random.Random(f"effects {seed}")
    judged = [index for index, record in enumerate(records) if not record.is_satisfactory]
    rows: list[dict[str, Any]] = []
    places: dict[int, list[int]] = {index: [] for index in judged}
    for index in judged:
        record = records[index]
        others = sorted({str(records[other].judgment) for other in judged} - {str(record.judgment)})
        response_ids = encoder.encode_response(record.output)
        for judgment in (None, record.judgment, *rng.sample(others, min(_NUM_FOREIGN, len(others)))):
            prompt_ids = encoder.encode_prompt(record.full_instruction, judgment)
            places[index].append(len(rows))
            rows.append({"prompt_ids": prompt_ids, "judged_prompt_ids": None, "response_ids": response_ids})
    scored = {row: logps for batch in score_rows(model, rows, show_progress=False) for row, logps, *_ in batch}
    effects = {}
    for index in judged:
        plain, own, *foreign = (scored[row].double() for row in places[index])
        largest = [float((logps - plain).max()) for logps in (own, *foreign)]
        sums = [float((logps - plain).clamp_min(0).sum()) for logps in (own, *foreign)]
        rank = sum(value < largest[0] for value in largest[1:]) / len(foreign)
        excess = 1 - sum(sums[1:]) / len(foreign) / sums[0] if sums[0] else 0.0
        effects[index] = (rank, min(1.0, max(0.0, excess)))
    return effects


def drop_ineffective(
    records: Sequence[JudgedRecord], effects: dict[int, tuple[float, float]], min_rank: float
) -> list[JudgedRecord]:
    """Keep satisfactory records, and those whose judgment has a larger effect than most judgments of others."""
    return [record for index, record in enumerate(records) if index not in effects or effects[index][0] >= min_rank]
