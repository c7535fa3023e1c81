"""Token scores as the data of a page: of each response its pieces of text, and of its tokens columns of numbers.

Numbers go in as they stand in the file, so that the page finds the very flags that eq. 5 finds in them. How they are
shown is left to `cutlm.inspect.inspection`.
"""

from collections.abc import Sequence
from typing import Any

from cutlm.blame.token_scores import TokenScores, flag_spans
from cutlm.inspect.pages import LEVELS
from cutlm.inspect.tokens import has_same_tokens, split_pieces

_MADE_BY = ("threshold", "unlikelihood_weight", "gamma", "detector", "tokenizer", "template")


def make_columns(
    names: Sequence[str],
    rows: Sequence[tuple[TokenScores, ...]],
    num_unpaired: Sequence[int] = (),
) -> dict[str, Any]:
    """The data of a page, fit for JSON.

    Args:
        names: Of the file, or of the two files.
        rows: Of each record its scores, by file.
        num_unpaired: Of each of two files, how many records the other does not have.

    Returns:
        `names`, `unpaired`, `levels` (from which change on there is the first, second ... shade), `made` (the
        different settings that scores were made by) and `records`: each with its texts and, by file, `sides`:
        `pieces` of the response and how many tokens each has (`sizes`, where it is not one each); `without`, `with`
        [T] or null; `flagged`, token indices, with their `weights`; `wrong`, token indices in `wrong_spans`, or
        null where nobody marked any; `made`, a place among the settings. The second of two sides has no pieces of its
        own where its tokens are the first one's.
    """
    made: dict[tuple[Any, ...], int] = {}
    records = []
    for scores in rows:
        record = scores[0].record
        sides = [_describe_side(side, made) for side in scores]
        if len(scores) == 2 and has_same_tokens(*scores):
            for name in ("pieces", "sizes", "has_end"):
                sides[1].pop(name, None)
        records.append(
            {
                "instruction": record.full_instruction,
                "judgment": record.judgment,
                "is_satisfactory": record.is_satisfactory,
                "sides": sides,
            }
        )
    return {
        "names": list(names),
        "unpaired": list(num_unpaired),
        "levels": LEVELS,
        "made": [dict(zip(_MADE_BY, values, strict=True)) for values in made],
        "records": records,
    }


def _describe_side(scores: TokenScores, made: dict[tuple[Any, ...], int]) -> dict[str, Any]:
    pieces = split_pieces(scores)
    flagged = [place for place, is_flagged in enumerate(scores.is_flagged) if is_flagged]
    side: dict[str, Any] = {
        "pieces": [piece.text for piece in pieces],
        "has_end": bool(pieces) and pieces[-1].is_end,
        "without": scores.logps_without,
        "with": scores.logps_with,
        "flagged": flagged,
        "weights": [scores.weights[place] for place in flagged],
        "wrong": _list_wrong(scores),
        "made": made.setdefault(tuple(getattr(scores, name) for name in _MADE_BY), len(made)),
    }
    if any(len(piece.indices) != 1 for piece in pieces):
        side["sizes"] = [len(piece.indices) for piece in pieces]
    return side


def _list_wrong(scores: TokenScores) -> list[int] | None:
    """The tokens that are truly wrong; None where that is not known, as without `wrong_spans` in a record."""
    if scores.record.is_satisfactory or not scores.record.wrong_spans:
        return None
    is_wrong = flag_spans(scores.spans, scores.record.wrong_spans)
    return [place for place, flag in enumerate(is_wrong) if flag]
