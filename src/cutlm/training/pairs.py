"""Pairs of a better and a worse response, for TRL's `DPOTrainer`: the objectives `dpo` and `ilf_dpo`.

The pairs are token ids from cutlm's own encoder, so that DPO sees the same prompts and responses as the other
objectives. The loss, the reference model and the metrics are TRL's.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.token_scores import TokenScores
from cutlm.model.collator import check_rows_fit_model, warn_of_long_limit
from cutlm.model.loading import check_lora_targets, unwrap_peft
from cutlm.model.saving import changes_base
from cutlm.prompting.encoding import Encoder, encode_each
from cutlm.training.checkpoints import CheckpointingTrainer
from cutlm.training.config import CUTConfig
from cutlm.training.dataset import describe_replaced_template, make_encoder
from cutlm.training.facts import describe_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_RESPONSES = ("chosen_ids", "rejected_ids")
_BATCH_SIZE = 1000


class Pair(NamedTuple):
    """Two responses to one instruction or conversation."""

    conversation: Conversation
    chosen: str
    rejected: str
    location: str


def pair_responses(records: Sequence[JudgedRecord], locations: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Pair each unsatisfactory response with a satisfactory one to the same instruction.

    If an instruction has several satisfactory responses, they take turns; a response that was sampled repeatedly counts
    once.

    Returns:
        The pairs, and one sentence for each reason why responses have none.
    """
    better: dict[str, dict[str, str]] = {}
    worse: dict[str, dict[str, str]] = {}
    for record, location in zip(records, locations, strict=True):
        responses = better if record.is_satisfactory else worse
        responses.setdefault(record.full_instruction, {}).setdefault(record.output, location)
    pairs, num_alike, num_alone = [], 0, {"satisfactory": 0, "unsatisfactory": 0}
    for instruction, conversation in {record.full_instruction: record.conversation for record in records}.items():
        chosen, rejected = better.get(instruction, {}), worse.get(instruction, {})
        if not chosen or not rejected:
            num_alone["satisfactory" if chosen else "unsatisfactory"] += 1
            continue
        for number, (response, location) in enumerate(rejected.items()):
            best = list(chosen)[number % len(chosen)]
            if best == response:  # judged both ways
                num_alike += 1
                continue
            pairs.append(Pair(conversation, best, response, location))
    alike = [f"{num_alike} pairs left out: the same response, judged both ways"] if num_alike else []
    return pairs, alike + [
        f"{num} instructions left out: every response is {kind}" for kind, num in num_alone.items() if num
    ]


