"""Build the base model of the tiny world from scratch.

  python experiments/build_base.py --out DIR

It is a LLaMA with about a million parameters, pretrained on the world's corpus (`corpus.py`) on a CPU in a few minutes.
It answers with the world's habits, and it reads a judgment if the prompt holds one. A folder that already holds the
same model is left as it is.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from corpus import Document, list_world_words, make_corpus
from measure import measure_base
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cutlm.errors import UserError
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import render_alpaca_prompt, render_refinement_prompt
from cutlm.world.base import load_base
from cutlm.world.judge import judge_task
from cutlm.world.tasks import SPLITS, list_tasks, load_questions, load_words

METRICS_FILE, RECIPE_FILE = "metrics.json", "recipe.json"
NUM_STEPS = 3000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="build_base.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and corpus (default: 0)")
    parser.add_argument(
        "--num-steps",
        type=int,
        default=NUM_STEPS,
        metavar="N",
        help=f"training steps, fewer to see that everything works (default: {NUM_STEPS})",
    )
    args = parser.parse_args(argv)
    if args.num_steps < 1:
        parser.error(f"--num-steps: expected a whole number of at least 1, got {args.num_steps}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed: expected a whole number from 0 to {2**32 - 1}, got {args.seed}")
    try:
        is_new = build_base(args.out, args.seed, args.num_steps)
    except UserError as error:
        parser.error(str(error))
    print(f"Wrote the base model to {args.out}" if is_new else f"{args.out} already holds this model, nothing to do")
    return 0


def build_base(out: str | Path, seed: int = 0, num_steps: int = NUM_STEPS) -> bool:
    """Train a base model and write its folder: float16 weights, tokenizer, recipe, and metrics on the dev tasks.

    The folder appears only when it is complete.

    Returns:
        False if the folder already holds the model of this recipe, so that nothing was done.

    Raises:
        UserError: The folder holds something else.
    """
    out = Path(out)
    stored = _read_stored_recipe(out)
    tokenizer = make_tokenizer()
    recipe = describe_recipe(tokenizer, seed, num_steps)
    if stored is not None:
        differing = [name for name, value in recipe.items() if stored.get(name) != value]
        if differing:
            raise UserError(
                f"--out {out}: expected a new folder, got a base model with another recipe ({', '.join(differing)}"
                " differ); choose another folder or remove it"
            )
        return False
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        # Before the training, so that a folder that cannot be written is reported at once.
        temporary.mkdir(parents=True)
        model = train_base(tokenizer, seed, num_steps)
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # Measure the saved model, whose weights are rounded to float16.
        metrics = measure_base(*load_base(temporary), list_tasks("dev"))
        for name, content in ((METRICS_FILE, metrics), (RECIPE_FILE, recipe)):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if out.is_dir():
            out.rmdir()  # it is empty; not every system can rename a folder onto it
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _read_stored_recipe(out: Path) -> dict[str, Any] | None:
    """The recipe in an existing folder; None if the folder is missing or empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder, got a file; choose another name")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    stored = read_recipe(out)
    if stored is None:
        raise UserError(f"--out {out}: expected a new folder, got one that is not empty; choose another folder")
    return stored


# ---- Recipe ----


