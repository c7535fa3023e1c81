"""Settings of training: dataclasses, and reading them from a flat YAML file and command-line options.

`CUTConfig` extends `transformers.TrainingArguments`; `ModelArguments` has the fields of TRL's `ModelConfig`. Every
problem that can be found before a model is loaded is reported here, all at once.
"""

import dataclasses
import importlib.util
import json
import os
import re
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import BitsAndBytesConfig, HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import HubStrategy

from cutlm.data.sources import check_columns
from cutlm.errors import ConfigError, suggest_name
from cutlm.flagging.contrast import CONTRASTS
from cutlm.flagging.teacher import NUM_COLUMNS, TEACHER_CONTEXTS, TeacherSettings
from cutlm.losses import DIVERGENCES, Parts
from cutlm.model.loading import has_fast_math, warn_of_slow_autocast
from cutlm.prompting.templates import JUDGMENT_ROLES, TEMPLATES, parse_date

if TYPE_CHECKING:
    from peft import LoraConfig

NORMALIZATIONS = ("token", "record")
PAIR_OBJECTIVES = ("dpo", "ilf_dpo")
TEACHER_OBJECTIVES = ("self_distillation", "redirect")
OBJECTIVES = (
    *("cut", "dual_cut", "likelihood", "hindsight", "forward_prediction", "ilf_mle", "unlikelihood"),
    *TEACHER_OBJECTIVES,
    *PAIR_OBJECTIVES,
)
DETECTORS = ("current", "frozen", "spans", "off")
DISTILLATIONS = ("topk", "sampled")
TEACHERS = ("frozen", "ema")
# The objectives that use a setting; settings that are not listed are used by all of them.
_USED_BY = {
    "threshold": ("cut", "dual_cut", "redirect"),
    "gamma": ("cut", "redirect"),
    "unlikelihood_weight": ("cut", "dual_cut", "redirect", "unlikelihood"),
    "detector": ("cut", "redirect"),
    "map_spans": ("cut",),
    **dict.fromkeys(("drop_ineffective", "weigh_by_effect"), ("cut", *TEACHER_OBJECTIVES)),
    "use_contrast_loss": ("cut",),
    **dict.fromkeys(("use_satisfactory_loss", "use_judged_loss"), ("cut", *TEACHER_OBJECTIVES)),
    "praise_weight": ("dual_cut",),
    "satisfactory_only": ("likelihood",),
    **dict.fromkeys(("teacher", "teacher_ema_rate", "teacher_context", "teacher_sees_response"), TEACHER_OBJECTIVES),
    **dict.fromkeys(
        ("guidance", "distillation", "divergence", "distillation_clip", "importance_clip"), ("self_distillation",)
    ),
    **dict.fromkeys(("redirect_strength", "use_unlikelihood_loss"), ("redirect",)),
    "dpo_beta": PAIR_OBJECTIVES,
    "critique_weight": tuple(name for name in OBJECTIVES if name not in ("forward_prediction", *PAIR_OBJECTIVES)),
    **dict.fromkeys(
        ("downsample", "normalization", "dataset_num_proc", "head_chunk_size", "max_tokens_per_batch"),
        tuple(name for name in OBJECTIVES if name not in PAIR_OBJECTIVES),
    ),
}
# Metrics of an evaluation; the best checkpoint may be chosen by any of these.
METRICS = (
    *("loss", "loss_likelihood", "loss_contrast", "loss_critique", "mean_log_ratio"),
    *("flagged_share", "flagged_share_q10", "flagged_share_q50", "flagged_share_q90"),
)
# Of torch.utils.checkpoint, and the last two of transformers.
_CHECKPOINTING_OPTIONS = (
    *("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"),
    *("every_n_layers", "offload"),
)
# Settings of text that also take true and false.
_TEXT_OR_BOOLEAN = ("resume_from_checkpoint", "fsdp")
# Optimizers that transformers builds around a model's modules, and their packages.
_OPTIMIZERS_OF_MODELS = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim"}


@dataclass
class DataArguments:
    """What to train on.

    Attributes:
        data: Judged records or token scores: files, globs, folders or data sets of the hub; see docs/data.md.
        eval_data: The same, to evaluate on.
        columns: The field of a record for each column that has another name, such as `{"prompt": "instruction"}`.
        eval_split: Share of `data`, drawn by `seed`, to evaluate on instead.
        overwrite_output_dir: Start over in a folder that is not empty; checkpoints in it are removed.
    """

    data: list[str] | None = None
    eval_data: list[str] | None = None
    columns: dict[str, str] | None = None
    eval_split: float = 0.0
    overwrite_output_dir: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("data", "eval_data"):
            if isinstance(value := getattr(self, name), str):  # one in a settings file
                setattr(self, name, [value])
        try:
            check_columns(self.columns)
        except ConfigError as error:
            problems += error.problems
        if not self.data:
            problems.append("data: expected a file of judged records, got none; set data: FILE")
        if not 0 <= self.eval_split < 1:
            problems.append(f"eval_split: expected a share from 0 to below 1, got {self.eval_split}")
        if self.eval_split and self.eval_data:
            problems.append("eval_split and eval_data: expected one of them, got both")
        if problems:
            raise ConfigError(problems)