def pair_refinements(records: Sequence[JudgedRecord], locations: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Pair the improved response of each unsatisfactory record with the one that was judged."""
    pairs, num_satisfactory, num_unrefined = [], 0, 0
    for record, location in zip(records, locations, strict=True):
        if record.is_satisfactory:
            num_satisfactory += 1
        elif not record.i_ans or record.i_ans == record.output:
            num_unrefined += 1
        else:
            pairs.append(Pair(record.conversation, record.i_ans, record.output, location))
    left_out = [f"{num_satisfactory} records left out: satisfactory, so there is no pair"] if num_satisfactory else []
    if num_unrefined:
        left_out.append(
            f"{num_unrefined} records left out: without a different response in i_ans (cutlm refine makes them)"
        )
    return pairs, left_out


def encode_pairs(pairs: Sequence[Pair], encoder: Encoder, max_length: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Encode pairs. Prompts are truncated on the left to fit, responses never.

    Returns:
        Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, and a sentence for each pair that does not fit.
    """
    rows, left_out = [], []
    rendered = encode_each(
        lambda pair: (
            encoder.render(pair.conversation),
            encoder.render_response(pair.chosen),
            encoder.render_response(pair.rejected),
        ),
        pairs,
        [pair.location for pair in pairs],
    )
    prompts, chosen, rejected = zip(*rendered, strict=True) if rendered else ((), (), ())
    encoded = zip(
        encoder.encode_prompts(prompts),
        encoder.encode_responses(chosen),
        encoder.encode_responses(rejected),
        strict=True,
    )
    for pair, (prompt_ids, chosen_ids, rejected_ids) in zip(pairs, encoded, strict=True):
        room = max_length - max(len(chosen_ids), len(rejected_ids))
        if room < 1:
            left_out.append(f"{pair.location}: a response alone fills max_length {max_length}; left out")
            continue
        prompt_ids = encoder.truncate(prompt_ids, room)
        rows.append({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    return rows, left_out


def encode_records_as_pairs(
    records: Sequence[JudgedRecord],
    args: CUTConfig,
    encoder: Encoder,
    locations: Sequence[str] | None,
    check_rows: Callable[[pyarrow.Table], None] | None = None,
) -> tuple[Dataset, list[str]]:
    """Pair records as the objective wants and encode the pairs; see `encode_pairs`.

    `check_rows` is called with the rows of each batch; see `cutlm.prompting.rows.encode_records`.

    Returns:
        The rows, and sentences with the counts of pairs and of omitted records; DataError without a pair.
    """
    locations = locations or [f"record {number}" for number in range(len(records))]
    make_pairs = pair_responses if args.objective == "dpo" else pair_refinements
    pairs, left_out = make_pairs(records, locations)
    schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in ("prompt_ids", *_RESPONSES)})
    tables, too_long = [schema.empty_table()], list[str]()
    for start in range(0, len(pairs), _BATCH_SIZE):
        batch, sentences = encode_pairs(pairs[start : start + _BATCH_SIZE], encoder, args.max_length)
        tables.append(pyarrow.Table.from_pylist(batch, schema))
        too_long += sentences
        if check_rows is not None:
            check_rows(tables[-1])
    rows = Dataset(pyarrow.concat_tables(tables), fingerprint=generate_random_fingerprint())
    if not len(rows):
        expected = "satisfactory and unsatisfactory responses to one instruction"
        expected = expected if args.objective == "dpo" else "improved responses in i_ans"
        raise DataError(f"{args.objective}: expected {expected}, got none", hint="\n".join(left_out + too_long))
    num_used = len({(pair.conversation.to_text(), text) for pair in pairs for text in (pair.chosen, pair.rejected)})
    counts = f"{len(rows)} pairs of {len(records)} records, with {num_used} different responses"
    return rows, [counts, *left_out, *too_long]


class PairTrainer(CheckpointingTrainer, DPOTrainer):
    """TRL's `DPOTrainer` on encoded pairs, with cutlm's stopping and saving.

    Args:
        model: The model.
        args: cutlm's settings, from which those of DPO are made.
        train_dataset: Judged records: several responses per instruction for "dpo", `i_ans` for "ilf_dpo".
        processing_class: The tokenizer.
        peft_config: An adapter to train instead of the whole model.
        locations: The location of each record, for messages.
        **kwargs: Passed to TRL's `DPOTrainer`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        args: CUTConfig,
        train_dataset: Sequence[JudgedRecord],
        processing_class: PreTrainedTokenizerBase,
        peft_config: "PeftConfig | None" = None,
        locations: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset and isinstance(train_dataset[0], TokenScores):
            raise ConfigError(f"objective {args.objective} learns from records; got token scores, which are for cut")
        if args.process_index == 0:
            warn_of_long_limit(unwrap_peft(model).config, args.max_length)
        encoder = make_encoder(processing_class, args)
        columns: Any = {"prompts": ("prompt_ids",), "responses": _RESPONSES}
        check_rows = partial(check_rows_fit_model, model, max_length=args.max_length, **columns)
        rows, notices = encode_records_as_pairs(train_dataset, args, encoder, locations, check_rows)
        template = encoder.build_chat_template()
        self.template_date = encoder.template_date
        self.notices = [
            *notices,
            *describe_replaced_template(processing_class, template, args.template),
        ]
        if template is not None:
            # Saved with the model, so that every tool prompts it as in training.
            processing_class = copy.copy(processing_class)
            processing_class.chat_template = template
        if peft_config is not None and changes_base(peft_config):
            init = getattr(peft_config, "init_lora_weights", None)
            raise ConfigError(
                f"init_lora_weights: {init} changes the base model, which is the reference of {args.objective};"
                " expected true, gaussian or orthogonal"
            )
        if peft_config is not None:
            check_lora_targets(model, peft_config)
            head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
            if head in (getattr(peft_config, "target_modules", None) or ()):
                raise ConfigError(f"lora_target_modules: expected no adapter on the output head, got {head}")
        elif not hasattr(model, "peft_config"):
            # TRL would load it again from the model's path, which a model in memory may not have.
            kwargs = {"ref_model": copy.deepcopy(model)} | kwargs
        for notice in self.notices if args.process_index == 0 else ():
            logger.warning(notice)
        super().__init__(
            model=model,
            args=to_dpo_config(args),
            train_dataset=rows,
            processing_class=processing_class,
            peft_config=peft_config,
            end_of_turn_id=encoder.end_of_turn_id,
            **kwargs,
        )
        self.facts = describe_config(args, self.model) | {
            "template": args.template,
            "data": {"num_records": len(train_dataset), "num_pairs": len(rows)},
        }

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # already encoded


def to_dpo_config(args: CUTConfig) -> DPOConfig:
    """TRL's settings from cutlm's: every field of `TrainingArguments`, and beta."""
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainingArguments) if field.init}
    return DPOConfig(**shared | {"beta": args.dpo_beta, "max_length": args.max_length})
