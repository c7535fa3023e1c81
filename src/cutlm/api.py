"""The Python API next to `CUTTrainer`: generate, judge, blame and merge, each a few lines over the commands' code.

Examples:
    >>> responses = generate("Qwen/Qwen3-1.7B", ["Name the capital of Australia."])
    >>> records, failures = judge(responses, base_url="http://localhost:8000/v1", judge_model="my-judge")
    >>> scores = blame("Qwen/Qwen3-1.7B", records, template="chat")
    >>> merge("runs/first", "runs/first-merged")
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from cutlm.data.files import SourceRow, read_rows
from cutlm.data.journal import read_header
from cutlm.data.records import JudgedRecord, as_records, list_rows
from cutlm.errors import ConfigError, UserError
from cutlm.flagging.detector import FlagSettings, blame_file, describe_ineffective
from cutlm.flagging.scoring import load_scorer
from cutlm.flagging.sensitivity import NUM_RECORDS
from cutlm.flagging.token_scores import TokenScores, read_token_scores
from cutlm.generation.files import check_prompts, generate_file
from cutlm.generation.local import Sampling, choose_max_new_tokens, is_stopped
from cutlm.judges.responses import Failure, make_record_rows, parse_responses
from cutlm.judges.rules import Rules, judge_by_rules
from cutlm.judges.server import judge_by_server
from cutlm.model.loading import fingerprint_model, load_trained
from cutlm.model.merge import merge_adapter
from cutlm.prompting.encoding import Encoder, choose_template
from cutlm.prompting.templates import JudgmentRole, TemplateName, parse_date, set_arguments
from cutlm.servers.client import Server

logger = logging.getLogger(__name__)


def generate(
    model: str | Path,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    template: TemplateName | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    batch_size: int = 32,
    dtype: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Generate a response to each prompt with a local model (`cutlm generate`).

    Args:
        model: A model or adapter folder, a GGUF file, or a hub name.
        prompts: Instructions, or rows with `instruction` and optional `input`, or with `messages`.
        template: "alpaca" or "chat"; None for the chat template that is saved with the model.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.
        max_new_tokens: Maximum tokens per response; None: 2048, or half of the model's context if that is less.
        temperature: 0 is greedy.
        top_p: Nucleus sampling; 1 turns it off.
        seed: Seed of the sampling.
        batch_size: Prompts at a time.
        dtype: dtype of the weights; "auto" for the checkpoint's, or float32 on a CPU that is faster in it.
        device: Such as "cuda:1"; None for a GPU if there is one.
        out: A file to write; an interrupted call with the same arguments resumes from `OUT.partial`.

    Returns:
        Rows with `instruction`, `output`, `generator`, `dataset` and, if the model thought first, `reasoning`, in the
        order of the prompts.

    Raises:
        UserError: A prompt or setting is not valid, the model cannot be loaded, or it gave no final answer to a prompt.

    Examples:
        >>> generate("runs/first-merged", ["Name the capital of Australia."])[0]["output"]
        'Canberra.'
    """
    given = [{"instruction": prompt} if isinstance(prompt, str) else prompt for prompt in list_rows(prompts, "prompts")]
    rows = check_prompts([SourceRow(f"prompts[{index}]", row) for index, row in enumerate(given)], [], "prompts")
    loaded, tokenizer = load_trained(model, dtype=dtype, device=device)
    encoder = _make_encoder(tokenizer, template or choose_template(tokenizer), chat_template_kwargs, out)
    sampling = Sampling(max_new_tokens or choose_max_new_tokens(loaded), temperature, top_p, seed, batch_size)
    with _writing_to(out, "responses.jsonl") as path:
        generated = generate_file(
            loaded,
            tokenizer,
            encoder,
            rows,
            path,
            sampling,
            generator=Path(model).name,
            dataset="prompts",
            fingerprint=fingerprint_model(model),
        )
        if failures := sorted(generated.failures.items()):
            raise UserError([f"prompts[{index}]: {reason}; {_advise(reason)}" for index, reason in failures])
        return [row.value for row in read_rows(path)[0]]


