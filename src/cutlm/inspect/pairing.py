"""Two files of token scores of the same records, as of a model before and after training, put together by record."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from cutlm.blame.token_scores import TokenScores
from cutlm.data.records import JudgedRecord


class Pairing(NamedTuple):
    """What two files have in common.

    Attributes:
        pairs: The scores of each record that stands in both, in the order of the first file.
        num_unpaired: How many of the first, and of the second file, the other does not have.
    """

    pairs: list[tuple[TokenScores, TokenScores]]
    num_unpaired: tuple[int, int]


def pair_scores(first: Sequence[TokenScores], second: Sequence[TokenScores]) -> Pairing:
    """Finds the records that stand in both files: the same instruction, input, response and judgment.

    A record that stands several times in a file is paired as often as the other file has it, in order.

    Args:
        first: Scores of one model.
        second: Scores of another.
    """
    waiting: defaultdict[tuple[str, str, str, str | None], deque[TokenScores]] = defaultdict(deque)
    for scores in second:
        waiting[_identify(scores.record)].append(scores)
    pairs = []
    for scores in first:
        fitting = waiting[_identify(scores.record)]
        if fitting:
            pairs.append((scores, fitting.popleft()))
    return Pairing(pairs, (len(first) - len(pairs), len(second) - len(pairs)))


def has_same_tokens(first: TokenScores, second: TokenScores) -> bool:
    """Whether the two scores of a response can be compared token by token."""
    return first.token_ids == second.token_ids and first.spans == second.spans


def _identify(record: JudgedRecord) -> tuple[str, str, str, str | None]:
    return record.instruction, record.input, record.output, record.judgment
