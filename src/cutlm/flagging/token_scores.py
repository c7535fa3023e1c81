"""Token scores: the findings of a detector for every token of a response, one self-contained JSON object per line.

`cutlm blame` writes these files, people inspect and edit them, training reads them. Files can be split and
concatenated. A row is the record itself plus the fields of `SCORE_FIELDS`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.data.files import SourceRow, read_rows, write_rows
from cutlm.data.records import JudgedRecord, check_rows, describe_value
from cutlm.errors import DataError
from cutlm.prompting.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cutlm.prompting.encoding import Encoder

SCHEMA_VERSION = 1
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
        template: Name and fingerprint of the prompts; see `fingerprint_template`.
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

    def to_row(self) -> dict[str, Any]:
        """The record as a row of a file."""
        row = self.record.model_dump(mode="json", exclude_unset=True) | {"judgment": self.record.judgment}
        row |= {"schema_version": SCHEMA_VERSION, "is_satisfactory": self.record.is_satisfactory}
        for name in _COLUMNS:
            row[name] = getattr(self, name)
        return row | {"spans": [list(span) for span in self.spans]}


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_token(value: Any) -> bool:
    return _is_whole(value) and value <= LARGEST_TOKEN


def _is_logp(value: Any) -> bool:
    return _is_number(value) and value <= MAX_LOGP


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


# For each column: a check of one element, its description, and whether the column may be null.
_COLUMNS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "token_ids": (_is_token, f"whole numbers from 0 to {LARGEST_TOKEN}", False),
    "tokens": (lambda value: isinstance(value, str), "strings", False),
    "spans": (_is_pair, "pairs of whole numbers [start, end]", False),
    "logps_without": (_is_logp, "finite numbers of at most 0", True),
    "logps_with": (_is_logp, "finite numbers of at most 0", True),
    "is_flagged": (lambda value: isinstance(value, bool), "true or false", False),
    "weights": (lambda value: value is None or (_is_number(value) and value >= 0), "numbers of at least 0", False),
    "threshold": (lambda value: _is_number(value) and value >= 0, "a number of at least 0", False),
    "unlikelihood_weight": (lambda value: _is_number(value) and value > 0, "a number above 0", False),
    "gamma": (lambda value: _is_number(value) and value >= 0, "a number of at least 0", False),
    "detector": (lambda value: isinstance(value, str), "a string", False),
    "tokenizer": (lambda value: isinstance(value, str), "a string", False),
    "template": (lambda value: isinstance(value, str), "a string", False),
}
_PER_TOKEN = tuple(_COLUMNS)[:7]
SCORE_FIELDS = ("schema_version", "is_satisfactory", *_COLUMNS)


def is_token_scores_row(value: Any) -> bool:
    """Whether a JSON value is a row of token scores rather than a plain record."""
    return isinstance(value, dict) and {"schema_version", "token_ids"} <= set(value)


def read_token_scores(path: str | Path) -> list[TokenScores]:
    """Read a file of token scores; flags and weights may have been edited.

    The weight of a token that is not flagged counts as 0, whatever the file says.

    Raises:
        DataError: The file cannot be read or has a later schema version, or a row cannot be used; all are named.
    """
    return parse_token_scores(path, *read_rows(path))


def parse_token_scores(path: str | Path, rows: Sequence[SourceRow], problems: Sequence[str]) -> list[TokenScores]:
    """Parse the rows of a file of token scores; see `read_token_scores`.

    Args:
        path: The file, for messages.
        rows: Its rows.
        problems: Problems found while reading it.
    """
    versions: list[Any] = [row.value.get("schema_version") for row in rows if isinstance(row.value, dict)]
    newest = max(filter(_is_whole, versions), default=SCHEMA_VERSION)
    if newest > SCHEMA_VERSION:
        raise DataError(
            f"{path}: expected token scores of schema_version {SCHEMA_VERSION}, got {newest} from a later cutlm;"
            " upgrade cutlm, or run cutlm blame again"
        )
    problems = [*problems]
    scores = [_read_row(row, problems) for row in rows]
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; fix them, nothing was skipped")
    if not scores:
        raise DataError(f"{path}: no token scores; expected JSON Lines with at least one row")
    return [score for score in scores if score is not None]


def _read_row(row: SourceRow, problems: list[str]) -> TokenScores | None:
    num_before = len(problems)
    own = row.value
    if isinstance(own, dict):
        own = {name: value for name, value in own.items() if name not in SCORE_FIELDS}
    check = check_rows([SourceRow(row.location, own)])
    problems.extend(check.problems)
    if not isinstance(row.value, dict):
        return None
    values: dict[str, Any] = dict(row.value)
    if values.get("schema_version") != SCHEMA_VERSION or isinstance(values["schema_version"], bool):
        got = describe_value(values["schema_version"]) if "schema_version" in values else "no such field"
        problems.append(
            f"{row.location}: field 'schema_version': expected {SCHEMA_VERSION}, got {got}; make the file"
            " with cutlm blame"
        )
        return None
    for name in _COLUMNS:
        _check_field(row.location, values, name, problems)
    if check.records and values.get("is_satisfactory") is not check.records[0].is_satisfactory:
        problems.append(
            f"{row.location}: field 'is_satisfactory': expected {json.dumps(check.records[0].is_satisfactory)} by the"
            f" row's judgment and score, got {json.dumps(values.get('is_satisfactory'))}; change one of them"
        )
    if len(problems) > num_before:
        return None
    (record,) = check.records
    _check_places(row.location, values, len(record.output), problems)
    pairs = zip(values["is_flagged"], values["weights"], strict=True)
    values["weights"] = [float(weight or 0) if is_flagged else 0.0 for is_flagged, weight in pairs]
    values["spans"] = [tuple(span) for span in values["spans"]]
    return TokenScores(record=record, **{name: values[name] for name in _COLUMNS})


def _check_field(where: str, values: dict[str, Any], name: str, problems: list[str]) -> None:
    is_valid, expected, is_optional = _COLUMNS[name]
    if name not in values:
        problems.append(f"{where}: field {name!r} is missing; make the file with cutlm blame")
        return
    value = values[name]
    if name not in _PER_TOKEN:
        if not is_valid(value):
            problems.append(f"{where}: field {name!r}: expected {expected}, got {describe_value(value)}")
        return
    if value is None and is_optional:
        return
    if not isinstance(value, list):
        problems.append(f"{where}: field {name!r}: expected a list of {expected}, got {describe_value(value)}")
        return
    num_tokens = len(values["token_ids"]) if isinstance(values.get("token_ids"), list) else len(value)
    if len(value) != num_tokens:
        problems.append(
            f"{where}: field {name!r}: expected {num_tokens} elements, one for each of token_ids, got {len(value)}"
        )
    place = next((place for place, element in enumerate(value) if not is_valid(element)), None)
    if place is not None:
        problems.append(
            f"{where}: field '{name}[{place}]': expected {expected}, got"
            f" {json.dumps(value[place]) if isinstance(value[place], list) else describe_value(value[place])}"
        )


def _check_places(where: str, values: dict[str, Any], length: int, problems: list[str]) -> None:
    """Check what depends on more than one field."""
    for place, (start, end) in enumerate(values["spans"]):
        if not start <= end <= length:
            problems.append(
                f"{where}: field 'spans[{place}]': expected start <= end <= {length}, the length of output, got"
                f" [{start}, {end}]"
            )
            break
    for place, (is_flagged, weight) in enumerate(zip(values["is_flagged"], values["weights"], strict=True)):
        if is_flagged and not weight:
            problems.append(
                f"{where}: field 'weights[{place}]': expected a number above 0 for a flagged token, got"
                f" {json.dumps(weight)}; set a weight (unlikelihood_weight is {values['unlikelihood_weight']:g}),"
                f" or set is_flagged[{place}] to false"
            )


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


def fingerprint_template(encoder: "Encoder") -> str:
    """Identify the prompts by their text: a changed chat template gives another fingerprint."""
    texts = [encoder.render("[instruction]").text, encoder.render("[instruction]", "[judgment]").text]
    return f"{encoder.template} {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}"
