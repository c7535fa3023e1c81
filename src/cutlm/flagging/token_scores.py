"""Token scores: the findings of a detector for every token of a response, one self-contained JSON object per line.

`cutlm blame` writes these files, people inspect and edit them, training reads them. Files can be split and
concatenated. A row is the record itself plus the fields of `SCORE_FIELDS`.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cutlm.data.files import (
    SourceRow,
    hash_file,
    is_plain_lines,
    join_hashes,
    read_line,
    read_rows,
    stream_lines,
    write_rows,
)
from cutlm.data.records import JudgedRecord, check_rows, describe_value, join_path
from cutlm.data.sources import as_sources, describe_sources, find_files
from cutlm.errors import DataError
from cutlm.flagging.teacher import find_column_problem
from cutlm.prompting.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cutlm.prompting.encoding import Encoder

SCHEMA_VERSION = 2  # the newest one; rows without a teacher are written as version 1
# What training compares with its own settings.
SETTINGS = ("threshold", "unlikelihood_weight", "gamma", "contrast", "surprise_weight")
_PROBE = "The naïve  answer: 12,345 + x_1?\n\n\tif (a) { return 'ok'; } 你好 🙂 ANTIDISESTABLISHMENT"
# Logarithms of probabilities are rounded in the file; a sum of probabilities may pass 1 by rounding.
MAX_LOGP = 1e-6
LARGEST_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class TokenScores:
    """One record, the log-probabilities of its response's T tokens in both contexts, and the flagged tokens.

    Attributes:
        record: The record.
        token_ids: [T], with the end-of-sequence token.
        tokens: [T] the text of each, for people.
        spans: [T] its [start, end) in characters of the response; see `cutlm.prompting.spans`.
        logps_without: [T] log p(y_t | x, y_<t); None if unknown, as for tokens of another tokenizer.
        logps_with: [T] log p(y_t | x, j, y_<t); None if not scored, as for satisfactory records.
        is_flagged: [T] whether the token is flagged.
        weights: [T] alpha * p(y_t | x, j)^gamma of a flagged token; 0 for any other.
        threshold: lambda of eq. 5.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight of eq. 6.
        detector: Fingerprint of the model.
        tokenizer: Fingerprint of the tokenizer; see `fingerprint_tokenizer`.
        template: Name and fingerprint of the prompts; see `Encoder.fingerprint`.
        template_date: The date in the prompts, such as "2026-11-26"; None if they have none.
        contrast: What `logps_with` is compared with to make flags: "judgment" for `logps_without` (eq. 5), "foreign" or
            "perfect" for `logps_reference`.
        logps_reference: [T] the log-probabilities under foreign judgments, averaged, or under "Perfect."; None if not
            scored.
        surprise_weight: kappa: how much a token's surprise counts besides its log ratio; 0 for eq. 5.
        judgment_rank: Share of judgments of other records that have a smaller effect on the response than its own one;
            None without `drop_ineffective` or `weigh_by_effect`, and of satisfactory records.
        teacher: How the distributions of a teacher were made (`cutlm.flagging.teacher.TeacherSettings`); None without.
        teacher_ids: [T][K] the tokens that the teacher finds most likely in the place of each token; empty where it is
            not asked, as for satisfactory records and, under objective redirect, tokens that are not flagged.
        teacher_logps: [T][K] their log-probabilities.
    """

    record: JudgedRecord
    token_ids: list[int]
    tokens: list[str]
    spans: list[Span]
    logps_without: list[float] | None
    logps_with: list[float] | None
    is_flagged: list[bool]
    weights: list[float]
    threshold: float
    unlikelihood_weight: float
    gamma: float
    detector: str
    tokenizer: str
    template: str
    template_date: str | None = None
    contrast: str = "judgment"
    logps_reference: list[float] | None = None
    surprise_weight: float = 0.0
    judgment_rank: float | None = None
    teacher: dict[str, Any] | None = None
    teacher_ids: list[list[int]] | None = None
    teacher_logps: list[list[float]] | None = None

    @property
    def log_ratios(self) -> list[float] | None:
        """[T] `logps_with` minus what it is compared with, which flags are made by; None if either is missing.

        With a surprise weight, the weighted surprise is added.
        """
        reference = self.logps_without if self.contrast == "judgment" else self.logps_reference
        if self.logps_with is None or reference is None:
            return None
        reference = add_surprise(reference, self.surprise_weight)
        return [judged - other for judged, other in zip(self.logps_with, reference, strict=True)]

    @property
    def num_template_tokens(self) -> int:
        """The number of tokens at the start that a chat template writes; they are never flagged."""
        return next((index for index, span in enumerate(self.spans) if tuple(span) != (0, 0)), len(self.spans))

    def drop_oldest_turn(self) -> "TokenScores | None":
        """Return the scores with a shorter conversation; see `JudgedRecord.drop_oldest_turn`."""
        shorter = self.record.drop_oldest_turn()
        return None if shorter is None else replace(self, record=shorter)

    def to_row(self) -> dict[str, Any]:
        """The record as a row of a file."""
        row = self.record.model_dump(mode="json", exclude_unset=True) | {"judgment": self.record.judgment}
        version, columns = (SCHEMA_VERSION, _COLUMNS) if self.teacher else (1, _COLUMNS[: -len(_TEACHER_FIELDS)])
        row |= {"schema_version": version, "is_satisfactory": self.record.is_satisfactory}
        for name in columns:
            row[name] = getattr(self, name)
        return row | {"spans": [list(span) for span in self.spans]}


_Token = Annotated[int, Field(ge=0, le=LARGEST_TOKEN)]
_Logp = Annotated[float, Field(le=MAX_LOGP)]
_Weight = Annotated[float, Field(ge=0)]
_Position = Annotated[int, Field(ge=0)]


class _Columns(BaseModel):
    """The fields that token scores add to a record."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    schema_version: int
    is_satisfactory: bool
    token_ids: list[_Token]
    tokens: list[str]
    spans: list[Annotated[tuple[_Position, _Position], Field(strict=False)]]
    logps_without: list[_Logp] | None
    logps_with: list[_Logp] | None
    is_flagged: list[bool]
    weights: list[_Weight | None]
    threshold: _Weight
    unlikelihood_weight: Annotated[float, Field(gt=0)]
    gamma: _Weight
    detector: str
    tokenizer: str
    template: str
    template_date: str | None = None
    contrast: Literal["judgment", "foreign", "perfect"] = "judgment"
    logps_reference: list[_Logp] | None = None
    surprise_weight: _Weight = 0.0
    judgment_rank: Annotated[float, Field(ge=0, le=1)] | None = None
    teacher: dict[str, Any] | None = None
    teacher_ids: list[list[_Token]] | None = None
    teacher_logps: list[list[_Logp]] | None = None


