"""Files of prompts to answer and of records to refine, by a local model or a server.

Finished responses go to `OUT.partial` at once, from which a stopped run resumes; it is removed when OUT is written.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.conversations import Conversation
from cutlm.data.files import SourceRow, read_rows, write_rows
from cutlm.data.journal import Journal
from cutlm.data.records import InstructionRow, JudgedRecord, validate_row
from cutlm.data.sources import as_sources, describe_sources
from cutlm.errors import DataError, UserError
from cutlm.generation.local import Generated, Sampling, find_room, find_room_in, generate_with_journal
from cutlm.prompting.encoding import Encoder, encode_each

if TYPE_CHECKING:
    from cutlm.generation.vllm import Engine

ALPACA_EVAL = "alpaca_eval"


def load_prompts(
    sources: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Read instructions, rows with `instruction`, optional `input` and `dataset`; see `read_data`.

    The source "alpaca_eval" is the 805 instructions on the hub. Raise a `DataError` that names all bad rows.
    """
    names = find_prompts(sources)
    return check_prompts(*read_rows(names, columns), describe_sources(names))


def find_prompts(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """Return sources of instructions, with "alpaca_eval" downloaded."""
    return [
        _download_alpaca_eval() if name == ALPACA_EVAL and not Path(name).exists() else name
        for name in as_sources(sources)
    ]


def check_prompts(rows: Sequence[SourceRow], problems: Sequence[str], source: str) -> list[dict[str, Any]]:
    """Check the rows of a file of instructions; see `load_prompts`."""
    problems = [*problems]
    checked = [validate_row(row, InstructionRow, problems) for row in rows]
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError(f"{source}: expected at least one instruction, got none")
    return [row.model_dump(exclude_unset=True) for row in checked if row is not None]


def _download_alpaca_eval() -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"alpaca_eval: cannot download the instructions from the hub ({reason}); pass a file instead"
        ) from None


def get_conversation(row: dict[str, Any]) -> Conversation:
    """Return the conversation that a row of `load_prompts` asks to answer."""
    return InstructionRow.model_validate(row).conversation