@dataclass(frozen=True)
class Hyperparameters:
    """How the base model is made and trained. Changing any of these changes the recipe."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    max_length: int = 256
    batch_size: int = 32
    learning_rate: float = 4e-3
    adam_beta2: float = 0.98
    num_warmup_steps: int = 100
    max_grad_norm: float = 1.0
    # Prompt tokens count a little in the loss: from them, too, the model learns to repeat a word that it has read.
    prompt_weight: float = 0.05


HYPERPARAMETERS = Hyperparameters()
_LIBRARIES = ("tokenizers", "torch", "transformers")
# The corpus is drawn in sequence, so its first documents identify it.
_NUM_HASHED_DOCUMENTS = 10_000
_NUM_HASHED_ENCODINGS = 1_000


def describe_recipe(tokenizer: PreTrainedTokenizerBase, seed: int, num_steps: int) -> dict[str, Any]:
    """Describe everything that determines a base model, as JSON.

    The recipe is stored with the model, so a test can detect that the packaged model no longer matches the code. Corpus
    and vocabulary are identified by hashes of the generated data, not of the code.
    """
    documents = make_corpus(_NUM_HASHED_DOCUMENTS, seed)
    encoder = Encoder(tokenizer, "alpaca")
    encoded = [encode_document(encoder, document) for document in documents[:_NUM_HASHED_ENCODINGS]]
    return {
        "seed": seed,
        "num_steps": num_steps,
        "hyperparameters": asdict(HYPERPARAMETERS),
        "corpus": _hash([documents, encoded]),
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items())),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """Read the recipe in a base model's folder; None if it is missing or damaged."""
    try:
        recipe = json.loads((Path(folder) / RECIPE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, dict) else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- Tokenizer ----

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# Enough documents to show every wording. Words that occur only in further documents are spelled in bytes.
_NUM_TOKENIZER_DOCUMENTS = 30_000


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Make the world's tokenizer, with the alpaca prompt as its chat template.

    Every word of the world is one token, digits are single tokens, and other text is split into bytes. Each fixed piece
    of the prompts is one token, so that long prompts cost a small model little.
    """
    splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words = {piece for text in _list_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS.values(), *alphabet, *sorted(words - set(alphabet))]
    # Without merges, a piece of text is one token if it is in the vocabulary, and bytes otherwise.
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    fast.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in _list_prompt_pieces()])
    fast.chat_template = Encoder(fast, "alpaca").build_chat_template()
    return fast


def _list_prompt_pieces() -> list[str]:
    """The fixed pieces of the prompts, between the texts of a record."""
    mark = "\0"
    prompts = (
        render_alpaca_prompt(mark),
        render_alpaca_prompt(mark, mark),
        render_refinement_prompt(mark, mark, mark),
    )
    return sorted({piece for prompt in prompts for piece in prompt.text.split(mark)})


def _list_texts() -> Iterable[str]:
    for document in make_corpus(_NUM_TOKENIZER_DOCUMENTS, 0):
        yield from (text for text in document if text is not None)
    for split in SPLITS:
        for task in list_tasks(split):
            yield task.instruction
            yield from task.right_answers
            if task.habit is not None:
                yield task.habit.response
                yield judge_task(task, task.habit.response).judgment or ""
    # These can occur anywhere, with a space before them or without.
    answers = [question.answer for question in load_questions().values()]
    for word in (*list_world_words(), *answers, *map(str.capitalize, answers), *map(str.upper, answers)):
        yield f"{word} {word}"
    yield from load_words()["vague"]


# ---- Pretraining ----


class EncodedDocument(NamedTuple):
    """A document as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def encode_document(encoder: Encoder, document: Document) -> EncodedDocument:
    """Encode a document with the prompt that its parts call for."""
    instruction, judgment, response, draft = document
    if draft is not None and judgment is not None:
        prompt_ids = encoder.encode_refinement_prompt(instruction, draft, judgment)
    else:
        prompt_ids = encoder.encode_prompt(instruction, judgment)
    return EncodedDocument(prompt_ids, encoder.encode_response(response))


def train_base(tokenizer: PreTrainedTokenizerBase, seed: int, num_steps: int) -> LlamaForCausalLM:
    """Make and train a base model; the same arguments give the same bits on one machine.

    Documents are not repeated, except by chance.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HYPERPARAMETERS.hidden_size,
            intermediate_size=HYPERPARAMETERS.intermediate_size,
            num_hidden_layers=HYPERPARAMETERS.num_layers,
            num_attention_heads=HYPERPARAMETERS.num_heads,
            max_position_embeddings=HYPERPARAMETERS.max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    encoder = Encoder(tokenizer, "alpaca")
    documents = make_corpus(num_steps * HYPERPARAMETERS.batch_size, seed)
    batches = _draw_batches([encode_document(encoder, document) for document in documents], random.Random(seed))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits of sums
    try:
        _train(model, batches)
    finally:
        torch.set_num_threads(num_threads)
    return model.eval()


def _draw_batches(documents: list[EncodedDocument], rng: random.Random) -> list[list[EncodedDocument]]:
    """Batches of documents of similar length, in random order."""
    order = rng.sample(documents, len(documents))
    size = HYPERPARAMETERS.batch_size
    batches: list[list[EncodedDocument]] = []
    for start in range(0, len(order), 16 * size):
        pool = sorted(order[start : start + 16 * size], key=lambda document: sum(map(len, document)))
        parts = [pool[first : first + size] for first in range(0, len(pool), size)]
        batches += rng.sample(parts, len(parts))
    return batches


def _train(model: LlamaForCausalLM, batches: Sequence[list[EncodedDocument]]) -> None:
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    rate, betas = HYPERPARAMETERS.learning_rate, (0.9, HYPERPARAMETERS.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = [
        # Muon needs less than half as many steps here as AdamW.
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=betas),
    ]
    num_warmup_steps = min(HYPERPARAMETERS.num_warmup_steps, len(batches) // 4)

    def scale_rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / (num_warmup_steps + 1))
        return warmup * (1 + math.cos(math.pi * step / len(batches))) / 2

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale_rate) for optimizer in optimizers]
    model.train()
    progress = tqdm(batches, desc="pretraining", unit="step", ncols=80)
    for batch in progress:
        loss = _compute_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), HYPERPARAMETERS.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)


def _compute_loss(model: LlamaForCausalLM, batch: list[EncodedDocument]) -> Tensor:
    width = max(sum(map(len, document)) for document in batch)
    ids, weights = [], []
    for prompt_ids, response_ids in batch:
        num_padding = width - len(prompt_ids) - len(response_ids)
        ids.append(prompt_ids + response_ids + [0] * num_padding)
        prompt_weights = [HYPERPARAMETERS.prompt_weight] * len(prompt_ids)
        weights.append(prompt_weights + [1.0] * len(response_ids) + [0.0] * num_padding)
    inputs, targets = torch.tensor(ids)[:, :-1], torch.tensor(ids)[:, 1:]
    target_weights = torch.tensor(weights)[:, 1:]
    is_text = target_weights > 0
    # No attention mask is needed: padding is on the right, and no token attends to its right.
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    losses = cross_entropy(model.lm_head(hidden[is_text]), targets[is_text], reduction="none")
    return (losses * target_weights[is_text]).sum() / target_weights[is_text].sum()


if __name__ == "__main__":
    sys.exit(main())