SCORE_FIELDS = tuple(_Columns.model_fields)
_COLUMNS = SCORE_FIELDS[2:]
_TEACHER_FIELDS = ("teacher", "teacher_ids", "teacher_logps")
_PER_TOKEN = (*_COLUMNS[:7], "logps_reference", *_TEACHER_FIELDS[1:])


def add_surprise(logps: Sequence[float], weight: float) -> list[float]:
    """Return what log-probabilities with a judgment are compared with to make flags: `logps` without a weight.

    A token is flagged if log p(y_t | x, j, y_<t) - log p + weight * (-log p) is above log lambda, where p is what it is
    compared with; that is, if log p(y_t | x, j, y_<t) - (1 + weight) log p is.
    """
    return [(1 + weight) * logp for logp in logps]


def is_token_scores_row(value: Any) -> bool:
    """Whether a JSON value is a row of token scores rather than a plain record."""
    return isinstance(value, dict) and {"schema_version", "token_ids"} <= set(value)


def read_token_scores(sources: str | Path | Sequence[str | Path]) -> list[TokenScores]:
    """Read one or several files of token scores; flags and weights may have been edited.

    The weight of a token that is not flagged counts as 0, whatever the file says.

    Raises:
        DataError: The file cannot be read or has a later schema version, or a row cannot be used; all are named.
    """
    return list(open_token_scores(sources) or parse_token_scores(describe_sources(sources), *read_rows(sources)))


