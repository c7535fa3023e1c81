"""Which replies in chats are feedback, by how far they shift the probabilities of the response.

A reply that is about the response makes its tokens more likely to a model that reads the reply first, and more than
replies to other responses do. A reply is kept if its shift is larger than that of each of a few foreign replies, so one
that says nothing about the response is kept with the probability 1 / (num_foreign + 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.flagging.contrast import draw_sources
from cutlm.flagging.detector import (
    FlagSettings,
    count_resumed,
    describe_run,
    encode_for_scoring,
    score_contexts,
    score_with_journal,
)
from cutlm.flagging.scoring import Scorer
from cutlm.flagging.sensitivity import ForeignContext, encode_context
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import RenderError


@dataclass(frozen=True)
class Shift:
    """How far a reply shifts the response that it follows, and how far foreign replies do."""

    own: float
    foreign: Sequence[float]

    @property
    def is_largest(self) -> bool:
        """Whether the reply shifts the response more than each foreign one does."""
        return self.own > max(self.foreign)


@dataclass
class Shifts:
    """The shifts of replies.

    Attributes:
        shifts: By the index of the record whose judgment the reply is.
        refused: Why the others were not tested: a few words by which they are counted.
        num_resumed: Number of records taken from a stopped run.
        journal: The partial file, to be removed when the results are written.
    """

    journal: Journal
    shifts: dict[int, Shift] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    num_resumed: int = 0


def compute_shift(logps_without: Sequence[float], logps_with: Sequence[float]) -> float:
    """Compute how far a reply explains a response: the mean over its tokens of the log ratio, where it is positive.

    With the reply in the prompt, a model expects a response to which it fits. What becomes less likely does not count,
    because any longer prompt does that to some tokens.

    Example:

        >>> compute_shift([-1.0, -2.0], [-1.5, -1.0])
        0.5
    """
    ratios = [max(0.0, judged - plain) for plain, judged in zip(logps_without, logps_with, strict=True)]
    return sum(ratios) / len(ratios)


def measure_shifts(
    records: Sequence[JudgedRecord],
    locations: Sequence[str],
    out: str | Path,
    encoder: Encoder,
    score: Scorer,
    *,
    num_foreign: int,
    max_length: int,
    detector: str,
    backend: Mapping[str, Any],
    overwrite: bool = False,
) -> Shifts:
    """Measure how far the judgments of unsatisfactory records, the replies, shift the responses.

    Args:
        records: The records.
        locations: The location of each.
        out: The file that the results go to; an interrupted run resumes from `OUT.partial`.
        encoder: Tokenizer and template.
        score: Computes log-probabilities.
        num_foreign: Number of foreign replies that each is compared with.
        max_length: Maximum number of tokens in a prompt and the response.
        detector: Fingerprint of the model.
        backend: Further settings that the numbers depend on.
        overwrite: Replace a partial file of another run.

    Raises:
        ConfigError: `num_foreign` is below 1, or too few replies differ.
    """
    if num_foreign < 1:
        raise ConfigError(f"num_foreign: expected a whole number of at least 1, got {num_foreign}")
    settings = FlagSettings(max_length=max_length)
    refused, places = {}, []
    for index, record in enumerate(records):
        if problem := _find_refusal(record, encoder):
            refused[index] = problem
        else:
            places.append(index)
    tested = [records[index] for index in places]
    encoded = encode_for_scoring(tested, [locations[index] for index in places], encoder, settings)
    kept = [tested[index] for index in encoded.indices]
    missing = set(range(len(tested))) - set(encoded.indices)
    refused |= {places[index]: f"longer than max_length {max_length}" for index in missing}
    sources = draw_sources(range(len(kept)), kept, {}, num_foreign)
    pairs = [(index, source) for index, own in sources.items() for source in own]

    def encode(index: int, source: int | None) -> ForeignContext:
        return encode_context(index, source, encoded.rows, kept, encoder, max_length)

    header = describe_run(tested, encoder, settings, detector, backend) | {"num_foreign": num_foreign}
    journal = Journal(out, header, overwrite=overwrite)
    shifts = Shifts(journal, refused=refused, num_resumed=count_resumed(journal))
    logps = score_with_journal(encoded.rows, journal, score)
    scored = score_contexts(encoded.rows, pairs, encode, score, journal)
    for index, own in sources.items():
        start = encoded.rows[index].get("num_template_tokens") or 0
        without, judged, _ = logps[index]
        assert judged is not None
        shifts.shifts[places[encoded.indices[index]]] = Shift(
            compute_shift(without[start:], judged[start:]),
            [compute_shift(without[start:], scored[index, source][start:]) for source in own],
        )
    return shifts


def _find_refusal(record: JudgedRecord, encoder: Encoder) -> str | None:
    """Say why a template cannot render a record, or return None."""
    try:
        encoder.check_conversation(record.conversation, record.output)
        encoder.encode_response(record.output)
        encoder.render(record.conversation, record.judgment)
    except RenderError as error:
        return str(error)
    return None
