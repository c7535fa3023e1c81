"""Judges of responses: a server, rules, or a person. Here is only what they have in common.

Each judge is a function from responses to an `Outcome`; reading responses and writing records is left to
`cutlm.judges.responses`.
"""

from dataclasses import dataclass, field
from typing import Any

PRAISE = "Perfect."


@dataclass(frozen=True)
class Response:
    """A response to be judged.

    Attributes:
        place: Where it stands, for messages: `responses.jsonl:17`.
        instruction: What was asked.
        input: Further material for the instruction.
        output: The response.
        row: All fields of the row as they were, to be kept.
    """

    location: str
    instruction: str
    input: str
    output: str
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def full_instruction(self) -> str:
        """The instruction and, after a newline, the input where there is one."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Failure:
    """Why a judgment could not be had.

    Attributes:
        kind: One or two words, by which failures are counted.
        reason: A sentence.
        answer: What the judge said, where it said anything.
    """

    kind: str
    reason: str
    answer: str = ""


@dataclass
class Outcome:
    """What became of responses, by their index.

    Attributes:
        judgments: What is wrong; None where nothing is.
        failures: Why there is no judgment.
        notes: Sentences for the user.
    """

    judgments: dict[int, str | None] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
