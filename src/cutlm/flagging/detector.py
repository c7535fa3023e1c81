"""Flags and weights (eq. 5 and 6) from log-probabilities that a frozen model assigns to a response.

`flag_response` is the one place where flags are made: `cutlm blame`, the trainer's frozen detector and the chat use it.
`blame_file` scores a file of records and can resume; `blame_record` scores one record in memory.
"""

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import torch
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from torch import Tensor

from cutlm.data.files import write_text
from cutlm.data.journal import Journal, refuse_foreign
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.contrast import CONTRASTS, Encode, Plan, average_logps, find_threshold, plan_contexts
from cutlm.flagging.report import Sensitivity, name_report_file
from cutlm.flagging.scoring import Scored, Scorer
from cutlm.flagging.sensitivity import (
    LEAST_RANK,
    NUM_RECORDS,
    Contrast,
    compute_sensitivity,
    rank_judgment,
)
from cutlm.flagging.teacher import Columns, TeacherSettings, encode_teacher_prompts, find_column_problem
from cutlm.flagging.token_scores import (
    SCORE_FIELDS,
    TokenScores,
    add_surprise,
    fingerprint_tokenizer,
    strip_scores,
    write_token_scores,
)
from cutlm.losses import flag_tokens
from cutlm.prompting.encoding import Encoder, RenderedRecord, view_both_contexts
from cutlm.prompting.rows import EncodedRecords, encode_records

_MAX_LOCATIONS_NAMED = 5
_NUM_ENCODED = 1000

# Unsatisfactory records with foreign judgments for threshold "auto": a hundred thousand tokens give a share of 1 %.
_NUM_CALIBRATED = 1000


class Logps(NamedTuple):
    """Log-probabilities of a response of T tokens under a model."""

    without: list[float]  # [T] log-probabilities without the judgment
    judged: list[float] | None  # [T] with it, if it has one
    teacher: Columns | None = None  # the distributions of a teacher, if they were asked for


@dataclass(frozen=True)
class FlagSettings:
    """How flags and weights are made.

    Attributes:
        threshold: lambda of eq. 5; "auto" for the smallest one that flags at most 1 % of the tokens under foreign
            judgments, and of satisfactory records, if they are scored with their praise.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight of eq. 6; 0 turns it off.
        max_length: Maximum number of tokens in a prompt and the response; prompts are truncated on the left.
        contrast: Baseline for the log-probability with the judgment: "judgment" for the one without (eq. 5), "foreign"
            for the logarithm of the mean probability under judgments of other records, "perfect" for the one with
            praise.
        num_foreign: Number of these judgments of other records.
        surprise_weight: kappa: a token is flagged if its log ratio, plus kappa times its surprise (minus the
            log-probability that the one with the judgment is compared with), is above log lambda. 0: eq. 5. Tokens that
            are unlikely are more often wrong, so this is the log odds of a token being wrong with a prior.
        with_praise: Score satisfactory records with their praise too ("Perfect." if they have none), to calibrate
            thresholds. They are never flagged.
        drop_ineffective: Leave out unsatisfactory records whose judgment has no larger effect on the response than
            those of other records: less than `LEAST_RANK` of `NUM_RIVALS` of them; see `rank_judgment`.
        weigh_by_effect: Find the share of these judgments that have a smaller effect, by which training can weigh the
            record.
        teacher: How the distributions of a teacher are made in the same pass; None for flags only.
    """

    threshold: float | Literal["auto"] = 1.1
    unlikelihood_weight: float = 1.0
    gamma: float = 1.0
    max_length: int = 2048
    with_praise: bool = False
    contrast: str = "judgment"
    num_foreign: int = 4
    surprise_weight: float = 0.0
    drop_ineffective: bool = False
    weigh_by_effect: bool = False
    teacher: TeacherSettings | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.threshold != "auto" and (isinstance(self.threshold, str) or not 1 <= self.threshold < math.inf):
            problems.append(f"threshold: expected a number of at least 1, or auto, got {self.threshold}")
        if self.contrast not in CONTRASTS:
            problems.append(f"contrast: expected one of {', '.join(CONTRASTS)}, got {self.contrast!r}")
        if self.num_foreign < 1:
            problems.append(f"num_foreign: expected a whole number of at least 1, got {self.num_foreign}")
        if not 0 < self.unlikelihood_weight < math.inf:
            problems.append(f"unlikelihood_weight: expected a number above 0, got {self.unlikelihood_weight}")
        if not 0 <= self.surprise_weight < math.inf:
            problems.append(f"surprise_weight: expected a number of at least 0, got {self.surprise_weight}")
        if not 0 <= self.gamma < math.inf:
            problems.append(f"gamma: expected a number of at least 0, got {self.gamma}")
        if self.max_length < 2:
            problems.append(f"max_length: expected a whole number of at least 2, got {self.max_length}")
        if problems:
            raise ConfigError(problems)


