"""Data sets for the trainer: records, token scores or encoded rows to rows, blamed and downsampled, every loss noted.

What an objective sees of a record is `cutlm.training.views`, scoring them beforehand `cutlm.blame.scoring`. Batching is
left to `cutlm.model.collator`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import PreTrainedTokenizerBase

from cutlm.blame.scoring import score_rows
from cutlm.blame.token_scores import TokenScores, fingerprint_template, fingerprint_tokenizer, map_to_tokenizer
from cutlm.data.records import JudgedRecord, as_records
from cutlm.errors import ConfigError, DataError
from cutlm.losses import flag_tokens
from cutlm.model.loading import unwrap_peft
from cutlm.prompting.encoding import EncodedRecord, Encoder, encode_records
from cutlm.prompting.templates import TEMPLATES
from cutlm.training.config import CUTConfig
from cutlm.training.views import View, choose_view, view_both_contexts

_ID_COLUMNS = ("prompt_ids", "judged_prompt_ids", "response_ids")


@dataclass
class PreparedData:
    """A data set that can be batched, and what became of the rest.

    Attributes:
        rows: Rows with `prompt_ids`, `judged_prompt_ids`, `response_ids`, `is_satisfactory` and, where the tokens to
            unlearn are known beforehand, `is_flagged` and `weights`.
        notices: Sentences on what was cut, left out or downsampled.
        num_left_out: Records left out, for whatever reason.
        chat_template: The template by which other tools give the model the prompts of these rows, where it is known.
    """

    rows: Dataset
    notices: list[str] = field(default_factory=list)
    num_left_out: int = 0
    chat_template: str | None = None


def prepare_data(
    dataset: Dataset | Sequence[Any],
    name: str,
    args: CUTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    locations: Sequence[str] | None = None,
) -> PreparedData:
    """Encodes records or token scores by the view of the objective, or takes encoded rows as they are.

    Args:
        dataset: Records, token scores or encoded rows.
        name: What to call it in messages.
        args: Template and length.
        tokenizer: For records.
        locations: Where each record stands, for messages; None numbers them.

    Raises:
        DataError: Bad records or rows; all are named.
        ConfigError: Records without a tokenizer, one that does not fit the template, or no single data set.
    """
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{name}: expected one data set, as a list or a datasets.Dataset, got a mapping of several"
            f" ({', '.join(map(str, dataset))}); give one of them"
        )
    if len(dataset) and isinstance(dataset[0], Mapping) and "response_ids" in dataset[0]:
        rows = _check_encoded(dataset, name)
        _refuse_other_objectives(rows, name, args)
        return PreparedData(rows)
    if tokenizer is None:
        raise ConfigError(f"{name}: records need a tokenizer to be encoded; give processing_class")
    encoder = Encoder(tokenizer, args.template)  # type: ignore[arg-type]
    if len(dataset) and isinstance(dataset[0], TokenScores):
        records = [scores.record for scores in dataset]
        locations = locations or [f"{name}[{index}]" for index in range(len(dataset))]
        view: View = _view_scores(dataset, locations, encoder, args)
    else:
        check = as_records(list(dataset), name)
        records, locations = check.records, locations or check.locations
        view = choose_view(args.objective, args.detector, args.unlikelihood_weight, args.satisfactory_only)
    encoded = encode_records(records, locations, encoder, args.max_length, view)
    return PreparedData(
        Dataset.from_list(encoded.rows),
        [f"{name}: {encoded.describe(args.max_length)}", *encoded.describe_left_out()],
        encoded.num_left_out,
        encoder.build_chat_template(),
    )


def _view_scores(
    dataset: Sequence[TokenScores], locations: Sequence[str], encoder: Encoder, args: CUTConfig
) -> Callable[[JudgedRecord, Encoder], EncodedRecord]:
    """A view that takes flags and weights from token scores.

    Raises:
        ConfigError: Other settings than for known flags, or than the scores were made with.
        DataError: Scores of another tokenizer or template, and `map_spans` is off.
    """
    if args.objective != "cut" or args.detector != "frozen":
        raise ConfigError(
            "the data are token scores, whose flags are for objective cut and detector frozen; got objective"
            f" {args.objective}, detector {args.detector}"
        )
    # A default is not taken for a wish.
    made_with = {
        name: sorted({getattr(scores, name) for scores in dataset} - {getattr(args, name)})
        for name in ("threshold", "unlikelihood_weight", "gamma")
        if getattr(args, name) != CUTConfig.__dataclass_fields__[name].default
    }
    differing = [
        f"{name}: the token scores were made with {values[0]}, got {getattr(args, name)}; leave it out, or blame the"
        " records again"
        for name, values in made_with.items()
        if values
    ]
    if differing:
        raise ConfigError(differing)
    tokenizer, template = fingerprint_tokenizer(encoder.tokenizer), fingerprint_template(encoder)
    problems, by_record, others = [], {}, set()
    for scores, place in zip(dataset, locations, strict=True):
        if not args.map_spans and scores.template != template:
            problems.append(f"{place}: field 'template': made with {scores.template}, the training's is {template}")
            others.add(scores.template.partition(" ")[0])
        if scores.token_ids != encoder.encode_response(scores.record.output):
            if scores.tokenizer == tokenizer:
                problems.append(f"{place}: field 'token_ids': expected those of output, got others; blame it again")
                continue
            if not args.map_spans:
                problems.append(f"{place}: field 'tokenizer': made with another tokenizer than the model's")
                continue
            scores = map_to_tokenizer(scores, encoder)
        by_record[id(scores.record)] = scores
    if problems:
        hint = "set map_spans: true to take flags and weights over by their characters"
        if len(others) == 1 and (other := others.pop()) != args.template and other in TEMPLATES:
            hint = f"train with --template {other}, as the scores were made, or {hint}"
        raise DataError(problems, hint=hint)

    def view(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
        scores = by_record[id(record)]
        extra = {"is_flagged": list(scores.is_flagged), "weights": list(scores.weights)}
        return replace(view_both_contexts(record, encoder), response_ids=list(scores.token_ids), extra=extra)

    return view


def describe_replaced_template(tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> list[str]:
    """Says that a tokenizer's own chat template will be another one in what is saved, where that is so.

    Args:
        tokenizer: With its own template.
        template: That of training; None where the tokenizer's stays.
        name: What training's is called.
    """
    if template is None or tokenizer.chat_template in (None, template):
        return []
    return [
        f"the tokenizer's chat template gives way to that of training (template: {name}), with which the model will be"
        " prompted; to keep it give template: chat"
    ]


def refuse_sharded_blame(args: CUTConfig) -> None:
    """Raises:
    ConfigError: Tokens would be blamed by a model whose weights are to be spread over processes.
    """
    if args.is_sharded:
        raise ConfigError(
            "detector: frozen needs the whole model before training, which FSDP and DeepSpeed spread over processes;"
            " run cutlm blame first and train on the file that it writes"
        )


def blame_beforehand(data: PreparedData, name: str, model: nn.Module, args: CUTConfig) -> None:
    """Finds the inappropriate tokens by the model as it is now, unless they are known, and leaves the plain context.

    Rows of a part of the loss that is off are left out. The context with the judgment stays where something is learned
    from it.
    """
    columns = {key: data.rows[key] for key in data.rows.column_names}
    num_rows = len(data.rows)
    if "is_flagged" not in columns:
        is_flagged: list[list[bool] | None] = [None] * num_rows
        weights: list[list[float] | None] = [None] * num_rows
        judged = [index for index, ids in enumerate(columns["judged_prompt_ids"]) if ids is not None]
        rows = data.rows.select(judged).to_list()
        for batch in score_rows(model, rows, is_bf16=bool(args.bf16), show_progress=not args.disable_tqdm):
            for number, without, with_judgment in batch:
                assert with_judgment is not None
                index = judged[number]
                blame = flag_tokens(
                    without,
                    with_judgment,
                    threshold=args.threshold,
                    unlikelihood_weight=args.unlikelihood_weight,
                    gamma=args.gamma,
                )
                is_flagged[index], weights[index] = blame.is_flagged.tolist(), blame.weights.tolist()
        columns |= {"is_flagged": is_flagged, "weights": weights}
    num_tokens = sum(
        len(ids) for ids, good in zip(columns["response_ids"], columns["is_satisfactory"], strict=True) if not good
    )
    num_flagged = sum(sum(flags or ()) for flags in columns["is_flagged"])
    data.notices.append(
        f"{name}: {num_flagged} of {num_tokens} tokens of unsatisfactory responses are blamed before training"
    )
    if not args.parts.unsatisfactory:
        columns["judged_prompt_ids"] = [None] * num_rows
        kept = [args.use_satisfactory_loss if good else args.use_contrast_loss for good in columns["is_satisfactory"]]
        if not all(kept):
            data.num_left_out += num_rows - sum(kept)
            data.notices.append(f"{name}: {num_rows - sum(kept)} records of a part that is off are left out")
            columns = {
                key: [value for value, is_kept in zip(values, kept, strict=True) if is_kept]
                for key, values in columns.items()
            }
    data.rows = Dataset.from_dict(columns, features=_known_features(data.rows))


def _known_features(rows: Dataset) -> Features:
    """Column types, said so that a column of nothing but None has one."""
    ids = List(Value("int64"))
    known = {
        "judged_prompt_ids": ids,
        "is_flagged": List(Value("bool")),
        "weights": List(Value("float64")),
    }
    return Features({**rows.features, **known})


def downsample(data: PreparedData, name: str, share: float, seed: int) -> None:
    """Keeps at most `share` satisfactory records per unsatisfactory one (paper, section 5.2), drawn by `seed`."""
    is_satisfactory = data.rows["is_satisfactory"]
    satisfactory = [index for index in range(len(data.rows)) if is_satisfactory[index]]
    num_kept = min(len(satisfactory), int(share * (len(data.rows) - len(satisfactory))))
    kept = set(random.Random(seed).sample(satisfactory, num_kept))
    num_dropped = len(satisfactory) - num_kept
    data.rows = data.rows.select(
        [index for index in range(len(data.rows)) if not is_satisfactory[index] or index in kept]
    )
    data.num_left_out += num_dropped
    data.notices.append(
        f"{name}: downsample {share} keeps {num_kept} of {len(satisfactory)} satisfactory records; {num_dropped} left"
        f" out, {len(data.rows)} to train on"
    )


def check_vocabulary(model: nn.Module, rows: Dataset, name: str, columns: Sequence[str] = _ID_COLUMNS) -> None:
    """Refuses token ids that the model has no embedding for, as of a tokenizer that is not its own.

    Raises:
        ConfigError: There are such.
    """
    num_embeddings = next(unwrap_peft(model).get_input_embeddings().parameters()).shape[0]
    largest = max(token for key in columns for ids in rows[key] for token in ids or ())
    if 0 < num_embeddings <= largest:  # none are here where they are sharded over processes
        raise ConfigError(
            f"{name}: expected token ids below {num_embeddings}, the size of the model's vocabulary, got {largest};"
            " give the model's own tokenizer"
        )


def _refuse_other_objectives(rows: Dataset, name: str, args: CUTConfig) -> None:
    """Refuses encoded rows for objectives that see something else of a record than these rows hold."""
    if args.objective not in ("cut", "dual_cut"):
        raise ConfigError(
            f"{name}: encoded rows are for objective cut and dual_cut; give records for objective {args.objective}"
        )
    for wanted, column, setting in (
        (args.objective == "dual_cut", "is_praised", "objective dual_cut"),
        (args.detector == "spans", "is_flagged", "detector spans"),
    ):
        if wanted and column not in rows.column_names:
            raise ConfigError(f"{name}: encoded rows for {setting} need the column {column}")
    if args.objective == "dual_cut":
        both = zip(rows["judged_prompt_ids"], rows["is_praised"], strict=True)
        problems = [
            f"{name}[{index}]: field 'is_praised': expected true or false beside judged_prompt_ids, got none"
            for index, (judged, is_praised) in enumerate(both)
            if judged is not None and is_praised is None
        ]
        if problems:
            raise DataError(problems)


def _check_encoded(dataset: Dataset | Sequence[Any], name: str) -> Dataset:
    """Checks rows of token ids that were made elsewhere.

    Raises:
        DataError: Rows that cannot be used; all are named.
    """
    problems = []
    may_be_flagged = not isinstance(dataset, Dataset) or "is_flagged" in dataset.column_names
    is_any_flagged = may_be_flagged and any(
        isinstance(row, Mapping) and row.get("is_flagged") is not None for row in dataset
    )
    for index, row in enumerate(dataset):
        place = f"{name}[{index}]"
        if not isinstance(row, Mapping):
            problems.append(f"{place}: expected a row of token ids, as the first one is, got {type(row).__name__}")
            continue
        num_before = len(problems)
        for key in _ID_COLUMNS:
            value = row.get(key)
            if value is None and key == "judged_prompt_ids":
                continue
            if not value or not all(isinstance(token, int) and token >= 0 for token in value):
                problems.append(f"{place}: field {key!r}: expected a filled list of token ids, got {value!r}")
        if len(problems) == num_before:
            problems += [f"{place}: {problem}" for problem in _find_bad_flags(row, is_any_flagged)]
    if problems:
        raise DataError(problems)
    if isinstance(dataset, Dataset):
        if "judged_prompt_ids" not in dataset.column_names:
            dataset = dataset.add_column("judged_prompt_ids", [None] * len(dataset))
        if "is_satisfactory" not in dataset.column_names:
            dataset = dataset.add_column("is_satisfactory", [ids is None for ids in dataset["judged_prompt_ids"]])
        return dataset
    extra = [key for key in ("is_flagged", "weights", "is_praised") if any(key in row for row in dataset)]
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


def _find_bad_flags(row: Mapping[str, Any], is_any_flagged: bool) -> list[str]:
    """What is wrong with the flags, weights and praise of a row, where it has any or other rows have flags."""
    problems = []
    num_tokens = len(row["response_ids"])
    flags, weights, is_praised = (row.get(key) for key in ("is_flagged", "weights", "is_praised"))
    is_good = row.get("is_satisfactory", row.get("judged_prompt_ids") is None)
    are_needed = flags is not None or weights is not None or (is_any_flagged and not is_good)
    columns = (
        ("is_flagged", flags, "true or false", lambda flag: isinstance(flag, bool)),
        ("weights", weights, "a number of at least 0", _is_weight),
    )
    for key, values, expected, check in columns if are_needed else ():
        problem = f"field {key!r}: expected {expected} for each of the {num_tokens} tokens of response_ids"
        if values is None:
            problems.append(f"{problem}, got none")
        elif not isinstance(values, list | tuple) or len(values) != num_tokens:
            got = f"{len(values)} of them" if isinstance(values, list | tuple) else type(values).__name__
            problems.append(f"{problem}, got {got}")
        elif bad := [value for value in values if not check(value)]:
            problems.append(f"{problem}, got {bad[0]!r}")
    if is_praised is not None and not isinstance(is_praised, bool):
        problems.append(f"field 'is_praised': expected true or false, got {is_praised!r}")
    return problems


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
