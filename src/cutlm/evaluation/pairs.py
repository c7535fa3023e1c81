"""Responses and what they are compared with, brought together by instruction."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from cutlm.judges import Response


@dataclass(frozen=True)
class Pairs:
    """Responses, each with a response to the same instruction.

    Attributes:
        pairs: The one and the other, in the order of the others.
        num_alone: Responses without another.
        num_missing: Others without a response.
    """

    pairs: list[tuple[Response, Response]]
    num_alone: int
    num_missing: int


def pair_responses(responses: Sequence[Response], others: Sequence[Response]) -> Pairs:
    """Finds for each of the others the response to the same instruction; of equal ones in their order.

    An instruction and its input are one text here: files of verdicts know no input.
    """
    waiting: dict[str, deque[Response]] = defaultdict(deque)
    for response in responses:
        waiting[response.full_instruction].append(response)
    pairs = []
    for other in others:
        found = waiting[other.full_instruction]
        if found:
            pairs.append((found.popleft(), other))
    return Pairs(pairs, len(responses) - len(pairs), len(others) - len(pairs))
