"""The report next to a file of token scores: counts, and how far the flags can be trusted.

This module does not import torch, so that pages and tables are quick.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cutlm.data.files import read_bytes

LEAST_FLAG_SIGNAL = 0.3


@dataclass(frozen=True)
class Sensitivity:
    """How a model's flags differ between a record's own judgment and the judgment of another record.

    Attributes:
        num_records: Number of records in the sample.
        flagged_share_own: Share of their tokens that is flagged under their own judgments.
        flagged_share_foreign: The same under the judgments of other records.
        flag_signal: 1 - flagged_share_foreign / flagged_share_own: 1 if foreign judgments flag nothing, 0 if they flag
            as much; None if no token is flagged under the records' own judgments.
        pairwise: Share of the records whose largest log ratio is larger under their own judgment; a tie does not count.
    """

    num_records: int
    flagged_share_own: float
    flagged_share_foreign: float
    flag_signal: float | None
    pairwise: float

    def describe(self) -> str:
        """Return the numbers as one line."""
        signal = (
            "undefined (nothing is flagged under their own)" if self.flag_signal is None else f"{self.flag_signal:.2f}"
        )
        return (
            f"sensitivity on {self.num_records} records: {self.flagged_share_own:.1%} of their tokens are flagged under"
            f" their own judgments, {self.flagged_share_foreign:.1%} under those of other records; flag_signal"
            f" {signal}, pairwise {self.pairwise:.2f}"
        )

    def describe_noise(self) -> str | None:
        """Return a sentence that says what to do if the flags are mostly noise; None if they are not."""
        return describe_noise(self.flag_signal)


def describe_noise(flag_signal: float | None) -> str | None:
    """Return a sentence that says what to do if the flags are mostly noise; None if they are not."""
    if flag_signal is not None and flag_signal >= LEAST_FLAG_SIGNAL:
        return None
    finding = "nothing is flagged"
    if flag_signal is not None:
        finding = f"flag_signal is {flag_signal:.2f}, below {LEAST_FLAG_SIGNAL}"
    return (
        f"{finding}: this model hardly reads these judgments, so its flags are mostly noise; flag with a larger model"
        " (cutlm blame, then cutlm train --map_spans true) or a taught detector (cutlm train-detector), or train on"
        " passages that the judge marks (detector: spans) or without flags (objective: likelihood, satisfactory_only:"
        " true)"
    )


def name_report_file(scores: str | Path) -> Path:
    """Name the report next to a file of token scores."""
    return Path(f"{scores}.report.json")


def count_ineffective(scores: str | Path) -> int | None:
    """Count the records that `drop_ineffective` left out of a file of token scores; None if it was not asked for."""
    try:
        return json.loads(read_bytes(name_report_file(scores))).get("num_ineffective")
    except (ValueError, RecursionError, AttributeError):  # including DataError, if the file is missing
        return None


def read_sensitivity(scores: str | Path) -> Sensitivity | None:
    """Read the sensitivity from the report next to a file of token scores; None without a usable report."""
    try:
        return Sensitivity(**json.loads(read_bytes(name_report_file(scores)))["sensitivity"])
    except (ValueError, RecursionError, KeyError, TypeError):  # including DataError, if the file is missing
        return None