@dataclass
class ModelArguments:
    """The model and its adapter: the fields of TRL's `ModelConfig`, with the paper's LoRA as the default.

    Attributes:
        model_name_or_path: A model folder, a GGUF file (dequantized to float32) or a hub name. Required.
        model_revision: Revision of the model on the hub.
        dtype: dtype of the weights. None: float32 for full fine-tuning, and under LoRA the checkpoint's ("auto"), or
            float32 on a CPU that is faster in it.
        attn_implementation: Attention implementation in transformers, such as sdpa or flash_attention_2.
        use_peft: Train a LoRA adapter; false trains all weights.
        lora_r: LoRA rank.
        lora_alpha: LoRA's alpha.
        lora_dropout: LoRA dropout.
        lora_target_modules: Modules that LoRA adapts; `all-linear` adapts every linear layer.
        lora_target_parameters: Parameters that LoRA adapts, in addition to modules.
        lora_modules_to_save: Modules that are fully trained, in addition to LoRA.
        lora_task_type: Do not change.
        use_rslora: Rank-stabilized LoRA.
        use_dora: DoRA.
        load_in_8bit: Load the base model in 8 bits (bitsandbytes).
        load_in_4bit: Load the base model in 4 bits (bitsandbytes).
        bnb_4bit_quant_type: 4-bit data type: nf4 or fp4.
        use_bnb_nested_quant: Quantize the quantization constants too.
        bnb_4bit_quant_storage: dtype in which 4-bit weights are stored.
    """

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    attn_implementation: str | None = None
    use_peft: bool = True
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["gate_proj", "down_proj", "up_proj"])
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.model_name_or_path:
            problems.append("model_name_or_path: expected a model folder, a GGUF file or a hub name, got none")
        if self.lora_r < 1:
            problems.append(f"lora_r: expected a whole number of at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout: expected a share from 0 to below 1, got {self.lora_dropout}")
        if self.load_in_4bit and self.load_in_8bit:
            problems.append("load_in_4bit and load_in_8bit: expected one of them, got both")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            problems.append("load_in_4bit and load_in_8bit train an adapter; expected use_peft: true, got false")
        if problems:
            raise ConfigError(problems)
        # PEFT reads the string "all-linear", but not a list that holds it.
        if isinstance(self.lora_target_modules, list) and self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]

    @property
    def load_dtype(self) -> str:
        """The dtype to load the weights in."""
        dtype = self.dtype or ("auto" if self.use_peft else "float32")
        return "bfloat16" if self.load_in_4bit and dtype == "auto" else dtype

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How the weights of the base model are quantized; None if they are not."""
        if self.load_in_4bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_quant_type=self.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
                bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
            )
        return BitsAndBytesConfig(load_in_8bit=True) if self.load_in_8bit else None

    def make_adapter_config(self) -> "LoraConfig | None":
        """Make the configuration of the adapter; None if all weights are trained.

        Raises:
            ConfigError: LoRA settings exclude each other.
        """
        if not self.use_peft:
            return None
        from peft import LoraConfig

        try:
            return LoraConfig(
                task_type=self.lora_task_type,
                r=self.lora_r,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules=self.lora_target_modules,
                target_parameters=self.lora_target_parameters,
                modules_to_save=self.lora_modules_to_save,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
            )
        except ValueError as error:
            raise ConfigError(f"lora_*, use_dora, use_rslora: {error}") from error


@dataclass
class CUTConfig(TrainingArguments):
    """Settings of `CUTTrainer`. The learning rate and its schedule are the paper's for LoRA.

    The fields are grouped by the objectives that use them; a setting of another objective is refused.

    Attributes:
        objective: "cut"; "dual_cut"; "self_distillation" or "redirect", by which the model that has read the judgment
            teaches the one that has not; one of the paper's baselines "likelihood", "hindsight", "forward_prediction",
            "ilf_mle", "unlikelihood"; or "dpo" and "ilf_dpo", which TRL's `DPOTrainer` trains. See docs/objectives.md.
        detector: How CUT flags tokens. "current": by the model as it is being trained, as in the paper; "frozen": by
            the model before training, once per record; "spans": by the records' own `wrong_spans`; "off": every token
            of an unsatisfactory response is flagged. None: "frozen" if the data are token scores or under "redirect",
            else "current". "redirect" has "frozen" and "spans" only.
        use_contrast_loss: Include eq. 6 (L1); false for an ablation.
        use_satisfactory_loss: Include eq. 7 (L2) over satisfactory responses.
        use_judged_loss: Include eq. 7 over unsatisfactory responses with their judgment. None: as in the paper,
            except for flags known before training ("frozen", "spans"), which then need the plain context only.
        satisfactory_only: Leave unsatisfactory records out of objective "likelihood".
        praise_weight: beta of "dual_cut": how much more than others praised tokens are learned.
        teacher: "frozen": the model before training, whose distributions are computed once; "ema": the moving average
            of the trained weights, which is asked in every training step. Not available under FSDP and DeepSpeed.
        teacher_ema_rate: How far the average moves to the trained weights at each optimizer step.
        teacher_context: How the prompt asks the teacher of "self_distillation" and "redirect" for a better response:
            "praise" adds the judgment "Perfect."; "advice" requests a response without the problem that the judgment
            names.
        teacher_sees_response: Show the teacher the response with the advice, as `cutlm refine` does.
        guidance: beta of "self_distillation": the teacher's distribution is proportional to
            p(v | teacher_context) [p(v | teacher_context) / p(v | judgment)]^beta; 0 turns it off.
        distillation: "topk": learn the teacher's distribution over its 20 most likely tokens and all others together;
            "sampled": only its advantage on the token of the response.
        divergence: Between the distributions of teacher and student, under distillation "topk".
        distillation_clip: Largest divergence or advantage of a token, in nats, beyond which its gradient stops growing;
            None for no limit.
        importance_clip: Weigh each distilled token by min(p / p_old, this), for responses of an older model; p_old is
            its probability before training. SDPO uses 2; None turns it off.
        redirect_strength: beta of "redirect", as `guidance`.
        use_unlikelihood_loss: Add CUT's unlikelihood term to that of a flagged token under "redirect".
        dpo_beta: beta of DPO.
        map_spans: Map token scores of another tokenizer by their character spans.
        threshold: lambda of eq. 5: a token is flagged if the judgment makes it more than this many times as likely.
            The paper uses 1.1 or 1.2. "auto", with detector "frozen": the smallest one at which judgments of other
            records flag at most 1 % of the tokens.
        contrast: What detector "frozen" compares the log-probability with the judgment with: "judgment" for that
            without it (eq. 5); "foreign" for the mean under judgments of other records; "perfect" for that with
            "Perfect.".
        num_foreign: Number of these judgments of other records.
        surprise_weight: How much it counts for a flag of detector "frozen" that a token is unlikely, besides its log
            ratio; 0 as in eq. 5. Combine it with threshold "auto".
        drop_ineffective: For noisy judges, with detector "frozen" or a teacher: leave out unsatisfactory records whose
            judgment has no larger effect on the response, for the model before training, than most of four judgments of
            other records. They are counted and listed.
        weigh_by_effect: Weigh each unsatisfactory record in the loss by the share of these four judgments that have a
            smaller effect than its own, instead of leaving it out or besides.
        unlikelihood_weight: alpha of eq. 6: 0.25, 0.5 or 1 in the paper; alpha of "dual_cut".
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6: 0.25, 0.5, 1 or 2 in the paper; 0 turns
            it off, as in the released code.
        critique_weight: Weight of an additional term (0 turns it off): the likelihood of the record's judgment, given
            instruction, response and the request to judge it, as in "forward_prediction", so that the model also learns
            to judge. RLTF uses 0.1.
        normalization: "token": each part of the loss is a mean over the tokens of the optimizer step; "record": a mean
            over its records of each record's mean over its tokens, the paper's 1/N.
        template: Prompt template: "alpaca", or "chat" for the tokenizer's own chat template.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": false}`; they become
            defaults of the saved template, so that the trained model is prompted with them.
        judgment_role: Who states the judgment under template "chat": "user", at the end of the last turn, or "system",
            in a message after the conversation (before it, for templates that render it only there).
        template_date: Date for chat templates that print one, such as 2026-11-26. None: that of the token scores or of
            the run that is resumed, else today.
        max_length: Maximum number of tokens in a prompt and its response. Prompts are truncated on the left to fit;
            responses are never truncated.
        downsample: Keep at most this many satisfactory records per unsatisfactory one, drawn by `seed`; None keeps
            all. The paper's online loop uses 0.25.
        dataset_num_proc: Processes that encode the data; None for this one, whose tokenizer uses all cores.
        head_chunk_size: Positions whose logits are in memory at a time; None chooses by the size of the vocabulary.
        max_tokens_per_batch: Maximum number of tokens in one forward and backward pass. A larger micro-batch is split
            into parts whose gradients add up to its own, so memory is bounded and the result is the same. None: what
            keeps the device busy, 16384 on a GPU and 1024 on a CPU. Not available under FSDP and DeepSpeed.
        sensitivity_records: Number of records for measuring whether the flags depend on the content of the judgments
            (`flag_signal`, `pairwise`): once with detector "frozen", otherwise before training and at every
            evaluation; 0 skips the measurement.
        learning_rate: Peak learning rate; the paper's, for LoRA.
        lr_scheduler_type: Learning rate schedule.
        logging_steps: Optimizer steps between log lines.
        remove_unused_columns: Must stay off, because the collator needs every column.
        logging_nan_inf_filter: Must stay off; a non-finite loss stops the run instead.
    """

    objective: str = field(default="cut", metadata={"choices": list(OBJECTIVES)})

    # Flags: cut and redirect; threshold and unlikelihood_weight also dual_cut
    detector: str | None = field(default=None, metadata={"choices": list(DETECTORS)})
    threshold: float | str = 1.1
    contrast: str = field(default="judgment", metadata={"choices": list(CONTRASTS)})
    num_foreign: int = 4
    surprise_weight: float = 0.0
    unlikelihood_weight: float = 1.0
    gamma: float = 1.0
    drop_ineffective: bool = False  # also self_distillation
    weigh_by_effect: bool = False  # also self_distillation
    map_spans: bool = False  # cut

    # Parts of the loss: cut; all but the first also self_distillation and redirect
    use_contrast_loss: bool = True
    use_satisfactory_loss: bool = True
    use_judged_loss: bool | None = None

    # A teacher: self_distillation and redirect
    teacher: str = field(default="frozen", metadata={"choices": list(TEACHERS)})
    teacher_ema_rate: float = 0.05
    teacher_context: str = field(default="praise", metadata={"choices": list(TEACHER_CONTEXTS)})
    teacher_sees_response: bool = False
    # self_distillation
    guidance: float = 1.0
    distillation: str = field(default="topk", metadata={"choices": list(DISTILLATIONS)})
    divergence: str = field(default="forward_kl", metadata={"choices": list(DIVERGENCES)})
    distillation_clip: float | None = None
    importance_clip: float | None = None
    # redirect
    redirect_strength: float = 1.0
    use_unlikelihood_loss: bool = True

    # Settings of one objective: likelihood, dual_cut, dpo and ilf_dpo
    satisfactory_only: bool = False
    praise_weight: float = 1.0
    dpo_beta: float = 0.1

    # All objectives but forward_prediction, dpo and ilf_dpo
    critique_weight: float = 0.0

    # All objectives
    normalization: str = field(default="token", metadata={"choices": list(NORMALIZATIONS)})
    template: str = field(default="alpaca", metadata={"choices": list(TEMPLATES)})
    chat_template_kwargs: dict[str, Any] | None = None
    template_date: str | None = None
    judgment_role: str = field(default="user", metadata={"choices": list(JUDGMENT_ROLES)})
    max_length: int = 2048
    downsample: float | None = None
    dataset_num_proc: int | None = None
    head_chunk_size: int | None = None
    max_tokens_per_batch: int | None = None
    sensitivity_records: int = 64

    learning_rate: float = 4e-4
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 10
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        problems = [*self._check_objective(), *self._check_numbers(), *self._check_unsupported()]
        if problems:
            raise ConfigError(problems)
        if self.greater_is_better is None and (self.metric_for_best_model or "").removeprefix("eval_").startswith(
            "loss"
        ):
            self.greater_is_better = False  # transformers takes less for better only if the name ends with "loss"
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning only helps transfers to a GPU
            if self.bf16:
                warn_of_slow_autocast()
        problems = self._check_device()
        if problems:
            raise ConfigError(problems)

    def _check_objective(self) -> list[str]:
        """Problems of cutlm's choices, and settings that the chosen objective would ignore."""
        if self.objective not in OBJECTIVES:
            return [f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}"]
        problems = []
        if self.detector is not None and self.detector not in DETECTORS:
            problems.append(f"detector: expected one of {', '.join(DETECTORS)}, got {self.detector!r}")
        choices_of: dict[str, Sequence[str]] = {
            "normalization": NORMALIZATIONS,
            "template": TEMPLATES,
            "judgment_role": JUDGMENT_ROLES,
            "contrast": CONTRASTS,
            "teacher": TEACHERS,
            "teacher_context": TEACHER_CONTEXTS,
            "distillation": DISTILLATIONS,
            "divergence": DIVERGENCES,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                problems.append(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.template != "chat" and (self.chat_template_kwargs or self.template_date):
            problems.append("chat_template_kwargs, template_date: not used by template alpaca; remove them")
        if self.template != "chat" and self.judgment_role != "user":
            problems.append(
                f"judgment_role: {self.judgment_role} needs template: chat, got template: {self.template}; set one of"
                " them"
            )
        try:
            parse_date(self.template_date)
        except ConfigError as error:
            problems += error.problems
        if isinstance(self.chat_template_kwargs, str):
            problems.append(f"chat_template_kwargs: expected a mapping, got {self.chat_template_kwargs!r}")
        unused = [name for name, users in _USED_BY.items() if self.objective not in users]
        unused += ["threshold"] if self.detector in ("spans", "off") else []
        unused += ["gamma"] if self.detector == "spans" else []
        if self.distillation == "sampled":
            unused.append("divergence")
        if self.objective == "redirect" and not self.use_unlikelihood_loss:
            unused += ["unlikelihood_weight", "gamma"]
        unused = [name for name in dict.fromkeys(unused) if getattr(self, name) != _default(name)]
        if unused:
            which = f"objective {self.objective}" + (f", detector {self.detector}" if self.detector else "")
            problems.append(f"{', '.join(unused)}: not used by {which}; remove from the settings")
        options = ("contrast", "num_foreign", "surprise_weight")
        frozen_only = [name for name in options if getattr(self, name) != _default(name)]
        frozen_only += ["threshold: auto"] if self.threshold == "auto" else []
        if frozen_only and not self.has_frozen_detector:
            got = f"objective {self.objective}, detector {self.detector or 'current'}"
            problems.append(
                f"{', '.join(frozen_only)}: expected objective cut or redirect and detector frozen, got {got}"
            )
        by_effect = [name for name in ("drop_ineffective", "weigh_by_effect") if getattr(self, name)]
        if by_effect and self.objective == "cut" and self.detector != "frozen":
            problems.append(f"{', '.join(by_effect)}: expected detector frozen, got {self.detector or 'current'}")
        if self.objective == "redirect" and self.detector not in (None, "frozen", "spans"):
            problems.append(f"detector: expected frozen or spans under objective redirect, got {self.detector}")
        if self.teacher != "ema" and self.teacher_ema_rate != _default("teacher_ema_rate"):
            problems.append(f"teacher_ema_rate: expected teacher ema, got {self.teacher}")
        if self.teacher_sees_response and self.teacher_context != "advice":
            problems.append(f"teacher_sees_response: expected teacher_context advice, got {self.teacher_context}")
        if not (self.use_contrast_loss or self.use_satisfactory_loss or self.use_judged_loss is not False):
            problems.append(
                "use_contrast_loss, use_satisfactory_loss, use_judged_loss: expected at least one of them, got none"
            )
        return problems

    def _check_numbers(self) -> list[str]:
        problems = []
        if self.threshold != "auto" and (isinstance(self.threshold, str) or not 1 <= self.threshold < float("inf")):
            problems.append(
                f"threshold: expected a number of at least 1 (the paper uses 1.1 or 1.2) or auto, got {self.threshold}"
            )
        numbers = ("unlikelihood_weight", "gamma", "surprise_weight", "praise_weight", "guidance", "redirect_strength")
        for name in (*numbers, "critique_weight", "learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                problems.append(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.teacher_ema_rate <= 1:
            problems.append(f"teacher_ema_rate: expected a number from 0 to 1, got {self.teacher_ema_rate}")
        for name in ("dpo_beta", "distillation_clip", "importance_clip"):
            if (number := getattr(self, name)) is not None and not 0 < number < float("inf"):
                problems.append(f"{name}: expected a number above 0, got {number}")
        if self.downsample is not None and not self.downsample >= 0:
            problems.append(f"downsample: expected a number of at least 0, or none to keep all, got {self.downsample}")
        optional = ("dataset_num_proc", "head_chunk_size", "max_tokens_per_batch")
        batching = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in ("max_length", "num_foreign", *optional, *batching):
            value = getattr(self, name)
            if not (value is None and name in optional) and (not isinstance(value, int) or value < 1):
                problems.append(f"{name}: expected a whole number of at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed: expected a whole number from 0 to 2**32 - 1, got {self.seed}")
        for name in ("dataloader_num_workers", "sensitivity_records"):
            if getattr(self, name) < 0:
                problems.append(f"{name}: expected a whole number of at least 0, got {getattr(self, name)}")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            problems.append(
                "num_train_epochs, max_steps: expected at least one step, got none; set one of them above 0"
            )
        return problems

    def _check_unsupported(self) -> list[str]:
        """Settings of transformers that cutlm cannot honor."""
        problems = []
        if self.teacher == "ema" and self.is_sharded:
            problems.append(
                "teacher: expected frozen under FSDP and DeepSpeed, which shard the weights to average, got ema"
            )
        if self.max_tokens_per_batch is not None and self.is_sharded:
            problems.append(
                "max_tokens_per_batch: expected none under FSDP and DeepSpeed, where every micro-batch is one pass on"
                f" every rank, got {self.max_tokens_per_batch}; lower per_device_train_batch_size instead"
            )
        if self.label_smoothing_factor:
            problems.append(f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; CUT has none")
        if self.train_sampling_strategy not in ("random", "sequential"):
            problems.append(
                "train_sampling_strategy: expected random or sequential, because batches are not padded, got"
                f" {self.train_sampling_strategy!r}"
            )
        if self.remove_unused_columns:
            problems.append("remove_unused_columns: expected false, as the collator needs every column, got true")
        if self.neftune_noise_alpha:
            problems.append(
                "neftune_noise_alpha: expected none, because its noise would depend on the batch, got"
                f" {self.neftune_noise_alpha}"
            )
        if self.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            problems.append("use_liger_kernel: the package liger-kernel is missing; run: pip install liger-kernel")
        options = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        try:
            unknown = sorted(
                set(json.loads(options) if isinstance(options, str) else options) - {*_CHECKPOINTING_OPTIONS}
            )
        except (ValueError, TypeError):
            problems.append(f"activation_checkpointing_kwargs: expected a JSON object, got {options!r}")
        else:
            if unknown:
                problems.append(
                    f"activation_checkpointing_kwargs: expected some of {', '.join(_CHECKPOINTING_OPTIONS)}, got"
                    f" {', '.join(unknown)}"
                )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            strategy = HubStrategy(self.hub_strategy).value
            problems.append(f"hub_strategy: expected end, because checkpoints are not pushed, got {strategy}")
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if not self.is_of_pairs and metric not in METRICS:
            problems.append(f"metric_for_best_model: expected one of {', '.join(METRICS)}, got {metric!r}")
        return problems

    def _check_device(self) -> list[str]:
        """Problems that only show once `TrainingArguments` has set up devices and processes."""
        problems = []
        if self.fp16 and self.device.type == "cpu":
            problems.append("fp16: expected false on a CPU, where it would have no effect, got true")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            problems.append("save_strategy: best needs metric_for_best_model, got none; set it, such as to loss")
        for name, expected in (("split_batches", False), ("dispatch_batches", False), ("even_batches", True)):
            got = getattr(self.accelerator_config, name, expected)
            if got is not None and bool(got) is not expected:
                # A batch's tensors have no row per record, and every process must have equally many batches.
                problems.append(f"accelerator_config: expected {name} {str(expected).lower()}, got {str(got).lower()}")
        return problems

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed is requested, here or by `accelerate launch` through the environment."""
        names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        return bool(self.fsdp or self.deepspeed) or any(os.environ.get(name, "").lower() == "true" for name in names)

    @property
    def is_of_pairs(self) -> bool:
        """Whether the objective learns from pairs of responses, with TRL's trainer."""
        return self.objective in PAIR_OBJECTIVES

    @property
    def has_teacher(self) -> bool:
        """Whether the objective learns from the distributions of a teacher."""
        return self.objective in TEACHER_OBJECTIVES

    @property
    def teacher_settings(self) -> TeacherSettings | None:
        """How the distributions of the teacher are made; None if the objective has none."""
        if not self.has_teacher:
            return None
        is_redirect = self.objective == "redirect"
        return TeacherSettings(
            self.teacher_context,
            self.teacher_sees_response,
            self.redirect_strength if is_redirect else self.guidance,
            NUM_COLUMNS if self.needs_columns else None,
            flagged_only=is_redirect and self.has_frozen_detector,
        )

    @property
    def needs_columns(self) -> bool:
        """Whether the loss needs the probabilities of other tokens than those of the responses."""
        return self.has_teacher and self.distillation == "topk"

    @property
    def has_frozen_detector(self) -> bool:
        """Whether the model before training flags the tokens."""
        is_default = self.objective == "redirect" and self.detector is None
        return self.objective in ("cut", "redirect") and (self.detector == "frozen" or is_default)

    @property
    def has_known_flags(self) -> bool:
        """Whether flags and the distributions of a teacher are known before training begins."""
        return self.detector in ("frozen", "spans") or self.has_teacher

    @property
    def current_threshold(self) -> float:
        """The threshold of flags that the model makes while it is trained; 0 flags every token."""
        return 0.0 if self.detector == "off" or isinstance(self.threshold, str) else self.threshold

    @property
    def has_current_flags(self) -> bool:
        """Whether the model that is being trained makes flags."""
        is_cut = self.objective == "cut" and self.detector in (None, "current") and self.use_contrast_loss
        return is_cut or self.objective == "dual_cut"

    @property
    def parts(self) -> Parts:
        """Which parts of CUT's loss are included."""
        is_judged_included = self.use_judged_loss
        if is_judged_included is None:
            is_judged_included = not self.has_known_flags and self.objective != "dual_cut"
        if self.has_known_flags and not is_judged_included:
            return Parts(unsatisfactory=False)  # one pool of tokens; records of an excluded part are left out of it
        return Parts(self.use_contrast_loss, self.use_satisfactory_loss, is_judged_included)


def _default(name: str) -> Any:
    return CUTConfig.__dataclass_fields__[name].default


@dataclass
class JudgeConfig(CUTConfig):
    """Settings of training a judge by the likelihood of its judgments; those of other objectives cannot be set."""

    objective: str = field(default="likelihood", init=False)
    detector: str | None = field(default=None, init=False)
    use_contrast_loss: bool = field(default=True, init=False)
    use_satisfactory_loss: bool = field(default=True, init=False)
    use_judged_loss: bool | None = field(default=None, init=False)
    satisfactory_only: bool = field(default=False, init=False)
    teacher: str = field(default="frozen", init=False)
    teacher_ema_rate: float = field(default=0.05, init=False)
    teacher_context: str = field(default="praise", init=False)
    teacher_sees_response: bool = field(default=False, init=False)
    guidance: float = field(default=1.0, init=False)
    distillation: str = field(default="topk", init=False)
    divergence: str = field(default="forward_kl", init=False)
    distillation_clip: float | None = field(default=None, init=False)
    importance_clip: float | None = field(default=None, init=False)
    redirect_strength: float = field(default=1.0, init=False)
    use_unlikelihood_loss: bool = field(default=True, init=False)
    praise_weight: float = field(default=1.0, init=False)
    critique_weight: float = field(default=0.0, init=False)
    dpo_beta: float = field(default=0.1, init=False)
    drop_ineffective: bool = field(default=False, init=False)
    weigh_by_effect: bool = field(default=False, init=False)
    map_spans: bool = field(default=False, init=False)
    threshold: float = field(default=1.1, init=False)
    judgment_role: str = field(default="user", init=False)
    contrast: str = field(default="judgment", init=False)
    num_foreign: int = field(default=4, init=False)
    surprise_weight: float = field(default=0.0, init=False)
    unlikelihood_weight: float = field(default=1.0, init=False)
    gamma: float = field(default=1.0, init=False)


@dataclass
class DetectorConfig(JudgeConfig):
    """Settings of teaching a detector by the likelihood of responses given their judgments."""

    objective: str = field(default="hindsight", init=False)
    judgment_role: str = field(default="user", metadata={"choices": list(JUDGMENT_ROLES)})


def check_libraries(config: CUTConfig) -> None:
    """Check settings that only transformers and torch can judge, on one dummy parameter, before a model is loaded."""
    problems = []
    special = next((name for name in _OPTIMIZERS_OF_MODELS if name in str(config.optim)), None)
    try:
        optimizer: torch.optim.Optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        if special is None:
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(config)
            if not is_optimizer_factory(kind):  # a factory needs a whole model
                optimizer = kind([nn.Parameter(torch.zeros(1))], **kwargs)
        elif importlib.util.find_spec(_OPTIMIZERS_OF_MODELS[special]) is None:
            raise ImportError(f"{config.optim} needs the package {_OPTIMIZERS_OF_MODELS[special]}")
        elif special != "lomo" and not config.optim_target_modules:
            raise ValueError(f"{config.optim} needs optim_target_modules")
        get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs or {},  # type: ignore[arg-type]
        )
    except (ValueError, TypeError, ImportError) as error:
        problems.append(f"optim, optim_args, adam_*, lr_scheduler_*: {_first_line(error)}")
    if config.fsdp and config.world_size == 1:
        problems.append("fsdp: expected several processes, got one; start with torchrun or accelerate launch")
    if config.torch_compile:
        try:
            backend = DynamoBackend((config.torch_compile_backend or "inductor").upper()).value.lower()
            torch.compile(nn.Identity(), backend=backend, mode=config.torch_compile_mode)  # compiles nothing yet
        except (ValueError, RuntimeError) as error:
            problems.append(f"torch_compile_backend, torch_compile_mode: {_first_line(error)}")
    try:
        for integration in get_reporting_integration_callbacks(config.report_to):
            integration()
    except (ValueError, ImportError, RuntimeError) as error:  # unknown, or its package is missing
        problems.append(f"report_to: {_first_line(error)}")
    if problems:
        raise ConfigError(problems)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@dataclass(frozen=True)
class Settings:
    """Settings as they were read."""

    parts: tuple[Any, ...]  # one instance of each dataclass
    resolved: dict[str, Any]  # every setting of cutlm's, and those of transformers that differ from its defaults

    def to_yaml(self) -> str:
        """The resolved settings as a file that reads back to the same."""
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing 200 lines of usage."""
        raise ConfigError(message)


def read_settings(types: Sequence[Any], config: str | None, options: Sequence[str], command: str = "train") -> Settings:
    """Read settings into dataclasses.

    Args:
        types: The dataclasses; no two have a field of the same name.
        config: A YAML file, or None.
        options: `--field value ...`, which take precedence over the file.
        command: The command they belong to, for messages.

    Raises:
        ConfigError: Unknown keys, values of the wrong kind or out of range; all at once.
    """
    parser = _Parser(list(types))
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    actions: dict[str, Any] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # a field that is true by default has a second one, `--no_field`
        if action.type in (int, float) and NoneType in get_args(hints[action.dest]):
            action.type = _accept_none(action.type)
        if getattr(action.type, "__name__", "") == "dict":
            action.type = _read_json_object
        elif action.dest == "threshold":
            action.type = _read_threshold
    fixed = {item.name for kind in types for item in dataclasses.fields(kind) if not item.init}

    def describe_unknown(what: str, name: str, names: Iterable[str]) -> str:
        if name in fixed:
            return f"{what} is not a setting of cutlm {command}; remove it"
        suggestion = suggest_name(name, (each for each in names if "-" not in each))
        return f"{what} is unknown; {suggestion or f'see cutlm {command} --help'}"

    values_of_file, misread = ({}, {}) if config is None else _load_yaml(config, actions)
    problems = list(misread.values())
    for key, value in values_of_file.items():
        if key in misread:
            continue
        if key not in actions:
            problems.append(describe_unknown(f"{config}: key {key!r}", str(key), set(actions)))
        elif (problem := _check_value(value, actions[key])) is not None:
            problems.append(f"{config}: {key}: {problem}")
    known = {text.removeprefix("--") for action in parser._actions for text in action.option_strings}
    given = [option.removeprefix("--").partition("=")[0] for option in options if option.startswith("--")]
    problems += [describe_unknown(f"option --{name}", name, known) for name in given if name not in known]
    problems += [
        f"{name}: a key among the settings would be saved with them; set HF_TOKEN in the environment instead"
        for name in sorted({*given, *map(str, values_of_file)})
        if name.endswith("hub_token")
    ]
    if problems:
        raise ConfigError(problems)
    defaults = {dest: action.default for dest, action in actions.items()}
    parser.set_defaults(**{key: _as_default(value, actions[key]) for key, value in values_of_file.items()})
    values = vars(parser.parse_args([*options]))
    parts = []
    for kind in types:
        names = [item.name for item in dataclasses.fields(kind) if item.init]
        try:
            parts.append(kind(**{name: values[name] for name in names}))
        except ConfigError as error:
            problems += error.problems
        except (ValueError, TypeError, KeyError, ImportError) as error:  # raised by TrainingArguments.__post_init__
            problems.append(_explain(error))
    if problems:
        raise ConfigError(problems)
    theirs = {item.name for item in dataclasses.fields(TrainingArguments)} - set(CUTConfig.__annotations__)
    resolved = {name: value for name, value in values.items() if name not in theirs or value != defaults[name]}
    for name in ("data", "eval_data"):  # one is written as such, not as a list
        if isinstance(value := resolved.get(name), list) and len(value) == 1:
            resolved[name] = value[0]
    return Settings(tuple(parts), {name: _to_plain(value) for name, value in resolved.items()})


def _to_plain(value: Any) -> Any:
    """A setting as YAML writes it: members of an enumeration by their values."""
    return [_to_plain(item) for item in value] if isinstance(value, list) else getattr(value, "value", value)


def _accept_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let an option that may be None take none and null, too, whose Python type refuses them."""

    def read(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    read.__name__ = kind.__name__  # argparse and `_check_value` name it
    return read


def _read_json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if value is None or isinstance(value, dict):
        return value
    raise ArgumentTypeError(f"""expected a JSON object such as '{{"name": true}}', got {text!r}""")


def _read_threshold(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def _explain(error: Exception) -> str:
    """An error of `transformers`, or what to do where its words do not say so."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and "deepspeed" in text:
        return "deepspeed: the package deepspeed is missing; run: pip install deepspeed"
    if text.startswith("Your setup doesn't support bf16"):
        advice = "add --use_cpu true, or" if has_fast_math(torch.bfloat16) else "set"
        return f"bf16: expected a GPU that computes in bfloat16, got none; {advice} --bf16 false"
    return text


class _YamlLoader(yaml.SafeLoader):
    """Reads dates as text, which no setting is and no JSON can hold."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (read by PyYAML)
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _load_yaml(path: str, actions: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file of settings.

    Returns:
        The values, and a sentence for each key that occurs twice or whose value is not read as it is written.
    """
    if Path(path).is_dir():
        raise ConfigError(f"{path}: expected a YAML file, got a directory")
    try:
        loader = _YamlLoader(Path(path).read_text("utf-8"))
        node = loader.get_single_node()
        pairs = list(node.value) if isinstance(node, yaml.MappingNode) else []  # without those of other mappings (<<)
        values = None if node is None else loader.construct_document(node)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path after --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with one `key: value` per line, got {type(values).__name__}")
    misread: dict[str, str] = {}
    counts = Counter(key.value for key, _ in pairs)
    for key, value in pairs:
        texts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        problem = f"the key occurs {counts[key.value]} times; keep one" if counts[key.value] > 1 else None
        if problem is None and key.value in actions:
            problem = next(filter(None, (_describe_misread(text, actions[key.value]) for text in texts)), None)
        if problem is not None:
            misread[key.value] = f"{path}:{key.start_mark.line + 1}: {key.value}: {problem}"
    return values, misread


def _describe_misread(node: yaml.Node, action: Any) -> str | None:
    """Say how YAML 1.1 reads a value without quotes, if that differs from the written value.

    It reads `no` and `off` as false, `1_000` as 1000, `010` as 8 and `1:30` as 90.
    """
    if (
        not isinstance(node, yaml.ScalarNode)
        or node.style is not None
        or node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null")
    ):
        return None
    value, kind = yaml.safe_load(node.value), getattr(action.type, "__name__", "")
    if kind in ("int", "float", "_read_threshold"):
        if isinstance(value, bool) or not re.match(r"[-+]?(?:0[0-7_]*[1-7]|\d+:)", node.value):
            return None
        return f"expected a number, got {node.value}, which YAML reads as {value}; write it in decimal digits"
    if kind in ("string_to_bool", "dict", "_read_json_object") or action.dest in _TEXT_OR_BOOLEAN:
        return None
    if str(value) == node.value:
        return None
    shown = json.dumps(value) if isinstance(value, bool) else value
    return f'expected text, got {node.value}, which YAML reads as {shown}; quote it: "{node.value}"'


def _check_value(value: Any, action: Any) -> str | None:
    """The problem of a value in the file for one option, or None."""
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, list):
        return None if action.nargs in ("+", "*") else f"expected one value, got a list of {len(value)}"
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "_read_threshold": "a number or auto",
        "str": "text",
        "string_to_bool": "true or false",
        "_read_json_object": "a mapping",
    }
    try:
        converted = action.type(str(value)) if action.type else value
    except (ValueError, TypeError, ArgumentTypeError):
        name = getattr(action.type, "__name__", "value")
        return f"expected {kinds.get(name, name.replace('_', ' '))}, got {value!r}"
    if action.choices is not None and converted not in action.choices:
        return f"expected one of {', '.join(map(str, action.choices))}, got {value!r}"
    return None


def _as_default(value: Any, action: Any) -> Any:
    """A value of the file as the text of an option, so that both are converted alike."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return [action.type(str(item)) if action.type else item for item in value]
    return str(value)