class StoredScores(Sequence[TokenScores]):
    """Token scores that stay in their files: with all their tokens, a hundred thousand do not fit into memory.

    The records are in memory. `open_token_scores` makes it.
    """

    def __init__(
        self,
        lines: Sequence[tuple[Path, int, int]],
        records: list[JudgedRecord],
        locations: list[str],
        settings: Collection[tuple[Any, ...]],
        sha256: str,
    ) -> None:
        self._lines = lines  # the file of each, and where it is there
        self.records = records
        self.locations = locations
        self.settings = settings  # the different values of `SETTINGS`
        self.sha256 = sha256  # of the files

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> TokenScores: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenScores]: ...
    def __getitem__(self, index: int | slice) -> TokenScores | list[TokenScores]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        path, offset, num_bytes = self._lines[index]
        with open(path, "rb") as file:
            value = read_line(file, offset, num_bytes)
        return _make_scores(_Columns.model_validate(value), self.records[index])

    def select(self, indices: Sequence[int]) -> "StoredScores":
        """Return some of the scores."""
        return StoredScores(
            [self._lines[index] for index in indices],
            [self.records[index] for index in indices],
            [self.locations[index] for index in indices],
            self.settings,
            self.sha256,
        )


def list_records(rows: Sequence[Any]) -> list[JudgedRecord]:
    """Return the records of token scores, or the records themselves."""
    if isinstance(rows, StoredScores):
        return rows.records
    return [row.record if isinstance(row, TokenScores) else row for row in rows]


def find_settings(scores: Sequence[TokenScores], name: str) -> set[Any]:
    """Return the different values of a setting of `SETTINGS` with which scores were made."""
    if isinstance(scores, StoredScores):
        return {values[SETTINGS.index(name)] for values in scores.settings}
    return {getattr(one, name) for one in scores}


def open_token_scores(sources: str | Path | Sequence[str | Path]) -> StoredScores | None:
    """Check the token scores in files of JSON Lines, and leave them there; None for other files or rows.

    Raises:
        DataError: As `read_token_scores`.
    """
    files = [file for source in as_sources(sources) for file in find_files(source)]
    if not files or not all(is_plain_lines(file.path) for file in files):
        return None
    lines, records, locations = list[tuple[Path, int, int]](), list[JudgedRecord](), list[str]()
    settings: set[tuple[Any, ...]] = set()
    problems: list[str] = []
    for file in files:
        for line in stream_lines(file.path, file.name):
            if not lines and not problems and not is_token_scores_row(line.row.value):
                return None
            if line.problem is not None:
                problems.append(line.problem)
                continue
            _refuse_later_version(file.name, [line.row])
            scores = _read_row(line.row, problems)
            if scores is not None:
                lines.append((file.path, line.offset, line.num_bytes))
                records.append(scores.record)
                locations.append(line.row.location)
                settings.add(tuple(getattr(scores, name) for name in SETTINGS))
    if problems:
        name = describe_sources(sources)
        raise DataError(problems, hint=f"{len(problems)} problems in {name}; fix them, nothing was skipped")
    if not lines:
        return None
    sha256 = join_hashes([hash_file(file.path) for file in files], {})
    return StoredScores(lines, records, locations, settings, sha256)


