"""Training data: records, token scores or encoded rows become rows of token ids.

`prepare_data` is the whole path: encode the parts of each record that the objective uses, downsample, check the ids
against the model, and add the flags of the frozen detector. Every record that is lost on the way is counted and
reported.
"""

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from pyarrow import compute
from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.data.files import hash_file, open_atomic, read_bytes
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord, as_records
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.flagging.contrast import list_judged
from cutlm.flagging.detector import (
    BlameReport,
    Comparison,
    FlagSettings,
    Logps,
    compare_contexts,
    count_resumed,
    describe_ineffective,
    describe_run,
    flag_response,
    make_all_scores,
    plan_comparison,
    refuse_clashes,
    round_batch,
    score_with_journal,
    write_scores,
)
from cutlm.flagging.report import Sensitivity, read_sensitivity
from cutlm.flagging.scoring import Scorer, score_rows
from cutlm.flagging.sensitivity import sample_foreign
from cutlm.flagging.teacher import Columns, encode_teacher_prompt, encode_teacher_prompts, match_teacher
from cutlm.flagging.token_scores import (
    SETTINGS,
    TokenScores,
    find_settings,
    fingerprint_tokenizer,
    list_records,
    map_to_tokenizer,
    open_token_scores,
)
from cutlm.model.collator import check_rows_fit_model
from cutlm.model.loading import fingerprint_model, unwrap_peft
from cutlm.prompting.encoding import Encoder, RenderedRecord, View, view_both_contexts
from cutlm.prompting.rows import encode_records
from cutlm.prompting.spans import flag_spans
from cutlm.prompting.templates import TEMPLATES, parse_date, set_arguments
from cutlm.training.config import CUTConfig

_ID_COLUMNS = ("prompt_ids", "judged_prompt_ids", "response_ids")
_NUM_ENCODED = 1000
_FORWARD_MARK = "\n\n### Judgment:\n"


@dataclass
class PreparedData:
    """A dataset that can be batched.

    Its rows have `prompt_ids`, `judged_prompt_ids`, `response_ids`, `location`, `is_satisfactory` and, if the tokens to
    unlearn are known, `is_flagged` and `weights`, and if there is a teacher, `teacher_ids` and `teacher_logps`.
    """

    rows: Dataset
    notices: list[str] = field(default_factory=list)  # sentences about truncated, omitted and downsampled records
    num_left_out: int = 0
    chat_template: str | None = None  # with which other tools make the same prompts
    end_of_turn_id: int | None = None  # the token that ends every response; None if unknown
    template_date: str | None = None  # the date in the prompts, if they have one
    sensitivity: Sensitivity | None = None  # of the frozen detector; None if unknown
    threshold: Any = None  # at which the frozen detector flags, also if it was "auto"
    # Of a sample of unsatisfactory records, three rows each: the prompt without a judgment, with its own, and with a
    # foreign one. With them the sensitivity of the model that is being trained is measured.
    contrasts: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class ScoresFile:
    """Where the frozen detector stores its token scores, so that a resumed run reuses them."""

    path: Path  # JSON Lines; its header goes next to it, as .json
    overwrite: bool = False  # replace scores that were edited or made with other settings


def prepare_data(
    dataset: Dataset | Sequence[Any],
    name: str,
    args: CUTConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    locations: Sequence[str] | None = None,
    scores_file: ScoresFile | None = None,
    threshold: float | None = None,
) -> PreparedData:
    """Turn records, token scores or encoded rows into rows of token ids that the model can read.

    Args:
        dataset: The dataset; encoded rows need no tokenizer.
        name: Its name in messages; "train_dataset" is downsampled.
        args: Settings of training.
        model: The model before training, which is the frozen detector.
        tokenizer: The tokenizer.
        locations: The location of each record, such as `data.jsonl:17`; None numbers them.
        scores_file: Where the frozen detector stores its token scores; None keeps the flags in memory.
        threshold: Threshold of the frozen detector; None for that of the settings.

    Raises:
        DataError: Bad records or rows, all named; or nothing is left.
        ConfigError: Settings that do not fit the data, the tokenizer or the model.
    """
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{name}: expected one dataset, as a list or a datasets.Dataset, got a mapping of several"
            f" ({', '.join(map(str, dataset))}); pass one of them"
        )
    records: list[JudgedRecord] = []
    encoder = None
    if len(dataset) and isinstance(dataset[0], Mapping) and "response_ids" in dataset[0]:
        rows = _check_encoded(dataset, name, args)
        ends = {ids[-1] for ids in rows["response_ids"]}
        data = PreparedData(rows, end_of_turn_id=ends.pop() if len(ends) == 1 else None)
        if name == "train_dataset" and args.downsample is not None:
            _downsample(data, name, args.downsample, args.seed)
        _refuse_empty(data, name)
    else:
        if tokenizer is None:
            raise ConfigError(f"{name}: records need a tokenizer; pass processing_class")
        encoder = make_encoder(tokenizer, args, dataset)
        # The other processes of this machine then find the rows in the cache.
        with args.main_process_first(desc="encoding"):
            check = partial(check_rows_fit_model, model, max_length=args.max_length)
            data, records = encode_dataset(dataset, name, args, encoder, locations, check)
        if args.teacher == "ema":
            _add_teacher_prompts(data, records, encoder, args)
        if args.critique_weight:
            _add_critiques(data, name, records, encoder, args.max_length)
            columns: Any = {"prompts": ("critique_prompt_ids",), "responses": ("critique_ids",)}
            check_rows_fit_model(model, data.rows, args.max_length, **columns)
    check_rows_fit_model(model, data.rows, args.max_length)
    if args.has_known_flags:
        is_known = ("teacher_ids" if args.has_teacher else "is_flagged") in data.rows.column_names
        if not is_known:
            _flag_rows(data, name, args, model, records, encoder, scores_file, threshold)
        _finish_flags(data, name, args)
    elif args.has_current_flags and encoder is not None:
        data.contrasts = _sample_contrasts(data.rows, records, encoder, args)
    return data


