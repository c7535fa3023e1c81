"""Log-probabilities of responses in several contexts, from which detectors score each token.

A response is scored without a judgment, with its own, with judgments of other responses, and with praise. Finished
batches are in a journal at once, so that a stopped run resumes.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.journal import Journal
from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.flagging.scoring import score_rows
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import TemplateName

NUM_FOREIGN = 2
# The log-probabilities [T] of one response, by context: "plain", "own", "perfect", "foreign_0", ...
Logps = dict[str, np.ndarray]
_RECORDS_PER_BLOCK = 16


def draw_foreign(records: Sequence[JudgedRecord], group: str | None, seed: int) -> list[list[str]]:
    """Draw judgments of other responses for each record.

    None says the same as the record's own, and if `group` names a field, none is of a record with the same value.
    """
    rng = random.Random(f"foreign {seed}")
    drawn = []
    for record in records:
        others = sorted(
            {
                other.judgment
                for other in records
                if other.judgment is not None
                and other.judgment != record.judgment
                and (group is None or (other.model_extra or {})[group] != (record.model_extra or {})[group])
            }
        )
        drawn.append(rng.sample(others, NUM_FOREIGN))
    return drawn


def list_contexts(record: JudgedRecord, foreign: Sequence[str]) -> dict[str, str | None]:
    """The judgments that a record is scored with, by the name of the context."""
    contexts = {"plain": None, "own": record.judgment, "perfect": PRAISE}
    return contexts | {f"foreign_{index}": judgment for index, judgment in enumerate(foreign)}


def score_contexts(
    model_path: Path,
    template: TemplateName,
    records: Sequence[JudgedRecord],
    foreign: Sequence[Sequence[str]],
    cache: Path,
    *,
    keep: Sequence[int] | None = None,
    deadline: float = math.inf,
) -> dict[int, Logps]:
    """Score records in all contexts with a model, or read what an earlier run scored.

    Args:
        model_path: A model's or an adapter's folder.
        template: The prompt template.
        records: The records.
        foreign: Judgments of other responses, for each record.
        cache: The folder of finished scores.
        keep: Indices of the records to score; None for all.
        deadline: Score no further records after this time (`time.monotonic`).

    Returns:
        The log-probabilities of the kept records by their index, in order; up to the deadline, those that are scored.
    """
    indices = list(range(len(records))) if keep is None else list(keep)
    texts = [[record.full_instruction, record.output, record.judgment] for record in records]
    content = json.dumps([str(model_path), template, texts, list(map(list, foreign)), indices])
    digest = hashlib.sha256(content.encode()).hexdigest()
    journal = Journal(cache / f"scores-{digest[:16]}", {"content": digest})
    finished = {line["index"]: line["logps"] for line in journal.lines}
    missing = [index for index in indices if index not in finished]
    if missing and time.monotonic() <= deadline:
        model, tokenizer = load_trained(model_path, dtype="float32", device="cpu")
        with journal:
            for start in range(0, len(missing), _RECORDS_PER_BLOCK):
                if time.monotonic() > deadline:
                    break
                block = missing[start : start + _RECORDS_PER_BLOCK]
                lines = _score_block(model, tokenizer, template, records, foreign, block)
                journal.append(lines)
                finished |= {line["index"]: line["logps"] for line in lines}
                print(f"scored {len(finished)} of {len(indices)} records ({template}, {model_path.name})", flush=True)
    return {
        index: {name: np.array(values) for name, values in finished[index].items()}
        for index in indices
        if index in finished
    }


def _score_block(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    records: Sequence[JudgedRecord],
    foreign: Sequence[Sequence[str]],
    block: Sequence[int],
) -> list[dict[str, Any]]:
    encoder = Encoder(tokenizer, template)
    rows, names = [], []
    for index in block:
        record = records[index]
        response_ids = encoder.encode_response(record.output)
        for name, judgment in list_contexts(record, foreign[index]).items():
            prompt_ids = encoder.encode_prompt(record.full_instruction, judgment)
            rows.append({"prompt_ids": prompt_ids, "judged_prompt_ids": None, "response_ids": response_ids})
            names.append((index, name))
    logps: dict[int, dict[str, list[float]]] = {index: {} for index in block}
    with closing(score_rows(model, rows, show_progress=False)) as batches:
        for row, values, *_ in (scored for batch in batches for scored in batch):
            index, name = names[row]
            logps[index][name] = [round(value, 6) for value in values.tolist()]
    return [{"index": index, "logps": by_context} for index, by_context in logps.items()]
