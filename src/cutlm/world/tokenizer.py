"""The tokenizer of the tiny world: every word of it is one token, digits stand alone, and any other text is bytes.

The fixed text of the prompts is a token a piece, so that a prompt costs a small model little. How a prompt is put
together is left to `cutlm.prompting.templates` and `cutlm.prompting.encoding`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import render_alpaca_prompt, render_refinement_prompt
from cutlm.world.corpus import Document, make_corpus
from cutlm.world.judge import judge_task
from cutlm.world.mistakes import list_world_words
from cutlm.world.tasks import SPLITS, list_tasks
from cutlm.world.words import load_questions, load_words

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
# Enough documents to show every wording; what a rare document adds beyond is spelled in bytes.
_NUM_DOCUMENTS = 30_000


def make_tokenizer() -> "PreTrainedTokenizerBase":
    """Makes the tokenizer, whose chat template is the alpaca prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    splitter = _make_splitter()
    words = {piece for text in _list_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = sorted(_list_alphabet())
    vocabulary = [*SPECIAL_TOKENS.values(), *alphabet, *sorted(words - set(alphabet))]
    # No merges: a piece of text that is in the vocabulary as a whole is one token, any other is bytes.
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    fast.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in list_fixed_pieces()])
    fast.chat_template = Encoder(fast, "alpaca").build_chat_template()
    return fast


def _make_splitter() -> "PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _list_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def list_fixed_pieces() -> list[str]:
    """What stands between the texts of a user in the prompts of the alpaca style."""
    mark = "\0"
    prompts = (
        render_alpaca_prompt(mark),
        render_alpaca_prompt(mark, mark),
        render_refinement_prompt(mark, mark, mark),
    )
    return sorted({piece for prompt in prompts for piece in prompt.text.split(mark)})


def _list_texts() -> Iterable[str]:
    for document in make_corpus(_NUM_DOCUMENTS, 0):
        yield from list_document_texts(document)
    for split in SPLITS:
        for task in list_tasks(split):
            yield task.instruction
            yield from task.right_answers
            if task.habit is not None:
                yield task.habit.response
                yield judge_task(task, task.habit.response).judgment or ""
    # Any of these can come to stand anywhere, with a space before it or without.
    answers = [question.answer for question in load_questions().values()]
    for word in (*list_world_words(), *answers, *map(str.capitalize, answers), *map(str.upper, answers)):
        yield f"{word} {word}"
    yield from load_words()["vague"]


def list_document_texts(document: Document) -> list[str]:
    """The texts of a document, without the prompt's own."""
    return [text for text in document if text is not None]
