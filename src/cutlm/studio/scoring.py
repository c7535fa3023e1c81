"""Scores of responses under the models, for the page: shading, the gauge, and the change by training."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings
from cutlm.flagging.live import LiveScorer
from cutlm.flagging.token_scores import write_token_scores
from cutlm.generation.local import find_context_limit
from cutlm.model.loading import find_base_model, is_adapter_folder, load_trained
from cutlm.prompting.encoding import Encoder, choose_template
from cutlm.prompting.spans import Span, flag_spans
from cutlm.prompting.templates import TemplateName, parse_date, set_arguments
from cutlm.studio.items import Item, describe_pieces, make_record

# Judgments of other responses that the gauge compares a wording with.
NUM_FOREIGN = 3
_DEFAULT_LENGTH = 2048

IsStopped = Callable[[], bool]


@dataclass(frozen=True)
class ModelSettings:
    """How the models of the studio are loaded and prompted; as options of the command."""

    template: TemplateName | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    template_date: str | None = None
    base: str | None = None
    dtype: str = "auto"
    device: str | None = None
    threshold: float = 1.1
    max_length: int | None = None


@dataclass(frozen=True)
class Side:
    """A model and its name on the page."""

    name: str
    path: str
    scorer: LiveScorer


class Models:
    """One model, or one before and one after training. Only one thread may use them at a time.

    Args:
        paths: The model, or both.
        settings: How they are loaded.

    Raises:
        UserError: A model cannot be loaded.
    """

    def __init__(self, paths: Sequence[str], settings: ModelSettings) -> None:
        self._settings = settings
        names = ("before", "after") if len(paths) == 2 else ("",)
        self._sides = [self._load(name, path) for name, path in zip(names, paths, strict=True)]

    def _load(self, name: str, path: str) -> Side:
        settings = self._settings
        base = settings.base if is_adapter_folder(path) else None
        model, tokenizer = load_trained(path, dtype=settings.dtype, base=base, device=settings.device)
        tokenizer = set_arguments(tokenizer, settings.chat_template_kwargs or {})
        template = settings.template
        if template is None:
            template = choose_template(tokenizer) if tokenizer.chat_template else "alpaca"
        encoder = Encoder(tokenizer, template, parse_date(settings.template_date))
        max_length = settings.max_length or min(find_context_limit(model) or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
        flags = FlagSettings(settings.threshold, max_length=max_length)
        return Side(name, path, LiveScorer(model, path, encoder, flags))

    @property
    def names(self) -> list[str]:
        """The names on the page: one that is empty, or "before" and "after"."""
        return [side.name for side in self._sides]

    @property
    def template(self) -> TemplateName:
        """The prompt template of the first model."""
        return self._sides[0].scorer.encoder.template

    @property
    def device(self) -> torch.device:
        """Where the first model runs."""
        return self._sides[0].scorer.device

    @property
    def training_options(self) -> dict[str, Any]:
        """The options that training must share for its prompts to be those of the page, by name."""
        settings = self._settings
        options: dict[str, Any] = {"max_length": settings.max_length}
        if self.template == "chat":
            arguments = settings.chat_template_kwargs
            options["chat_template_kwargs"] = json.dumps(arguments) if arguments else None
            options["template_date"] = settings.template_date
        return {name: value for name, value in options.items() if value}

    @property
    def base_path(self) -> str:
        """The model to train: the first one, or the base model of an adapter."""
        path = self._sides[0].path
        return find_base_model(path, self._settings.base) if is_adapter_folder(path) else path

    def add_trained(self, path: Path) -> None:
        """Load a model that was trained meanwhile as the one after training."""
        first = self._sides[0]
        self._sides = [Side("before", first.path, first.scorer), self._load("after", str(path))]

    def score(self, item: Item, judgment: str, is_stopped: IsStopped) -> list[dict[str, Any]]:
        """Score a response with a judgment by each model, for the page."""
        record = make_record(item, judgment)
        scored: list[dict[str, Any]] = []
        for side in self._sides:
            try:
                scores = side.scorer.score(record, is_stopped)
            except UserError as error:
                scored.append({"name": side.name, "problem": str(error).removeprefix("the response: ")})
                continue
            opening = side.scorer.encoder.count_template_tokens(scores.token_ids)
            scored.append({"name": side.name, "num_template_tokens": opening, **describe_pieces(scores)})
        return scored

    def measure_reaction(
        self, item: Item, judgment: str, foreign: Sequence[str], threshold: float, is_stopped: IsStopped
    ) -> dict[str, Any] | None:
        """Measure how the flags of a wording differ from those of judgments of other responses; None if unknown."""
        record = make_record(item, judgment)
        if record.is_satisfactory or not foreign:
            return None
        try:
            found = self._sides[0].scorer.measure_sensitivity(record, foreign, threshold, is_stopped)
        except UserError:  # the response is too long, which the shading reports
            return None
        return None if found is None else {**vars(found), "is_noise": found.describe_noise() is not None}

    def write_scores(
        self,
        path: Path,
        rows: Sequence[tuple[JudgedRecord, Sequence[Span]]],
        threshold: float,
        is_stopped: IsStopped,
    ) -> None:
        """Write token scores of records without the flags in the passages of each, which a reviewer removed."""
        scores = []
        for record, unflagged in rows:
            try:
                one = self._sides[0].scorer.score(record, is_stopped, threshold)
            except UserError:
                continue  # too long, as training would leave it out
            removed = flag_spans(one.spans, unflagged)
            kept = [flag and not gone for flag, gone in zip(one.is_flagged, removed, strict=True)]
            weights = [weight if flag else 0.0 for flag, weight in zip(kept, one.weights, strict=True)]
            scores.append(replace(one, is_flagged=kept, weights=weights))
        if not scores:
            raise UserError("no response fits into the model's context; start the studio with a larger --max_length")
        write_token_scores(path, scores)

    def compare(self, records: Sequence[JudgedRecord], threshold: float, is_stopped: IsStopped) -> list[dict[str, Any]]:
        """Compute mean log-probabilities by each model: of satisfactory responses, flagged tokens, and other tokens.

        The flags are those of the first model, and the context has no judgment.
        """
        sums = {kind: [[0.0, 0] for _ in self._sides] for kind in ("satisfactory", "flagged", "other")}
        for record in records:
            plain = record.model_copy(update={"judgment": PRAISE})
            try:
                first = self._sides[0].scorer.score(record, is_stopped, threshold)
                scored = [side.scorer.score(plain, is_stopped) for side in self._sides]
            except UserError:
                continue
            for number, scores in enumerate(scored):
                if scores.token_ids != first.token_ids or scores.logps_without is None:
                    continue
                for logp, flag in zip(scores.logps_without, first.is_flagged, strict=True):
                    kind = "satisfactory" if record.is_satisfactory else "flagged" if flag else "other"
                    sums[kind][number][0] += logp
                    sums[kind][number][1] += 1
        return [
            {
                "kind": kind,
                "num_tokens": own[0][1],
                "means": [total / num if num else None for total, num in own],
            }
            for kind, own in sums.items()
        ]


def choose_foreign(judgments: dict[int, str], index: int, key: str) -> list[str]:
    """Choose judgments of other responses, the same ones as long as there are no new ones."""
    own = judgments.get(index, "").casefold().strip()
    others = {text.casefold().strip(): text for other, text in judgments.items() if other != index}
    others.pop(own, None)
    # By their own hash, so that a new judgment replaces at most one of those that are scored already.
    return sorted(others.values(), key=lambda text: random.Random(f"{key} {text}").random())[:NUM_FOREIGN]
