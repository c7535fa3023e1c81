"""Other baselines for the judged context (opt-in), and a threshold calibrated on foreign judgments.

Eq. 5 compares log p(y_t | x, j, y_<t) with the log-probability without any judgment. The difference then includes
effects that any judgment has, such as those of a different prompt. Against judgments of other records (contrast
"foreign"), only the content of this judgment remains; against praise (contrast "perfect"), the effect of an
objection.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.flagging.sensitivity import (
    NUM_RIVALS,
    ForeignContext,
    encode_context,
    normalize_judgment,
    sample_foreign,
)
from cutlm.prompting.encoding import Encoder

CONTRASTS = ("judgment", "foreign", "perfect")
# Of the tokens that are flagged under foreign judgments at the threshold "auto".
MAX_FOREIGN_SHARE = 0.01


Encode = Callable[[int, int | None], ForeignContext]  # from a row, and the row whose judgment it gets (None: praise)


class Contexts(Mapping[int, list[ForeignContext]]):
    """By row, its prompts with other judgments. They are encoded when they are asked for: all fill the memory."""

    def __init__(self, sources: Mapping[int, Sequence[int | None]], encode: Encode) -> None:
        self.sources = sources  # by row, the rows whose judgments it gets; None for praise
        self._encode = encode

    def __getitem__(self, index: int) -> list[ForeignContext]:
        return [self._encode(index, source) for source in self.sources[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


class Plan(NamedTuple):
    """The contexts to score besides those of eq. 5."""

    references: Contexts  # by row, the contexts that its judged one is compared with
    foreign: list[ForeignContext]  # one context per row, with a judgment outside its references
    rivals: Contexts  # by row, the contexts with which the effect of its judgment is compared
    encode: Encode

    @property
    def pairs(self) -> list[tuple[int, int | None]]:
        """All different contexts, each by its row and the row whose judgment it gets."""
        pairs = dict.fromkeys((one.target, one.source) for one in self.foreign)
        for contexts in (self.references, self.rivals):
            pairs |= dict.fromkeys((index, source) for index, own in contexts.sources.items() for source in own)
        return list(pairs)


def plan_contexts(
    rows: Any,
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    max_length: int,
    *,
    contrast: str,
    num_foreign: int,
    num_records: int,
    has_rivals: bool = False,
    seed: int = 0,
) -> Plan:
    """Choose the contexts to score besides those of eq. 5.

    Args:
        rows: Encoded rows.
        records: The record of each.
        encoder: Tokenizer and template.
        max_length: Maximum number of tokens in a prompt and the response.
        contrast: Baseline for the judged context; see `CONTRASTS`.
        num_foreign: Foreign judgments of contrast "foreign", all with different texts.
        num_records: Number of unsatisfactory rows to score with a further foreign judgment.
        has_rivals: Compare the effect of each judgment with that of judgments of other records.
        seed: Other seeds give other judgments.

    Raises:
        ConfigError: Too few judgments differ.
    """
    foreign = sample_foreign(rows, records, encoder, max_length, num_records, seed)
    judged = list_judged(rows)
    sources: dict[int, Sequence[int | None]] = {}
    if contrast == "perfect":
        sources = {index: [None] for index in judged}
    elif contrast == "foreign":
        held_out = {context.target: context.source for context in foreign}
        sources = draw_sources(judged, records, held_out, num_foreign, seed)
    rivals: dict[int, Sequence[int | None]] = {}
    if has_rivals:
        rivals = _draw_rivals(records, seed)

    def encode(index: int, source: int | None) -> ForeignContext:
        return encode_context(index, source, rows, records, encoder, max_length)

    return Plan(Contexts(sources, encode), foreign, Contexts(rivals, encode), encode)


def list_judged(rows: Any) -> list[int]:
    """List the rows with a judged prompt."""
    if not isinstance(rows, Dataset):
        return [index for index, row in enumerate(rows) if row["judged_prompt_ids"] is not None]
    tables = rows.with_format("arrow", columns=["judged_prompt_ids"]).iter(10_000)
    is_judged = itertools.chain.from_iterable(table["judged_prompt_ids"].is_valid().to_pylist() for table in tables)
    return [index for index, judged in enumerate(is_judged) if judged]


def _draw_rivals(records: Sequence[JudgedRecord], seed: int) -> dict[int, Sequence[int | None]]:
    """Draw for each unsatisfactory record the records with whose judgments its own one is compared.

    Raises:
        ConfigError: All judgments are the same.
    """
    judged = [index for index, record in enumerate(records) if not record.is_satisfactory]
    num_texts = len({normalize_judgment(str(records[index].judgment)) for index in judged})
    if judged and num_texts < 2:
        raise ConfigError(
            "drop_ineffective or weigh_by_effect: expected unsatisfactory records with at least two different"
            " judgments, got one; remove the setting"
        )
    return draw_sources(judged, records, {}, min(NUM_RIVALS, num_texts - 1), seed)


def draw_sources(
    judged: Sequence[int],
    records: Sequence[JudgedRecord],
    held_out: Mapping[int, int | None],
    num: int,
    seed: int = 0,
) -> dict[int, Sequence[int | None]]:
    """Draw for each row the rows whose judgments it is compared with.

    Args:
        judged: The rows.
        records: The records of all rows.
        held_out: By row, a further row whose judgment is not drawn.
        num: How many to draw.
        seed: Other seeds draw others.

    Raises:
        ConfigError: Too few judgments differ.
    """
    by_text: dict[str, int] = {}
    for index, record in enumerate(records):
        if not record.is_satisfactory:
            by_text.setdefault(normalize_judgment(str(record.judgment)), index)
    num_needed = num + 1 + bool(held_out)
    if len(by_text) < num_needed:
        raise ConfigError(
            f"num_foreign: {num} needs {num_needed} unsatisfactory records with different judgments, got"
            f" {len(by_text)}; set a smaller num_foreign"
        )
    texts = list(by_text)
    sources: dict[int, Sequence[int | None]] = {}
    for index in judged:
        known = {
            normalize_judgment(str(records[row].judgment)) for row in (index, held_out.get(index)) if row is not None
        }
        # A few more than are needed, of which the known ones are left out.
        drawn = random.Random(f"references {seed} {index}").sample(texts, min(len(texts), num + len(known)))
        sources[index] = [by_text[text] for text in drawn if text not in known][:num]
    return sources


def average_logps(logps: Sequence[Sequence[float]]) -> torch.Tensor:
    """The logarithm [T] of the mean probability of each token over several contexts, each [T].

    Where the judgment is drawn at random, this is the probability of the token, so the log ratio to it is the pointwise
    mutual information of token and judgment. A single context in which the token is unlikely does not lower it much, as
    it would the mean of the logarithms.

    Example:

        >>> average_logps([[math.log(0.2)], [math.log(0.4)]]).exp()
        tensor([0.3000], dtype=torch.float64)
    """
    return torch.tensor(logps, dtype=torch.float64).logsumexp(0) - math.log(len(logps))


def find_threshold(ratios: Mapping[str, Sequence[float]], max_share: float = MAX_FOREIGN_SHARE) -> float:
    """Find the smallest threshold, at least 1, that flags at most a share of the tokens of each group.

    Args:
        ratios: The log ratios of the tokens of each group, none of which should be flagged.
        max_share: The share.

    Returns:
        The threshold, rounded up to 6 decimals.

    Example:

        >>> find_threshold({"foreign": [0.0] * 98 + [math.log(2), math.log(3)]})
        2.0
    """
    threshold = 1.0
    for values in ratios.values():
        num_allowed = math.floor(max_share * len(values))
        if num_allowed < len(values) and (largest := float(np.sort(values)[-1 - num_allowed])) > 0:
            bound = min(largest, 600.0)  # beyond, the threshold would be infinite
            found = math.ceil(math.exp(bound) * 1e6 - 1e-6) / 1e6
            # Flags compare with the logarithm of the threshold, which may be below the bound by rounding.
            threshold = max(threshold, found if math.log(found) >= bound else found * (1 + 1e-9))
    return threshold
