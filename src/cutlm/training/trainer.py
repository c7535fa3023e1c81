"""`CUTTrainer`: a `transformers.Trainer` whose loss is one of cutlm's objectives over the whole optimizer step.

Before the first micro-batch of a step runs, the trainer counts the tokens of all its micro-batches on all ranks. The
losses are sums; dividing them by these counts gives one gradient for every way to split a step. From the top:
`CUTTrainer.__init__` prepares the data, `training_step` and `compute_loss` go from a micro-batch to its share of the
loss, `compute_batch_loss` assigns token log-probabilities to the parts of the objective.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DynamoBackend, gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from cutlm.errors import ConfigError, NonFiniteError
from cutlm.flagging.report import Sensitivity
from cutlm.flagging.scoring import count_tokens
from cutlm.flagging.sensitivity import Contrast, compute_sensitivity
from cutlm.flagging.token_scores import TokenScores
from cutlm.losses import (
    CutLoss,
    Parts,
    Teaching,
    TokenFlags,
    combine_parts,
    cut_loss,
    dual_cut_loss,
    redirect_loss,
    self_distillation_loss,
    sum_terms,
)
from cutlm.model.collator import (
    CutCollator,
    collate_teacher_rows,
    find_non_finite,
    list_critique_lengths,
    list_record_lengths,
    split_batch,
    split_lengths,
    warn_of_long_limit,
)
from cutlm.model.forward import (
    check_head,
    choose_layout,
    choose_tokens_per_pass,
    evaluation_mode,
    run_inside,
    score_batch,
    score_taught_batch,
    score_teacher,
)
from cutlm.model.loading import check_lora_targets, compile_layers, load_model, unwrap_peft
from cutlm.model.logprobs import get_head
from cutlm.model.saving import changes_base, check_base_change, collect_initial_weights
from cutlm.training.checkpoints import CheckpointingTrainer
from cutlm.training.config import CUTConfig
from cutlm.training.dataset import PreparedData, ScoresFile, describe_replaced_template, prepare_data, take_settings
from cutlm.training.ema import AveragedWeights
from cutlm.training.facts import describe_config, describe_rows
from cutlm.training.metrics import RunningMetrics
from cutlm.training.sampling import BalancedSampler

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_MAX_LOCATIONS_NAMED = 20


class StepCounts(NamedTuple):
    """Denominators of the two parts of the loss: tokens (or records) of a whole optimizer step."""

    num_contrast: float
    num_likelihood: float
    num_critique: float = 0.0


class CUTTrainer(CheckpointingTrainer):
    """Trains a causal language model on judged records by Contrastive Unlikelihood Training.

    Args:
        model: A model, or the folder or hub name of one.
        args: Settings; None uses the defaults. They are copied, not changed.
        train_dataset: Records (`instruction`, optional `input`, `output`, `judgment`, optional `score` and `i_ans`) or
            token scores, as a list or a `datasets.Dataset`; or encoded rows with `prompt_ids`, `judged_prompt_ids`
            (None for satisfactory records) and `response_ids` (with the end-of-turn token), which need no tokenizer.
        eval_dataset: Likewise.
        processing_class: The tokenizer.
        peft_config: An adapter to train instead of the whole model.
        locations: The location of each training record for messages, such as `data.jsonl:17`; None numbers them.
        scores_file: Where `detector: frozen` stores its token scores; None keeps the flags in memory.
        **kwargs: Passed to `transformers.Trainer`.

    Records that were truncated, left out or downsampled are counted in the log and in `notices`.

    Raises:
        DataError: Bad records, or no data remains for training.
        ConfigError: Settings that do not fit the data, the tokenizer or the model.
        NonFiniteError: By `train`, before the optimizer step, if the loss or the gradient norm is not finite.

    Examples:
        >>> trainer = CUTTrainer(
        ...     model="Qwen/Qwen3-1.7B",
        ...     args=CUTConfig(output_dir="runs/first", template="chat"),
        ...     train_dataset=load_records("records.jsonl"),
        ...     processing_class=AutoTokenizer.from_pretrained("Qwen/Qwen3-1.7B"),
        ...     peft_config=LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]),
        ... )
        >>> trainer.train()
    """

    # The loss is divided by counts over all micro-batches of a step; the Trainer must not divide it again.
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
        scores_file: ScoresFile | None = None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args) if args is not None else CUTConfig()
        names = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
        unused = [name for name in names if kwargs.get(name) is not None]
        if unused:
            raise ConfigError(f"{', '.join(unused)}: would never be called, because no logits are made; remove them")
        if args.is_of_pairs:
            raise ConfigError(f"objective: {args.objective} is trained by cutlm.training.pairs.PairTrainer")
        self.notices: list[str] = []
        if args.n_gpu > 1:
            # DataParallel would split the tensors of a batch by rows, which they do not have.
            self.notices.append(
                f"Found {args.n_gpu} GPUs, using 1. To use all of them, run: torchrun --nproc_per_node {args.n_gpu} -m"
                " cutlm ..."
            )
            args._n_gpu = 1
        if args.objective == "cut" and args.detector is None and _is_scores(train_dataset):
            args.detector = "frozen"
        if isinstance(model, str | Path):
            model = load_model(model, device=args.device)
        if not any(weight.requires_grad for weight in model.parameters()) and peft_config is None:
            raise ConfigError("model: all its weights are frozen; unfreeze some, or pass a peft_config")
        _check_adapter(model, peft_config, args)
        check_head(model)
        if args.process_index == 0:
            warn_of_long_limit(unwrap_peft(model).config, args.max_length)
        prepared: dict[str, PreparedData] = {}
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is None:
                continue
            own = (locations, scores_file) if name == "train_dataset" else (None, None)
            # The threshold "auto" is found on the training records.
            threshold = prepared["train_dataset"].threshold if prepared else None
            settings = args
            if name == "eval_dataset" and _is_scores(train_dataset) and not _is_scores(dataset):
                settings = take_settings(args, train_dataset)
            data = prepare_data(dataset, name, settings, model, processing_class, *own, threshold)
            self.notices += data.notices
            prepared[name] = data
            if data.chat_template is not None and processing_class is not None:
                if name == "train_dataset":
                    self.notices += describe_replaced_template(processing_class, data.chat_template, args.template)
                # Saved with the model, so that every tool prompts it as in training.
                processing_class = copy.copy(processing_class)
                processing_class.chat_template = data.chat_template
        self.template_date = prepared["train_dataset"].template_date if "train_dataset" in prepared else None
        self.num_left_out = prepared["train_dataset"].num_left_out if "train_dataset" in prepared else 0
        set_seed(args.seed)  # before the adapter draws its weights
        if peft_config is not None:
            model = _add_adapter(model, peft_config, args)
            if changes_base(peft_config):
                self.initial_adapter = collect_initial_weights(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=prepared["train_dataset"].rows if "train_dataset" in prepared else None,
            eval_dataset=prepared["eval_dataset"].rows if "eval_dataset" in prepared else None,
            processing_class=processing_class,
            end_of_turn_id=prepared["train_dataset"].end_of_turn_id if "train_dataset" in prepared else None,
            **{"data_collator": CutCollator(args.critique_weight > 0, args.teacher == "ema")} | kwargs,
        )
        self.facts = describe_config(args, model)
        if "train_dataset" in prepared:
            data = prepared["train_dataset"]
            self.facts |= {
                "data": describe_rows(data.rows, data.num_left_out),
                "template": None if data.chat_template is None else args.template,
            }
            if data.sensitivity is not None:
                self.facts["sensitivity"] = dataclasses.asdict(data.sensitivity)
        for name, data in prepared.items():
            batch_size = args.train_batch_size if name == "train_dataset" else args.eval_batch_size
            num_repeats = -len(data.rows) % (batch_size * args.world_size)
            if args.world_size > 1 and num_repeats and not args.dataloader_drop_last:
                self.notices.append(
                    f"{name}: {num_repeats} of {len(data.rows)} records are seen twice, so that each of"
                    f" {args.world_size} processes has equally many full batches"
                )
        if self.is_world_process_zero():
            for notice in self.notices:
                logger.warning(notice)
        if self.is_fsdp_enabled:
            _keep_outputs_exact(self.accelerator.state.fsdp_plugin)
        self._layout = choose_layout(
            model,
            is_sharded=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            is_compiled=args.torch_compile,
        )
        if args.torch_compile:
            # Accelerate would compile a forward that never runs.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            compile_layers(model, args.torch_compile_backend, args.torch_compile_mode)
        self._max_tokens = args.max_tokens_per_batch or choose_tokens_per_pass(args.device)
        self._metrics = RunningMetrics(args.device, args.critique_weight)
        self._eval_metrics: RunningMetrics | None = None
        self._step_logps: list[tuple[Tensor, Mapping[str, Any]]] = []
        self._last_log_time = time.perf_counter()
        self._num_evaluated = 0
        # On the evaluation records, if there are any, so that the start compares with later evaluations.
        self._sensitivity_prefix = "eval_" if "eval_dataset" in prepared else ""
        sampled = prepared.get("eval_dataset") or prepared.get("train_dataset")
        self._contrasts = sampled.contrasts if sampled else []
        self._frozen_sensitivity = prepared["train_dataset"].sensitivity if "train_dataset" in prepared else None
        self._is_noise_reported = False
        self.add_callback(_LogSensitivity(self))
        # A teacher that follows the trained weights.
        self.averaged: AveragedWeights | None = None
        if args.teacher == "ema":
            self.averaged = AveragedWeights(self.accelerator.unwrap_model(self.model), args.teacher_ema_rate)
            self.add_callback(_UpdateTeacher(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """The order of the records; on several processes, each gets similar numbers of tokens."""
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1 or sampler is None:
            return sampler
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(sampler, RandomSampler):
            # Accelerate would do this, but it only sees the outer sampler: the same order on all processes.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeedableRandomSampler(rows, data_seed=seed, generator=torch.Generator())
        critique = ("critique_prompt_ids", "critique_ids")
        sizes = [count_tokens(row) + sum(len(row.get(name) or ()) for name in critique) for row in rows]
        accumulated = self.args.gradient_accumulation_steps
        return BalancedSampler(sampler, sizes, self.args.world_size, self.args.train_batch_size, accumulated)

    # ---- A teacher that follows the trained weights ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the averaged weights of a checkpoint if training resumes from one."""
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(str(self.args.output_dir))
        if self.averaged is not None and found:
            self.averaged.load(str(found))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, push: bool = True) -> None:
        """Save the adapter or model; in a checkpoint, also the averaged weights."""
        super().save_model(output_dir, _internal_call, push)
        if _internal_call and self.averaged is not None and self.args.should_save:
            self.averaged.save(str(output_dir))

    def _ask_teacher(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The distributions of the averaged model at the taught tokens, in place of those from before training."""
        assert self.averaged is not None
        settings = self.args.teacher_settings
        assert settings is not None
        num_judged, lengths = batch["num_unsatisfactory"], batch["response_lengths"]
        num_records = len(batch["locations"])
        sizes = [*lengths[:num_judged], *lengths[2 * num_judged : num_judged + num_records]]
        masks = batch["is_taught"].split(sizes)
        asked = [index for index, row in enumerate(batch["teacher_rows"]) if row is not None and masks[index].any()]
        if not asked:
            return {}
        rows = collate_teacher_rows([batch["teacher_rows"][index] for index in asked])
        rows = self._prepare_inputs(rows)
        numbers: Any = {"guidance": settings.guidance, "num_columns": settings.num_columns}
        with self.averaged.applied(model), evaluation_mode(model), self.accelerator.autocast():
            _, ids, logps = score_teacher(model, rows, layout=self._layout, **numbers)
        is_taught = torch.cat([masks[index] for index in asked])
        return {"teacher_ids": ids[is_taught], "teacher_logps": logps[is_taught]}

    # ---- Loss ----

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], StepCounts | None]:
        """Fetch the micro-batches of an optimizer step and count their tokens over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_logps = []
        counts = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            counts += torch.tensor(self._count(batch), dtype=torch.float64)
        if self.args.world_size > 1:
            # Some accelerators have no float64; counts of a step are exact in float32 up to 16 million.
            counts = self.accelerator.reduce(counts.float().to(device), "sum").cpu().double()
        return batches, StepCounts(*counts.tolist())

    def _count(self, batch: Mapping[str, Any]) -> StepCounts:
        """A batch's share of the denominators of the step."""
        normalization = self.args.normalization
        num_critique = sum(_weigh_critiques(batch, normalization)[1])
        count = count_redirected_batch if self.args.objective == "redirect" else count_batch
        return StepCounts(*count(batch, normalization, self.args.parts), num_critique)

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: StepCounts | None = None
    ) -> Tensor:
        """Forward and backward over a micro-batch, in parts of at most `max_tokens_per_batch` tokens."""
        parts = [dict(inputs)] if num_items_in_batch is None else self._split(inputs)
        losses = []
        for part in parts:
            # Ranks reduce their gradients with the last part.
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _split(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Divide a micro-batch into parts of at most `max_tokens_per_batch` tokens."""
        # Where weights are gathered for every pass, all ranks must make equally many passes.
        if self._layout.is_single_pass or self.is_deepspeed_enabled:
            return [dict(batch)]
        return split_batch(batch, self._max_tokens)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: StepCounts | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch: its share of the loss of the optimizer step.

        Args:
            model: The model, wrapped or not.
            inputs: A batch of `data_collator`.
            return_outputs: Return the `CutLoss` too.
            num_items_in_batch: Counts of the whole step; None treats the batch as the step.
        """
        inputs = self._prepare_inputs(dict(inputs))
        inner = self.accelerator.unwrap_model(model)
        if self.averaged is not None:
            inputs |= self._ask_teacher(inner, inputs)
        with self.accelerator.autocast():
            logps, columns = run_inside(model, inner, self._score, inputs)
        outputs = compute_batch_loss(logps, inputs, self.args, columns)
        own_counts = self._count(inputs)
        counts = num_items_in_batch or own_counts
        loss = combine_parts(outputs.contrast, outputs.likelihood, counts.num_contrast, counts.num_likelihood)
        if outputs.critique is not None and counts.num_critique:
            loss = loss + self.args.critique_weight * outputs.critique / counts.num_critique
        if num_items_in_batch is not None:
            # Ranks average their gradients, but their losses are shares of one sum.
            loss = loss * self.args.world_size
        if self._eval_metrics is not None:
            self._eval_metrics.add(outputs, inputs, *own_counts)
        elif model.training:
            self._step_logps.append((logps.detach(), inputs))
            self._metrics.add(outputs, inputs, *own_counts)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the response tokens, and those of the tokens that a teacher prefers, if it has any."""
        options: Any = {
            "needs_judged_grad": self.args.parts.unsatisfactory,
            "layout": self._layout,
            # Activation checkpointing already keeps little of a pass in memory.
            "max_tokens": None if self.args.activation_checkpointing else self._max_tokens,
        }
        if self.args.needs_columns and "teacher_ids" in batch:
            return score_taught_batch(model, batch, self.args.head_chunk_size, **options)
        return score_batch(model, batch, self.args.head_chunk_size, **options), None

    def _check_finite(self, grad_norm: float) -> None:
        """Fail before the optimizer step if a log-probability or the gradient norm is not finite; name the records.

        Raises:
            NonFiniteError: One of them is not finite.
        """
        bad = [
            location
            for logps, batch in self._step_logps
            if not torch.isfinite(logps.sum())
            for location in find_non_finite(logps, batch)
        ]
        # Under float16 an infinite norm is how the gradient scaler finds its scale; it skips the step itself.
        is_scaled = self.accelerator.scaler is not None
        if not bad and (is_scaled or torch.isfinite(torch.tensor(grad_norm))):
            return
        if bad:
            cause = f"non-finite log-probabilities in {_join(bad)}"
        else:
            cause = f"the records are {_join([name for _, batch in self._step_logps for name in batch['locations']])}"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: the gradient norm is {grad_norm}; {cause}. Stopped before the"
            " optimizer step; the weights are those of the last step. Lower the learning rate, or look at these records"
        )

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log line of training.

        `tokens_per_second` counts prompts and responses in all contexts, on all processes, without padding.
        """
        if "loss" in logs and self._metrics.num_batches:
            seconds = time.perf_counter() - self._last_log_time
            metrics = self._metrics.reduce(self.accelerator)
            num_tokens = metrics.pop("num_tokens")
            logs |= metrics | {"tokens_per_second": num_tokens / seconds, "records_left_out": self.num_left_out}
            self._metrics = RunningMetrics(self.args.device, self.args.critique_weight)
            self._last_log_time = time.perf_counter()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Evaluate one micro-batch in parts; `compute_loss` adds each to the metrics."""
        counts = self._count(inputs)
        losses = []
        for part in self._split(inputs):
            with torch.no_grad():
                losses.append(self.compute_loss(model, part, num_items_in_batch=counts).detach())
            self._num_evaluated += len(part["input_ids"])
            self.show_progress(f"{self._num_evaluated:,} tokens evaluated")
        return torch.stack(losses).sum() / self.args.world_size, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate by the same formula, over the whole dataset as if it were one optimizer step.

        On several processes the records that complete the last batches count twice; `notices` says so.
        """
        self._eval_metrics = RunningMetrics(self.args.device, self.args.critique_weight)
        self._num_evaluated = 0
        start = time.perf_counter()
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            metrics = self._eval_metrics.reduce(self.accelerator)
        finally:
            self._eval_metrics = None
            self._last_log_time += time.perf_counter() - start  # the speed in the log is that of training
        metrics.pop("num_tokens")
        if self._sensitivity_prefix:
            metrics |= _list_metrics(self._measure_sensitivity())
        merged = dict(output.metrics or {}) | {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics=merged)

    def log_sensitivity(self) -> None:
        """Log the sensitivity of the model before training, or of the frozen detector."""
        if self._frozen_sensitivity is not None:
            self.log(_list_metrics(self._frozen_sensitivity))
        elif self._contrasts and not (self.args.eval_on_start and self._sensitivity_prefix):
            metrics = _list_metrics(self._measure_sensitivity())
            self.log({f"{self._sensitivity_prefix}{name}": value for name, value in metrics.items()})

    def _measure_sensitivity(self) -> Sensitivity | None:
        """Measure the sensitivity of the model as it is now; every process scores a part of the sample."""
        # No more sequences in a pass than in one of the evaluation.
        size = max(1, 2 * self.args.eval_batch_size // 3)
        model: Any = self.model
        inner = self.accelerator.unwrap_model(model)
        contrasts: list[Contrast] = []
        for first in range(0, len(self._contrasts), size * self.args.world_size):
            start = first + size * self.args.process_index
            own = self._contrasts[start : start + size]
            # Where weights are gathered for every pass, all ranks must make equally many passes.
            rows = [row for triple in own or self._contrasts[:1] for row in triple]
            batch = self._prepare_inputs(CutCollator()(rows))
            with evaluation_mode(model), torch.no_grad(), self.accelerator.autocast():
                logps, _ = run_inside(model, inner, self._score, batch)
            parts = [part.tolist() for part in logps.float().cpu().split(batch["response_lengths"])]
            for index, triple in enumerate(own):
                num_template_tokens = triple[0].get("num_template_tokens") or 0
                without, own_logps, foreign = parts[3 * index : 3 * index + 3]
                contrasts.append(Contrast(without, own_logps, foreign, num_template_tokens))
        if self.args.world_size > 1:
            contrasts = gather_object(contrasts)
        sensitivity = compute_sensitivity(contrasts, self.args.current_threshold)
        if sensitivity is not None and not self._is_noise_reported:
            self._is_noise_reported = True
            noise = sensitivity.describe_noise()
            if noise and self.is_world_process_zero():
                logger.warning(f"warning: {noise}")
        return sensitivity


def _is_scores(dataset: Any) -> TypeGuard[Sequence[TokenScores]]:
    return bool(dataset) and isinstance(dataset, Sequence) and isinstance(dataset[0], TokenScores)


class _LogSensitivity(TrainerCallback):
    """Logs the sensitivity before the first step, when the model is on its devices."""

    def __init__(self, trainer: CUTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:  # a resumed run has logged it
            self.trainer.log_sensitivity()


class _UpdateTeacher(TrainerCallback):
    """Moves the averaged weights after each optimizer step."""

    def __init__(self, trainer: CUTTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer.averaged is not None
        self.trainer.averaged.update(self.trainer.accelerator.unwrap_model(self.trainer.model))


def _list_metrics(sensitivity: Sensitivity | None) -> dict[str, float]:
    """The metrics to log; one without a value is absent."""
    if sensitivity is None:
        return {}
    metrics = {"flag_signal": sensitivity.flag_signal, "pairwise": sensitivity.pairwise}
    return {name: value for name, value in metrics.items() if value is not None}


def compute_batch_loss(
    logps: Tensor, batch: Mapping[str, Any], args: CUTConfig, columns: Tensor | None = None
) -> CutLoss:
    """Compute the sums of a micro-batch: assign its tokens to the parts of the objective.

    Args:
        logps: [R] log-probabilities, in the order of `batch["target_ids"]`.
        batch: A batch of `CutCollator`.
        args: Settings of the objective.
        columns: [M, K + 1] log-probabilities of the tokens of the M distributions of a teacher, and of all others.
    """
    if critique_lengths := list_critique_lengths(batch):
        own, critiques = logps.split([len(logps) - sum(critique_lengths), sum(critique_lengths)])
        factors, _ = _weigh_critiques(batch, args.normalization)
        critiques = critiques * _repeat(factors, critique_lengths, logps.device)
        rest = {name: value for name, value in batch.items() if name != "critique_owners"}
        rest["response_lengths"] = batch["response_lengths"][: -len(critique_lengths)]
        return dataclasses.replace(compute_batch_loss(own, rest, args, columns), critique=-critiques.sum())
    num_tokens, num_satisfactory_tokens = split_lengths(batch)
    without, with_judgment, satisfactory = logps.split([num_tokens, num_tokens, num_satisfactory_tokens])
    lengths = batch["response_lengths"]
    token_weights = weights = weights_satisfactory = None
    if args.normalization == "record" or "record_weights" in batch:
        own_lengths = list_record_lengths(batch)
        factors, _ = _weigh(own_lengths, batch.get("record_weights"), args.normalization)
        token_weights = _repeat(factors, own_lengths, logps.device)
        weights, weights_satisfactory = token_weights.split([num_tokens, num_satisfactory_tokens])
    if args.objective == "dual_cut":
        return dual_cut_loss(
            without,
            with_judgment,
            satisfactory,
            _repeat(batch.get("is_praised", []), lengths, logps.device).bool(),
            threshold=args.current_threshold,
            unlikelihood_weight=args.unlikelihood_weight,
            praise_weight=args.praise_weight,
            weights=weights,
            weights_satisfactory=weights_satisfactory,
            can_flag=batch.get("can_flag"),
        )
    if args.has_teacher:
        plain = torch.cat([without, satisfactory])
        # Flags are absent from a batch of satisfactory records only.
        all_flags = TokenFlags(torch.zeros_like(plain, dtype=torch.bool), torch.zeros_like(plain))
        if "is_flagged" in batch:
            all_flags = TokenFlags(batch["is_flagged"], batch["flag_weights"])
        terms, redirected = _compute_taught_terms(plain, all_flags, columns, batch, args), None
        if args.objective == "redirect":
            redirected = torch.where(all_flags.is_flagged, terms, 0.0)
            terms = torch.where(all_flags.is_flagged, 0.0, terms)
        contrast, likelihood = sum_terms(
            terms[:num_tokens], with_judgment, terms[num_tokens:], weights, weights_satisfactory, args.parts
        )
        if redirected is not None:
            likelihood = contrast + likelihood  # of all other tokens
            contrast = (redirected if token_weights is None else redirected * token_weights).sum()
        is_flagged, log_ratios = all_flags.is_flagged[:num_tokens], (with_judgment - without).detach()
        return CutLoss(contrast, likelihood, is_flagged, log_ratios)
    flags = flags_satisfactory = None
    if "is_flagged" in batch:
        sizes = [num_tokens, num_satisfactory_tokens]
        pairs = zip(batch["is_flagged"].split(sizes), batch["flag_weights"].split(sizes), strict=True)
        flags, flags_satisfactory = (TokenFlags(*pair) for pair in pairs)
    return cut_loss(
        without,
        with_judgment,
        satisfactory,
        threshold=args.current_threshold,
        unlikelihood_weight=args.unlikelihood_weight,
        gamma=args.gamma,
        weights=weights,
        weights_satisfactory=weights_satisfactory,
        flags=flags,
        flags_satisfactory=flags_satisfactory,
        can_flag=batch.get("can_flag"),
        parts=args.parts,
    )


def _compute_taught_terms(
    logps: Tensor, flags: TokenFlags, columns: Tensor | None, batch: Mapping[str, Any], args: CUTConfig
) -> Tensor:
    """The terms [N] of the tokens of all plain contexts, of an objective that has a teacher."""
    is_taught = batch["is_taught"]
    own = logps[is_taught]
    # The distribution of a sampled token is that of the token of the response alone.
    teaching = Teaching(is_taught, batch["teacher_logps"], own[:, None] if columns is None else columns)
    if args.objective == "redirect":
        return redirect_loss(logps, flags, teaching, has_unlikelihood=args.use_unlikelihood_loss)
    importance = None
    if args.importance_clip is not None:
        importance = (own.detach() - batch["old_logps"]).exp().clamp(max=args.importance_clip)
    kind = args.divergence if args.needs_columns else "sampled"
    return self_distillation_loss(logps, teaching, kind=kind, clip=args.distillation_clip, importance=importance)


def _repeat(values: Sequence[float], lengths: Sequence[int], device: torch.device) -> Tensor:
    """One value per record -> one per token."""
    return torch.tensor([value for value, n in zip(values, lengths, strict=False) for _ in range(n)], device=device)


def _weigh(
    lengths: Sequence[int], weights: Sequence[float] | None, normalization: str
) -> tuple[Sequence[float], Sequence[float]]:
    """For each record the weight of its tokens, under "record" with the paper's 1/N, and its share of a denominator."""
    weights = weights or [1] * len(lengths)
    if normalization == "record":
        return [weight / n for weight, n in zip(weights, lengths, strict=True)], weights
    return weights, [weight * n for weight, n in zip(weights, lengths, strict=True)]


def _weigh_critiques(batch: Mapping[str, Any], normalization: str) -> tuple[Sequence[float], Sequence[float]]:
    """As `_weigh`, for each critique, which has the weight of its record."""
    weights = batch.get("record_weights")
    own = weights and [weights[record] for record in batch.get("critique_owners", [])]
    return _weigh(list_critique_lengths(batch), own, normalization)


def count_batch(batch: Mapping[str, Any], normalization: str, parts: Parts) -> tuple[float, float]:
    """A batch's share of the denominators of L1 and L2: tokens, or records under `normalization: record`."""
    _, sizes = _weigh(list_record_lengths(batch), batch.get("record_weights"), normalization)
    num_unsatisfactory = sum(sizes[: batch["num_unsatisfactory"]])
    num_satisfactory = sum(sizes[batch["num_unsatisfactory"] :])
    return (
        num_unsatisfactory * parts.contrast,
        num_unsatisfactory * parts.unsatisfactory + num_satisfactory * parts.satisfactory,
    )


def count_redirected_batch(batch: Mapping[str, Any], normalization: str, parts: Parts) -> tuple[float, float]:
    """A batch's share of the denominators of redirect: the weights of the flagged tokens, and of all others."""
    lengths = list_record_lengths(batch)
    factors, sizes = _weigh(lengths, batch.get("record_weights"), normalization)
    counts = [0] * len(lengths)
    if "is_flagged" in batch:
        counts = torch.stack([part.sum() for part in batch["is_flagged"].split(lengths)]).tolist()
    num_flagged = sum(factor * count for factor, count in zip(factors, counts, strict=True))
    others = [factor * (n - count) for factor, n, count in zip(factors, lengths, counts, strict=True)]
    first = batch["num_unsatisfactory"]
    num_others = sum(others[:first]) + sum(others[first:]) * parts.satisfactory
    return num_flagged, num_others + sum(sizes[:first]) * parts.unsatisfactory


# ---- Adapters and sharding ----


def _check_adapter(model: nn.Module, peft_config: "PeftConfig | None", args: CUTConfig) -> None:
    """Raises:
    ConfigError: The adapter does not fit the model, or works by a forward pass of PEFT's that is not used here.
    """
    for config in (peft_config, getattr(model, "active_peft_config", None)):
        if config is not None and (config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)):
            raise ConfigError(
                "peft_config: expected an adapter inside the model such as LoRA, got prompt learning or activated LoRA"
            )
        if config is not None and changes_base(config):
            check_base_change(config, is_new=config is peft_config, is_sharded=args.is_sharded)
    if peft_config is None:
        return
    if hasattr(model, "peft_config"):
        raise ConfigError("peft_config: the model already has an adapter; merge it first, or pass no peft_config")
    check_lora_targets(model, peft_config)


def _add_adapter(model: nn.Module, peft_config: "PeftConfig", args: CUTConfig) -> nn.Module:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(
            model, bool(args.activation_checkpointing), args.activation_checkpointing_kwargs
        )
    adapted = get_peft_model(model, peft_config)
    get_head(unwrap_peft(adapted))  # raises if the adapter sits on the output head
    return adapted


def _keep_outputs_exact(plugin: Any) -> None:
    """Make FSDP2 leave outputs in their dtype and reduce gradients in float32.

    Accelerate would round every output to bfloat16, log-probabilities too: near -10 its steps are 0.06 wide, while
    flags compare differences with log 1.1 = 0.095.
    """
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def _join(locations: Sequence[str]) -> str:
    shown = ", ".join(locations[:_MAX_LOCATIONS_NAMED])
    num_more = len(locations) - _MAX_LOCATIONS_NAMED
    return f"{shown} and {num_more} more" if num_more > 0 else shown