# ---- Encoding ----


def make_encoder(tokenizer: PreTrainedTokenizerBase, args: CUTConfig, dataset: Sequence[Any] = ()) -> Encoder:
    """Make the encoder of the settings; without a date there, with that of the token scores."""
    tokenizer = set_arguments(tokenizer, dict(args.chat_template_kwargs or {}))
    date = args.template_date
    if date is None and len(dataset) and isinstance(dataset[0], TokenScores):
        date = dataset[0].template_date
    encoder = Encoder(tokenizer, args.template, parse_date(date), args.judgment_role)  # type: ignore[arg-type]
    if encoder.build_chat_template() is None:
        raise ConfigError(
            f"template: alpaca: no chat template gives the same prompt with {tokenizer.name_or_path!r}, so other"
            " tools would prompt the trained model otherwise; use template: chat"
        )
    return encoder


def encode_dataset(
    dataset: Sequence[Any],
    name: str,
    args: CUTConfig,
    encoder: Encoder,
    locations: Sequence[str] | None,
    check_rows: Callable[[pyarrow.Table], None] | None = None,
) -> tuple[PreparedData, list[JudgedRecord]]:
    """Encode records or token scores and downsample them; also return the record of each row.

    `check_rows` is called with the rows of each batch; see `encode_records`.

    Raises:
        DataError: Bad records, all named; or nothing is left.
    """
    if len(dataset) and isinstance(dataset[0], TokenScores):
        _check_scores(dataset, args)
        records: Sequence[Any] = dataset
        locations = locations or [f"{name}[{index}]" for index in range(len(dataset))]
        view: View = partial(_view_scores, args=args)
    else:
        if locations is None:
            check = as_records(dataset, name)
            records, locations = check.records, check.locations
        else:
            records = list(dataset)  # read from a file, which has checked them
        view = choose_view(args)
    show_progress = not args.disable_tqdm
    options: Any = {"num_processes": args.dataset_num_proc, "show_progress": show_progress, "check": check_rows}
    encoded = encode_records(records, locations, encoder, args.max_length, view, **options)
    known = list_records(records)
    notices = [f"{name}: {encoded.describe(args.max_length)}", *encoded.describe_left_out()]
    notices += [f"warning: {sentence}" for sentence in encoder.describe_omissions(known)]
    data = PreparedData(
        encoded.rows,
        notices,
        encoded.num_left_out,
        encoder.build_chat_template(),
        encoder.end_of_turn_id,
        encoder.template_date,
    )
    _refuse_empty(data, name)
    records = [known[index] for index in encoded.indices]
    if name == "train_dataset" and args.downsample is not None:
        records = [records[index] for index in _downsample(data, name, args.downsample, args.seed)]
    _refuse_empty(data, name)
    return data, records


def choose_view(args: CUTConfig) -> View:
    """The view of an objective: the response that it learns, and the prompt or prompts before it (paper, section 3)."""
    if args.objective == "cut" or args.has_teacher:
        if args.detector == "spans":
            return partial(_view_wrong_spans, weight=args.unlikelihood_weight)
        return view_both_contexts
    if args.objective == "likelihood" and args.satisfactory_only:
        return _view_satisfactory
    views: dict[str, View] = {
        "dual_cut": _view_with_praise,
        "likelihood": _view_response,
        "hindsight": _view_hindsight,
        "forward_prediction": _view_forward,
        "ilf_mle": _view_refinement,
        "unlikelihood": partial(_view_all_flagged, weight=args.unlikelihood_weight),
    }
    return views[args.objective]


