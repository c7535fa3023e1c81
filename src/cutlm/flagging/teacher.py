"""A teacher: the model before training, in a context that describes a better response.

Its distributions at the tokens of a response are found in the pass that scores the response for flags, and stored with
the token scores. Training on them needs no further pass of the teacher.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cutlm.data.conversations import Conversation
from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.errors import ConfigError
from cutlm.prompting.encoding import Encoder

if TYPE_CHECKING:
    from torch import Tensor  # readers of token scores need no torch

TEACHER_CONTEXTS = ("praise", "advice")
NUM_COLUMNS = 20


class Columns(NamedTuple):
    """A teacher's distributions at the T tokens of a response, the most likely tokens of each; empty for no teacher."""

    ids: list[list[int]]  # [T][K] token ids
    logps: list[list[float]]  # [T][K] their log-probabilities

    def restrict(self, is_kept: Sequence[bool]) -> "Columns":
        """Return the columns with those of other tokens empty."""
        return Columns(
            [ids if kept else [] for ids, kept in zip(self.ids, is_kept, strict=True)],
            [logps if kept else [] for logps, kept in zip(self.logps, is_kept, strict=True)],
        )


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher makes its distributions.

    Attributes:
        context: Its prompt: "praise" for the one that promises "Perfect.", "advice" for the request of a response
            without the problem that the judgment names.
        sees_response: Show the response in the advice, as the request to refine it does.
        guidance: beta: how far it is guided away from the context with the judgment; see `cutlm.losses.guide`.
        num_columns: Number of tokens of a distribution; None for the token of the response alone.
        flagged_only: Keep the distributions of flagged tokens only.
    """

    context: str = "praise"
    sees_response: bool = False
    guidance: float = 1.0
    num_columns: int | None = NUM_COLUMNS
    flagged_only: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.context not in TEACHER_CONTEXTS:
            problems.append(f"teacher_context: expected {' or '.join(TEACHER_CONTEXTS)}, got {self.context!r}")
        if self.sees_response and self.context != "advice":
            problems.append(f"teacher_sees_response: expected teacher_context advice, got {self.context}")
        if not 0 <= self.guidance < math.inf:
            problems.append(f"guidance, redirect_strength: expected a number of at least 0, got {self.guidance}")
        if self.num_columns is not None and self.num_columns < 1:
            problems.append(f"num_columns: expected a whole number of at least 1, got {self.num_columns}")
        if problems:
            raise ConfigError(problems)

    def describe(self) -> dict[str, Any]:
        """Return the settings as an object of JSON."""
        return asdict(self)


def encode_teacher_prompts(
    rows: Any, records: Sequence[JudgedRecord], encoder: Encoder, settings: TeacherSettings, max_length: int
) -> list[list[int] | None]:
    """Encode the prompt of the teacher for each judged row; None for other rows.

    Args:
        rows: Encoded rows, a list or a `datasets.Dataset`.
        records: The record of each.
        encoder: Tokenizer and template.
        settings: Settings of the prompt.
        max_length: Maximum number of tokens in a prompt and the response.
    """
    return [
        None
        if row["judged_prompt_ids"] is None
        else encode_teacher_prompt(record, encoder, settings, max_length - len(row["response_ids"]))
        for row, record in zip(rows, records, strict=True)
    ]


def encode_teacher_prompt(
    record: JudgedRecord, encoder: Encoder, settings: TeacherSettings, num_tokens: int
) -> list[int]:
    """Encode the teacher's prompt for a record, truncated to a number of tokens as the record's own prompts are."""

    def encode(conversation: Conversation) -> list[int]:
        return _encode(record, conversation, encoder, settings, for_generation=False)

    return encoder.fit_prompt(encode, record.conversation, num_tokens)


def encode_teacher_generation_prompt(record: JudgedRecord, encoder: Encoder, settings: TeacherSettings) -> list[int]:
    """Encode the teacher's prompt for a record as it is fed to a model for generation."""
    return _encode(record, record.conversation, encoder, settings, for_generation=True)


def _encode(
    record: JudgedRecord,
    conversation: Conversation,
    encoder: Encoder,
    settings: TeacherSettings,
    *,
    for_generation: bool,
) -> list[int]:
    if settings.context == "praise":
        encode = encoder.encode_generation_prompt if for_generation else encoder.encode_prompt
        return encode(conversation, PRAISE)
    draft = record.output if settings.sees_response else None
    return encoder.encode_advised_prompt(conversation, record.stated_judgment, draft, for_generation=for_generation)


def list_columns(ids: "Tensor", logps: "Tensor") -> Columns:
    """Distributions [T, K] as they are stored: log-probabilities are rounded, and tokens without any are left out."""
    columns = Columns([], [])
    for own_ids, own_logps in zip(ids.tolist(), logps.tolist(), strict=True):
        pairs = [pair for pair in zip(own_ids, own_logps, strict=True) if pair[1] > -math.inf]
        columns.ids.append([token for token, _ in pairs])
        columns.logps.append([min(0.0, round(logp, 6)) + 0.0 for _, logp in pairs])
    return columns


def find_column_problem(ids: Any, logps: Any, num_tokens: int) -> str | None:
    """Say what is wrong with stored distributions of a response, or None."""
    for name, values in (("teacher_ids", ids), ("teacher_logps", logps)):
        if not isinstance(values, list) or len(values) != num_tokens:
            return f"field {name!r}: expected a list for each of the {num_tokens} tokens"
    for place, (own_ids, own_logps) in enumerate(zip(ids, logps, strict=True)):
        if len(own_ids) != len(own_logps) or len(set(own_ids)) != len(own_ids):
            return f"field 'teacher_ids[{place}]': expected different tokens, one for each of teacher_logps[{place}]"
        if sum(map(math.exp, own_logps)) > 1 + 1e-3:
            return f"field 'teacher_logps[{place}]': expected the probabilities of one distribution, got a sum above 1"
    return None


def match_teacher(found: Mapping[str, Any] | None, settings: TeacherSettings) -> list[str]:
    """List the settings of stored distributions that do not give those of training."""
    wanted = settings.describe()
    if found is not None and not found.get("flagged_only"):
        del wanted["flagged_only"]  # those of flagged tokens are among them
    return [name for name in wanted if (found or {}).get(name) != wanted[name]]
