"""Whether a teacher's prompt helps: a judge's verdicts on responses under it and on responses under the plain prompt.

The gain bounds how much a model can learn from the teacher. This module imports no torch, so that tables are quick.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from cutlm.data.files import write_text
from cutlm.flagging.teacher import TeacherSettings
from cutlm.judges.responses import EMPTY_RESPONSE, Outcome, Response

# Responses are said to shrink or grow strongly beyond this ratio of the mean lengths.
_MAX_LENGTH_RATIO = 1.5


@dataclass(frozen=True)
class Comparison:
    """Verdicts on pairs of responses to the same instructions, plain and under the teacher's prompt.

    Attributes:
        num_records: Pairs in which both responses have a verdict. An empty response is unsatisfactory.
        num_missing: Pairs in which one has none.
        share_plain: Share of satisfactory responses under the plain prompt.
        share_teacher: The same under the teacher's prompt.
        teacher_gain: The difference.
        interval: Its 95 % confidence interval (Bonett and Price 2012, for paired proportions).
        p_value: Of McNemar's exact test, two-sided.
        mean_length_plain: Mean number of characters of a response under the plain prompt.
        mean_length_teacher: The same under the teacher's prompt.
        num_empty_plain: Empty responses under the plain prompt.
        num_empty_teacher: The same under the teacher's prompt.
    """

    num_records: int
    num_missing: int
    share_plain: float
    share_teacher: float
    teacher_gain: float
    interval: tuple[float, float]
    p_value: float
    mean_length_plain: float
    mean_length_teacher: float
    num_empty_plain: int
    num_empty_teacher: int

    def describe(self) -> str:
        """Return the numbers in a sentence."""
        low, high = self.interval
        missing = f"; {self.num_missing} more have no verdict" if self.num_missing else ""
        return (
            f"teacher_gain {self.teacher_gain:+.2f} (95 % interval {low:+.2f} to {high:+.2f}) on {self.num_records}"
            f" instructions{missing}: {self.share_teacher:.1%} of the responses are satisfactory under the teacher's"
            f" prompt, {self.share_plain:.1%} under the plain one; mean length {self.mean_length_teacher:.0f} and"
            f" {self.mean_length_plain:.0f} characters"
        )

    def list_warnings(self) -> list[str]:
        """Return a sentence for each reason not to learn from this teacher."""
        return list_warnings(self.teacher_gain, self.interval, self.mean_length_plain, self.mean_length_teacher)


def list_warnings(gain: float, interval: tuple[float, float], plain: float, teacher: float) -> list[str]:
    """Return a sentence for each reason not to learn from a teacher.

    Args:
        gain: Of its prompt.
        interval: Of the gain.
        plain: Mean length of responses under the plain prompt.
        teacher: Mean length of responses under the teacher's prompt.
    """
    warnings = []
    low, high = interval
    if low <= 0:
        warnings.append(
            f"no gain is shown under the teacher's prompt: {gain:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}; a"
            " model learns little from such a teacher: try another teacher_context, or more records"
        )
    if teacher * _MAX_LENGTH_RATIO < plain or plain * _MAX_LENGTH_RATIO < teacher:
        warnings.append(
            f"responses {'shrink' if teacher < plain else 'grow'} under the teacher's prompt, from {plain:.0f} to"
            f" {teacher:.0f} characters on average; a model that learns from it may do so, too"
        )
    return warnings


def compare_verdicts(responses: Sequence[Response], outcome: Outcome) -> Comparison | None:
    """Compare the verdicts on responses, the first half plain and the second under the teacher's prompt.

    Args:
        responses: N plain responses, then N under the teacher's prompt to the same instructions.
        outcome: Their judgments.

    Returns:
        The comparison; None if no pair has both verdicts.
    """
    num = len(responses) // 2
    is_satisfactory: dict[int, bool] = {index: text is None for index, text in outcome.judgments.items()}
    # Without these, a teacher whose responses are empty would look as if it had not been asked.
    is_satisfactory |= {index: False for index, failure in outcome.failures.items() if failure == EMPTY_RESPONSE}
    pairs = [(index, num + index) for index in range(num) if {index, num + index} <= is_satisfactory.keys()]
    if not pairs:
        return None
    plain, teacher = zip(*pairs, strict=True)

    def measure_length(indices: Sequence[int]) -> float:
        return fmean(len(responses[index].output.strip()) for index in indices)

    def count_empty(indices: Sequence[int]) -> int:
        return sum(not responses[index].output.strip() for index in indices)

    num_gained = sum(is_satisfactory[two] > is_satisfactory[one] for one, two in pairs)
    num_lost = sum(is_satisfactory[two] < is_satisfactory[one] for one, two in pairs)
    return Comparison(
        num_records=len(pairs),
        num_missing=num - len(pairs),
        share_plain=fmean(is_satisfactory[index] for index in plain),
        share_teacher=fmean(is_satisfactory[index] for index in teacher),
        teacher_gain=(num_gained - num_lost) / len(pairs),
        interval=find_interval(num_gained, num_lost, len(pairs)),
        p_value=compute_p_value(num_gained, num_lost),
        mean_length_plain=measure_length(plain),
        mean_length_teacher=measure_length(teacher),
        num_empty_plain=count_empty(plain),
        num_empty_teacher=count_empty(teacher),
    )


def find_interval(num_gained: int, num_lost: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Find the confidence interval of the difference of two proportions of the same pairs (Bonett and Price 2012).

    Unlike a bootstrap, it has a width if no pair differs.

    Args:
        num_gained: Pairs of which only the second is satisfactory.
        num_lost: Pairs of which only the first is.
        num: All pairs.
        confidence: The confidence level.

    Example:

        >>> low, high = find_interval(10, 2, 50)  # 11 / 52 - 3 / 52, plus or minus 1.96 standard errors
        >>> f"{low:.3f} {high:.3f}"
        '0.019 0.289'
    """
    gained, lost = (num_gained + 1) / (num + 2), (num_lost + 1) / (num + 2)
    difference = gained - lost
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    width = z * math.sqrt((gained + lost - difference**2) / (num + 2))
    return max(-1.0, difference - width), min(1.0, difference + width)


def compute_p_value(num_gained: int, num_lost: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    Example:

        >>> compute_p_value(5, 0)  # 2 / 2 ** 5
        0.0625
    """
    num = num_gained + num_lost
    tail = sum(math.comb(num, count) for count in range(min(num_gained, num_lost) + 1)) / 2**num
    return min(1.0, 2 * tail)


def write_comparison(
    out: str | Path, comparison: Comparison, teacher: TeacherSettings, further: Mapping[str, Any]
) -> None:
    """Write a comparison, with the teacher's prompt and other settings, as JSON."""
    content = {
        "teacher_context": teacher.context,
        "teacher_sees_response": teacher.sees_response,
        **further,
        **asdict(comparison),
        "warnings": comparison.list_warnings(),
    }
    write_text(Path(out), json.dumps(content, indent=2) + "\n")
