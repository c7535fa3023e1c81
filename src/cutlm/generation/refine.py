"""Improved responses for the ILF baselines: a model rewrites what it was told is wrong, given the judgment.

The paper's ILF-MLE and ILF-DPO take refinements as given; here a model makes them. Learning from them is left to the
objectives `ilf_mle` and `ilf_dpo`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.files import write_rows
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord
from cutlm.generation.local import Counts, Sampling, generate_with_journal
from cutlm.prompting.encoding import Encoder


def encode_requests(records: Sequence[JudgedRecord], encoder: Encoder) -> list[list[int]]:
    """Token ids of the request to improve each response, for unsatisfactory records."""
    return [
        encoder.encode_refinement_prompt(record.full_instruction, record.output, record.judgment or "")
        for record in records
    ]


def refine_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    records: Sequence[JudgedRecord],
    out: str | Path,
    sampling: Sampling,
    *,
    fingerprint: str,
) -> Counts:
    """Writes the records again, unsatisfactory ones with an improved response in `i_ans`.

    One that has an `i_ans` keeps it. Finished batches go to `OUT.partial` at once; it is removed when `out` is whole.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Makes the prompts' token ids.
        records: The records.
        out: The file to write.
        sampling: How to draw.
        fingerprint: Of the model; a partial file made with another one is refused.

    Raises:
        UserError: A partial file of another run is in the way.
    """
    open_records = [record for record in records if not record.is_satisfactory and not record.i_ans]
    header = {
        "sampling": asdict(sampling),
        "template": encoder.template,
        "model": fingerprint,
        "records": hashlib.sha256(json.dumps([row.model_dump(mode="json") for row in records]).encode()).hexdigest(),
    }
    journal = Journal(out, header)
    counts = generate_with_journal(model, tokenizer, encoder, encode_requests(open_records, encoder), sampling, journal)
    answers = iter(counts.responses[index] for index in range(len(open_records)))
    rows = []
    for record in records:
        row = record.model_dump(mode="json", exclude_unset=True)
        if not record.is_satisfactory and not record.i_ans:
            row["i_ans"] = next(answers)
        rows.append(row)
    write_rows(out, rows)
    journal.remove()
    return counts