def flag_response(
    logps_reference: Sequence[float], logps_with: Sequence[float], settings: FlagSettings, num_template_tokens: int = 0
) -> tuple[list[bool], list[float]]:
    """Flag the tokens of one response (eq. 5) and weigh them (eq. 6), in float64.

    Args:
        logps_reference: [T] log p(y_t | x, y_<t), or what else `settings.contrast` compares with, rounded as in a file
            of token scores.
        logps_with: [T] log p(y_t | x, j, y_<t).
        settings: Threshold (a number), unlikelihood weight, gamma and surprise weight.
        num_template_tokens: Tokens at the start that the chat template writes; they are never flagged.

    Returns:
        Flags [T], and weights [T] that are 0 for tokens that are not flagged.

    Example:
        >>> flag_response([-2.0, -0.1], [-1.0, -0.1], FlagSettings(gamma=0.0))
        ([True, False], [1.0, 0.0])
    """
    assert settings.threshold != "auto", "it has been found before"
    flags = flag_tokens(
        torch.tensor(add_surprise(logps_reference, settings.surprise_weight), dtype=torch.float64),
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
    """Counts of the token scores of a file."""

    num_records: int = 0
    num_judged: int = 0  # unsatisfactory records
    num_tokens: int = 0  # tokens of unsatisfactory responses
    num_flagged: int = 0
    num_without_flag: int = 0  # unsatisfactory records without any flag
    num_resumed: int = 0  # records taken from an interrupted run
    num_truncated: int = 0  # records with a truncated prompt
    left_out: list[str] = field(default_factory=list)  # a sentence for each record that is too long
    ineffective: dict[str, float] = field(default_factory=dict)  # by location, the ranks of judgments left out
    sensitivity: Sensitivity | None = None  # None if it was not asked for, or fewer than two judgments differ
    settings: FlagSettings = field(default_factory=FlagSettings)  # with the threshold that was found
    is_threshold_found: bool = False

    def count(self, scores: TokenScores) -> None:
        """Count the token scores of one more record."""
        self.num_records += 1
        num_flagged = sum(scores.is_flagged)
        self.num_flagged += num_flagged
        if not scores.record.is_satisfactory:
            self.num_judged += 1
            self.num_tokens += len(scores.token_ids)
            self.num_without_flag += not num_flagged

    def describe(self) -> str:
        """Counts for the user, and how far the flags can be trusted, in lines."""
        num_judged, num_tokens, num_flagged = self.num_judged, self.num_tokens, self.num_flagged
        lines = [
            f"{self.num_records} records scored ({self.num_records - num_judged} satisfactory, {num_judged}"
            f" unsatisfactory); {self.num_truncated} with a truncated prompt; {len(self.left_out)} left out",
            f"{num_flagged} of {num_tokens} tokens of unsatisfactory responses flagged"
            f" ({num_flagged / max(1, num_tokens):.1%}); {self.num_without_flag} of these records without any flag",
        ]
        if self.settings.drop_ineffective:
            lines.append(describe_ineffective(self.ineffective, num_judged + len(self.ineffective)))
        if self.settings.contrast != "judgment":
            lines.append(f"the flags are against contrast: {self.settings.contrast}")
        if self.is_threshold_found:
            lines.append(f"threshold: auto found {self.settings.threshold:g}")
        if self.sensitivity is not None:
            lines.append(self.sensitivity.describe())
            lines += [f"warning: {noise}" for noise in [self.sensitivity.describe_noise()] if noise]
        return "\n".join(lines)


def describe_ineffective(locations: Collection[str], num_judged: int) -> str:
    """Say which of the unsatisfactory records are left out by `drop_ineffective`."""
    named = ", ".join([*locations][:_MAX_LOCATIONS_NAMED])
    more = f" and {num_more} more" if (num_more := len(locations) - _MAX_LOCATIONS_NAMED) > 0 else ""
    return (
        f"drop_ineffective: {len(locations)} of {num_judged} unsatisfactory records left out, because their judgment"
        " has no larger effect on the response than those of other records" + (f": {named}{more}" if named else "")
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
    if not len(encoded.rows):
        raise DataError(encoded.left_out, hint="no record remains to score; set a larger max_length")
    kept = [records[index] for index in encoded.indices]
    plan = plan_comparison(encoded.rows, kept, encoder, settings, sensitivity_records)
    header = describe_run(records, encoder, settings, detector, backend)
    journal = Journal(out, header, overwrite=overwrite)
    num_resumed = count_resumed(journal)
    logps = score_with_journal(encoded.rows, journal, score)
    comparison = compare_contexts(encoded.rows, kept, logps, plan, score, settings, journal)
    report = BlameReport(
        num_resumed=num_resumed,
        num_truncated=encoded.num_truncated,
        left_out=encoded.left_out,
        sensitivity=comparison.sensitivity if sensitivity_records else None,
        settings=comparison.settings,
        is_threshold_found=settings.threshold == "auto",
        ineffective={encoded.rows[index]["location"]: rank for index, rank in comparison.ineffective.items()},
    )
    if len(report.ineffective) == len(kept):
        named = describe_ineffective(report.ineffective, len(kept))
        raise DataError(f"{named}; no record remains: remove drop_ineffective, or use another model")
    write_scores(out, make_all_scores(encoded.rows, kept, logps, comparison, encoder, detector), report)
    journal.remove()
    return report


def write_scores(out: str | Path, scores: Iterable[TokenScores], report: BlameReport) -> None:
    """Write token scores one by one, count them in their report and write that too."""

    def count() -> Iterator[TokenScores]:
        for one in scores:
            report.count(one)
            yield one
        write_report(out, report)  # before the scores have their name, so that a file of scores has its report

    write_token_scores(out, count())


def count_resumed(journal: Journal) -> int:
    """Count the records whose log-probabilities a journal holds."""
    return sum("logps_foreign" not in line for line in journal.lines)


class JournalLogps(Mapping[int, Logps]):
    """The log-probabilities that a journal holds, by the index of the row; they stay in its file."""

    def __init__(self, journal: Journal, places: dict[int, int]) -> None:
        self._journal = journal
        self._places = places  # the line of each row

    def __getitem__(self, index: int) -> Logps:
        return _read_line(self._journal.lines[self._places[index]])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def score_with_journal(rows: Sequence[Mapping[str, Any]], journal: Journal, score: Scorer) -> JournalLogps:
    """Score the rows that a journal does not hold yet, appending each batch to it; return all by their indices."""
    places = {}
    for place, line in enumerate(journal.lines):
        if not _matches_row(line, rows):
            refuse_foreign(journal.path)
        if "logps_foreign" not in line:
            places[line["index"]] = place
    with journal, closing(score(rows, frozenset(places))) as batches:
        for batch in batches:
            logps = round_batch(batch)
            places |= {index: len(journal.lines) + number for number, index in enumerate(logps)}
            journal.append(_write_line(index, one) for index, one in logps.items())
    return JournalLogps(journal, places)


def round_batch(batch: Sequence[Scored]) -> dict[int, Logps]:
    """The log-probabilities of a batch as they are stored, by the indices of the rows."""
    return {
        index: Logps(round_logps(without), None if judged is None else round_logps(judged), teacher)
        for index, without, judged, teacher in batch
    }


def _write_line(index: int, logps: Logps) -> dict[str, Any]:
    line: dict[str, Any] = {"index": index, "logps_without": logps.without, "logps_with": logps.judged}
    if logps.teacher is not None:
        line |= {"teacher_ids": logps.teacher.ids, "teacher_logps": logps.teacher.logps}
    return line


def _read_line(line: Mapping[str, Any]) -> Logps:
    teacher = Columns(line["teacher_ids"], line["teacher_logps"]) if "teacher_ids" in line else None
    return Logps(line["logps_without"], line["logps_with"], teacher)


@dataclass(frozen=True)
class Comparison:
    """Inputs for the flags besides the log-probabilities in both contexts.

    Attributes:
        settings: The settings, with the threshold that was found for "auto".
        references: By row, the log-probabilities [T] that those with the judgment are compared with, unless these are
            those without. They may be read when they are asked for.
        sensitivity: How far the flags depend on the content of the judgments; None if fewer than two judgments
            differ, or if it was not requested.
        ranks: By unsatisfactory row, the rank of the effect of its judgment, if records are left out or weighed by it.
    """

    settings: FlagSettings
    references: Mapping[int, list[float]]
    sensitivity: Sensitivity | None
    ranks: dict[int, float] = field(default_factory=dict)

    @property
    def ineffective(self) -> dict[int, float]:
        """The rows that are left out, with the ranks of their judgments."""
        if not self.settings.drop_ineffective:
            return {}
        return {index: rank for index, rank in self.ranks.items() if rank < LEAST_RANK}


def plan_comparison(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    settings: FlagSettings,
    num_records: int,
) -> Plan:
    """Choose the contexts to score for the contrast, the threshold and the sensitivity of `num_records` rows.

    Raises:
        ConfigError: The settings need more judgments that differ.
    """
    plan = plan_contexts(
        rows,
        records,
        encoder,
        settings.max_length,
        contrast=settings.contrast,
        num_foreign=settings.num_foreign,
        num_records=max(num_records, _NUM_CALIBRATED) if settings.threshold == "auto" else num_records,
        has_rivals=settings.drop_ineffective or settings.weigh_by_effect,
    )
    if settings.threshold == "auto" and not plan.foreign:
        raise ConfigError(
            "threshold: auto needs unsatisfactory records with at least two different judgments; set a number"
        )
    return plan


def compare_contexts(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[JudgedRecord],
    logps: Mapping[int, Logps],
    plan: Plan,
    score: Scorer,
    settings: FlagSettings,
    journal: Journal | None = None,
) -> Comparison:
    """Score the contexts of a plan and derive the inputs for the flags.

    Args:
        rows: Encoded rows.
        records: The record of each.
        logps: For each judged row, by its index, the log-probabilities without and with its own judgment.
        plan: The contexts.
        score: Computes the log-probabilities.
        settings: Settings of the flags.
        journal: Holds the results of a stopped run and gets the new ones.
    """
    scored = score_contexts(rows, plan.pairs, plan.encode, score, journal)
    references = References(plan.references.sources, scored)

    def count_template_tokens(index: int) -> int:
        return rows[index].get("num_template_tokens") or 0

    ranks = {}
    for index, sources in plan.rivals.sources.items():
        without, judged, _ = logps[index]
        assert judged is not None
        rivals = [scored[index, source] for source in sources]
        ranks[index] = rank_judgment(without, judged, rivals, count_template_tokens(index))
    contrasts = []
    for context in plan.foreign:
        without, own, _ = logps[context.target]
        assert own is not None
        reference = references.get(context.target, without)
        reference = add_surprise(reference, settings.surprise_weight)
        contrasts.append(
            Contrast(reference, own, scored[context.target, context.source], count_template_tokens(context.target))
        )
    if settings.threshold == "auto":
        ratios = {"foreign": array("d"), "praise": array("d")}
        for one in contrasts:
            ratios["foreign"].extend(_subtract(one.foreign, one.without)[one.num_template_tokens :])
        for index, (without, judged, _) in logps.items():
            if judged is not None and records[index].is_satisfactory:
                reference = add_surprise(references.get(index, without), settings.surprise_weight)
                ratios["praise"].extend(_subtract(judged, reference)[count_template_tokens(index) :])
        settings = replace(settings, threshold=find_threshold(ratios))
    assert settings.threshold != "auto"
    return Comparison(settings, references, compute_sensitivity(contrasts, settings.threshold), ranks)


def _subtract(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


Pair = tuple[int, int | None]  # a row, and the row whose judgment it gets; None for praise


class JournalContexts(Mapping[Pair, list[float]]):
    """The log-probabilities of contexts that a journal holds; they stay in its file."""

    def __init__(self, journal: Journal, places: dict[Pair, int]) -> None:
        self._journal = journal
        self._places = places  # the line of each context

    def __getitem__(self, pair: Pair) -> list[float]:
        logps: list[float] = self._journal.lines[self._places[pair]]["logps_foreign"]
        return logps

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class References(Mapping[int, list[float]]):
    """By row, the averages of its log-probabilities in other contexts, computed when they are asked for."""

    def __init__(self, sources: Mapping[int, Sequence[int | None]], scored: Mapping[Pair, list[float]]) -> None:
        self._sources, self._scored = sources, scored

    def __getitem__(self, index: int) -> list[float]:
        return round_logps(average_logps([self._scored[index, source] for source in self._sources[index]]))

    def __iter__(self) -> Iterator[int]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def score_contexts(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], encode: Encode, score: Scorer, journal: Journal | None
) -> Mapping[Pair, list[float]]:
    """Score contexts that a journal does not hold yet; return all. Without a journal, they are in memory."""
    known: dict[Pair, list[float]] = {}
    places: dict[Pair, int] = {}
    numbers = {pair: number for number, pair in enumerate(pairs)}
    for place, line in enumerate(journal.lines if journal else ()):
        if "logps_foreign" in line and (pair := (line["index"], line["source"])) in numbers:
            places[pair] = place
    if len(places) < len(pairs):
        done = frozenset(numbers[pair] for pair in places)
        with journal or nullcontext(), closing(score(_encode_contexts(rows, pairs, encode), done)) as batches:
            for batch in batches:
                scored = {pairs[one.row]: round_logps(one.without) for one in batch}
                if journal is None:
                    known |= scored
                    continue
                places |= {pair: len(journal.lines) + number for number, pair in enumerate(scored)}
                journal.append(
                    {"index": index, "source": source, "logps_foreign": values}
                    for (index, source), values in scored.items()
                )
    return known if journal is None else JournalContexts(journal, places)


def _encode_contexts(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], encode: Encode) -> Dataset:
    """Encode contexts as rows to score, a thousand at a time as Python objects."""
    ids = pyarrow.list_(pyarrow.int32())
    types = {"prompt_ids": ids, "judged_prompt_ids": ids, "response_ids": ids, "location": pyarrow.string()}
    tables = []
    for start in range(0, len(pairs), _NUM_ENCODED):
        columns: dict[str, list[Any]] = {name: [] for name in types}
        for index, source in pairs[start : start + _NUM_ENCODED]:
            judgment = "praise" if source is None else f"the judgment of {rows[source]['location']}"
            columns["prompt_ids"].append(encode(index, source).prompt_ids)
            columns["judged_prompt_ids"].append(None)
            columns["response_ids"].append(rows[index]["response_ids"])
            columns["location"].append(f"{rows[index]['location']} with {judgment}")
        tables.append(pyarrow.table(columns, pyarrow.schema(types)))
    return Dataset(pyarrow.concat_tables(tables), fingerprint=generate_random_fingerprint())


def make_all_scores(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[JudgedRecord],
    logps: Mapping[int, Logps],
    comparison: Comparison,
    encoder: Encoder,
    detector: str,
) -> Iterator[TokenScores]:
    """Yield the token scores of all rows, in their order, without those whose judgment is ineffective."""
    marks, ineffective = describe_marks(encoder, comparison.settings, detector), comparison.ineffective
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        if index in ineffective:
            continue
        reference = comparison.references.get(index)
        response_ids = row["response_ids"]
        scores = make_scores(record, response_ids, logps[index], reference, encoder, comparison.settings, marks)
        yield replace(scores, judgment_rank=comparison.ranks.get(index))


def write_report(scores: str | Path, report: BlameReport) -> None:
    """Write the report of a file of token scores next to it."""
    content: dict[str, Any] = {
        "num_records": report.num_records,
        "threshold": report.settings.threshold,
        "contrast": report.settings.contrast,
        "surprise_weight": report.settings.surprise_weight,
        "num_foreign": report.settings.num_foreign if report.settings.contrast == "foreign" else None,
        "flagged_share": report.num_flagged / report.num_tokens if report.num_tokens else None,
        "sensitivity": report.sensitivity and asdict(report.sensitivity),
    }
    if report.settings.drop_ineffective:
        ranks = [{"location": location, "judgment_rank": rank} for location, rank in report.ineffective.items()]
        content |= {"num_ineffective": len(ranks), "ineffective": ranks}
    write_text(name_report_file(scores), json.dumps(content, indent=2) + "\n")


def blame_record(
    record: JudgedRecord, encoder: Encoder, score: Scorer, settings: FlagSettings, detector: str
) -> tuple[TokenScores, bool]:
    """Score one record in memory; return its token scores, and whether a prompt was truncated."""
    encoded = encode_for_scoring([record], ["the response"], encoder, settings)
    if not len(encoded.rows):
        raise DataError(encoded.left_out, hint="no record remains to score; set a larger max_length")
    rows, records = encoded.rows, [record]
    plan = plan_comparison(rows, records, encoder, settings, 0)
    with closing(score(rows, ())) as batches:
        (logps,) = map(round_batch, batches)
    comparison = compare_contexts(rows, records, logps, plan, score, settings)
    (scores,) = make_all_scores(rows, records, logps, comparison, encoder, detector)
    return scores, encoded.num_truncated > 0


def describe_run(
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    settings: FlagSettings,
    detector: str,
    backend: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the log-probabilities depend on, by name. Flags are not among it: they are made at the end."""
    rows = [record.model_dump(mode="json") for record in records]
    teacher = {"teacher": settings.teacher.describe()} if settings.teacher else {}
    return {
        "max_length": settings.max_length,
        "with_praise": settings.with_praise,
        **backend,
        "model": detector,
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": encoder.fingerprint,
        "template_date": encoder.template_date,
        "data": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        **teacher,
    }


def encode_for_scoring(
    records: Sequence[JudgedRecord], locations: Sequence[str], encoder: Encoder, settings: FlagSettings
) -> EncodedRecords:
    """Encode the contexts of each record; with `with_praise`, those of satisfactory records too."""

    def view_with_praise(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
        conversation = record.conversation
        return RenderedRecord(
            encoder.render(conversation),
            encoder.render(conversation, record.stated_judgment),
            encoder.render_response(record.output),
        )

    view = view_with_praise if settings.with_praise else view_both_contexts
    encoded = encode_records(records, locations, encoder, settings.max_length, view)
    if settings.teacher is not None:
        kept = [records[index] for index in encoded.indices]
        prompts = encode_teacher_prompts(encoded.rows, kept, encoder, settings.teacher, settings.max_length)
        column = pyarrow.array(prompts, pyarrow.list_(pyarrow.int32()))
        fingerprint = generate_random_fingerprint()
        encoded.rows = encoded.rows.add_column("teacher_prompt_ids", column, new_fingerprint=fingerprint)
    return encoded


def make_scores(
    record: JudgedRecord,
    response_ids: list[int],
    logps: Logps,
    logps_reference: list[float] | None,
    encoder: Encoder,
    settings: FlagSettings,
    marks: Mapping[str, Any],
) -> TokenScores:
    """Token scores of one response from its rounded log-probabilities."""
    is_flagged, weights = [False] * len(response_ids), [0.0] * len(response_ids)
    columns = None
    if logps.judged is not None and not record.is_satisfactory:
        num_template_tokens = encoder.count_template_tokens(response_ids)
        reference = logps.without if logps_reference is None else logps_reference
        is_flagged, weights = flag_response(reference, logps.judged, settings, num_template_tokens)
        if logps.teacher is not None and settings.teacher is not None:
            is_own = [place >= num_template_tokens for place in range(len(response_ids))]
            columns = logps.teacher.restrict(is_flagged if settings.teacher.flagged_only else is_own)
    return TokenScores(
        record=record,
        token_ids=response_ids,
        tokens=[str(encoder.tokenizer.decode([index])) for index in response_ids],
        spans=encoder.locate_tokens(record.output, response_ids),
        logps_without=logps.without,
        logps_with=logps.judged,
        logps_reference=logps_reference,
        is_flagged=is_flagged,
        weights=weights,
        teacher_ids=columns and columns.ids,
        teacher_logps=columns and columns.logps,
        **marks,
    )


def describe_marks(encoder: Encoder, settings: FlagSettings, detector: str) -> dict[str, Any]:
    """The fields of token scores that all records of a run share."""
    return {
        "threshold": settings.threshold,
        "unlikelihood_weight": settings.unlikelihood_weight,
        "gamma": settings.gamma,
        "contrast": settings.contrast,
        "surprise_weight": settings.surprise_weight,
        "detector": detector,
        "tokenizer": fingerprint_tokenizer(encoder.tokenizer),
        "template": encoder.fingerprint,
        "template_date": encoder.template_date,
        "teacher": settings.teacher and settings.teacher.describe(),
    }


def _matches_row(line: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a journal line holds log-probabilities of one of these rows."""
    index = line["index"]
    if type(index) is not int or not 0 <= index < len(rows):
        return False
    row = rows[index]
    if "logps_foreign" in line:
        return isinstance(line.get("source", ""), int | None) and _are_logps(
            line["logps_foreign"], len(row["response_ids"])
        )
    if not {"logps_without", "logps_with"} <= set(line):
        return False
    is_judged = row["judged_prompt_ids"] is not None
    columns = [line["logps_without"], *([line["logps_with"]] if is_judged else [])]
    if not all(_are_logps(logps, len(row["response_ids"])) for logps in columns):
        return False
    if row.get("teacher_prompt_ids") is not None:
        distributions = (line.get("teacher_ids"), line.get("teacher_logps"))
        if find_column_problem(*distributions, len(row["response_ids"])) is not None:
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
