"""The frozen detector: which tokens of a response a judgment blames, by a model that is not being trained (eq. 5).

Log-probabilities come from a local model (`scoring`) or from a server (`server`); this module turns them into flags
and weights. The file format is in `token_scores`.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlm.blame.scoring import Scorer
from cutlm.blame.token_scores import (
    SCORE_FIELDS,
    TokenScores,
    fingerprint_template,
    fingerprint_tokenizer,
    strip_scores,
    write_token_scores,
)
from cutlm.data.journal import Journal, refuse_foreign
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.losses import flag_tokens
from cutlm.prompting.encoding import Encoder

PRAISE = "Perfect."


@dataclass(frozen=True)
class FlagSettings:
    """What flags and weights are made by.

    Attributes:
        threshold: lambda of eq. 5.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight of eq. 6; 0 switches it off.
        max_length: Most tokens of a prompt and the response together; prompts are cut from the left to fit.
        with_praise: Whether satisfactory records too are scored with their judgment ("Perfect." where they have
            none), as thresholds are calibrated on. They get no flags all the same.
    """

    threshold: float = 1.1
    unlikelihood_weight: float = 1.0
    gamma: float = 1.0
    max_length: int = 2048
    with_praise: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.threshold < math.inf:
            problems.append(f"threshold: expected a number of at least 1, got {self.threshold}")
        if not 0 < self.unlikelihood_weight < math.inf:
            problems.append(f"unlikelihood_weight: expected a number above 0, got {self.unlikelihood_weight}")
        if not 0 <= self.gamma < math.inf:
            problems.append(f"gamma: expected a number of at least 0, got {self.gamma}")
        if self.max_length < 2:
            problems.append(f"max_length: expected a whole number of at least 2, got {self.max_length}")
        if problems:
            raise ConfigError(problems)


@dataclass
class BlameCounts:
    """What was found, and what became of the rest.

    Attributes:
        num_records: Records scored.
        num_satisfactory: Of these, the satisfactory ones.
        num_resumed: Records taken over from a run that was stopped.
        num_truncated: Records of which a prompt was cut from the left.
        left_out: A sentence for each record that was left out for its length.
        num_tokens: Response tokens of unsatisfactory records.
        num_flagged: Of these, the flagged ones.
        num_without_flag: Unsatisfactory records without a flag.
    """

    num_records: int = 0
    num_satisfactory: int = 0
    num_resumed: int = 0
    num_truncated: int = 0
    left_out: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_flagged: int = 0
    num_without_flag: int = 0

    def describe(self) -> str:
        """Two lines of counts, fit to be printed."""
        share = self.num_flagged / max(1, self.num_tokens)
        num_unsatisfactory = self.num_records - self.num_satisfactory
        return (
            f"{self.num_records} records scored ({self.num_satisfactory} satisfactory, {num_unsatisfactory}"
            f" unsatisfactory); {self.num_truncated} with a prompt cut from the left to fit;"
            f" {len(self.left_out)} left out\n"
            f"{self.num_flagged} of {self.num_tokens} tokens of unsatisfactory responses flagged ({share:.1%});"
            f" {self.num_without_flag} of these records without any flag"
        )


def blame_file(
    records: Sequence[JudgedRecord],
    locations: Sequence[str],
    out: str | Path,
    encoder: Encoder,
    score: Scorer,
    settings: FlagSettings,
    *,
    detector: str,
    backend: Mapping[str, Any],
    overwrite: bool = False,
) -> BlameCounts:
    """Scores records and writes their token scores, in the order of the records.

    What is finished goes to `OUT.partial` at once, to be gone on with; it is removed when `out` is whole.

    Args:
        records: The records.
        locations: Where each stands, for messages: `data.jsonl:17`.
        out: The file to write.
        encoder: Tokenizer and template.
        score: Gives the log-probs.
        settings: Flags, weights and lengths.
        detector: Fingerprint of the model.
        backend: What else the numbers may depend on, by name, such as the dtype.
        overwrite: Whether a partial file of another run gives way.

    Returns:
        Counts.

    Raises:
        DataError: A record has fields of its own that token scores need for theirs.
        UserError: A partial file of another run is in the way, or the scorer's.
    """
    records = [strip_scores(record) for record in records]
    _refuse_clashes(records, locations)
    counts = BlameCounts()
    rows, kept = _encode(records, locations, encoder, settings, counts)
    journal = Journal(out, describe_run(records, encoder, settings, detector, backend), overwrite=overwrite)
    if not all(_fits(line, rows) for line in journal.lines):
        refuse_foreign(journal.path)
    finished = {line["index"]: (line["logps_without"], line["logps_with"]) for line in journal.lines}
    counts.num_resumed = len(finished)
    with journal, closing(score(rows, frozenset(finished))) as batches:
        for batch in batches:
            rounded = {index: (_round(without), _round(judged)) for index, without, judged in batch}
            journal.append({"index": key, "logps_without": a, "logps_with": b} for key, (a, b) in rounded.items())
            finished |= rounded

    def make_all() -> Iterator[TokenScores]:
        for index, (row, record) in enumerate(zip(rows, kept, strict=True)):
            scores = make_scores(record, row["response_ids"], *finished[index], encoder, settings, detector)
            counts.num_records += 1
            counts.num_satisfactory += record.is_satisfactory
            if not record.is_satisfactory:
                counts.num_tokens += len(scores.token_ids)
                counts.num_flagged += sum(scores.is_flagged)
                counts.num_without_flag += not any(scores.is_flagged)
            yield scores

    write_token_scores(out, make_all())
    journal.remove()
    return counts


def blame_record(
    record: JudgedRecord, encoder: Encoder, score: Scorer, settings: FlagSettings, detector: str
) -> tuple[TokenScores, bool]:
    """Scores one record, and writes nothing down.

    Returns:
        Its token scores, and whether a prompt was cut from the left to fit.

    Raises:
        DataError: The response leaves no room for a prompt.
        UserError: The scorer's.
    """
    counts = BlameCounts()
    (row,), _ = _encode([record], ["the response"], encoder, settings, counts)
    with closing(score([row], ())) as batches:
        ((_, without, judged),) = (scored for batch in batches for scored in batch)
    logps = _round(without)
    assert logps is not None
    scores = make_scores(record, row["response_ids"], logps, _round(judged), encoder, settings, detector)
    return scores, counts.num_truncated > 0


def describe_run(
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    settings: FlagSettings,
    detector: str,
    backend: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the log-probs depend on, by name; what is made of them at the end is not among it."""
    rows = [strip_scores(record).model_dump(mode="json") for record in records]
    return {
        "max_length": settings.max_length,
        "with_praise": settings.with_praise,
        **backend,
        "model": detector,
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": fingerprint_template(encoder),
        "data": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def _fits(line: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a line of a journal holds the log-probs of one of these rows."""
    index = line["index"]
    if type(index) is not int or not 0 <= index < len(rows) or not {"logps_without", "logps_with"} <= set(line):
        return False
    row = rows[index]
    is_judged = row["judged_prompt_ids"] is not None
    columns = [line["logps_without"], *([line["logps_with"]] if is_judged else [])]
    if not all(isinstance(logps, list) and len(logps) == len(row["response_ids"]) for logps in columns):
        return False
    return (is_judged or line["logps_with"] is None) and all(
        isinstance(logp, float) and math.isfinite(logp) for logps in columns for logp in logps
    )


def _refuse_clashes(records: Sequence[JudgedRecord], locations: Sequence[str]) -> None:
    problems = [
        f"{place}: field {name!r}: a name that token scores need for their own; rename it in the records"
        for place, record in zip(locations, records, strict=True)
        for name in record.model_extra or {}
        if name in SCORE_FIELDS
    ]
    if problems:
        raise DataError(problems)


def _encode(
    records: Sequence[JudgedRecord],
    locations: Sequence[str],
    encoder: Encoder,
    settings: FlagSettings,
    counts: BlameCounts,
) -> tuple[list[dict[str, Any]], list[JudgedRecord]]:
    """Token ids of the records that fit, and these records."""
    rows, kept = [], []
    for record, place in zip(records, locations, strict=True):
        encoded = encoder.encode_record(record, settings.max_length)
        if encoded is None:
            counts.left_out.append(f"{place}: the response alone fills max_length {settings.max_length}; left out")
            continue
        judged_ids, is_truncated = encoded.judged_prompt_ids, encoded.is_truncated
        if record.is_satisfactory and settings.with_praise:
            room = settings.max_length - len(encoded.response_ids)
            whole_ids = encoder.encode_prompt(record.full_instruction, record.judgment or PRAISE)
            judged_ids, is_truncated = encoder.truncate(whole_ids, room), is_truncated or len(whole_ids) > room
        counts.num_truncated += is_truncated
        rows.append(
            {
                "prompt_ids": encoded.prompt_ids,
                "judged_prompt_ids": judged_ids,
                "response_ids": encoded.response_ids,
                "location": place,
            }
        )
        kept.append(record)
    if not rows:
        raise DataError([*counts.left_out], hint="no record is left to be scored; give a larger max_length")
    return rows, kept


def _round(logps: Tensor | None) -> list[float] | None:
    # What a float32 holds of them. Flags are made from the rounded ones, so that the file bears out its own flags.
    return None if logps is None else [min(0.0, round(value, 6)) + 0.0 for value in logps.tolist()]


def make_scores(
    record: JudgedRecord,
    response_ids: list[int],
    logps_without: list[float],
    logps_with: list[float] | None,
    encoder: Encoder,
    settings: FlagSettings,
    detector: str,
) -> TokenScores:
    """Flags and weights by eq. 5 and 6, of the log-probs as they stand in the file."""
    is_flagged, weights = [False] * len(response_ids), [0.0] * len(response_ids)
    if logps_with is not None and not record.is_satisfactory:
        without, judged = (torch.tensor(logps, dtype=torch.float64) for logps in (logps_without, logps_with))
        blame = flag_tokens(
            without,
            judged,
            threshold=settings.threshold,
            unlikelihood_weight=settings.unlikelihood_weight,
            gamma=settings.gamma,
        )
        is_flagged = blame.is_flagged.tolist()
        # A weight that is too small for a number is still above 0, as that of every flagged token.
        smallest = sys.float_info.min
        weights = [
            max(float(f"{weight:.6g}"), smallest) if flag else 0.0
            for flag, weight in zip(is_flagged, blame.weights.tolist(), strict=True)
        ]
    return TokenScores(
        record=record,
        token_ids=response_ids,
        tokens=[str(encoder.tokenizer.decode([index])) for index in response_ids],
        spans=encoder.locate_tokens(record.output, response_ids),
        logps_without=logps_without,
        logps_with=logps_with,
        is_flagged=is_flagged,
        weights=weights,
        threshold=settings.threshold,
        unlikelihood_weight=settings.unlikelihood_weight,
        gamma=settings.gamma,
        detector=detector,
        tokenizer=fingerprint_tokenizer(encoder.tokenizer),
        template=fingerprint_template(encoder),
    )