def _advise(failure: str) -> str:
    if is_stopped(failure):
        return "set a larger max_new_tokens"
    return "sample another response (a temperature above 0, another seed), or leave the prompt out"


class Judged(NamedTuple):
    """The result of `judge`.

    Attributes:
        records: The responses with their judgments.
        failures: Why the others have none, by the index of the response.
    """

    records: list[JudgedRecord]
    failures: dict[int, Failure]


def judge(
    responses: Sequence[Mapping[str, Any]],
    *,
    rules: Rules | None = None,
    base_url: str | None = None,
    judge_model: str | None = None,
    cache: str | Path | None = None,
    **server_settings: Any,
) -> Judged:
    """Judge responses by a function of yours, or by a model on an OpenAI-compatible server (`cutlm judge`).

    Args:
        responses: Rows with `instruction`, optional `input`, and `output`, or `messages`, as `generate` returns them.
        rules: A function, called with the instruction (or the conversation as text) and the response; returns a
            judgment, or None if nothing is wrong, or a pair of that and the wrong spans.
        base_url: Address of a server, such as "http://localhost:8000/v1"; its key is read from OPENAI_API_KEY.
        judge_model: Name of the model on the server.
        cache: SQLite file of the server's judgments, which are then paid for once; None keeps no file.
        **server_settings: Further fields of `cutlm.servers.client.Server`, such as `concurrency` or `max_retries`.

    Raises:
        UserError: A response or a setting is not valid, or the server refuses every request.

    Examples:
        >>> judge([{"instruction": "2 + 2?", "output": "5"}], rules=lambda _, text: None if text == "4" else "Wrong.")
        Judged(records=[JudgedRecord(instruction='2 + 2?', ..., judgment='Wrong.', ...)], failures={})
    """
    rows = [SourceRow(f"responses[{index}]", row) for index, row in enumerate(list_rows(responses, "responses"))]
    parsed = parse_responses(rows, [], "responses")
    if rules is not None and not callable(rules):
        raise ConfigError(f"judge: rules: expected a function, got {rules!r}; import it and pass the function itself")
    if rules is not None and base_url is None:
        outcome = judge_by_rules(parsed, rules)
    elif base_url is not None and judge_model is not None and rules is None:
        server = Server(base_url, judge_model, **server_settings)
        with _writing_to(cache, "cache.sqlite") as path:
            outcome = judge_by_server(parsed, server, path)
    else:
        raise ConfigError("judge: expected either rules, or base_url and judge_model")
    records = [JudgedRecord.model_validate(row) for row in make_record_rows(parsed, outcome)]
    return Judged(records, dict(outcome.failures))


