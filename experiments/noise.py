"""Noisy judges: a share of the judgments is wrong or says nothing."""

import random
from collections.abc import Sequence

from cutlm.data.records import PRAISE, JudgedRecord

# Of unsatisfactory responses: the judgment of another one, praise, or a judgment that names nothing; "flipped": of any
# response, praise if it is unsatisfactory, else a judgment that names nothing.
NOISES = ("foreign", "praise", "vague", "flipped")
VAGUE = ("This is not right.", "The response has a problem.", "This does not do what was asked for.")


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
