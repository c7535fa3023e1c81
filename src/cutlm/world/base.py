"""The base model of the tiny world: a LLaMA with a million parameters that answers with the world's habits.

It can also read a judgment in its prompt. `experiments/build_base.py` trains it from scratch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from cutlm.data.records import PRAISE
from cutlm.generation.local import Sampling, generate_responses
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.world.tasks import Task

MAX_NEW_TOKENS, BATCH_SIZE = 40, 64


def base_path() -> Path:
    """The folder of the base model that comes with the package."""
    return Path(__file__).with_name("base_model")


def load_base(path: str | Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a base model in float32 and evaluation mode, and its tokenizer; by default the packaged one."""
    folder = base_path() if path is None else Path(path)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(folder)


def answer_tasks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], *, is_praised: bool = False
) -> list[str]:
    """Generate the greedy response to each task.

    If `is_praised`, the prompt holds the judgment "Perfect.", which asks for a right answer.
    """
    encoder = Encoder(tokenizer, "alpaca")
    prompts = [encoder.encode_generation_prompt(task.instruction, PRAISE if is_praised else None) for task in tasks]
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
    return generate_responses(model, tokenizer, encoder, prompts, sampling)