def _view_with_praise(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
    """Both contexts of every record; satisfactory ones with their praise (DualCUT)."""
    judged_prompt = encoder.render(record.conversation, record.stated_judgment)
    extra = {"is_praised": record.is_satisfactory}
    return replace(_view_response(record, encoder), judged_prompt=judged_prompt, extra=extra)


def _view_response(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
    """The response after the instruction, whatever its judgment (maximum likelihood)."""
    return RenderedRecord(encoder.render(record.conversation), None, encoder.render_response(record.output))


def _view_satisfactory(record: JudgedRecord, encoder: Encoder) -> RenderedRecord | str:
    """Satisfactory responses only (rejection sampling)."""
    return _view_response(record, encoder) if record.is_satisfactory else "unsatisfactory, and satisfactory_only is on"


def _view_hindsight(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
    """The response after the instruction and its judgment (Liu et al. 2023, arXiv 2302.02676)."""
    prompt = encoder.render(record.conversation, record.stated_judgment)
    return RenderedRecord(prompt, None, encoder.render_response(record.output))


def _view_forward(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
    """The response, then its judgment (forward prediction: Weston 2016, arXiv 1604.06045).

    An end-of-turn token also follows the response, so that the model still learns to end its answer there.
    """
    judgment = encoder.render_response(_FORWARD_MARK + record.stated_judgment)
    return replace(_view_response(record, encoder), continuation=judgment)


def _add_critiques(
    data: PreparedData, name: str, records: Sequence[JudgedRecord], encoder: Encoder, max_length: int
) -> None:
    """Add the judgment of each record as `critique_ids`, to be learned after `critique_prompt_ids`.

    The context is that of forward prediction: instruction, response, and the request to judge it.
    """
    columns = _RowColumns(["critique_prompt_ids", "critique_ids"])
    num_left_out = 0
    for start in range(0, len(records), _NUM_ENCODED):
        part = records[start : start + _NUM_ENCODED]
        prompts = encoder.encode_prompts([encoder.render(record.conversation) for record in part])
        responses = encoder.encode_responses([encoder.render_response(record.output) for record in part])
        texts = [_FORWARD_MARK + record.stated_judgment for record in part]
        critiques = encoder.encode_responses([encoder.render_response(text) for text in texts])
        for prompt_ids, response_ids, text, ids in zip(prompts, responses, texts, critiques, strict=True):
            num_template = encoder.count_template_tokens(ids)
            spans = encoder.locate_tokens(text, ids)[num_template:]
            ids = ids[num_template:]
            num_asked = sum(end <= len(_FORWARD_MARK) for _, end in spans)
            # The response and the request stay whole, as the response does before its judgment.
            shown, learned = [*response_ids, *ids[:num_asked]], ids[num_asked:]
            num_tokens = max_length - len(shown) - len(learned)
            prompt = [*encoder.truncate(prompt_ids, num_tokens), *shown] if num_tokens > 0 else None
            num_left_out += prompt is None
            columns.add({"critique_prompt_ids": prompt, "critique_ids": prompt and learned})
    for key, values in columns.finish().items():
        data.rows = _set_column(data.rows, key, values)
    data.notices.append(
        f"{name}: {len(records) - num_left_out} judgments to learn (critique_weight); {num_left_out} left out, because"
        f" they do not fit max_length {max_length} with their response"
    )


def _add_teacher_prompts(
    data: PreparedData, records: Sequence[JudgedRecord], encoder: Encoder, args: CUTConfig
) -> None:
    """Add the prompts of a teacher that is asked in every training step: its own, and the one with the judgment."""
    assert args.teacher_settings is not None
    columns = _RowColumns(["teacher_prompt_ids", "teacher_judged_ids"])
    for response_ids, record in zip(data.rows["response_ids"], records, strict=True):
        prompt_ids = judged_ids = None
        if not record.is_satisfactory:
            num_tokens = args.max_length - len(response_ids)
            prompt_ids = encode_teacher_prompt(record, encoder, args.teacher_settings, num_tokens)
            encode = partial(encoder.encode_prompt, judgment=record.judgment)
            judged_ids = encoder.fit_prompt(encode, record.conversation, num_tokens)
        columns.add({"teacher_prompt_ids": prompt_ids, "teacher_judged_ids": judged_ids})
    for key, values in columns.finish().items():
        data.rows = _set_column(data.rows, key, values)


def _view_refinement(record: JudgedRecord, encoder: Encoder) -> RenderedRecord | str:
    """The improved response `i_ans`, or a satisfactory response (ILF: Scheurer et al. 2023, arXiv 2303.16755)."""
    if record.is_satisfactory:
        return _view_response(record, encoder)
    if not record.i_ans:
        return "unsatisfactory, and without an improved response in i_ans (cutlm refine makes them)"
    return RenderedRecord(encoder.render(record.conversation), None, encoder.render_response(record.i_ans))


def _view_all_flagged(record: JudgedRecord, encoder: Encoder, *, weight: float) -> RenderedRecord:
    """Every token of an unsatisfactory response is unlearned, every satisfactory response learned."""

    def flag_all(response_ids: list[int]) -> dict[str, Any]:
        num_template = encoder.count_template_tokens(response_ids)
        num_own = len(response_ids) - num_template
        is_flagged = [False] * num_template + [True] * num_own
        return {"is_flagged": is_flagged, "weights": [0.0] * num_template + [weight] * num_own}

    rendered = _view_response(record, encoder)
    return rendered if record.is_satisfactory else replace(rendered, annotate=flag_all)


def _view_wrong_spans(record: JudgedRecord, encoder: Encoder, *, weight: float) -> RenderedRecord | str:
    """Both contexts, with the tokens of the record's `wrong_spans` flagged."""
    if record.is_satisfactory:
        return view_both_contexts(record, encoder)
    wrong_spans = record.wrong_spans
    if not wrong_spans:
        return "unsatisfactory, and without wrong_spans"

    def flag_wrong(response_ids: list[int]) -> dict[str, Any] | str:
        spans = encoder.locate_tokens(record.output, response_ids)
        num_template = encoder.count_template_tokens(response_ids)
        is_flagged = [False] * num_template + flag_spans(spans[num_template:], wrong_spans)
        if not any(is_flagged):
            return "unsatisfactory, and its wrong_spans contain no token"
        return {"is_flagged": is_flagged, "weights": [weight * flag for flag in is_flagged]}

    return replace(view_both_contexts(record, encoder), annotate=flag_wrong)


def _check_scores(dataset: Sequence[TokenScores], args: CUTConfig) -> None:
    """Raises:
    ConfigError: The settings ask for something else than the token scores were made with.
    """
    if not args.has_frozen_detector and args.objective != "self_distillation":
        raise ConfigError(
            "the data are token scores, which are for objectives cut, redirect and self_distillation and detector"
            f" frozen; got objective {args.objective}, detector {args.detector}"
        )
    problems = []
    has_flags = args.objective != "self_distillation"
    for key in SETTINGS if has_flags else ():
        wanted = getattr(args, key)
        others = sorted(find_settings(dataset, key) - {wanted})
        # A default is not taken for a request, and any threshold may have been found.
        if others and wanted != "auto" and wanted != CUTConfig.__dataclass_fields__[key].default:
            problems.append(
                f"{key}: the token scores were made with {others[0]}, got {wanted}; remove the setting, or run cutlm"
                " blame again"
            )
    judged = [scores for scores in dataset if not scores.record.is_satisfactory]
    if args.teacher_settings is not None:
        differing = {name for scores in judged for name in match_teacher(scores.teacher, args.teacher_settings)}
        if differing:
            problems.append(
                f"the token scores were made without a teacher or with other settings ({', '.join(sorted(differing))}"
                f" differ); run cutlm blame again with --objective {args.objective} and the settings of training"
            )
    if any(scores.judgment_rank is None for scores in judged):
        problems += [
            f"{key}: the token scores were made without it; run cutlm blame again with --{key}"
            for key in ("drop_ineffective", "weigh_by_effect")
            if getattr(args, key)
        ]
    if problems:
        raise ConfigError(problems)


def take_settings(args: CUTConfig, dataset: Sequence[TokenScores]) -> CUTConfig:
    """Return the settings with those of the flags of token scores, so that other records are flagged alike.

    Those that were set, and those in which the token scores differ, stay.
    """
    args = copy.copy(args)
    for key in SETTINGS:
        found = find_settings(dataset, key)
        if len(found) == 1 and getattr(args, key) in (CUTConfig.__dataclass_fields__[key].default, "auto"):
            setattr(args, key, found.pop())
    return args


def _view_scores(scores: TokenScores, encoder: Encoder, *, args: CUTConfig) -> RenderedRecord:
    """The response without the judgment, with flags and weights from token scores, and a teacher's distributions.

    Under `map_spans`, flags of another tokenizer are mapped; otherwise the tokenizer and the template must be those of
    training.
    """
    record, is_mapped = scores.record, args.map_spans

    def take_flags(response_ids: list[int]) -> dict[str, Any]:
        found = scores
        problems = [] if is_mapped else _compare_templates(scores.template, encoder)
        if scores.token_ids != response_ids:
            if scores.tokenizer == fingerprint_tokenizer(encoder.tokenizer):
                problems.append("field 'token_ids': expected those of output, got others; run cutlm blame again")
            elif is_mapped:
                found = map_to_tokenizer(scores, encoder)
            else:
                problems.append(
                    "field 'tokenizer': made with another tokenizer than the model's; set map_spans: true to map flags"
                    " and weights by their characters"
                )
        columns = None
        if scores.teacher_ids is not None and scores.teacher_logps is not None:
            columns = Columns(scores.teacher_ids, scores.teacher_logps)
        if args.objective == "redirect" and not record.is_satisfactory:
            taught = columns.ids if columns else [[]] * len(scores.token_ids)
            places = [place for place, flag in enumerate(scores.is_flagged) if flag and not taught[place]]
            problems += [
                f"field 'teacher_ids[{place}]': expected the teacher's tokens for a flagged token, got none; set"
                f" is_flagged[{place}] to false, or run cutlm blame again"
                for place in places[:1]
            ]
        if problems:
            raise DataError(problems)
        extra = _list_taught(columns, found.is_flagged, scores.logps_without, args)
        if args.objective != "self_distillation":
            extra |= {"is_flagged": list(found.is_flagged), "weights": list(found.weights)}
        if args.weigh_by_effect:
            extra["record_weight"] = 1.0 if scores.judgment_rank is None else scores.judgment_rank
        return extra

    is_judged = args.parts.unsatisfactory and not record.is_satisfactory
    return RenderedRecord(
        encoder.render(record.conversation),
        encoder.render(record.conversation, record.judgment) if is_judged else None,
        encoder.render_response(record.output),
        annotate=take_flags,
    )


def _compare_templates(template: str, encoder: Encoder) -> list[str]:
    """Say how the template of token scores differs from that of training, and what to do."""
    if template == encoder.fingerprint:
        return []
    advice, name = "set map_spans: true", template.split()[0]
    if name in TEMPLATES and name != encoder.template:
        advice = f"train with --template {name}, or {advice}"
    elif template.split()[:2] == encoder.fingerprint.split()[:2]:  # a third part is the role that states judgments
        role = "system" if template.endswith(" system") else "user"
        advice = f"train with --judgment_role {role}, or {advice}"
    return [f"field 'template': made with {template}, training uses {encoder.fingerprint}; {advice}"]


def _refuse_empty(data: PreparedData, name: str) -> None:
    """Raises:
    DataError: No row is left.
    """
    if not len(data.rows):
        use = "train" if name == "train_dataset" else "evaluate"
        raise DataError(f"{name}: nothing remains to {use} on", hint="\n".join(data.notices))


def _downsample(data: PreparedData, name: str, share: float, seed: int) -> list[int]:
    """Keep at most `share` satisfactory records per unsatisfactory one (paper, section 5.2); return their indices."""
    is_satisfactory = data.rows["is_satisfactory"]
    satisfactory = [index for index, good in enumerate(is_satisfactory) if good]
    num_kept = min(len(satisfactory), int(share * (len(data.rows) - len(satisfactory))))
    chosen = set(random.Random(seed).sample(satisfactory, num_kept))
    kept = [index for index, good in enumerate(is_satisfactory) if not good or index in chosen]
    num_dropped = len(satisfactory) - num_kept
    data.rows = data.rows.select(kept)
    data.num_left_out += num_dropped
    data.notices.append(
        f"{name}: downsample {share} keeps {num_kept} of {len(satisfactory)} satisfactory records; {num_dropped} left"
        f" out, {len(kept)} to train on"
    )
    return kept


def _sample_contrasts(
    rows: Dataset, records: Sequence[JudgedRecord], encoder: Encoder, args: CUTConfig
) -> list[list[dict[str, Any]]]:
    contrasts = []
    for context in sample_foreign(rows, records, encoder, args.max_length, args.sensitivity_records):
        row = rows[context.target]
        prompts = row["prompt_ids"], row["judged_prompt_ids"], context.prompt_ids
        contrasts.append([row | {"prompt_ids": ids, "judged_prompt_ids": None} for ids in prompts])
    return contrasts


# ---- The frozen detector ----


def refuse_sharded_detector(args: CUTConfig) -> None:
    """Raises:
    ConfigError: The frozen detector would have to ask a model whose weights are sharded.
    """
    if args.is_sharded:
        raise ConfigError(
            f"{'objective' if args.has_teacher else 'detector'}: {args.objective if args.has_teacher else 'frozen'}"
            " needs the whole model before training, which FSDP and DeepSpeed shard; run cutlm blame first and train on"
            " its output"
        )


def _flag_rows(
    data: PreparedData,
    name: str,
    args: CUTConfig,
    model: nn.Module,
    records: Sequence[JudgedRecord],
    encoder: Encoder | None,
    scores_file: ScoresFile | None,
    threshold: float | None,
) -> None:
    """Score the rows with the current model: add the columns `is_flagged` and `weights`, and those of a teacher."""
    refuse_sharded_detector(args)
    if not getattr(model, "is_quantized", False):
        nn.Module.to(model, args.device)  # the Trainer does so only later
    chosen: Any = args.threshold if threshold is None else threshold  # a number or "auto"
    settings = FlagSettings(
        chosen,
        args.unlikelihood_weight,
        args.gamma,
        args.max_length,
        contrast=args.contrast,
        num_foreign=args.num_foreign,
        surprise_weight=args.surprise_weight,
        drop_ineffective=args.drop_ineffective and name == "train_dataset",
        weigh_by_effect=args.weigh_by_effect and name == "train_dataset",
        teacher=args.teacher_settings,
    )
    rows = data.rows
    if settings.teacher is not None and encoder is not None:
        prompts = encode_teacher_prompts(rows, records, encoder, settings.teacher, args.max_length)
        rows = _set_column(rows, "teacher_prompt_ids", pyarrow.array(prompts, pyarrow.list_(pyarrow.int32())))
    judged = list_judged(rows)
    flagged = set(judged)
    unknown = _list_flags(None, None, args) | _list_taught(None, None, None, args)
    columns = _RowColumns(list(unknown))
    record_weights: list[float] = []
    ineffective: dict[int, float] = {}

    def score(rows: Any, done: Any) -> Any:
        check_rows_fit_model(model, rows, args.max_length)
        options: Any = {"is_bf16": bool(args.bf16), "show_progress": not args.disable_tqdm}
        return score_rows(model, rows, done=done, teacher=settings.teacher, **options)

    if scores_file is not None and encoder is not None:
        # Only the training data have a file.
        scored, ineffective = _score_once(data, rows, args, model, records, encoder, score, settings, scores_file)
        kept = [index for index in range(len(rows)) if index not in ineffective]
        for index, one in zip(kept, scored, strict=True):
            record_weights.append(1.0 if one.judgment_rank is None else one.judgment_rank)
            if index not in flagged:
                columns.add(unknown)
                continue
            known_flags = rows[index].get("is_flagged") or one.is_flagged
            found = None if one.teacher_ids is None else Columns(one.teacher_ids, one.teacher_logps or [])
            taught = _list_taught(found, known_flags, one.logps_without, args)
            columns.add(_list_flags(one.is_flagged, one.weights, args) | taught)
        data.threshold = scored[0].threshold
    else:
        comparison = Comparison(settings, {}, None)
        plan = None
        if encoder is not None:
            num_records = args.sensitivity_records if name == "train_dataset" else 0
            plan = plan_comparison(rows, records, encoder, settings, num_records)
        elif (
            settings.threshold == "auto"
            or settings.contrast != "judgment"
            or settings.drop_ineffective
            or settings.weigh_by_effect
        ):
            raise ConfigError(
                f"{name}: contrast, drop_ineffective, weigh_by_effect, threshold: auto: expected records, got encoded"
                " rows; pass records"
            )
        logps: dict[int, Logps] = {
            judged[number]: one
            for batch in score(rows.select(judged), ())
            for number, one in round_batch(batch).items()
        }
        if plan is not None:
            comparison = compare_contexts(rows, records, logps, plan, score, settings)
            data.sensitivity, ineffective = comparison.sensitivity, comparison.ineffective
        for index in range(len(rows)):
            if index in ineffective:
                continue
            record_weights.append(comparison.ranks.get(index, 1.0))
            if index not in flagged:
                columns.add(unknown)
                continue
            without, with_judgment, found = logps[index]
            assert with_judgment is not None
            num_template = rows[index].get("num_template_tokens") or 0
            reference = comparison.references.get(index, without)
            flags = flag_response(reference, with_judgment, comparison.settings, num_template)
            known_flags = rows[index].get("is_flagged") or flags[0]
            if found is not None:
                found = found.restrict([place >= num_template for place in range(len(without))])
            columns.add(_list_flags(*flags, args) | _list_taught(found, known_flags, without, args))
        data.threshold = comparison.settings.threshold
    if settings.threshold == "auto":
        data.notices.append(f"{name}: threshold: auto found {data.threshold:g}")
    if settings.drop_ineffective:
        named = [rows[index]["location"] for index in ineffective]
        data.notices.append(f"{name}: {describe_ineffective(named, len(judged))}")
        data.num_left_out += len(ineffective)
        data.rows = data.rows.select([index for index in range(len(rows)) if index not in ineffective])
        _refuse_empty(data, name)
    for key, values in columns.finish().items():
        data.rows = _set_column(data.rows, key, values)
    if settings.weigh_by_effect:
        data.rows = _set_column(data.rows, "record_weight", pyarrow.array(record_weights))


# Given because a column may hold nothing but None.
_TYPES = {
    "teacher_prompt_ids": pyarrow.list_(pyarrow.int32()),
    "teacher_judged_ids": pyarrow.list_(pyarrow.int32()),
    "critique_prompt_ids": pyarrow.list_(pyarrow.int32()),
    "critique_ids": pyarrow.list_(pyarrow.int32()),
    "is_flagged": pyarrow.list_(pyarrow.bool_()),
    "weights": pyarrow.list_(pyarrow.float64()),
    "teacher_ids": pyarrow.list_(pyarrow.list_(pyarrow.int32())),
    "teacher_logps": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
    "old_logps": pyarrow.list_(pyarrow.float32()),
}


class _RowColumns:
    """Builds columns of `_TYPES` row by row, with few rows as Python objects at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._pending: list[Mapping[str, Any]] = []
        self._chunks: dict[str, list[pyarrow.Array]] = {name: [] for name in names}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the values of the next row."""
        self._pending.append(row)
        if len(self._pending) == 1000:
            self._pack()

    def _pack(self) -> None:
        for name, chunks in self._chunks.items():
            chunks.append(pyarrow.array([row[name] for row in self._pending], _TYPES[name]))
        self._pending = []

    def finish(self) -> dict[str, pyarrow.ChunkedArray]:
        """Return the columns."""
        self._pack()
        return {name: pyarrow.chunked_array(chunks, _TYPES[name]) for name, chunks in self._chunks.items()}


def _list_flags(is_flagged: list[bool] | None, weights: list[float] | None, args: CUTConfig) -> dict[str, Any]:
    """The flags of a row by columns, if the objective uses those of the frozen detector."""
    return {"is_flagged": is_flagged, "weights": weights} if args.has_frozen_detector else {}


def _list_taught(
    columns: Columns | None, is_flagged: Sequence[bool] | None, logps: Sequence[float] | None, args: CUTConfig
) -> dict[str, Any]:
    """Return a teacher's columns for a row; empty if the objective has no teacher."""
    if not args.has_teacher:
        return {}
    if columns is not None and is_flagged is not None and args.objective == "redirect":
        columns = columns.restrict(is_flagged)
    taught = {"teacher_ids": columns and columns.ids, "teacher_logps": columns and columns.logps}
    return taught | ({"old_logps": logps} if args.importance_clip is not None else {})


def _score_once(
    data: PreparedData,
    rows: Dataset,
    args: CUTConfig,
    model: nn.Module,
    records: Sequence[JudgedRecord],
    encoder: Encoder,
    score: Scorer,
    settings: FlagSettings,
    scores_file: ScoresFile,
) -> tuple[Sequence[TokenScores], dict[int, float]]:
    """Token scores of the rows: those stored by an earlier start of the same run, or made now and stored.

    Rows whose judgment is ineffective have none; they are returned with the ranks of their judgments. The sensitivity
    is stored likewise, and set in `data`.
    """
    refuse_clashes(records, list(rows["location"]))
    language_model: Any = unwrap_peft(model)
    detector = fingerprint_model(language_model.name_or_path)
    quantization = getattr(language_model.config, "quantization_config", None)
    backend = {
        "revision": getattr(language_model.config, "_commit_hash", None),
        "dtype": f"{language_model.dtype}",
        "quantization": quantization and json.dumps(quantization.to_dict(), default=str, sort_keys=True),
        "attn_implementation": language_model.config._attn_implementation,
        "bf16": bool(args.bf16),
        "device": args.device.type,
    }
    run = describe_run(records, encoder, settings, detector, backend)
    keys = ("threshold", "unlikelihood_weight", "gamma", "contrast", "num_foreign", "surprise_weight")
    header = {key: getattr(settings, key) for key in (*keys, "drop_ineffective", "weigh_by_effect")} | run
    path = scores_file.path
    header_path = path.with_suffix(".json")
    partial = path.with_name(f"{path.name}.partial")
    # All machines share the folder, as they do for checkpoints, so one process writes.
    with args.main_process_first(local=False, desc="blame"):
        difference = _compare_scores(path, header_path, header)
        if difference is None:
            data.notices.append(f"{path}: reusing the token scores of these records by this model")
            data.sensitivity = read_sensitivity(path)
            stored = json.loads(read_bytes(header_path)).get("ineffective", [])
            return _open_scores(path), dict(stored)
        if args.process_index:
            raise UserError(
                f"{path}: expected the token scores of the first process, found none; see its own error, or share the"
                " folder between machines"
            )
        # A partial file next to it means that an earlier start was killed before the header was written.
        if path.exists() and not partial.exists() and not scores_file.overwrite:
            raise UserError(
                f"{path}: {difference}; train on it as it is with cutlm train --data {path}, replace it with"
                " --overwrite_output_dir, or name another output_dir"
            )

        journal = Journal(path, run, overwrite=scores_file.overwrite)  # flags are made at the end
        num_resumed = count_resumed(journal)
        plan = plan_comparison(rows, records, encoder, settings, args.sensitivity_records)
        logps = score_with_journal(rows, journal, score)
        comparison = compare_contexts(rows, records, logps, plan, score, settings, journal)
        data.sensitivity = comparison.sensitivity if args.sensitivity_records else None
        header_path.unlink(missing_ok=True)
        ineffective = comparison.ineffective
        if len(ineffective) == len(rows):
            named = describe_ineffective(list(rows["location"]), len(rows))
            raise DataError(f"{named}; nothing remains to train on: set drop_ineffective: false")
        report = BlameReport(
            sensitivity=data.sensitivity,
            settings=comparison.settings,
            ineffective={rows[index]["location"]: rank for index, rank in ineffective.items()},
        )
        write_scores(path, make_all_scores(rows, records, logps, comparison, encoder, detector), report)
        with open_atomic(header_path) as file:
            stored = [[index, rank] for index, rank in ineffective.items()]
            content = header | {"ineffective": stored, "sha256": hash_file(path)}
            file.write(json.dumps(content, indent=2).encode())
        journal.remove()
        data.notices.append(f"{path}: {len(rows)} records scored ({num_resumed} of them by an interrupted run)")
        return _open_scores(path), ineffective


def _open_scores(path: Path) -> Sequence[TokenScores]:
    scores = open_token_scores(path)
    assert scores is not None, "they have been written as JSON Lines"
    return scores


def _compare_scores(path: Path, header_path: Path, header: Mapping[str, Any]) -> str | None:
    """Why a file of token scores is not what this run would make, or None if it is."""
    if not path.exists():
        return "no such file"
    try:
        found = json.loads(read_bytes(header_path))
    except (ValueError, RecursionError):  # including DataError, if the file is missing
        found = None
    if not isinstance(found, dict):
        return f"without a readable {header_path.name} next to it, it is not known how it was made"
    # As before there was a choice.
    earlier = {"contrast": "judgment", "num_foreign": FlagSettings.num_foreign, "surprise_weight": 0.0}
    found = earlier | {"drop_ineffective": False, "weigh_by_effect": False} | found
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        return f"made with other settings ({', '.join(differing)} differ)"
    return None if found.get("sha256") == hash_file(path) else "edited since it was made"


def _finish_flags(data: PreparedData, name: str, args: CUTConfig) -> None:
    """Count the flags or the taught tokens, and drop what training on known flags does not need."""
    is_satisfactory = data.rows["is_satisfactory"]
    num_tokens = num = 0
    is_distilled = args.objective == "self_distillation"
    name_marked = "teacher_ids" if is_distilled else "is_flagged"
    columns = ["response_ids", name_marked, "is_satisfactory"]
    for table in data.rows.with_format("arrow", columns=columns).iter(10_000):
        judged = table.filter(compute.invert(table["is_satisfactory"]))
        num_tokens += compute.sum(compute.list_value_length(judged["response_ids"])).as_py() or 0
        marked = compute.list_flatten(table[name_marked].cast(_TYPES[name_marked]))
        is_marked = compute.greater(compute.list_value_length(marked), 0) if is_distilled else marked
        num += compute.sum(is_marked).as_py() or 0
    share, what = num / max(1, num_tokens), "distilled" if is_distilled else "flagged"
    data.notices.append(f"{name}: {num} of {num_tokens} tokens of unsatisfactory responses are {what} ({share:.1%})")
    if "record_weight" in data.rows.column_names:
        weights = [w for w, good in zip(data.rows["record_weight"], is_satisfactory, strict=True) if not good]
        mean = sum(weights) / max(1, len(weights))
        data.notices.append(f"{name}: weigh_by_effect: unsatisfactory records weigh {mean:.2f} on average")
    if data.sensitivity is not None:
        data.notices.append(f"{name}: {data.sensitivity.describe()}")
        data.notices += [f"warning: {noise}" for noise in [data.sensitivity.describe_noise()] if noise]
    if args.parts.unsatisfactory:
        return
    drop_excluded(data, name, args)
    nulls = pyarrow.nulls(len(data.rows), pyarrow.list_(pyarrow.int32()))
    data.rows = _set_column(data.rows, "judged_prompt_ids", nulls)


def drop_excluded(data: PreparedData, name: str, args: CUTConfig) -> None:
    """Drop the records of an excluded part of the loss if flags are known and only plain contexts are learned.

    Raises:
        DataError: No row is left.
    """
    if not args.has_known_flags or args.parts.unsatisfactory:
        return
    kept = [
        index
        for index, good in enumerate(data.rows["is_satisfactory"])
        if (args.use_satisfactory_loss if good else args.use_contrast_loss)
    ]
    if len(kept) < len(data.rows):
        num_dropped = len(data.rows) - len(kept)
        data.num_left_out += num_dropped
        data.notices.append(f"{name}: {num_dropped} records of an excluded part of the loss are left out")
        data.rows = data.rows.select(kept)
    if not kept:
        raise DataError(f"{name}: nothing remains to learn from", hint="\n".join(data.notices))


def _set_column(rows: Dataset, name: str, values: pyarrow.Array) -> Dataset:
    """Add or replace a column."""
    if name in rows.column_names:
        rows = rows.remove_columns(name)
    # The explicit fingerprint keeps `datasets` from pickling the column to compute one.
    return rows.add_column(name, values, new_fingerprint=generate_random_fingerprint())


# ---- Encoded rows ----


def _check_encoded(dataset: Dataset | Sequence[Any], name: str, args: CUTConfig) -> Dataset:
    """Check rows of token ids that were made elsewhere; all bad rows are named."""
    if args.critique_weight:
        raise ConfigError(f"{name}: critique_weight needs the judgments of records, got encoded rows; pass records")
    if args.objective not in ("cut", "dual_cut"):
        raise ConfigError(
            f"{name}: encoded rows are for objectives cut and dual_cut; pass records for objective {args.objective}"
        )
    names = set(dataset.column_names) if isinstance(dataset, Dataset) else {key for row in dataset for key in row}
    for is_needed, column, setting in (
        (args.objective == "dual_cut", "is_praised", "objective dual_cut"),
        (args.detector == "spans", "is_flagged", "detector spans"),
    ):
        if is_needed and column not in names:
            raise ConfigError(f"{name}: encoded rows for {setting} need the column {column}")
    has_flags = "is_flagged" in names and any(row.get("is_flagged") is not None for row in dataset)
    problems = [
        f"{name}[{index}]: {problem}"
        for index, row in enumerate(dataset)
        for problem in _find_row_problems(row, has_flags, args.objective == "dual_cut")
    ]
    if problems:
        raise DataError(problems)
    if isinstance(dataset, Dataset):
        if "judged_prompt_ids" not in dataset.column_names:
            dataset = dataset.add_column("judged_prompt_ids", [None] * len(dataset))
        if "is_satisfactory" not in dataset.column_names:
            dataset = dataset.add_column("is_satisfactory", [ids is None for ids in dataset["judged_prompt_ids"]])
        return dataset
    extra = [key for key in ("is_flagged", "weights", "is_praised", "num_template_tokens") if key in names]
    return Dataset.from_list(
        [
            {key: row.get(key) for key in (*_ID_COLUMNS, *extra)}
            | {
                "location": row.get("location") or f"{name}[{index}]",
                "is_satisfactory": row.get("is_satisfactory", row.get("judged_prompt_ids") is None),
            }
            for index, row in enumerate(dataset)
        ]
    )


def _find_row_problems(row: Any, has_flags: bool, needs_praise: bool) -> list[str]:
    """The problems of one encoded row.

    If any row has flags (`has_flags`), every unsatisfactory one must have them; under `needs_praise` a judged row must
    say whether its judgment is praise.
    """
    if not isinstance(row, Mapping):
        return [f"expected a row of token ids, as the first one is, got {type(row).__name__}"]
    problems = []
    for key in _ID_COLUMNS:
        ids = row.get(key)
        if ids is None and key == "judged_prompt_ids":
            continue
        if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
            problems.append(f"field {key!r}: expected a non-empty list of token ids, got {ids!r}")
    if problems:
        return problems
    num_template = row.get("num_template_tokens")
    if num_template is not None and not (type(num_template) is int and 0 <= num_template < len(row["response_ids"])):
        problems.append(
            "field 'num_template_tokens': expected a whole number of at least 0, below the number of response_ids, got"
            f" {num_template!r}"
        )
    num_tokens, is_judged = len(row["response_ids"]), row.get("judged_prompt_ids") is not None
    flags, weights, is_praised = (row.get(key) for key in ("is_flagged", "weights", "is_praised"))
    columns = (
        ("is_flagged", flags, "true or false", lambda flag: isinstance(flag, bool)),
        ("weights", weights, "a number of at least 0", _is_weight),
    )
    are_needed = (
        flags is not None or weights is not None or (has_flags and not row.get("is_satisfactory", not is_judged))
    )
    for key, values, expected, is_valid in columns if are_needed else ():
        problem = f"field {key!r}: expected {expected} for each of the {num_tokens} tokens of response_ids"
        if not isinstance(values, list | tuple):
            problems.append(f"{problem}, got {'none' if values is None else type(values).__name__}")
        elif len(values) != num_tokens:
            problems.append(f"{problem}, got {len(values)} of them")
        elif bad := [value for value in values if not is_valid(value)]:
            problems.append(f"{problem}, got {bad[0]!r}")
    if is_praised is not None and not isinstance(is_praised, bool):
        problems.append(f"field 'is_praised': expected true or false, got {is_praised!r}")
    elif needs_praise and is_judged and is_praised is None:
        problems.append("field 'is_praised': expected true or false next to judged_prompt_ids, got none")
    return problems


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def describe_replaced_template(tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> list[str]:
    """Return a notice that the template of training replaces the tokenizer's chat template, or an empty list."""
    if name == "chat" or template is None or tokenizer.chat_template in (None, template):
        return []
    return [
        f"this model has a chat template, which is not used (template: {name}); the saved tokenizer gets the prompt of"
        " training as its chat template instead. To train in the model's own format, set template: chat"
    ]
