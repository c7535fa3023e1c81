"""Detectors as scores of tokens, and how well these find the wrong tokens."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from contexts import Logps
from sklearn.metrics import average_precision_score

from cutlm.data.records import JudgedRecord
from cutlm.evaluation.detection import count_detected
from cutlm.flagging.sensitivity import Contrast, compute_sensitivity
from cutlm.prompting.spans import Span, flag_spans

THRESHOLD = 1.1
MAX_FALSE_SHARE = 0.01
SURPRISE_WEIGHT = 0.25
_NUM_RESAMPLED = 200
# A token without a judgment is suspicious if it is less likely than this.
_SURPRISING = 0.1


@dataclass(frozen=True)
class Response:
    """A judged response whose tokens were scored."""

    record: JudgedRecord
    token_spans: list[Span]
    logps: Logps

    @property
    def is_wrong(self) -> np.ndarray:
        """[T] Whether each token overlaps a wrong span."""
        return np.array(flag_spans(self.token_spans, self.record.wrong_spans or ()))


# ---- Detectors ----


def contrast_plain(logps: Logps, judged: str = "own") -> np.ndarray:
    """Log ratio to the response without a judgment, as in the paper."""
    return logps[judged] - logps["plain"]


def contrast_foreign(logps: Logps, judged: str = "own") -> np.ndarray:
    """Log ratio to the mean over judgments of other responses."""
    names = [name for name in logps if name.startswith("foreign") and name != judged]
    return logps[judged] - np.mean([logps[name] for name in names], axis=0)


def contrast_perfect(logps: Logps, judged: str = "own") -> np.ndarray:
    """Log ratio to the response under praise."""
    return logps[judged] - logps["perfect"]


def contrast_surprise(logps: Logps, judged: str = "own") -> np.ndarray:
    """Log ratio to the response under praise, and a quarter of its surprise there (`surprise_weight`)."""
    return logps[judged] - (1 + SURPRISE_WEIGHT) * logps["perfect"]


def contrast_smooth(logps: Logps, judged: str = "own") -> np.ndarray:
    """The same, averaged over each token and its neighbours."""
    scores = np.pad(contrast_surprise(logps, judged), 1)
    return np.convolve(scores, np.ones(3) / 3, "valid")


ScoreTokens = Callable[..., np.ndarray]
CONTRASTS: dict[str, ScoreTokens] = {
    "none": contrast_plain,
    "foreign": contrast_foreign,
    "perfect": contrast_perfect,
    "perfect_surprise": contrast_surprise,
    "perfect_smooth": contrast_smooth,
}


def choose_threshold(contrast: ScoreTokens, responses: Sequence[Response]) -> float:
    """The smallest threshold, at least 1, at which hardly any token is flagged under a judgment of another response."""
    ratios = np.concatenate([contrast(response.logps, "foreign_0") for response in responses])
    return max(1.0, math.exp(np.quantile(ratios, 1 - MAX_FALSE_SHARE, method="higher")))


def score_surprise(response: Response) -> np.ndarray:
    """How unlikely each token is; knows nothing of the judgment."""
    return -response.logps["plain"]


def score_words(response: Response) -> np.ndarray:
    """2 for tokens of a passage that the judgment quotes, 1 for tokens of a word that it mentions; knows no model."""
    text, judgment = response.record.output, response.record.judgment or ""
    quoted = re.findall(r'"([^"]+)"', judgment)
    passages = [match.span() for quote in quoted for match in re.finditer(re.escape(quote), text)]
    mentioned = set(re.findall(r"\w+", judgment.lower()))
    words = [match.span() for match in re.finditer(r"\w+", text) if match[0].lower() in mentioned]
    spans = response.token_spans
    in_passage, in_word = (np.array(flag_spans(spans, found), dtype=float) for found in (passages, words))
    return np.maximum(2 * in_passage, in_word)


# ---- Metrics ----


def measure_scores(
    responses: Sequence[Response],
    scores: Sequence[np.ndarray],
    threshold: float,
    auto_threshold: float | None,
    groups: Sequence[str],
) -> dict[str, Any]:
    """Measure how well scores find the wrong tokens of responses.

    Args:
        responses: The responses.
        scores: [T] for each, higher for tokens that look wrong.
        threshold: A token is flagged if its score is above the logarithm of this.
        auto_threshold: The same for a threshold chosen without knowing what is wrong; None if there is none.
        groups: Fields of records, by whose values average precision is reported too.
    """
    wrong = [response.is_wrong for response in responses]
    result = {**_rate(scores, wrong), "interval": _resample(scores, wrong), "num_records": len(responses)}
    tokens = list(zip(np.concatenate(scores).tolist(), np.concatenate(wrong).tolist(), strict=True))
    found = count_detected(tokens, threshold)
    result |= {"f1": found.f1, "precision": found.precision, "recall": found.recall, "threshold": threshold}
    result |= {"f1_auto": None, "threshold_auto": auto_threshold}
    if auto_threshold is not None:
        result["f1_auto"] = count_detected(tokens, auto_threshold).f1
    result["by_group"] = {
        name: {
            value: _rate([scores[index] for index in indices], [wrong[index] for index in indices])
            | {"num_records": len(indices)}
            for value, indices in _group(responses, name).items()
        }
        for name in groups
    }
    return result


def flag_threshold_of_surprise() -> float:
    """The threshold of `score_surprise`, as `measure_scores` takes it."""
    return 1 / _SURPRISING


def _group(responses: Sequence[Response], name: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, response in enumerate(responses):
        groups.setdefault((response.record.model_extra or {})[name], []).append(index)
    return dict(sorted(groups.items()))


def _rate(scores: Sequence[np.ndarray], wrong: Sequence[np.ndarray]) -> dict[str, float]:
    """Average precision, and its value for a random order: the share of wrong tokens."""
    is_wrong = np.concatenate(wrong)
    precision = average_precision_score(is_wrong, np.concatenate(scores))
    return {"average_precision": float(precision), "chance": float(is_wrong.mean())}


def _resample(scores: Sequence[np.ndarray], wrong: Sequence[np.ndarray]) -> list[float]:
    """The 95 % bootstrap interval of average precision over responses."""
    rng = np.random.default_rng(0)
    lengths = [len(flags) for flags in wrong]
    is_wrong, score = np.concatenate(wrong), np.concatenate(scores)
    values = []
    for _ in range(_NUM_RESAMPLED):
        counts = np.bincount(rng.integers(len(wrong), size=len(wrong)), minlength=len(wrong))
        weights = np.repeat(counts, lengths)
        values.append(average_precision_score(is_wrong, score, sample_weight=weights))
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def measure_sensitivity(responses: Sequence[Response]) -> dict[str, Any]:
    """Measure how much of what is flagged depends on what the judgment says; see `cutlm.flagging.sensitivity`."""
    contrasts = [
        Contrast(*(response.logps[name].tolist() for name in ("plain", "own", "foreign_0"))) for response in responses
    ]
    found = compute_sensitivity(contrasts, THRESHOLD)
    assert found is not None, "there are responses"
    return asdict(found)
