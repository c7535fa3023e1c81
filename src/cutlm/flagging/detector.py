"""Flags and weights (eq. 5 and 6) from log-probabilities that a frozen model assigns to a response.

`flag_response` is the one place where flags are made: `cutlm blame`, the trainer's frozen detector and the chat use it.
`blame_file` scores a file of records and can resume; `blame_record` scores one record in memory.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlm.data.files import read_bytes, write_text
from cutlm.data.journal import Journal, refuse_foreign
from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.scoring import Scorer
from cutlm.flagging.sensitivity import NUM_RECORDS, Contrast, Sensitivity, compute_sensitivity, sample_foreign
from cutlm.flagging.token_scores import (
    SCORE_FIELDS,
    TokenScores,
    fingerprint_tokenizer,
    strip_scores,
    write_token_scores,
)
from cutlm.losses import flag_tokens
from cutlm.prompting.encoding import EncodedRecord, EncodedRecords, Encoder, encode_records, view_both_contexts

Logps = tuple[list[float], list[float]]  # of a response [T], without and with the judgment


@dataclass(frozen=True)
class FlagSettings:
    """How flags and weights are made.

    Attributes:
        threshold: lambda of eq. 5.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight of eq. 6; 0 turns it off.
        max_length: Maximum number of tokens in a prompt and the response; prompts are truncated on the left.
        with_praise: Score satisfactory records with their judgment too ("Perfect." if they have none), to calibrate
            thresholds. They are never flagged.
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


def flag_response(
    logps_without: Sequence[float], logps_with: Sequence[float], settings: FlagSettings, num_template_tokens: int = 0
) -> tuple[list[bool], list[float]]:
    """Flag the tokens of one response (eq. 5) and weigh them (eq. 6), in float64.

    Args:
        logps_without: [T] log p(y_t | x, y_<t), rounded as in a file of token scores.
        logps_with: [T] log p(y_t | x, j, y_<t).
        settings: Threshold, unlikelihood weight and gamma.
        num_template_tokens: Tokens at the start that the chat template writes; they are never flagged.

    Returns:
        Flags [T], and weights [T] that are 0 for tokens that are not flagged.

    Example:
        >>> flag_response([-2.0, -0.1], [-1.0, -0.1], FlagSettings(gamma=0.0))
        ([True, False], [1.0, 0.0])
    """
    flags = flag_tokens(
        torch.tensor(logps_without, dtype=torch.float64),
        torch.tensor(logps_with, dtype=torch.float64),
        threshold=settings.threshold,
        unlikelihood_weight=settings.unlikelihood_weight,
        gamma=settings.gamma,
        can_flag=torch.arange(len(logps_with)) >= num_template_tokens,
    )
    # A weight that underflows must still be above 0, like that of every flagged token.
    weights = [max(float(f"{weight:.6g}"), sys.float_info.min) for weight in flags.weights.tolist()]
    is_flagged = flags.is_flagged.tolist()
    return is_flagged, [weight if flag else 0.0 for flag, weight in zip(is_flagged, weights, strict=True)]


def round_logps(logps: Tensor) -> list[float]:
    """Log-probabilities as they are stored. Flags are made from these, so that a file is consistent with itself."""
    return [min(0.0, round(value, 6)) + 0.0 for value in logps.tolist()]


