"""What `cutlm demo` measures: CUT's loss, likelihoods of blamed and other tokens, and shares of right answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cutlm.collator import CutCollator, split_lengths
from cutlm.demo_world import Subject, judge
from cutlm.encoding import Encoder, encode_records
from cutlm.model import score_batch
from cutlm.objectives import CutLoss, combine_parts, cut_loss
from cutlm.records import JudgedRecord

MAX_LENGTH = 256
OBJECTIVE = {"threshold": 1.1, "unlikelihood_weight": 1.0, "gamma": 1.0}


class Scores(NamedTuple):
    """What a model makes of the records' responses: log-probs of their tokens, and CUT's loss and flags.

    Attributes:
        without: [U] log-probs of unsatisfactory responses, without the judgment.
        satisfactory: [S] log-probs of satisfactory responses.
        cut: Loss and flags.
    """

    without: Tensor
    satisfactory: Tensor
    cut: CutLoss


@torch.no_grad()
def score_records(model: nn.Module, encoder: Encoder, records: Sequence[JudgedRecord]) -> Scores:
    """Runs a model over records in both contexts."""
    encoded = encode_records(records, ["record"] * len(records), encoder, MAX_LENGTH)
    batch = CutCollator()(encoded.rows)
    num_tokens, num_satisfactory_tokens = split_lengths(batch)
    without, with_judgment, satisfactory = score_batch(model, batch).split(
        [num_tokens, num_tokens, num_satisfactory_tokens]
    )
    return Scores(without, satisfactory, cut_loss(without, with_judgment, satisfactory, **OBJECTIVE))  # type: ignore[arg-type]


def measure(scores: Scores, is_flagged: Tensor) -> dict[str, float | None]:
    """CUT's loss on the records, and the mean likelihood without judgments of given tokens and of all others."""
    contrast, likelihood = scores.cut.contrast.item(), scores.cut.likelihood.item()
    num_contrast, num_likelihood = len(scores.without), len(scores.without) + len(scores.satisfactory)
    flagged, others = scores.without[is_flagged], torch.cat([scores.without[~is_flagged], scores.satisfactory])
    return {
        "loss": combine_parts(contrast, likelihood, num_contrast, num_likelihood),
        "loss_contrast": contrast / max(1, num_contrast),
        "loss_likelihood": likelihood / num_likelihood,
        "likelihood_flagged": flagged.exp().mean().item() if len(flagged) else None,
        "likelihood_others": others.exp().mean().item(),
    }


def rate_answers(held_out: Sequence[tuple[Subject, str]], answers: Sequence[str]) -> dict[str, Any]:
    """Shares of right answers to held-out instructions, by what is new about them."""
    groups: dict[str, list[bool]] = {}
    for (subject, _), answer in zip(held_out, answers, strict=True):
        name = "other_phrasing" if subject.is_in_records else f"other_{subject.kind}"
        groups.setdefault(name, []).append(judge(subject, answer) is None)
    return {
        "right_answers": {name: sum(group) / len(group) for name, group in groups.items()},
        "num_answers": {name: len(group) for name, group in groups.items()},
    }


def split_blamed(model: nn.Module, encoder: Encoder, record: JudgedRecord) -> list[tuple[str, bool]]:
    """The tokens of an unsatisfactory response as text, each with whether the model blames it."""
    flags = score_records(model, encoder, [record]).cut.is_flagged.tolist()
    ids = encoder.encode_response(record.output)
    texts = [str(encoder.tokenizer.decode([token])) for token in ids[:-1]]  # less the end-of-sequence
    return list(zip(texts, flags[:-1], strict=True))


def choose_examples(held_out: Sequence[tuple[Subject, str]], answers: Sequence[str]) -> list[int]:
    """For each habit the first held-out instruction that the base model answers wrongly, in printable words."""
    chosen: dict[str | None, int] = {}
    for index, ((subject, _), answer) in enumerate(zip(held_out, answers, strict=True)):
        if answer.strip() and answer.isprintable() and judge(subject, answer) is not None:
            chosen.setdefault(subject.habit, index)
    return [index for habit, index in chosen.items() if habit is not None]