def parse_token_scores(path: str | Path, rows: Sequence[SourceRow], problems: Sequence[str]) -> list[TokenScores]:
    """Parse the rows of a file of token scores; see `read_token_scores`.

    Args:
        path: The file, for messages.
        rows: Its rows.
        problems: Problems found while reading it.
    """
    _refuse_later_version(path, rows)
    problems = [*problems]
    scores = [_read_row(row, problems) for row in rows]
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; fix them, nothing was skipped")
    if not scores:
        raise DataError(f"{path}: no token scores; expected JSON Lines with at least one row")
    return [score for score in scores if score is not None]


def _refuse_later_version(path: str | Path, rows: Sequence[SourceRow]) -> None:
    """Raises:
    DataError: Some rows are by a later version of cutlm.
    """
    versions: list[Any] = [row.value.get("schema_version") for row in rows if isinstance(row.value, dict)]
    newest = max((version for version in versions if type(version) is int), default=SCHEMA_VERSION)
    if newest > SCHEMA_VERSION:
        raise DataError(
            f"{path}: expected token scores of schema_version {SCHEMA_VERSION}, got {newest} from a later cutlm;"
            " upgrade cutlm, or run cutlm blame again"
        )


def _read_row(row: SourceRow, problems: list[str]) -> TokenScores | None:
    """One row as token scores, or None with a sentence for each problem."""
    if not isinstance(row.value, dict):
        problems.append(f"{row.location}: expected an object with a record and its token scores")
        return None
    found: list[str] = []
    check = check_rows([SourceRow(row.location, {k: v for k, v in row.value.items() if k not in SCORE_FIELDS})])
    found += check.problems
    lengths = {name: len(values) for name in _PER_TOKEN if isinstance(values := row.value.get(name), list)}
    num_tokens = lengths.get("token_ids", 0)
    found += [
        f"{row.location}: field {name!r}: expected {num_tokens} elements, one for each of token_ids, got {length}"
        for name, length in lengths.items()
        if length != num_tokens and "token_ids" in lengths
    ]
    try:
        columns = _Columns.model_validate(row.value)
    except ValidationError as error:
        # One sentence per field: a list may have thousands of bad elements.
        first = {detail["loc"][0]: detail for detail in reversed(error.errors())}
        for detail in first.values():
            path, is_missing = detail["loc"], detail["type"] == "missing"
            if is_missing and len(path) > 1:
                path, is_missing, detail["msg"] = path[:2], False, "[start, end]"
            name = f"{row.location}: field {join_path(path)!r}"
            if is_missing:
                found.append(f"{name} is missing; make the file with cutlm blame")
            else:
                expected = detail["msg"].removeprefix("Input should be ")
                found.append(f"{name}: expected {expected}, got {describe_value(detail['input'])}")
    else:
        found += [f"{row.location}: {problem}" for problem in _check_columns(columns, *check.records)]
    problems += found
    if found:
        return None
    return _make_scores(columns, check.records[0])


def _make_scores(columns: _Columns, record: JudgedRecord) -> TokenScores:
    values = {name: getattr(columns, name) for name in _COLUMNS}
    pairs = zip(columns.is_flagged, columns.weights, strict=True)
    values["weights"] = [(weight or 0.0) if flag else 0.0 for flag, weight in pairs]
    return TokenScores(record=record, **values)