@dataclass
class BlameReport:
    """The token scores of a file, in the order of the records, and counts."""

    scores: list[TokenScores]
    num_resumed: int = 0  # records taken from an interrupted run
    num_truncated: int = 0  # records with a truncated prompt
    left_out: list[str] = field(default_factory=list)  # a sentence for each record that is too long
    sensitivity: Sensitivity | None = None  # None if it was not asked for, or fewer than two judgments differ

    @property
    def judged(self) -> list[TokenScores]:
        """Those of unsatisfactory records."""
        return [scores for scores in self.scores if not scores.record.is_satisfactory]

    @property
    def num_tokens(self) -> int:
        """Tokens of unsatisfactory responses."""
        return sum(len(scores.token_ids) for scores in self.judged)

    @property
    def num_flagged(self) -> int:
        return sum(sum(scores.is_flagged) for scores in self.scores)

    @property
    def num_without_flag(self) -> int:
        """Unsatisfactory records without any flag."""
        return sum(not any(scores.is_flagged) for scores in self.judged)

    def describe(self) -> str:
        """Counts for the user, and how far the flags can be trusted, in lines."""
        num_judged, num_tokens, num_flagged = len(self.judged), self.num_tokens, self.num_flagged
        lines = [
            f"{len(self.scores)} records scored ({len(self.scores) - num_judged} satisfactory, {num_judged}"
            f" unsatisfactory); {self.num_truncated} with a truncated prompt; {len(self.left_out)} left out",
            f"{num_flagged} of {num_tokens} tokens of unsatisfactory responses flagged"
            f" ({num_flagged / max(1, num_tokens):.1%}); {self.num_without_flag} of these records without any flag",
        ]
        if self.sensitivity is not None:
            lines.append(self.sensitivity.describe())
            lines += [f"warning: {noise}" for noise in [self.sensitivity.describe_noise()] if noise]
        return "\n".join(lines)


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
    sensitivity_records: int = NUM_RECORDS,
) -> BlameReport:
    """Score records and write their token scores, in the order of the records, and a report (`OUT.report.json`).

    Finished batches go to `OUT.partial` at once, from which an interrupted run resumes.

    Args:
        records: The records.
        locations: The location of each, such as `data.jsonl:17`, for messages.
        out: The file to write.
        encoder: Tokenizer and template.
        score: Computes the log-probabilities.
        settings: Flags, weights and lengths.
        detector: Fingerprint of the model.
        backend: Further settings that the numbers depend on, by name, such as the dtype.
        overwrite: Replace a partial file of another run.
        sensitivity_records: Number of records to measure the sensitivity on; 0 does not measure it.

    Raises:
        ConfigError: `sensitivity_records` is negative.
        DataError: A record has fields whose names token scores use, or no record fits.
        UserError: A partial file of another run exists, or the scorer failed.
    """
    if sensitivity_records < 0:
        raise ConfigError(f"sensitivity_records: expected a whole number of at least 0, got {sensitivity_records}")
    records = [strip_scores(record) for record in records]
    refuse_clashes(records, locations)
    encoded = encode_for_scoring(records, locations, encoder, settings)
    if not encoded.rows:
        raise DataError(encoded.left_out, hint="no record remains to score; set a larger max_length")
    kept = [records[index] for index in encoded.indices]
    header = describe_run(records, encoder, settings, detector, backend)
    journal = Journal(out, header, overwrite=overwrite)
    num_resumed = count_resumed(journal)
    scores = score_with_journal(encoded.rows, kept, journal, encoder, score, settings, detector)
    sensitivity = measure_sensitivity(
        encoded.rows,
        kept,
        collect_logps(scores),
        encoder,
        score,
        settings,
        num_records=sensitivity_records,
        journal=journal,
    )
    report = BlameReport(scores, num_resumed, encoded.num_truncated, encoded.left_out, sensitivity)
    write_report(out, report)  # first, so that a file of scores has its report
    write_token_scores(out, scores)
    journal.remove()
    return report


def count_resumed(journal: Journal) -> int:
    """Count the records whose log-probabilities a journal holds."""
    return sum("logps_foreign" not in line for line in journal.lines)


def score_with_journal(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[JudgedRecord],
    journal: Journal,
    encoder: Encoder,
    score: Scorer,
    settings: FlagSettings,
    detector: str,
) -> list[TokenScores]:
    """Score the rows that a journal does not hold yet, appending each batch to it."""
    if not all(_matches_row(line, rows) for line in journal.lines):
        refuse_foreign(journal.path)
    lines = [line for line in journal.lines if "logps_foreign" not in line]
    finished = {line["index"]: (line["logps_without"], line["logps_with"]) for line in lines}
    with journal, closing(score(rows, frozenset(finished))) as batches:
        for batch in batches:
            logps = {
                index: (round_logps(without), None if judged is None else round_logps(judged))
                for index, without, judged in batch
            }
            journal.append({"index": key, "logps_without": a, "logps_with": b} for key, (a, b) in logps.items())
            finished |= logps
    marks = _fingerprint(encoder, settings, detector)
    return [
        make_scores(record, row["response_ids"], *finished[index], encoder, settings, marks)
        for index, (row, record) in enumerate(zip(rows, records, strict=True))
    ]


