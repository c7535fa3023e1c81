"""Tiny models and tokenizers for the tests, made in memory without any download."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task. Write a response to the instruction and the response should match"
    " the corresponding judgment.\n\n",
    "### Instruction:\nName the capital of Australia.\n\n### Judgment:\nIt is wrong.\n\n### Response:\nCanberra is.",
    "Hello world! Sydney is a large city, not the capital. 12 + 34 = 46.",
    'A new line\nand one more\n\nSo: yes  two spaces, (and) "quotes".\n\n### Response:\n\nThe answer is 7.\n',
    "Write a response that this judgment fits:\nPerfect.",
    "if a < b and c > d: x_1 = y / z | {0} [1] & so <on>? ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 9058",
    "Überraschung, 你好, 🙂",
)
TOKENIZER_KINDS = ("bpe", "bpe_bos", "bpe_unsplit", "llama", "llama_legacy", "unigram")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer(kind: str = "bpe", corpus: Sequence[str] | None = None, *, chat: bool = False) -> Any:
    """Trains a small tokenizer.

    Args:
        kind: How it splits text:
            "bpe": byte-level BPE that separates words, without a beginning-of-sequence token (GPT-2, Qwen);
            "bpe_bos": the same with a beginning-of-sequence token (Llama 3);
            "bpe_unsplit": byte-level BPE whose merges cross spaces and line breaks;
            "llama": SentencePiece's BPE with byte fallback, a beginning-of-sequence token, and a space before the text;
            "llama_legacy": the older conversion, which also adds a space after each special token;
            "unigram": SentencePiece's unigram model, which normalizes text, without a beginning-of-sequence token (T5).
        corpus: Texts to train on.
        chat: Whether to add a ChatML template and its two special tokens, the second as end-of-sequence token.
    """
    texts = list(corpus or CORPUS) * 4
    if kind.startswith("bpe"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "bpe_unsplit")
        tokenizer.decoder = decoders.ByteLevel()
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        trainer: Any = trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=list(names.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind.startswith("llama"):
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "llama_legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        # Like SentencePiece, train on single words, and leave line breaks to the byte tokens.
        texts = [word for text in texts for word in text.replace(" ", "\n ").split("\n") if word]
        trainer = trainers.BpeTrainer(
            vocab_size=640, special_tokens=[*names.values(), *_BYTES], limit_alphabet=120, show_progress=False
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        names = {"unk_token": "<unk>", "eos_token": "</s>"}
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=list(names.values()), unk_token="<unk>", show_progress=False
        )
    else:
        raise ValueError(f"expected one of {TOKENIZER_KINDS}, got {kind!r}")
    tokenizer.train_from_iterator(texts, trainer)
    has_bos = kind == "bpe_bos" or kind.startswith("llama")
    if has_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    if kind.startswith("llama"):  # the byte tokens were special only for the trainer
        tokenizer = _make_plain(tokenizer, _BYTES)
    if chat:
        tokenizer.add_special_tokens([AddedToken(IM_START, special=True), AddedToken(IM_END, special=True)])
        names["eos_token"] = IM_END
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    wrapped.name_or_path = f"tiny-{kind}"
    if chat:
        wrapped.chat_template = ("{{ bos_token }}" if has_bos else "") + CHATML
    return wrapped


def _make_plain(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(state))


def make_model(vocab_size: int, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Makes a two-layer LLaMA in float32, with weights large enough for its probabilities to differ."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | config))).float().eval()


def make_scripted_model(vocab_size: int, ids: Sequence[int], **config: Any) -> LlamaForCausalLM:
    """Makes a model that continues each of these different tokens with the next one, whatever precedes it."""
    assert len(set(ids)) == len(ids)
    sizes = {"hidden_size": -(-vocab_size // 8) * 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = make_model(vocab_size, **sizes | config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        for before, after in pairwise(ids):
            model.lm_head.weight[after, before] = 1.0
    return model


def save_tiny_model(folder: str | Path, chat: bool = False, seed: int = 0) -> Path:
    """Saves a tiny model and its byte-level tokenizer, which can encode any text, to a folder."""
    tokenizer = make_tokenizer("bpe", chat=chat)
    model = make_model(
        len(tokenizer),
        seed,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