def blame(
    model: str | Path,
    records: Sequence[JudgedRecord | Mapping[str, Any]],
    *,
    template: TemplateName = "alpaca",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    judgment_role: JudgmentRole = "user",
    threshold: float | Literal["auto"] = 1.1,
    unlikelihood_weight: float = 1.0,
    gamma: float = 1.0,
    contrast: str = "judgment",
    num_foreign: int = 4,
    surprise_weight: float = 0.0,
    drop_ineffective: bool = False,
    weigh_by_effect: bool = False,
    max_length: int = 2048,
    dtype: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    sensitivity_records: int = NUM_RECORDS,
) -> list[TokenScores]:
    """Flag the tokens that each judgment objects to, by a frozen model (`cutlm blame`; paper, eq. 5).

    Args:
        model: A model or adapter folder, a GGUF file, or a hub name.
        records: Judged records.
        template: "alpaca" or "chat", as in training.
        chat_template_kwargs: Arguments of the chat template, as in training.
        judgment_role: "user" or "system", as in training.
        threshold: lambda of eq. 5, or "auto"; see `FlagSettings`.
        unlikelihood_weight: alpha of eq. 6.
        gamma: Exponent of the dynamic weight of eq. 6; 0 turns it off.
        contrast: Baseline for the judgment: "judgment" for no judgment (eq. 5), "foreign" or "perfect".
        num_foreign: Number of foreign judgments for contrast "foreign".
        surprise_weight: How much it counts for a flag that a token is unlikely; 0 as in eq. 5; see `FlagSettings`.
        drop_ineffective: Leave out records whose judgment has no larger effect than those of other records; see
            `FlagSettings`. A warning names them.
        weigh_by_effect: Find the `judgment_rank` of each unsatisfactory record, by which training can weigh it.
        max_length: Maximum tokens in a prompt and its response; prompts are truncated on the left.
        dtype: dtype of the weights; "auto" for the checkpoint's, or float32 on a CPU that is faster in it.
        device: Such as "cuda:1"; None for a GPU if there is one.
        out: A file to write, which `CUTTrainer` and `cutlm train` take as data; an interrupted call resumes. Its report
            is next to it, in `OUT.report.json`.
        sensitivity_records: Number of records for measuring whether the flags depend on the content of the
            judgments; a warning is logged if they hardly do. 0 skips the measurement.

    Returns:
        Token scores in the order of the records, without those that are too long or left out.

    Raises:
        UserError: A record or a setting is not valid, or the model cannot be loaded.

    Examples:
        >>> scores = blame("runs/base", [JudgedRecord(instruction="2 + 2?", output="5", judgment="Wrong.")])
        >>> scores[0].is_flagged
        [True, False]
    """
    settings = FlagSettings(
        threshold,
        unlikelihood_weight,
        gamma,
        max_length,
        contrast=contrast,
        num_foreign=num_foreign,
        surprise_weight=surprise_weight,
        drop_ineffective=drop_ineffective,
        weigh_by_effect=weigh_by_effect,
    )
    check = as_records(records, "records")
    tokenizer, score, detector, backend = load_scorer(model, dtype=dtype, device=device, max_length=max_length)
    encoder = _make_encoder(tokenizer, template, chat_template_kwargs, out, judgment_role)
    with _writing_to(out, "scores.jsonl") as path:
        report = blame_file(
            check.records,
            check.locations,
            path,
            encoder,
            score,
            settings,
            detector=detector,
            backend=backend,
            sensitivity_records=sensitivity_records,
        )
        scores = read_token_scores(path)
    if report.sensitivity is not None and (noise := report.sensitivity.describe_noise()):
        logger.warning(noise)
    if report.ineffective:
        logger.warning(describe_ineffective(report.ineffective, report.num_judged + len(report.ineffective)))
    return scores


def merge(adapter: str | Path, out: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Merge an adapter into its base model and save the result with its tokenizer (`cutlm merge`).

    Args:
        adapter: The folder of the adapter.
        out: The folder to write.
        base: The base model; None for the one that the adapter names.
        overwrite: Replace a folder that holds a model.

    Returns:
        The folder.

    Raises:
        UserError: The adapter or its base model cannot be loaded, they do not fit, or the folder is not empty.

    Examples:
        >>> merge("runs/first", "runs/first-merged")
        PosixPath('runs/first-merged')
    """
    merge_adapter(adapter, out, base=base, overwrite=overwrite)
    return Path(out)


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    chat_template_kwargs: Mapping[str, Any] | None,
    out: str | Path | None,
    judgment_role: JudgmentRole = "user",
) -> Encoder:
    """The encoder of a call that writes `out`, with the date of the call that it resumes."""
    date = None if out is None else read_header(out).get("template_date")
    return Encoder(set_arguments(tokenizer, chat_template_kwargs or {}), template, parse_date(date), judgment_role)


@contextmanager
def _writing_to(path: str | Path | None, name: str) -> Iterator[Path]:
    """Yield the path, or a temporary one if it is None."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name