def collect_logps(scores: Sequence[TokenScores]) -> dict[int, Logps]:
    """Collect the log-probabilities of responses that were scored in both contexts, by their indices."""
    return {
        index: (one.logps_without, one.logps_with)
        for index, one in enumerate(scores)
        if one.logps_without is not None and one.logps_with is not None
    }


def measure_sensitivity(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[JudgedRecord],
    logps: Mapping[int, Logps],
    encoder: Encoder,
    score: Scorer,
    settings: FlagSettings,
    *,
    num_records: int,
    journal: Journal | None = None,
) -> Sensitivity | None:
    """Measure the sensitivity of a model: score a sample of the rows with foreign judgments, too.

    Args:
        rows: Encoded rows.
        records: The record of each.
        logps: For each unsatisfactory row, by its index, the log-probabilities without and with its own judgment.
        encoder: Tokenizer and template.
        score: Computes the log-probabilities.
        settings: Threshold and lengths.
        num_records: Size of the sample; 0 measures nothing.
        journal: Holds what a stopped run has finished, whatever the size of its sample, and gets what is new.

    Returns:
        The sensitivity; None if fewer than two judgments differ.
    """
    contexts = sample_foreign(rows, records, encoder, settings.max_length, num_records)
    if not contexts:
        return None
    foreign_rows = [
        {
            "prompt_ids": context.prompt_ids,
            "judged_prompt_ids": None,
            "response_ids": rows[context.target]["response_ids"],
            "location": f"{rows[context.target]['location']} with the judgment of {rows[context.source]['location']}",
        }
        for context in contexts
    ]
    places = {(context.target, context.source): place for place, context in enumerate(contexts)}
    finished: dict[int, list[float]] = {}
    for line in journal.lines if journal else ():
        if "logps_foreign" in line and (place := places.get((line["index"], line["source"]))) is not None:
            finished[place] = line["logps_foreign"]
    if len(finished) < len(contexts):
        with journal or nullcontext(), closing(score(foreign_rows, frozenset(finished))) as batches:
            for batch in batches:
                scored = {place: round_logps(foreign) for place, foreign, _ in batch}
                if journal is not None:
                    journal.append(
                        {"index": contexts[place].target, "source": contexts[place].source, "logps_foreign": values}
                        for place, values in scored.items()
                    )
                finished |= scored
    contrasts = [
        Contrast(*logps[context.target], finished[place], rows[context.target].get("num_template_tokens") or 0)
        for place, context in enumerate(contexts)
    ]
    return compute_sensitivity(contrasts, settings.threshold)


def name_report_file(scores: str | Path) -> Path:
    """Name the report next to a file of token scores."""
    return Path(f"{scores}.report.json")


def write_report(scores: str | Path, report: BlameReport) -> None:
    """Write the report of a file of token scores next to it."""
    content = {
        "num_records": len(report.scores),
        "flagged_share": report.num_flagged / report.num_tokens if report.num_tokens else None,
        "sensitivity": report.sensitivity and asdict(report.sensitivity),
    }
    write_text(name_report_file(scores), json.dumps(content, indent=2) + "\n")


def read_sensitivity(scores: str | Path) -> Sensitivity | None:
    """Read the sensitivity from the report next to a file of token scores; None if there is none that can be used."""
    try:
        return Sensitivity(**json.loads(read_bytes(name_report_file(scores)))["sensitivity"])
    except (ValueError, RecursionError, KeyError, TypeError):  # including DataError, if the file is missing
        return None


def blame_record(
    record: JudgedRecord, encoder: Encoder, score: Scorer, settings: FlagSettings, detector: str
) -> tuple[TokenScores, bool]:
    """Score one record in memory; return its token scores, and whether a prompt was truncated."""
    encoded = encode_for_scoring([record], ["the response"], encoder, settings)
    if not encoded.rows:
        raise DataError(encoded.left_out, hint="no record remains to score; set a larger max_length")
    (row,) = encoded.rows
    with closing(score([row], ())) as batches:
        ((_, without, judged),) = (scored for batch in batches for scored in batch)
    logps = round_logps(without), None if judged is None else round_logps(judged)
    marks = _fingerprint(encoder, settings, detector)
    return make_scores(record, row["response_ids"], *logps, encoder, settings, marks), encoded.num_truncated > 0


