"""What a model bears, tried on a few tokens before the long run: layouts of sequences, and the head read by its weight.

The layouts themselves are `cutlm.model.layouts`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cutlm.errors import UserError
from cutlm.model.forward import Passes, score_batch
from cutlm.model.layouts import MASKED_KINDS, Run, Tree, name_attention, run_lending, run_padded, run_row
from cutlm.model.loading import list_rope_parameters, unwrap_peft

logger = logging.getLogger(__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, and each module back to what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def choose_passes(model: nn.Module, *, is_sharded: bool = False, is_compiled: bool = False) -> Passes:
    """Finds out which layouts a model bears, by trying them on a few tokens.

    Args:
        model: A causal language model, bare or with an adapter, all of whose weights are here.
        is_sharded: Whether it will be trained with its weights spread over processes.
        is_compiled: Whether its layers will be, which would be done for each of them anew if it kept keys and values.
    """
    language_model = unwrap_peft(model)
    if not is_at_hand(language_model):
        return Passes(is_single=is_sharded)
    attention = name_attention(language_model)
    looks_back_whole = _looks_back_whole(language_model)
    # A mask of ours stands for all layers, so all must look at everything before them.
    is_masked = attention in MASKED_KINDS and looks_back_whole
    # Flash attention, flex attention and their like; on a CPU the second is compiled anew for each length.
    is_other = attention not in MASKED_KINDS and (attention != "flex_attention" or language_model.device.type == "cuda")
    can_lend = not (is_compiled or is_sharded) and looks_back_whole and (is_masked or is_other)
    return Passes(
        is_packed=is_other and _bears(language_model, run_row, [Tree((0,), 0, 9), Tree((1,), 0, 11), Tree((2,), 0, 7)]),
        is_sharing=is_masked and _bears(language_model, run_row, [Tree((0, 1), 3, 17), Tree((2,), 0, 7)]),
        is_lending=can_lend and _bears(language_model, run_lending, [Tree((0, 1), 3, 17), Tree((2, 3), 2, 14)]),
        is_single=is_sharded,
        unpadded_beyond=_find_switch(language_model),
    )


def is_at_hand(language_model: nn.Module) -> bool:
    """Whether a model's weights are in this process, and not on others or nowhere yet."""
    return not any(weight.is_meta or hasattr(weight, "ds_id") for weight in language_model.parameters())


def _find_switch(language_model: Any) -> int | None:
    """The length from which a model turns its positions by other angles, for all that it is given at once.

    "dynamic" angles depend on the longest input so far, too, which `transformers` keeps in the model.
    """
    config = language_model.config.get_text_config()
    for rope in list_rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _looks_back_whole(language_model: Any) -> bool:
    config = language_model.config.get_text_config()
    if "local" in str(getattr(config, "attention_types", "")):  # GPT-Neo
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


def _bears(language_model: Any, run: Run, trees: list[Tree]) -> bool:
    """Whether sequences that are run together get the hidden states that they have alone.

    Args:
        language_model: The model.
        run: One of `cutlm.model.layouts`.
        trees: Of sequences of 9, 11, 7 and 9 tokens; the first two have 3 in common at their beginning, the others 2.
    """
    vocab_size = language_model.config.get_text_config().vocab_size
    device = language_model.device
    ids = [(number * 7 + 3) % vocab_size for number in range(20)]
    parts = (ids[:9], [*ids[:3], *ids[12:]], ids[5:12], [*ids[5:7], *ids[:7]])
    sequences = [torch.tensor(part, device=device) for part in parts]
    try:
        with evaluating(language_model), torch.no_grad():
            together = dict(run(language_model, trees, sequences))
            alone = {
                index: states
                for tree in trees
                for number in tree.indices
                for index, states in run_padded(language_model, [Tree((number,), 0, len(parts[number]))], sequences)
            }
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError) as error:
        logger.debug("sequences are run apart from each other: %s", error)
        return False
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.05
    return all(
        (states - alone[index][-len(states) :]).float().norm() <= tolerance * alone[index].float().norm()
        for index, states in together.items()
    )


def check_head(model: nn.Module) -> None:
    """Compares our log-probs of a few tokens with the model's own logits.

    A model that does something to its logits which `get_head` does not know would otherwise be trained on wrong
    probabilities without a word.

    Raises:
        UserError: They differ.
    """
    language_model = unwrap_peft(model)
    device = language_model.device
    if not is_at_hand(language_model):
        return
    num_tokens = min(8, language_model.config.get_text_config().vocab_size)
    ids = torch.arange(num_tokens, device=device)
    batch = {
        "input_ids": ids[:-1],
        "target_ids": ids[1:],
        "sequence_lengths": [num_tokens - 1],
        "response_lengths": [num_tokens - 1],
    }
    with evaluating(language_model), torch.no_grad():
        ours = score_batch(language_model, batch)
        logits = language_model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    theirs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.1
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance and torch.isfinite(theirs).all():
        raise UserError(
            f"{type(language_model).__name__}: log-probs from the head's weight differ from the model's own logits by"
            f" {difference:.3g} (at most {tolerance} expected); the model treats its logits in a way that cutlm does"
            " not know"
        )
