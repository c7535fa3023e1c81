"""Sensitivity: how much a model's flags depend on the content of the judgment.

Some unsatisfactory responses are scored under the judgment of another record, too. A model that reads judgments flags
fewer tokens then. One that does not flags as many, whatever the judgment says, and its flags are mostly noise.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.flagging.report import Sensitivity
from cutlm.losses import flag_tokens
from cutlm.prompting.encoding import Encoder

NUM_RECORDS = 64
# A judgment is effective if its effect is larger than that of this share of the judgments it is compared with.
LEAST_RANK = 0.75
NUM_RIVALS = 4


class Contrast(NamedTuple):
    """Log-probabilities [T] of one unsatisfactory response in three contexts."""

    without: Sequence[float]  # log p(y_t | x, y_<t)
    own: Sequence[float]  # log p(y_t | x, j, y_<t) with its own judgment
    foreign: Sequence[float]  # the same with the judgment of another record
    num_template_tokens: int = 0  # tokens at the start that the chat template writes, which do not count


class ForeignContext(NamedTuple):
    """The prompt of a row with the judgment of another row."""

    target: int  # the row whose response is scored
    source: int | None  # the row whose judgment it gets; None for praise
    prompt_ids: list[int]


def pair_foreign(judgments: Sequence[str], seed: int = 0) -> list[int]:
    """Assign to each record another record, the judgment of which has another text.

    It is a permutation, unless more than half of the judgments have the same text: those then share the others.

    Args:
        judgments: The judgments. White space and case do not distinguish them.
        seed: Other seeds give other pairs.

    Returns:
        For each judgment the index of a foreign one; an empty list if all have the same text.

    Example:

        >>> pair_foreign(["Too long.", "Too long.", "Wrong.", "Rude."])
        [2, 3, 0, 1]
    """
    generator = random.Random(f"foreign {seed}")
    groups: dict[str, list[int]] = defaultdict(list)
    for index in generator.sample(range(len(judgments)), len(judgments)):
        groups[normalize_judgment(judgments[index])].append(index)
    if len(groups) < 2:
        return []
    # In this order the records of one text follow each other, so a step as long as the largest group leaves any group.
    by_size = sorted(groups.values(), key=len, reverse=True)
    order = [index for group in by_size for index in group]
    num, num_largest = len(order), len(by_size[0])
    foreign = [0] * num
    for place, index in enumerate(order):
        if 2 * num_largest > num and place < num_largest:
            source = num_largest + place % (num - num_largest)
        else:
            source = (place + num_largest) % num
        foreign[index] = order[source]
    return foreign


def normalize_judgment(judgment: str) -> str:
    """Return the text by which judgments are the same: white space and case do not distinguish them."""
    return " ".join(judgment.split()).casefold()


def encode_context(
    index: int,
    source: int | None,
    rows: Any,
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    max_length: int,
) -> ForeignContext:
    """Encode the prompt of a row with the judgment of another row, or with praise; truncated as its own prompts are."""
    judgment = PRAISE if source is None else records[source].judgment
    num_tokens = max_length - len(rows[index]["response_ids"])
    prompt_ids = encoder.fit_prompt(
        lambda conversation: encoder.encode_prompt(conversation, judgment), records[index].conversation, num_tokens
    )
    return ForeignContext(index, source, prompt_ids)


def sample_foreign(
    rows: Any,
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    max_length: int,
    num_records: int = NUM_RECORDS,
    seed: int = 0,
) -> list[ForeignContext]:
    """Draw unsatisfactory rows, and encode the prompt of each with the judgment of another one.

    Args:
        rows: Encoded rows, a list or a `datasets.Dataset`.
        records: The record of each.
        encoder: Tokenizer and template.
        max_length: Maximum number of tokens in a prompt and the response; prompts are truncated on the left.
        num_records: Number of rows to draw.
        seed: Seed of the sample and of the pairs.

    Returns:
        The contexts in the order of the rows; none if fewer than two judgments differ.
    """
    judged = [index for index, record in enumerate(records) if not record.is_satisfactory]
    judgments = [str(records[index].judgment) for index in judged]
    foreign = pair_foreign(judgments, seed)
    places = range(len(foreign))
    drawn = sorted(random.Random(f"sample {seed}").sample(places, min(num_records, len(foreign))))
    return [
        encode_context(judged[place], judged[foreign[place]], rows, records, encoder, max_length) for place in drawn
    ]


def rank_judgment(
    without: Sequence[float], own: Sequence[float], foreign: Sequence[Sequence[float]], num_template_tokens: int = 0
) -> float:
    """Rank the effect of a record's judgment on its response among those of judgments of other records.

    The effect is the largest log ratio of a token. A judgment that says nothing about this response, such as one that
    belongs to another record, has no larger effect than others.

    Args:
        without: [T] log p(y_t | x, y_<t).
        own: [T] log p(y_t | x, j, y_<t) with the record's own judgment.
        foreign: [N][T] the same with judgments of other records.
        num_template_tokens: Tokens at the start that the chat template writes, which do not count.

    Returns:
        The share of the other judgments whose effect is smaller.

    Example:

        >>> rank_judgment([-2.0, -2.0], [-1.0, -3.0], [[-2.0, -2.0], [-2.0, -0.5]])  # 1 against 0 and 1.5
        0.5
    """

    def find_effect(logps: Sequence[float]) -> float:
        pairs = zip(logps[num_template_tokens:], without[num_template_tokens:], strict=True)
        return max(judged - plain for judged, plain in pairs)

    effect = find_effect(own)
    return sum(find_effect(logps) < effect for logps in foreign) / len(foreign)


def compute_sensitivity(contrasts: Sequence[Contrast], threshold: float) -> Sensitivity | None:
    """Compute the sensitivity from the log-probabilities of a sample; None without any record.

    Args:
        contrasts: The log-probabilities of each record.
        threshold: lambda of eq. 5.

    Example:

        >>> contrast = Contrast([-2.0, -2.0, -2.0], own=[-1.0, -1.0, -2.0], foreign=[-2.0, -1.5, -2.0])
        >>> compute_sensitivity([contrast], threshold=1.1).flag_signal  # 2 tokens are flagged, then 1
        0.5
    """
    if not contrasts:
        return None
    num_tokens = num_larger = 0
    num_flagged = [0, 0]
    for contrast in contrasts:
        start = contrast.num_template_tokens
        without, own, foreign = (torch.tensor(logps[start:], dtype=torch.float64) for logps in contrast[:3])
        num_tokens += len(without)
        for place, logps in enumerate((own, foreign)):
            flags = flag_tokens(without, logps, threshold=threshold, unlikelihood_weight=1.0, gamma=0.0)
            num_flagged[place] += int(flags.is_flagged.sum())
        num_larger += bool((own - without).max() > (foreign - without).max())
    shares = [num / num_tokens for num in num_flagged]
    signal = 1 - num_flagged[1] / num_flagged[0] if num_flagged[0] else None
    return Sensitivity(len(contrasts), shares[0], shares[1], signal, num_larger / len(contrasts))
