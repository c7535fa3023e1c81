"""Settings of training: the paper's, on top of every field of `transformers.TrainingArguments`."""

import importlib.util
import json
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from cutlm.errors import ConfigError
from cutlm.losses import Parts
from cutlm.prompting.templates import TEMPLATES

NORMALIZATIONS = ("token", "record")
OBJECTIVES = (
    "cut",
    "dual_cut",
    "likelihood",
    "hindsight",
    "forward_prediction",
    "ilf_mle",
    "unlikelihood",
    "dpo",
    "ilf_dpo",
)
DETECTORS = ("current", "frozen", "spans", "off")
# What an evaluation measures, by which the best checkpoint may be chosen.
METRICS = (
    *("loss", "loss_likelihood", "loss_contrast", "mean_log_ratio"),
    *("flagged_share", "flagged_share_q10", "flagged_share_q50", "flagged_share_q90"),
)
# Of torch, and the last two of transformers.
_CHECKPOINTING_OPTIONS = (
    *("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"),
    *("every_n_layers", "offload"),
)


@dataclass
class CUTConfig(TrainingArguments):
    """Settings of `CUTTrainer`. The learning rate and its schedule are the paper's for LoRA.

    Attributes:
        objective: "cut"; "dual_cut"; one of the paper's baselines "likelihood", "hindsight", "forward_prediction",
            "ilf_mle", "unlikelihood"; or "dpo" and "ilf_dpo", which TRL's `DPOTrainer` trains.
        detector: Of CUT. "current": by the model as it is trained, as in the paper; "frozen": by the model as it was
            before, once per record; "spans": the records' own `wrong_spans`; "off": every token of an unsatisfactory
            response is taken for inappropriate. None: "frozen" where the data are token scores, else "current".
        use_contrast_loss: Whether eq. 6 is in the loss; off for an ablation.
        use_satisfactory_loss: Whether eq. 7 is, over satisfactory responses.
        use_judged_loss: Whether eq. 7 is, over unsatisfactory ones with their judgment. None: as in the paper,
            but not for flags that are known beforehand ("frozen", "spans"), which then need the plain context only.
        satisfactory_only: Whether "likelihood" leaves unsatisfactory records out.
        praise_weight: What a praised token weighs more than others under "dual_cut".
        dpo_beta: beta of DPO.
        map_spans: Whether token scores of another tokenizer are taken over by their character spans.
        threshold: lambda of eq. 5: a token is inappropriate when the judgment makes it more than this many times as
            likely. The paper uses 1.1 or 1.2.
        unlikelihood_weight: alpha of eq. 6: 0.25, 0.5 or 1 in the paper.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma of eq. 6: 0.25, 0.5, 1 or 2 in the paper; 0 switches
            it off, as the released code does.
        normalization: "token": each part of the loss is a mean over the tokens of the optimizer step; "record": a mean
            over its records of each record's mean over its tokens, the paper's 1/N.
        template: "alpaca", or "chat" for the tokenizer's own chat template.
        max_length: Most tokens of a prompt and its response together. Prompts are cut from the left to fit;
            responses are never cut.
        downsample: Keep at most this many satisfactory records per unsatisfactory one, drawn by `seed`; None keeps
            all. The paper's online loop uses 0.25.
        head_chunk_size: Positions whose logits are held at a time; None chooses by the size of the vocabulary.
        max_tokens_per_batch: Most tokens that go forward and backward at a time. A micro-batch with more is run in
            parts whose gradients add up to its own, so memory is bounded whatever the batch size, and the result is
            the same. None: as many as keep the device busy, 16384 on a GPU and 1024 on a CPU. Not under FSDP and
            DeepSpeed, where every micro-batch is one pass.
    """

    objective: str = field(default="cut", metadata={"help": "what is learned", "choices": list(OBJECTIVES)})
    detector: str | None = field(
        default=None, metadata={"help": "which model finds inappropriate tokens", "choices": list(DETECTORS)}
    )
    use_contrast_loss: bool = field(default=True, metadata={"help": "eq. 6"})
    use_satisfactory_loss: bool = field(default=True, metadata={"help": "eq. 7 over satisfactory responses"})
    use_judged_loss: bool | None = field(
        default=None, metadata={"help": "eq. 7 over unsatisfactory responses; none: not with detector frozen or spans"}
    )
    satisfactory_only: bool = field(default=False, metadata={"help": "objective likelihood: of these records alone"})
    praise_weight: float = field(default=1.0, metadata={"help": "objective dual_cut: extra weight of praised tokens"})
    dpo_beta: float = field(default=0.1, metadata={"help": "beta of DPO"})
    map_spans: bool = field(default=False, metadata={"help": "take token scores of another tokenizer by their spans"})
    threshold: float = field(default=1.1, metadata={"help": "lambda of eq. 5, at least 1"})
    unlikelihood_weight: float = field(default=1.0, metadata={"help": "alpha of eq. 6"})
    gamma: float = field(default=1.0, metadata={"help": "exponent of the dynamic weight of eq. 6; 0: off"})
    normalization: str = field(
        default="token", metadata={"help": "mean over tokens or over records", "choices": list(NORMALIZATIONS)}
    )
    template: str = field(default="alpaca", metadata={"help": "prompt template", "choices": list(TEMPLATES)})
    max_length: int = field(default=2048, metadata={"help": "most tokens of prompt and response"})
    downsample: float | None = field(
        default=None, metadata={"help": "most satisfactory records per unsatisfactory one; none: all"}
    )
    head_chunk_size: int | None = field(
        default=None, metadata={"help": "positions whose logits are held at a time; none: by the vocabulary"}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "most tokens that go forward and backward at a time; none: by the device"}
    )

    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate; the paper's, for LoRA"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule of the learning rate"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between log lines"})
    # A batch's tensors are laid out by our collator, under names of our own.
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave this off"})
    # A loss that is no number ends the run instead, before it can reach the weights.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave this off"})

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.threshold < float("inf"):
            problems.append(
                f"threshold: expected a number of at least 1 (the paper uses 1.1 or 1.2), got {self.threshold}"
            )
        for name in ("unlikelihood_weight", "gamma", "praise_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                problems.append(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if not 0 < self.dpo_beta < float("inf"):
            problems.append(f"dpo_beta: expected a number above 0, got {self.dpo_beta}")
        problems += self._check_objective()
        for name, choices in (("normalization", NORMALIZATIONS), ("template", TEMPLATES)):
            if getattr(self, name) not in choices:
                problems.append(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("max_length", "head_chunk_size", "max_tokens_per_batch"):
            value = getattr(self, name)
            is_left_open = value is None and name != "max_length"
            if not is_left_open and (not isinstance(value, int) or value < 1):
                problems.append(f"{name}: expected a whole number of at least 1, got {value}")
        if self.max_tokens_per_batch is not None and self.is_sharded:
            problems.append(
                "max_tokens_per_batch: expected none under FSDP and DeepSpeed, where every micro-batch is one pass on"
                f" every rank, got {self.max_tokens_per_batch}; lower per_device_train_batch_size instead"
            )
        if self.downsample is not None and not self.downsample >= 0:
            problems.append(f"downsample: expected a number of at least 0, or none to keep all, got {self.downsample}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if not getattr(self, name) >= 1:
                problems.append(f"{name}: expected a whole number of at least 1, got {getattr(self, name)}")
        if not 0 <= self.learning_rate < float("inf"):
            problems.append(f"learning_rate: expected a number of at least 0, got {self.learning_rate}")
        if self.label_smoothing_factor:
            problems.append("label_smoothing_factor: expected 0, as CUT has no such thing, got another number")
        if self.train_sampling_strategy not in ("random", "sequential"):
            problems.append(
                "train_sampling_strategy: expected random or sequential, as nothing is padded here and grouping by"
                f" length would save nothing, got {self.train_sampling_strategy!r}"
            )
        if self.remove_unused_columns:
            problems.append("remove_unused_columns: expected false, as the collator needs every column, got true")
        if self.neftune_noise_alpha:
            problems.append(
                "neftune_noise_alpha: expected none, as its noise would depend on what else is in a batch, got"
                f" {self.neftune_noise_alpha}"
            )
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            problems.append(
                "num_train_epochs, max_steps: expected at least one step, got none; give one of them a number above 0"
            )
        if self.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            problems.append("use_liger_kernel: needs the package liger-kernel; run: pip install liger-kernel")
        unknown = sorted(set(self._read_checkpointing_options(problems)) - set(_CHECKPOINTING_OPTIONS))
        if unknown:
            problems.append(
                f"activation_checkpointing_kwargs: expected some of {', '.join(_CHECKPOINTING_OPTIONS)}, got"
                f" {', '.join(unknown)}"
            )
        wanted = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if not self.is_of_pairs and wanted not in METRICS:
            problems.append(f"metric_for_best_model: expected one of {', '.join(METRICS)}, got {wanted!r}")
        if problems:
            raise ConfigError(problems)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for
        self._check_device()

    def _read_checkpointing_options(self, problems: list[str]) -> dict[str, Any]:
        given = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        try:
            return dict(json.loads(given) if isinstance(given, str) else given)
        except (ValueError, TypeError):
            problems.append(f"activation_checkpointing_kwargs: expected a JSON object, got {given!r}")
            return {}

    def _check_device(self) -> None:
        """What can be told only when the processes and their devices are known.

        Raises:
            ConfigError: As said.
        """
        problems = []
        if self.fp16 and self.device.type == "cpu":
            problems.append("fp16: expected false on a CPU, where it would have no effect, got true; bf16 works there")
        loading = self.accelerator_config
        for name, expected in (("split_batches", False), ("dispatch_batches", False), ("even_batches", True)):
            got = getattr(loading, name, expected)
            if got is not None and bool(got) is not expected:
                # Batches are lists of lengths and tensors without rows, and every process must have as many of them.
                problems.append(f"accelerator_config: expected {name} {str(expected).lower()}, got {str(got).lower()}")
        if problems:
            raise ConfigError(problems)

    def _check_objective(self) -> list[str]:
        problems = []
        if self.objective not in OBJECTIVES:
            return [f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}"]
        if self.detector is not None and self.detector not in DETECTORS:
            problems.append(f"detector: expected one of {', '.join(DETECTORS)}, got {self.detector!r}")
        unused = [
            name
            for name, default, is_used in (
                ("threshold", 1.1, self.objective in ("cut", "dual_cut") and self.detector not in ("spans", "off")),
                ("gamma", 1.0, self.objective in ("cut", "dual_cut") and self.detector != "spans"),
                ("unlikelihood_weight", 1.0, self.objective in ("cut", "dual_cut", "unlikelihood")),
                ("map_spans", False, self.objective == "cut"),
            )
            if not is_used and getattr(self, name) != default
        ]
        if unused:
            which = f"objective {self.objective}" + (f", detector {self.detector}" if self.detector else "")
            problems.append(f"{', '.join(unused)}: not used by {which}; leave them out")
        if self.objective != "cut":
            changed = [
                name
                for name, default in (
                    ("detector", None),
                    ("use_contrast_loss", True),
                    ("use_satisfactory_loss", True),
                    ("use_judged_loss", None),
                )
                if getattr(self, name) is not default
            ]
            if changed:
                problems.append(f"{', '.join(changed)}: of objective cut only; got objective {self.objective}")
        for name, default, owner in (("praise_weight", 1.0, "dual_cut"), ("dpo_beta", 0.1, "dpo or ilf_dpo")):
            if getattr(self, name) != default and self.objective not in owner.split(" or "):
                problems.append(f"{name}: of objective {owner} only; got objective {self.objective}")
        if self.is_of_pairs:
            ignored = [
                name
                for name, default in (
                    ("downsample", None),
                    ("normalization", "token"),
                    ("head_chunk_size", None),
                    ("max_tokens_per_batch", None),
                )
                if getattr(self, name) != default
            ]
            if ignored:
                problems.append(f"{', '.join(ignored)}: not for objective {self.objective}, which TRL trains")
        if self.satisfactory_only and self.objective != "likelihood":
            problems.append(f"satisfactory_only: of objective likelihood only; got objective {self.objective}")
        if not (self.use_contrast_loss or self.use_satisfactory_loss or self.use_judged_loss is not False):
            problems.append(
                "use_contrast_loss, use_satisfactory_loss, use_judged_loss: expected one of them on, got none"
            )
        return problems

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed is asked for: here, or by `accelerate launch`, which says so in the environment."""
        names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        return bool(self.fsdp or self.deepspeed) or any(os.environ.get(name, "").lower() == "true" for name in names)

    @property
    def is_of_pairs(self) -> bool:
        """Whether pairs of responses are learned from, by TRL's trainer."""
        return self.objective in ("dpo", "ilf_dpo")

    @property
    def has_known_flags(self) -> bool:
        """Whether the inappropriate tokens are known before training begins."""
        return self.detector in ("frozen", "spans")

    @property
    def parts(self) -> Parts:
        """Which parts of CUT's loss are in."""
        is_unsatisfactory_in = self.use_judged_loss
        if is_unsatisfactory_in is None:
            is_unsatisfactory_in = not self.has_known_flags
        if self.has_known_flags and not is_unsatisfactory_in:
            return Parts(unsatisfactory=False)  # one pool of tokens; records of a part that is off are left out of it
        return Parts(self.use_contrast_loss, self.use_satisfactory_loss, is_unsatisfactory_in)


@dataclass
class JudgeConfig(CUTConfig):
    """Settings of training a judge, by likelihood of its answers: those of other objectives are none of it."""

    objective: str = field(default="likelihood", init=False)
    detector: str | None = field(default=None, init=False)
    use_contrast_loss: bool = field(default=True, init=False)
    use_satisfactory_loss: bool = field(default=True, init=False)
    use_judged_loss: bool | None = field(default=None, init=False)
    satisfactory_only: bool = field(default=False, init=False)
    praise_weight: float = field(default=1.0, init=False)
    dpo_beta: float = field(default=0.1, init=False)
    map_spans: bool = field(default=False, init=False)
    threshold: float = field(default=1.1, init=False)
    unlikelihood_weight: float = field(default=1.0, init=False)
    gamma: float = field(default=1.0, init=False)
