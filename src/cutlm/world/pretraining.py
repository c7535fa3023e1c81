"""Trains the base model of the tiny world from nothing: a LLaMA of a million parameters, on the world's corpus.

It learns to answer with the world's habits, and to read judgments where a prompt holds one. What it reads is left to
`cutlm.world.corpus`, the folder of the trained model to `cutlm.world.base`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from cutlm.prompting.encoding import Encoder
from cutlm.world.corpus import Document, make_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_STEPS = 3000
BATCH_SIZE = 32
NUM_WARMUP_STEPS = 100
# Prompts count a little: from them too the model learns to repeat a word that it has read.
PROMPT_WEIGHT = 0.05
MATRIX_LEARNING_RATE, VECTOR_LEARNING_RATE = 4e-3, 4e-3


class EncodedDocument(NamedTuple):
    """What is read, and what is to be written, as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def make_model(tokenizer: "PreTrainedTokenizerBase", seed: int) -> LlamaForCausalLM:
    """Makes an untrained LLaMA of about a million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_base(
    tokenizer: "PreTrainedTokenizerBase", seed: int, num_steps: int, show_progress: bool = True
) -> LlamaForCausalLM:
    """Makes and trains a base model; the same arguments give the same bits on one machine.

    Args:
        tokenizer: The world's tokenizer.
        seed: Of the weights, the corpus and its order.
        num_steps: Batches to train on; no document comes twice but by chance.
        show_progress: Whether to draw a bar.
    """
    model = make_model(tokenizer, seed)
    encoder = Encoder(tokenizer, "alpaca")
    texts = [encode_document(encoder, document) for document in make_corpus(num_steps * BATCH_SIZE, seed)]
    batches = list(_draw_batches(texts, random.Random(seed)))
    num_threads = torch.get_num_threads()
    # How sums are split among threads shows in their last bits.
    torch.set_num_threads(1)
    try:
        _train(model, batches, show_progress)
    finally:
        torch.set_num_threads(num_threads)
    return model.eval()


def encode_document(encoder: Encoder, document: Document) -> EncodedDocument:
    """Turns a document into token ids."""
    instruction, judgment, response, draft = document
    if draft is not None and judgment is not None:
        prompt_ids = encoder.encode_refinement_prompt(instruction, draft, judgment)
    else:
        prompt_ids = encoder.encode_prompt(instruction, judgment)
    return EncodedDocument(prompt_ids, encoder.encode_response(response))


def _train(model: LlamaForCausalLM, batches: Sequence[list[EncodedDocument]], show_progress: bool) -> None:
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        # Muon needs less than half of AdamW's steps here.
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=VECTOR_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    num_warmup = min(NUM_WARMUP_STEPS, len(batches) // 4)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / (num_warmup + 1)) * (1 + math.cos(math.pi * step / len(batches))) / 2,
        )
        for optimizer in optimizers
    ]
    model.train()
    progress = tqdm(batches, desc="pretraining", unit="step", ncols=80, disable=not show_progress)
    for batch in progress:
        loss = _compute_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)


def _draw_batches(texts: list[EncodedDocument], rng: random.Random) -> Iterator[list[EncodedDocument]]:
    """Batches of texts of like length, in random order."""
    order = rng.sample(texts, len(texts))
    pool_size = 16 * BATCH_SIZE
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda text: sum(map(len, text)))
        batches = [pool[place : place + BATCH_SIZE] for place in range(0, len(pool), BATCH_SIZE)]
        yield from rng.sample(batches, len(batches))


def _compute_loss(model: LlamaForCausalLM, batch: list[EncodedDocument]) -> Tensor:
    width = max(sum(map(len, text)) for text in batch)
    padding = [[0] * (width - len(prompt) - len(response)) for prompt, response in batch]
    ids = torch.tensor([[*text.prompt_ids, *text.response_ids, *pad] for text, pad in zip(batch, padding, strict=True)])
    weights = torch.tensor(
        [
            [PROMPT_WEIGHT] * len(text.prompt_ids) + [1.0] * len(text.response_ids) + pad
            for text, pad in zip(batch, padding, strict=True)
        ]
    )[:, 1:]
    is_text = weights > 0
    # Padding stands to the right, where no text looks.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = cross_entropy(model.lm_head(hidden[is_text]), ids[:, 1:][is_text], reduction="none")
    return (losses * weights[is_text]).sum() / weights[is_text].sum()
