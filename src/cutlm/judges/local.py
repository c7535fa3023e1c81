"""A local model as a judge: one that `cutlm train-judge` trained, and the records that it is trained on."""

from collections.abc import Sequence
from typing import Any

from cutlm.data.journal import Journal, read_header
from cutlm.data.records import JudgedRecord
from cutlm.errors import DataError, UserError
from cutlm.generation.files import describe_run
from cutlm.generation.local import Sampling, find_room, generate_with_journal
from cutlm.judges.answers import BadAnswer, read_answer
from cutlm.judges.prompt import TRAINED_PROMPT, fill_prompt, write_answer
from cutlm.judges.responses import Failure, Outcome, Response, set_aside_empty
from cutlm.model.loading import fingerprint_model, load_trained, unwrap_peft
from cutlm.prompting.encoding import Encoder, choose_template
from cutlm.prompting.templates import RenderError, parse_date

_MAX_NEW_TOKENS = 1024


def make_training_records(records: Sequence[Any]) -> list[JudgedRecord]:
    """Turn judged records into training records of a judge: the question as instruction, its answer as output.

    Judgment and score are kept, so that satisfactory records can be counted and downsampled.

    Raises:
        DataError: They are token scores.
    """
    if not all(isinstance(record, JudgedRecord) for record in records):
        raise DataError("data: expected plain records to train a judge on, got token scores; pass their records")
    pairs = [(record, fill_prompt(TRAINED_PROMPT, record)) for record in records]
    return [
        JudgedRecord(instruction=question, output=write_answer(one), judgment=one.judgment, score=one.score)
        for one, question in pairs
    ]


def judge_locally(
    responses: Sequence[Response],
    path: str,
    out: str,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
) -> tuple[Outcome, Journal]:
    """Judge responses with a trained model, by greedy decoding.

    Args:
        responses: The responses.
        path: The model's folder: an adapter or a whole model.
        out: The output file; finished batches are kept in `OUT.partial`, from which a stopped run resumes.
        max_new_tokens: The maximum length of an answer; None: 1024, but at most a quarter of the model's context.
        batch_size: The number of responses at a time.
        dtype: See `load_model`.
        device: None uses a GPU if there is one.
        overwrite: Replace a partial file of a run with other settings.

    Returns:
        A judgment or a failure for each response, and the journal, to be removed once the outcome is written.
    """
    model, tokenizer = load_trained(path, dtype=dtype, device=device)
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: expected a model that cutlm train-judge trained, got one whose tokenizer has no chat template"
        )
    encoder = Encoder(tokenizer, choose_template(tokenizer), parse_date(read_header(out).get("template_date")))
    if max_new_tokens is None:
        limit = getattr(unwrap_peft(model).config.get_text_config(), "max_position_embeddings", None)
        max_new_tokens = _MAX_NEW_TOKENS if limit is None else max(1, min(_MAX_NEW_TOKENS, limit // 4))
    sampling = Sampling(max_new_tokens, batch_size=batch_size)
    max_prompt = find_room(model, max_new_tokens)
    kept, outcome = set_aside_empty(responses)
    questions = {index: fill_prompt(TRAINED_PROMPT, responses[index]) for index in kept}
    encoded: dict[int, list[int]] = {}
    for index, question in questions.items():
        try:
            encoded[index] = encoder.encode_generation_prompt(question)
        except RenderError as error:
            outcome.failures[index] = Failure("not rendered", str(error))
    for index, ids in encoded.items():
        if max_prompt is not None and len(ids) > max_prompt:
            reason = f"the question has {len(ids)} tokens; the model's context leaves {max_prompt} besides the answer"
            outcome.failures[index] = Failure("long question", reason)
    asked = [index for index in kept if index not in outcome.failures]
    inputs = [questions[index] for index in asked]
    header = describe_run(inputs, sampling, encoder.fingerprint, fingerprint_model(path), encoder.template_date, model)
    journal = Journal(out, header, overwrite=overwrite)
    counts = generate_with_journal(model, tokenizer, encoder, [encoded[index] for index in asked], sampling, journal)
    if counts.num_resumed:
        outcome.notes.append(f"{counts.num_resumed} answers are from a run that was stopped")
    for number, index in enumerate(asked):
        if number in counts.failures:
            outcome.failures[index] = Failure("no answer", counts.failures[number])
            continue
        answer = counts.responses[number]
        if number in counts.unfinished:
            reason = f"the answer was truncated at {max_new_tokens} tokens; set a larger --max_new_tokens"
            outcome.failures[index] = Failure("cut off", reason, answer)
            continue
        try:
            verdict = read_answer(answer, None, responses[index], questions[index], "trained")
        except BadAnswer as error:
            outcome.failures[index] = Failure(error.kind, error.reason, answer)
        else:
            outcome.judgments[index] = verdict.judgment
    return outcome, journal
