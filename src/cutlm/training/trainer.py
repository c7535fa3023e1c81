"""`CUTTrainer`: a `transformers.Trainer` whose loss is one of cutlm's objectives over the whole optimizer step.

It counts the tokens of all micro-batches and ranks of a step before the first is run, divides sums by those counts, and
stops before the optimizer step when something is no number. The loss itself is `cutlm.training.batch_loss`, the data
`cutlm.training.preparation`, the passes through the model are `cutlm.model.forward`, stopping and saving
`cutlm.training.safe_trainer`.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DynamoBackend
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from cutlm.blame.scoring import check_context, count_tokens
from cutlm.blame.token_scores import TokenScores
from cutlm.errors import ConfigError, DataError, NonFiniteError
from cutlm.losses import combine_parts
from cutlm.model.collator import CutCollator, find_non_finite, split_batch
from cutlm.model.forward import check_head, choose_layout, choose_tokens_per_pass, run_inside, score_batch
from cutlm.model.loading import check_lora_targets, compile_layers, load_model
from cutlm.training.batch_loss import compute_batch_loss, count_batch
from cutlm.training.config import CUTConfig
from cutlm.training.metrics import Tally
from cutlm.training.preparation import (
    PreparedData,
    blame_beforehand,
    check_vocabulary,
    describe_replaced_template,
    downsample,
    prepare_data,
    refuse_sharded_blame,
)
from cutlm.training.safe_trainer import SafeTrainer
from cutlm.training.sampling import BalancedSampler

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_MAX_PLACES_NAMED = 20


class StepCounts(NamedTuple):
    """What the two parts of the loss are divided by: tokens (or records) of a whole optimizer step."""

    num_contrast: float
    num_likelihood: float


class CUTTrainer(SafeTrainer):
    """Trains a causal language model on judged records by Contrastive Unlikelihood Training.

    Args:
        model: A model, or the folder or hub name of one.
        args: Settings; None takes the defaults.
        train_dataset: Records (`instruction`, optional `input`, `output`, `judgment`, optional `score` and `i_ans`) as
            a list or a `datasets.Dataset`; or encoded rows with `prompt_ids`, `judged_prompt_ids` (None when
            satisfactory) and `response_ids` (end-of-sequence included), for which no tokenizer is needed.
        eval_dataset: Likewise.
        processing_class: The tokenizer.
        peft_config: An adapter to train instead of the whole model.
        locations: Where each record stands, for messages (`data.jsonl:17`); None numbers them.
        **kwargs: As of `transformers.Trainer`.

    What was cut, left out or downsampled is logged, and stands in `notices`.

    Raises:
        DataError: Bad records, or nothing left to train on.
        ConfigError: Settings at odds with the tokenizer or the model.
        NonFiniteError: By `train`, before the optimizer step, when the loss or gradient norm is no number.
    """

    # The loss is divided by counts over all of a step's micro-batches; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    args: CUTConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module,
        args: CUTConfig | None = None,
        train_dataset: Dataset | Sequence[Any] | None = None,
        eval_dataset: Dataset | Sequence[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: "PeftConfig | None" = None,
        locations: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or CUTConfig()
        names = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
        unused = [name for name in names if kwargs.get(name) is not None]
        if unused:
            raise ConfigError(f"{', '.join(unused)}: would never be called, as no logits are made; leave them out")
        self.notices: list[str] = []
        if args.n_gpu > 1:
            # torch's DataParallel would deal a batch's tensors out by rows, and they have none.
            self.notices.append(
                f"{args.n_gpu} GPUs are here and one is used; for all of them start with: torchrun --nproc_per_node"
                f" {args.n_gpu} -m cutlm ..."
            )
            args._n_gpu = 1
        if isinstance(model, str | Path):
            model = load_model(model)
        if not any(weight.requires_grad for weight in model.parameters()) and peft_config is None:
            raise ConfigError("model: no weight of it is to be trained; unfreeze some, or give a peft_config")
        if args.is_of_pairs:
            raise ConfigError(f"objective: {args.objective} is trained by cutlm.training.pairs.PairTrainer")
        if args.detector is None and train_dataset and isinstance(train_dataset[0], TokenScores):
            args = copy.copy(args)  # it is the caller's, who may have other data for it
            args.detector = "frozen"
        set_seed(args.seed)  # before the adapter draws its first weights
        if peft_config is not None:
            model = _add_adapter(model, peft_config, args)
        _refuse_prompt_learning(getattr(model, "active_peft_config", None))
        check_head(model)
        self.num_left_out = 0
        prepared: dict[str, PreparedData] = {}
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is None:
                continue
            is_training = name == "train_dataset"
            data = prepare_data(dataset, name, args, processing_class, locations if is_training else None)
            if is_training and args.downsample is not None:
                downsample(data, name, args.downsample, args.seed)
            if not len(data.rows):
                use = "train" if is_training else "evaluate"
                raise DataError(f"{name}: nothing is left to {use} on", hint="\n".join(data.notices))
            check_vocabulary(model, data.rows, name)
            check_context(model, data.rows, args.max_length)
            if args.has_known_flags:
                if "is_flagged" not in data.rows.column_names:
                    refuse_sharded_blame(args)
                if not (args.is_sharded or getattr(model, "is_quantized", False)):
                    nn.Module.to(model, args.device)  # the Trainer would only do so later
                blame_beforehand(data, name, model, args)
                if not len(data.rows):
                    raise DataError(f"{name}: nothing is left to learn from", hint="\n".join(data.notices))
            self.notices += data.notices
            self.num_left_out += data.num_left_out if is_training else 0
            prepared[name] = data
            if data.chat_template is not None and processing_class is not None:
                if is_training:
                    self.notices += describe_replaced_template(processing_class, data.chat_template, args.template)
                # Saved with the model, so that every tool prompts it as it was trained.
                processing_class = copy.deepcopy(processing_class)
                processing_class.chat_template = data.chat_template
        kwargs.setdefault("data_collator", CutCollator())
        super().__init__(
            model=model,
            args=args,
            train_dataset=prepared["train_dataset"].rows if "train_dataset" in prepared else None,
            eval_dataset=prepared["eval_dataset"].rows if "eval_dataset" in prepared else None,
            processing_class=processing_class,
            **kwargs,
        )
        for name, data in prepared.items():
            batch_size = args.train_batch_size if name == "train_dataset" else args.eval_batch_size
            self._note_repeats(name, len(data.rows), batch_size)
        if self.is_world_process_zero():
            for notice in self.notices:
                logger.warning(notice)
        if self.is_fsdp_enabled:
            _keep_log_probs_exact(self.accelerator.state.fsdp_plugin)
        self._layout = choose_layout(
            model,
            is_sharded=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            is_compiled=args.torch_compile,
        )
        if args.torch_compile:
            # It would compile a forward that is not run.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            compile_layers(model, args.torch_compile_backend, args.torch_compile_mode)
        self._max_tokens = args.max_tokens_per_batch or choose_tokens_per_pass(args.device)
        self._tally = Tally(args.device)
        self._eval_tally: Tally | None = None
        self._step_logps: list[tuple[Tensor, Mapping[str, Any]]] = []
        self._last_log_time = time.perf_counter()

    def _note_repeats(self, name: str, num_rows: int, batch_size: int) -> None:
        """Says what Accelerate does so that every process gets as many batches as the others."""
        num_repeats = -num_rows % (batch_size * self.args.world_size)
        if self.args.world_size > 1 and num_repeats and not self.args.dataloader_drop_last:
            self.notices.append(
                f"{name}: {num_rows} records are made up to {num_rows + num_repeats} by seeing some again, so that"
                f" each of {self.args.world_size} processes has full batches"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """The order of the records; on several processes, each with like numbers of tokens."""
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1 or sampler is None:
            return sampler
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(sampler, RandomSampler):
            # As Accelerate would do, which sees the outer sampler only: one order for all processes.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeedableRandomSampler(rows, data_seed=seed, generator=torch.Generator())
        sizes = [count_tokens(row) for row in rows]
        accumulated = self.args.gradient_accumulation_steps
        return BalancedSampler(sampler, sizes, self.args.world_size, self.args.train_batch_size, accumulated)

    # ---- Loss ----

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], StepCounts | None]:
        """Fetches the micro-batches of an optimizer step and counts them over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_logps = []
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            counts += torch.tensor(count_batch(batch, self.args.normalization, self.args.parts))
        if self.args.world_size > 1:
            # MPS and some accelerators have no float64; a step's counts are exact in float32 up to 16 million.
            counts = self.accelerator.reduce(counts.float().to(device), "sum").cpu().double()
        return batches, StepCounts(counts[0].item(), counts[1].item())

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: StepCounts | None = None
    ) -> Tensor:
        """Forward and backward over a micro-batch, in parts of at most `max_tokens_per_batch` tokens."""
        parts = [dict(inputs)]
        # Where weights are gathered for every pass, all ranks must make the same number of them.
        if num_items_in_batch is not None and not (self._layout.is_single_pass or self.is_deepspeed_enabled):
            parts = split_batch(inputs, self._max_tokens)
        losses = []
        for part in parts:
            # Ranks add up their gradients with the last part.
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))  # type: ignore[arg-type]
        return torch.stack(losses).sum()

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepCounts | None = None,
    ) -> Any:
        """CUT's loss of a micro-batch: its share of the loss of the optimizer step.

        Args:
            model: The model, wrapped or not.
            inputs: A batch of `data_collator`.
            return_outputs: Whether to return the `CutLoss` too.
            num_items_in_batch: Counts of the whole step; None takes the batch for the step.
        """
        inputs = self._prepare_inputs(dict(inputs))
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            logps = run_inside(model, inner, self._score, inputs)
        outputs = compute_batch_loss(logps, inputs, self.args)
        own_counts = count_batch(inputs, self.args.normalization, self.args.parts)
        loss = combine_parts(outputs.contrast, outputs.likelihood, *(num_items_in_batch or own_counts))
        if num_items_in_batch is not None:
            # The gradients of ranks are averaged, but their losses are shares of one sum.
            loss = loss * self.args.world_size
        if self._eval_tally is not None:
            self._eval_tally.add(outputs, inputs, *own_counts)
        elif model.training:
            self._step_logps.append((logps.detach(), inputs))
            self._tally.add(outputs, inputs, *own_counts)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        is_learned = self.args.parts.unsatisfactory
        return score_batch(
            model,
            batch,
            self.args.head_chunk_size,
            needs_judged_grad=is_learned,
            layout=self._layout,
            # With activation checkpointing, little is kept of a pass as it is.
            max_tokens=None if self.args.activation_checkpointing else self._max_tokens,
        )

    def _check_finite(self, grad_norm: Any) -> None:
        """Stops before the optimizer step when a log-prob or the gradient norm is no number, and names the records.

        Raises:
            NonFiniteError: As said.
        """
        norm = torch.as_tensor(grad_norm, dtype=torch.float32).cpu()
        # Under float16 an infinite norm is how the gradient scaler finds its scale; it skips the step itself.
        is_scaled = self.accelerator.scaler is not None
        bad_places = [
            place
            for logps, batch in self._step_logps
            if not torch.isfinite(logps.sum())
            for place in find_non_finite(logps, batch)
        ]
        if not bad_places and (is_scaled or torch.isfinite(norm)):
            return
        if bad_places:
            who = f"the log-probs of {_join(bad_places)} are no numbers"
        else:
            locations = [place for _, batch in self._step_logps for place in batch["locations"]]
            who = f"the gradient of this step's records is none: {_join(locations)}"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: the gradient norm is {norm.item()}; {who}. Stopped before the"
            " optimizer step, the weights are those of the last one; lower the learning rate, or look at these records"
        )

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was tallied since the last line of training to it."""
        if "loss" in logs and self._tally.num_batches:
            seconds = time.perf_counter() - self._last_log_time
            metrics = self._tally.reduce(self.accelerator)
            num_tokens = metrics.pop("num_tokens")
            logs |= metrics | {"tokens_per_second": num_tokens / seconds, "records_left_out": self.num_left_out}
            self._tally = Tally(self.args.device)
            self._last_log_time = time.perf_counter()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """One micro-batch of an evaluation; its sums go to the tally."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates by the same formula, over the whole data set as if it were one optimizer step.

        On several processes the records that fill up the last batches count twice, as `notices` says.
        """
        self._eval_tally = Tally(self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            metrics = self._eval_tally.reduce(self.accelerator)
        finally:
            self._eval_tally = None
        metrics.pop("num_tokens")
        merged = dict(output.metrics or {}) | {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics=merged)


def _add_adapter(model: nn.Module, peft_config: "PeftConfig", args: CUTConfig) -> nn.Module:
    from peft import get_peft_model, prepare_model_for_kbit_training

    _refuse_prompt_learning(peft_config)
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "peft_config: expected a model without an adapter, got one that has one; merge it, or give no config"
        )
    check_lora_targets(model, peft_config)
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(
            model, bool(args.activation_checkpointing), args.activation_checkpointing_kwargs
        )
    return get_peft_model(model, peft_config)


def _keep_log_probs_exact(plugin: Any) -> None:
    """Has FSDP2 leave outputs as they are, and add up gradients in float32.

    Accelerate would have every output rounded to bfloat16, log-probs too: at -10 its steps are of 0.06, and a ratio of
    two probabilities is compared with 1.1, whose logarithm is 0.095.
    """
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def _refuse_prompt_learning(peft_config: "PeftConfig | None") -> None:
    """These work by PEFT's own forward pass, which is not the one that is scored here."""
    if peft_config is None:
        return
    if peft_config.is_prompt_learning or getattr(peft_config, "alora_invocation_tokens", None):
        raise ConfigError(
            "peft_config: expected an adapter inside the model such as LoRA, got prompt learning or an activated LoRA"
        )


def _join(locations: Sequence[str]) -> str:
    shown = ", ".join(locations[:_MAX_PLACES_NAMED])
    return shown if len(locations) <= _MAX_PLACES_NAMED else f"{shown} and {len(locations) - _MAX_PLACES_NAMED} more"
