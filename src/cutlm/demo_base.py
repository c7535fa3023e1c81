"""The base model of `cutlm demo`: a tokenizer and a small LLaMA, trained from nothing within about a minute.

It learns the plain answers of `cutlm.demo_world`, habits included, and to read a judgment where the prompt holds one.
Nothing here is of use for a model of one's own; aligning it is left to `cutlm.demo`.
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

from cutlm.encoding import Encoder
from cutlm.prompts import render_alpaca_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cutlm.demo_world import Document

BATCH_SIZE = 32
_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# Prompts count a little: from them too the model learns to repeat a name that it has read.
_PROMPT_WEIGHT = 0.1
_MATRIX_LEARNING_RATE, _VECTOR_LEARNING_RATE = 5e-3, 4e-3


class _Text(NamedTuple):
    prompt_ids: list[int]
    response_ids: list[int]


def make_tokenizer(documents: "Sequence[Document]") -> "PreTrainedTokenizerBase":
    """Trains a byte-level BPE tokenizer, whose chat template is the alpaca prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        special_tokens=list(_SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (f"{render_alpaca_prompt(text.instruction, text.judgment).text}{text.response}" for text in documents), trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL_TOKENS)
    fast.chat_template = Encoder(fast, "alpaca").build_chat_template()
    return fast


def make_model(tokenizer: "PreTrainedTokenizerBase", seed: int) -> LlamaForCausalLM:
    """Makes an untrained LLaMA of about a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, tokenizer: "PreTrainedTokenizerBase", documents: "Sequence[Document]", seed: int
) -> None:
    """Trains the model on every document once."""
    encoder = Encoder(tokenizer, "alpaca")
    texts = [
        _Text(encoder.encode_prompt(text.instruction, text.judgment), encoder.encode_response(text.response))
        for text in documents
    ]
    batches = list(_draw_batches(texts, random.Random(seed)))
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        # Muon needs less than half of AdamW's steps here.
        torch.optim.Muon(matrices, lr=_MATRIX_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_VECTOR_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    num_warmup = min(50, len(batches) // 4)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / (num_warmup + 1)) * (1 + math.cos(math.pi * step / len(batches))) / 2,
        )
        for optimizer in optimizers
    ]
    model.train()
    progress = tqdm(batches, desc="   pretraining", unit="step", ncols=80)
    for batch in progress:
        loss = _compute_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    model.eval()


def _draw_batches(texts: list[_Text], rng: random.Random) -> Iterator[list[_Text]]:
    """Batches of texts of like length, in random order."""
    order = rng.sample(texts, len(texts))
    pool_size = 16 * BATCH_SIZE
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda text: sum(map(len, text)))
        batches = [pool[place : place + BATCH_SIZE] for place in range(0, len(pool), BATCH_SIZE)]
        yield from rng.sample(batches, len(batches))


def _compute_loss(model: LlamaForCausalLM, batch: list[_Text]) -> Tensor:
    width = max(sum(map(len, text)) for text in batch)
    padding = [[0] * (width - len(prompt) - len(response)) for prompt, response in batch]
    ids = torch.tensor([[*text.prompt_ids, *text.response_ids, *pad] for text, pad in zip(batch, padding, strict=True)])
    weights = torch.tensor(
        [
            [_PROMPT_WEIGHT] * len(text.prompt_ids) + [1.0] * len(text.response_ids) + pad
            for text, pad in zip(batch, padding, strict=True)
        ]
    )[:, 1:]
    is_text = weights > 0
    # Padding stands to the right, where no text looks.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = cross_entropy(model.lm_head(hidden[is_text]), ids[:, 1:][is_text], reduction="none")
    return (losses * weights[is_text]).sum() / weights[is_text].sum()