def describe_run(
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    settings: FlagSettings,
    detector: str,
    backend: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the log-probabilities depend on, by name. Flags are not among it: they are made at the end."""
    rows = [record.model_dump(mode="json") for record in records]
    return {
        "max_length": settings.max_length,
        "with_praise": settings.with_praise,
        **backend,
        "model": detector,
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": encoder.fingerprint,
        "template_date": encoder.template_date,
        "data": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def encode_for_scoring(
    records: Sequence[JudgedRecord], locations: Sequence[str], encoder: Encoder, settings: FlagSettings
) -> EncodedRecords:
    """Encode both contexts of each record; with `with_praise`, those of satisfactory records too."""

    def view_with_praise(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
        judgment = (record.judgment or PRAISE) if record.is_satisfactory else record.judgment
        conversation = record.conversation
        return EncodedRecord(
            encoder.encode_prompt(conversation),
            encoder.encode_prompt(conversation, judgment),
            encoder.encode_response(record.output),
        )

    view = view_with_praise if settings.with_praise else view_both_contexts
    return encode_records(records, locations, encoder, settings.max_length, view)


def make_scores(
    record: JudgedRecord,
    response_ids: list[int],
    logps_without: list[float],
    logps_with: list[float] | None,
    encoder: Encoder,
    settings: FlagSettings,
    marks: Mapping[str, Any],
) -> TokenScores:
    """Token scores of one response from its rounded log-probabilities."""
    is_flagged, weights = [False] * len(response_ids), [0.0] * len(response_ids)
    if logps_with is not None and not record.is_satisfactory:
        num_template_tokens = encoder.count_template_tokens(response_ids)
        is_flagged, weights = flag_response(logps_without, logps_with, settings, num_template_tokens)
    return TokenScores(
        record=record,
        token_ids=response_ids,
        tokens=[str(encoder.tokenizer.decode([index])) for index in response_ids],
        spans=encoder.locate_tokens(record.output, response_ids),
        logps_without=logps_without,
        logps_with=logps_with,
        is_flagged=is_flagged,
        weights=weights,
        **marks,
    )


def _fingerprint(encoder: Encoder, settings: FlagSettings, detector: str) -> dict[str, Any]:
    """The fields of token scores that all records of a run share."""
    return {
        "threshold": settings.threshold,
        "unlikelihood_weight": settings.unlikelihood_weight,
        "gamma": settings.gamma,
        "detector": detector,
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": encoder.fingerprint,
        "template_date": encoder.template_date,
    }


def _matches_row(line: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a journal line holds log-probabilities of one of these rows."""
    index = line["index"]
    if type(index) is not int or not 0 <= index < len(rows):
        return False
    row = rows[index]
    if "logps_foreign" in line:
        return type(line.get("source")) is int and _are_logps(line["logps_foreign"], len(row["response_ids"]))
    if not {"logps_without", "logps_with"} <= set(line):
        return False
    is_judged = row["judged_prompt_ids"] is not None
    columns = [line["logps_without"], *([line["logps_with"]] if is_judged else [])]
    if not all(_are_logps(logps, len(row["response_ids"])) for logps in columns):
        return False
    return is_judged or line["logps_with"] is None


def _are_logps(values: Any, length: int) -> bool:
    """Whether a value of a journal line is a list of so many log-probabilities."""
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(logp, float) and math.isfinite(logp) for logp in values)
    )


def refuse_clashes(records: Sequence[JudgedRecord], locations: Sequence[str]) -> None:
    """Raises:
    DataError: A record has a field that its token scores would overwrite.
    """
    problems = [
        f"{location}: field {name!r}: token scores use this name; rename the field in the records"
        for location, record in zip(locations, records, strict=True)
        for name in record.model_extra or {}
        if name in SCORE_FIELDS
    ]
    if problems:
        raise DataError(problems)