def describe_run(
    inputs: Any,
    sampling: Sampling,
    template: str,
    fingerprint: str,
    template_date: str | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Return the header of a run's journal: all settings that its responses depend on, with a hash of the inputs.

    `fingerprint` is of the model, or its name on a server; `model` is a local one, whose dtype counts, too.
    """
    prompts = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    header: dict[str, Any] = {"sampling": asdict(sampling), "template": template, "model": fingerprint}
    header |= {"prompts": prompts, "template_date": template_date}
    return header if model is None else header | {"dtype": str(next(model.parameters()).dtype)}


def generate_file(
    model: "nn.Module | Engine",
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[dict[str, Any]],
    out: str | Path,
    sampling: Sampling,
    *,
    generator: str,
    dataset: str,
    fingerprint: str,
    judgment: str | None = None,
    max_failure_rate: float = 0.0,
    overwrite: bool = False,
) -> Generated:
    """Answer prompts with a local model and write AlpacaEval's format, see `write_answers`.

    Args:
        model: A causal language model in evaluation mode, or one that vLLM has loaded.
        tokenizer: Its tokenizer.
        encoder: Encodes the prompts.
        prompts: See `load_prompts`.
        out: The file to write.
        sampling: How to sample.
        generator: The model's name in the output.
        dataset: The `dataset` of rows that have none.
        fingerprint: Of the model; a partial file of another one is refused.
        judgment: Asks for responses that deserve this judgment, from models trained by hindsight.
        max_failure_rate: The largest share of prompts without a response with which the file is written.
        overwrite: Replace a partial file of a run with other settings.

    Raises:
        UserError: There is a partial file of a run with other settings.
    """
    # Fails before a prompt is encoded.
    if isinstance(model, nn.Module):
        room = find_room(model, sampling.max_new_tokens)
    else:
        room = find_room_in(model.context_limit, sampling.max_new_tokens)
    conversations = [get_conversation(row) for row in prompts]
    inputs = [list_inputs(conversations), judgment]
    local = model if isinstance(model, nn.Module) else None
    header = describe_run(inputs, sampling, encoder.fingerprint, fingerprint, encoder.template_date, local)
    encoded = encode_prompts(conversations, judgment, encoder)
    encoded, num_shortened = drop_old_turns(
        encoded, conversations, lambda _, each: encoder.encode_generation_prompt(each, judgment), room
    )
    if isinstance(model, nn.Module):
        journal = Journal(out, header, overwrite=overwrite)
        generated = generate_with_journal(model, tokenizer, encoder, encoded, sampling, journal)
    else:
        from cutlm.generation.vllm import generate_with_vllm

        header |= {"engine": "vllm", "engine_settings": model.settings}
        journal = Journal(out, header, overwrite=overwrite)
        generated = generate_with_vllm(model, tokenizer, encoder, encoded, sampling, journal)
    generated.num_truncated += num_shortened
    write_answers(prompts, generated, journal, out, generator, dataset, max_failure_rate)
    return generated


def drop_old_turns(
    encoded: Sequence[list[int]],
    conversations: Sequence[Conversation],
    encode: Callable[[int, Conversation], list[int]],
    room: int | None,
) -> tuple[list[list[int]], int]:
    """Drop the oldest turns of conversations whose prompts do not fit; also return how many fit by that.

    `encode` gets the index of a conversation and its remaining turns. System messages stay. A last turn that is too
    long alone is left as it is, for `generation.local.fit_prompts`.
    """
    fitted, num_shortened = list(encoded), 0
    for index, conversation in enumerate(conversations):
        shorter: Conversation | None = conversation
        while (
            room is not None
            and len(fitted[index]) > room
            and shorter is not None
            and (shorter := shorter.drop_oldest_turn()) is not None
        ):
            fitted[index] = encode(index, shorter)
            num_shortened += len(fitted[index]) <= room
    return fitted, num_shortened


def list_inputs(conversations: Sequence[Conversation]) -> list[Any]:
    """Return conversations as JSON values, those of one turn as text: what responses depend on."""
    return [
        each.instruction if each.is_single_turn else [list(each.messages), list(each.tools)] for each in conversations
    ]


def encode_prompts(conversations: Sequence[Conversation], judgment: str | None, encoder: Encoder) -> list[list[int]]:
    """Return the token ids of prompts to generate from; raise a `DataError` that names those the template refuses."""
    locations = [f"prompt {number}" for number in range(1, len(conversations) + 1)]
    return encode_each(lambda each: encoder.encode_generation_prompt(each, judgment), conversations, locations)


def write_answers(
    prompts: Sequence[dict[str, Any]],
    generated: Generated,
    journal: Journal,
    out: str | Path,
    generator: str,
    dataset: str,
    max_failure_rate: float,
) -> None:
    """Write the answers of a run, see `make_rows`, and list prompts without one in `OUT.failures.jsonl`.

    If there are too many of these, OUT is not written, and the journal stays.
    """
    rows = {index: {"number": index + 1} | prompts[index] for index in generated.failures}
    _write_failures(out, generated, rows)
    if not generated.has_too_many_failures(max_failure_rate):
        write_rows(out, make_rows(prompts, generated, generator, dataset))
        journal.remove()


def name_failures_file(out: str | Path) -> Path:
    return Path(f"{out}.failures.jsonl")


def _write_failures(out: str | Path, generated: Generated, rows: dict[int, dict[str, Any]]) -> None:
    """List the failures of a run with the row of each, or remove the list of an earlier run."""
    path = name_failures_file(out)
    if generated.failures:
        write_rows(path, [{"reason": reason} | rows[index] for index, reason in sorted(generated.failures.items())])
    else:
        path.unlink(missing_ok=True)


def refine_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    records: Sequence[JudgedRecord],
    out: str | Path,
    sampling: Sampling,
    *,
    fingerprint: str,
    overwrite: bool = False,
) -> Generated:
    """Write records again, with an improved response in `i_ans` of each unsatisfactory one that has none.

    These are for the ILF baselines, which learn from refinements. See `generate_file` for the arguments. Records for
    which the model gave none are also listed in `OUT.failures.jsonl`.
    """
    room = find_room(model, sampling.max_new_tokens)  # fails before a prompt is encoded
    unrefined = [index for index, record in enumerate(records) if not record.is_satisfactory and not record.i_ans]
    inputs = [record.model_dump(mode="json") for record in records]
    header = describe_run(inputs, sampling, encoder.fingerprint, fingerprint, encoder.template_date, model)
    journal = Journal(out, header, overwrite=overwrite)
    asked = [records[index] for index in unrefined]
    encoded = encode_refinement_prompts(asked, encoder)
    encoded, num_shortened = drop_old_turns(
        encoded,
        [record.conversation for record in asked],
        lambda index, each: encoder.encode_refinement_prompt(each, asked[index].output, asked[index].judgment or ""),
        room,
    )
    generated = generate_with_journal(model, tokenizer, encoder, encoded, sampling, journal)
    generated.num_truncated += num_shortened
    for number in [number for number, output in generated.responses.items() if not output.strip()]:
        generated.failures[number] = "the response is empty"
        del generated.responses[number]
        generated.unfinished.discard(number)
    rows = [record.model_dump(mode="json", exclude_unset=True) for record in records]
    for number, output in generated.responses.items():
        rows[unrefined[number]]["i_ans"] = output
    _write_failures(out, generated, {number: rows[unrefined[number]] for number in generated.failures})
    write_rows(out, rows)
    journal.remove()
    return generated


def encode_refinement_prompts(records: Sequence[JudgedRecord], encoder: Encoder) -> list[list[int]]:
    """Return the token ids of prompts that ask to improve unsatisfactory responses by their judgments."""
    return encode_each(
        lambda record: encoder.encode_refinement_prompt(record.conversation, record.output, record.judgment or ""),
        records,
        [f"unsatisfactory record {number}" for number in range(1, len(records) + 1)],
    )


def make_rows(
    prompts: Sequence[dict[str, Any]], generated: Generated, generator: str, dataset: str
) -> list[dict[str, Any]]:
    """Return a row of AlpacaEval's format for each response: `instruction`, `output`, `generator`, `dataset`.

    `input` and `reasoning` are added where there are some.
    """
    rows = []
    for index, row in enumerate(prompts):
        if index in generated.responses:
            answer = {"instruction": row["instruction"], "output": generated.responses[index], "generator": generator}
            answer |= {"input": row["input"]} if row.get("input") else {}
            if messages := row.get("messages"):
                answer["messages"] = [*messages, {"role": "assistant", "content": generated.responses[index]}]
                answer |= {"tools": row["tools"]} if row.get("tools") else {}
            answer |= {"dataset": row.get("dataset") or dataset}
            rows.append(answer | ({"reasoning": generated.reasoning[index]} if index in generated.reasoning else {}))
    return rows
