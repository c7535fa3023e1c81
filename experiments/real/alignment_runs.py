"""One run of the comparison of alignment methods: a method, trained on judged responses, and measured.

Training is the library's own, with LoRA and the chat template. Two steps with a cache between them: `train_adapter`
and `measure`, so that an adapter is trained once for the development split and the test.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ifeval import Prompt, check_response
from peft import PeftModel
from transformers import PrinterCallback
from trl import get_peft_config

from cutlm.data.files import write_text
from cutlm.data.records import PRAISE, JudgedRecord
from cutlm.flagging.scoring import score_rows
from cutlm.generation.local import Sampling, generate_responses
from cutlm.model.loading import load_model, load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig, ModelArguments
from cutlm.training.pairs import PairTrainer
from cutlm.training.trainer import CUTTrainer

# Larger batches are slower on a CPU: 32 rows generate 160 tokens per core and second, 96 rows 80.
GENERATION_BATCH_SIZE = 32


@dataclass(frozen=True)
class Method:
    """One way to learn from judged responses.

    Attributes:
        name: Its name in the table.
        settings: Settings of `CUTConfig` that differ from the defaults; None for the model before alignment.
        data: "greedy": the greedy response to each instruction; "samples": two sampled responses to every second one.
        is_praised: Whether the trained model is prompted with the judgment "Perfect.".
        about: A short description for the table.
    """

    name: str
    settings: dict[str, Any] | None = field(default_factory=dict)
    data: str = "greedy"
    is_praised: bool = False
    about: str = ""


BASE = Method("base", None, about="the model before alignment")
# In the order in which they are run.
METHODS = (
    Method("cut_spans", {"detector": "spans"}, about="CUT, wrong tokens marked by the rules"),
    Method(
        "likelihood_satisfactory",
        {"objective": "likelihood", "satisfactory_only": True},
        about="likelihood of satisfactory responses",
    ),
    Method("cut_frozen", {"detector": "frozen"}, about="CUT, tokens flagged once by the model before alignment"),
    Method(
        "dpo", {"objective": "dpo"}, data="samples", about="DPO, pairs from two samples of every second instruction"
    ),
    Method(
        "hindsight",
        {"objective": "hindsight"},
        is_praised=True,
        about='likelihood given the judgment; prompted with "Perfect."',
    ),
    Method("cut", about="CUT as in the paper"),
)


@dataclass(frozen=True)
class Training:
    """What determines an adapter, together with the model and the records.

    Attributes:
        method: The method.
        learning_rate: Peak; it decays linearly to 0.
        seed: Seed of the adapter's initial weights and of the order of the records.
        num_steps: Optimizer steps.
        batch_size: Judged responses in each.
    """

    method: Method
    learning_rate: float
    seed: int
    num_steps: int
    batch_size: int

    def make_key(self, records: Sequence[JudgedRecord]) -> str:
        """Identify the adapter by all that it depends on except the model and the code."""
        settings = asdict(self)
        settings["method"] = {"settings": self.method.settings}
        texts = [settings, [record.model_dump() for record in records]]
        return f"{self.method.name}-{hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]}"


def train_adapter(model_folder: Path, records: Sequence[JudgedRecord], training: Training, folder: Path) -> float:
    """Train an adapter into a folder, unless it is there already; return the seconds it took, with the detector's."""
    if not folder.is_dir():
        settings = training.method.settings
        assert settings is not None, f"{training.method.name} is not trained"
        if settings.get("detector") != "spans":
            records = [record.model_copy(update={"wrong_spans": None}) for record in records]
        is_pairs = settings.get("objective") == "dpo"
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as partial:
            args = CUTConfig(
                output_dir=partial,
                max_steps=training.num_steps,
                # A pair is two responses.
                per_device_train_batch_size=training.batch_size // (2 if is_pairs else 1),
                learning_rate=training.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=min(5, training.num_steps // 4),
                seed=training.seed,
                template="chat",
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                **settings,
            )
            trainer_class: Any = PairTrainer if is_pairs else CUTTrainer
            trainer = trainer_class(
                model=load_model(model_folder, dtype="float32"),
                args=args,
                train_dataset=list(records),
                processing_class=load_tokenizer(model_folder),
                peft_config=get_peft_config(ModelArguments(model_name_or_path=str(model_folder))),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            saved = Path(partial) / "adapter"
            trainer.model.save_pretrained(saved)
            seconds = time.perf_counter() - started
            write_text(saved / "seconds.json", json.dumps(seconds))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(saved, folder)
    return float(json.loads((folder / "seconds.json").read_text("utf-8")))


def load_aligned(model_folder: Path, adapter: Path | None) -> Any:
    """Load the model, with the adapter merged into it if there is one."""
    model: Any = load_model(model_folder, dtype="float32")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def respond(
    model: Any,
    model_folder: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    is_praised: bool = False,
) -> list[str]:
    """Generate greedy responses to prompts."""
    tokenizer = load_tokenizer(model_folder)
    encoder = Encoder(tokenizer, "chat")
    ids = [encoder.encode_prompt(prompt.text, PRAISE if is_praised else None) for prompt in prompts]
    sampling = Sampling(max_new_tokens, batch_size=GENERATION_BATCH_SIZE)
    return generate_responses(model, tokenizer, encoder, ids, sampling)


def check_responses(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[bool]]:
    """Say which instructions of each prompt its response follows."""
    return [check_response(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def measure_retention(model: Any, model_folder: Path, records: Sequence[JudgedRecord]) -> float:
    """Compute the mean log-likelihood per token of responses, in nats, without a judgment."""
    encoder = Encoder(load_tokenizer(model_folder), "chat")
    rows = [
        {
            "prompt_ids": encoder.encode_prompt(record.full_instruction),
            "judged_prompt_ids": None,
            "response_ids": encoder.encode_response(record.output),
        }
        for record in records
    ]
    total, num_tokens = 0.0, 0
    for batch in score_rows(model, rows, show_progress=False):
        for _, logps, _ in batch:
            total += float(logps.double().sum())
            num_tokens += len(logps)
    return total / num_tokens
