"""Scores of one response under changing judgments, quickly enough to be shown while a judgment is written."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cutlm.data.records import JudgedRecord
from cutlm.errors import DataError
from cutlm.flagging.detector import FlagSettings, Logps, describe_marks, encode_for_scoring, make_scores, round_logps
from cutlm.flagging.report import Sensitivity
from cutlm.flagging.sensitivity import Contrast, compute_sensitivity
from cutlm.flagging.token_scores import TokenScores
from cutlm.model.collator import check_rows_fit_model
from cutlm.model.forward import SequenceScorer, check_head
from cutlm.model.loading import fingerprint_model, unwrap_peft
from cutlm.prompting.encoding import Encoder

# Log-probabilities that are kept: of a response without a judgment, and with each wording.
_NUM_KEPT = 512

IsStopped = Callable[[], bool]


def _never() -> bool:
    return False


class LiveScorer:
    """Scores single records, and reuses the computation that a record shares with recent ones.

    Args:
        model: A causal language model, with or without an adapter.
        path: Its folder or name.
        encoder: Its tokenizer and template.
        settings: Threshold and lengths. The contrast is that of eq. 5.

    Example:

        >>> scorer = LiveScorer(model, path, encoder, FlagSettings())
        >>> scorer.score(record.model_copy(update={"judgment": "Sydney is wrong."})).is_flagged
        [False, True, ...]
    """

    def __init__(self, model: nn.Module, path: str | Path, encoder: Encoder, settings: FlagSettings) -> None:
        check_head(model)
        self.encoder, self.settings = encoder, settings
        self._model, self._scorer = model, SequenceScorer(model)
        self._kept: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = OrderedDict()
        self._marks = describe_marks(encoder, settings, fingerprint_model(path))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return unwrap_peft(self._model).device

    def score(
        self, record: JudgedRecord, is_stopped: IsStopped = _never, threshold: float | None = None
    ) -> TokenScores:
        """Score a record; one that is satisfactory without its judgment only.

        Args:
            record: The record.
            is_stopped: Whether the result is no longer wanted.
            threshold: lambda of eq. 5; None for that of the settings.

        Raises:
            DataError: The response does not fit, or the chat template refuses it.
            CancelledError: `is_stopped` returned true.
        """
        without, judged, response_ids = self._score_both(record, is_stopped)
        settings, marks = self.settings, self._marks
        if threshold is not None:
            settings, marks = replace(settings, threshold=threshold), marks | {"threshold": threshold}
        return make_scores(record, response_ids, Logps(without, judged), None, self.encoder, settings, marks)

    def measure_sensitivity(
        self, record: JudgedRecord, foreign: Sequence[str], threshold: float, is_stopped: IsStopped = _never
    ) -> Sensitivity | None:
        """Measure how far the flags of an unsatisfactory record depend on its judgment; None without a foreign one.

        Args:
            record: The record.
            foreign: Judgments of other records.
            threshold: lambda of eq. 5.
            is_stopped: As for `score`.
        """
        without, own, response_ids = self._score_both(record, is_stopped)
        assert own is not None, "only an unsatisfactory record has a judgment to react to"
        start = self.encoder.count_template_tokens(response_ids)
        contrasts = []
        for judgment in foreign:
            _, other, _ = self._score_both(record.model_copy(update={"judgment": judgment}), is_stopped)
            if other is not None:
                contrasts.append(Contrast(without, own, other, start))
        return compute_sensitivity(contrasts, threshold)

    def _score_both(
        self, record: JudgedRecord, is_stopped: IsStopped
    ) -> tuple[list[float], list[float] | None, list[int]]:
        encoded = encode_for_scoring([record], ["the response"], self.encoder, self.settings)
        if not encoded.rows:
            raise DataError(encoded.left_out)
        check_rows_fit_model(self._model, encoded.rows, self.settings.max_length)
        (row,) = encoded.rows
        # The plain context first: its prefix is the one that all wordings share.
        contexts = [row["prompt_ids"], row["judged_prompt_ids"]]
        logps = [ids and self._score(ids, row["response_ids"], is_stopped) for ids in contexts]
        return logps[0], logps[1], row["response_ids"]

    def _score(self, prompt_ids: list[int], response_ids: list[int], is_stopped: IsStopped) -> list[float]:
        key = (tuple(prompt_ids), tuple(response_ids))
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            logps = self._scorer.score(prompt_ids, response_ids, is_stopped)
            if not logps.isfinite().all():
                raise DataError("non-finite log-probabilities; the weights are damaged: try --dtype float32")
            self._kept[key] = round_logps(logps)
            if len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]
