"""Settings of training: the paper's, on top of every field of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from cutlm.errors import ConfigError
from cutlm.prompts import TEMPLATES

NORMALIZATIONS = ("token", "record")


@dataclass
class CUTConfig(TrainingArguments):
    """Settings of `CUTTrainer`. The learning rate and its schedule are the paper's for LoRA.

    Attributes:
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
    """

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

    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate; the paper's, for LoRA"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule of the learning rate"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between log lines"})
    # A batch's tensors are laid out by our collator, under names of our own.
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave this off"})
    # A loss that is no number ends the run instead, before it can reach the weights.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave this off"})

    def __post_init__(self) -> None:
        problems = []
        if not self.threshold >= 1:
            problems.append(
                f"threshold: expected a number of at least 1 (the paper uses 1.1 or 1.2), got {self.threshold}"
            )
        for name in ("unlikelihood_weight", "gamma"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name, choices in (("normalization", NORMALIZATIONS), ("template", TEMPLATES)):
            if getattr(self, name) not in choices:
                problems.append(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("max_length", "head_chunk_size"):
            value = getattr(self, name)
            is_left_open = value is None and name == "head_chunk_size"
            if not is_left_open and (not isinstance(value, int) or value < 1):
                problems.append(f"{name}: expected a whole number of at least 1, got {value}")
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
        if problems:
            raise ConfigError(problems)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for