def _check_columns(columns: _Columns, record: JudgedRecord | None = None) -> list[str]:
    """Check what depends on more than one field."""
    if not 1 <= columns.schema_version <= SCHEMA_VERSION:
        return [
            f"field 'schema_version': expected 1 to {SCHEMA_VERSION}, got {columns.schema_version}; make the file with"
            " cutlm blame"
        ]
    problems = []
    if columns.teacher_ids is not None or columns.teacher_logps is not None:
        problem = find_column_problem(columns.teacher_ids, columns.teacher_logps, len(columns.token_ids))
        problems += [problem] if problem else []
    if record is not None:
        if columns.is_satisfactory is not record.is_satisfactory:
            problems.append(
                f"field 'is_satisfactory': expected {json.dumps(record.is_satisfactory)} by the row's judgment and"
                f" score, got {json.dumps(columns.is_satisfactory)}; change one of them"
            )
        length = len(record.output)
        bad = [(index, span) for index, span in enumerate(columns.spans) if not span[0] <= span[1] <= length]
        for index, span in bad[:1]:
            problems.append(
                f"field 'spans[{index}]': expected start <= end <= {length}, the length of output, got {list(span)}"
            )
    for index, (is_flagged, weight) in enumerate(zip(columns.is_flagged, columns.weights, strict=False)):
        if is_flagged and not weight:
            problems.append(
                f"field 'weights[{index}]': expected a number above 0 for a flagged token, got {json.dumps(weight)};"
                f" set a weight (unlikelihood_weight is {columns.unlikelihood_weight:g}), or set is_flagged[{index}] to"
                " false"
            )
    return problems


def write_token_scores(path: str | Path, scores: Iterable[TokenScores]) -> int:
    """Write token scores atomically and return the number of rows."""
    return write_rows(path, (score.to_row() for score in scores))


def strip_scores(record: JudgedRecord) -> JudgedRecord:
    """The plain record, if a row of token scores was read as a record."""
    further = record.model_extra or {}
    if not {"schema_version", "token_ids"} <= set(further):
        return record
    row = record.model_dump(exclude_unset=True)
    return JudgedRecord.model_validate({name: value for name, value in row.items() if name not in SCORE_FIELDS})


def map_to_tokenizer(scores: TokenScores, encoder: "Encoder") -> TokenScores:
    """Map flags and weights to the tokens of another tokenizer, such as those of a larger model to a smaller one.

    A token is flagged if it shares a character with a flagged one, and gets the largest weight of those. A flag on
    white space alone maps to tokens of white space alone.

    Args:
        scores: The scores of one response.
        encoder: The other tokenizer, with the template of training.

    Returns:
        Scores of the new tokens, without log-probabilities; the same scores if the tokens are the same.
    """
    output = scores.record.output
    token_ids = encoder.encode_response(output)
    fingerprint = fingerprint_tokenizer(encoder.tokenizer)
    if token_ids == scores.token_ids and fingerprint == scores.tokenizer:
        return scores
    heaviest = [0.0] * (len(output) + 1)  # per character; the last one is the end-of-sequence token
    for (start, end), is_flagged, weight in zip(scores.spans, scores.is_flagged, scores.weights, strict=True):
        is_space = not output[start:end].strip()
        for place in range(start, max(end, start + 1)) if is_flagged else ():
            if is_space or not output[place].isspace():
                heaviest[place] = max(heaviest[place], weight)
    spans = encoder.locate_tokens(output, token_ids)
    is_own = [end > start or start == len(output) for start, end in spans]
    weights = [
        max(heaviest[start : max(end, start + 1)]) if has_place else 0.0
        for (start, end), has_place in zip(spans, is_own, strict=True)
    ]
    return replace(
        scores,
        token_ids=token_ids,
        tokens=[str(encoder.tokenizer.decode([index])) for index in token_ids],
        spans=spans,
        logps_without=None,
        logps_with=None,
        logps_reference=None,
        teacher=None,
        teacher_ids=None,
        teacher_logps=None,
        is_flagged=[weight > 0 for weight in weights],
        weights=weights,
        tokenizer=fingerprint,
    )


def fingerprint_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identify a tokenizer by its vocabulary and by how it splits a probe, wherever it is stored."""
    return _fingerprint(tokenizer, len(tokenizer), tokenizer.eos_token_id)


@lru_cache(maxsize=4)
def _fingerprint(tokenizer: "PreTrainedTokenizerBase", num_tokens: int, eos_id: int) -> str:
    """Cached, because it is needed for every record; the other arguments change when a tokenizer is changed."""
    probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), probe, eos_id])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
