"""A response cut into pieces that can be shown one by one: a token each, or several where these share a character.

The pieces put together are the response to the letter, white space included, whatever a tokenizer makes of it. How a
piece looks is left to `cutlm.inspect.pages` and `cutlm.inspect.terminal`.
"""

from typing import NamedTuple

from cutlm.blame.token_scores import TokenScores


class Piece(NamedTuple):
    """A part of a response.

    Attributes:
        text: Its characters; "" for the end-of-sequence.
        locations: Which tokens it shows. None for text that no token claims, as in a file edited by hand.
        ratio: Of these tokens the largest change by the judgment, log p(y_t | x, j, y_<t) - log p(y_t | x, y_<t);
            None where it is not known.
        is_blamed: Whether one of them is.
        is_end: Whether it is the end-of-sequence.
    """

    text: str
    locations: tuple[int, ...]
    ratio: float | None
    is_blamed: bool
    is_end: bool = False


def split_pieces(scores: TokenScores) -> list[Piece]:
    """Cuts the response of a record into pieces.

    Args:
        scores: The scores of its tokens.

    Returns:
        The pieces; their texts joined are the response.
    """
    output, last = scores.record.output, len(scores.spans) - 1
    texts: list[str] = []
    locations: list[list[int]] = []
    reached = 0
    has_end = bool(scores.spans) and tuple(scores.spans[last]) == (len(output), len(output))
    for place, (_, end) in enumerate(scores.spans[: last if has_end else None]):
        if texts and end <= reached:  # a further part of a character, as the bytes of an emoji are
            locations[-1].append(place)
            continue
        texts.append(output[reached:end])
        locations.append([place])
        reached = max(reached, end)
    if reached < len(output):  # white space, which spans leave out
        if texts:
            texts[-1] += output[reached:]
        else:
            texts, locations = [output], [[]]
    ratios = compute_ratios(scores)
    pieces = [_make_piece(scores, ratios, text, group) for text, group in zip(texts, locations, strict=True)]
    if has_end:
        pieces.append(_make_piece(scores, ratios, "", [last])._replace(is_end=True))
    return pieces


def compute_ratios(scores: TokenScores) -> list[float] | None:
    """Of each token how much likelier the judgment makes it, in nats; None where it is not known."""
    if scores.logps_with is None or scores.logps_without is None:
        return None
    return [judged - plain for judged, plain in zip(scores.logps_with, scores.logps_without, strict=True)]


def _make_piece(scores: TokenScores, ratios: list[float] | None, text: str, locations: list[int]) -> Piece:
    ratio = None if ratios is None else max((ratios[place] for place in locations), key=abs, default=None)
    return Piece(text, tuple(locations), ratio, any(scores.is_flagged[place] for place in locations))
