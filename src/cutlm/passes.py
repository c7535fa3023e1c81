"""The passes of a micro-batch through a model: each token once, next to no padding, and the head where it counts.

Sequences go through the body in one of three layouts, whichever the model and the machine have:

- in groups of nearly one length, padded on the right, where no token of a causal model looks;
- as trees: the tokens with which both contexts of a response begin stand once, and both continuations behind them, kept
  from each other by a mask;
- end to end in one row with position ids that begin anew, which attention of variable length (flash, flex) keeps apart.

What comes of the log-probs is left to `cutlm.batch_loss`, the log-probs themselves to `cutlm.logprobs`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlm.errors import UserError
from cutlm.logprobs import get_head, token_logprobs
from cutlm.model import unwrap_peft

logger = logging.getLogger(__name__)

# Tokens that are enough to keep the device busy: a longer sequence gains nothing from company.
_GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}
_MAX_PADDING = 1 / 8
# A mask costs attention to all places of a row. Below this share of both sequences, a common beginning is not worth it.
_LEAST_SHARED = 1 / 5
# Kinds of attention that take any mask.
_MASKED = ("sdpa", "eager")


@dataclass(frozen=True)
class Passes:
    """How sequences go through the body of a model; see `choose_passes`.

    Attributes:
        is_packed: End to end in one row, kept apart by their position ids.
        is_sharing: What two contexts have in common at their beginning is run once.
        is_single: A micro-batch is one pass, whatever is in it: under FSDP and ZeRO-3 every pass gathers weights, and
            all ranks must make the same number of them.
    """

    is_packed: bool = False
    is_sharing: bool = False
    is_single: bool = False


PLAIN = Passes()


@dataclass(frozen=True)
class _Tree:
    """Sequences with a common beginning: one by itself, or the two contexts of a response.

    Attributes:
        indices: Of the sequences.
        num_shared: Tokens that all of them begin with.
        num_tokens: Of them all, the shared ones once.
    """

    indices: tuple[int, ...]
    num_shared: int
    num_tokens: int


@dataclass(frozen=True)
class _Pass:
    """What goes through the body at a time.

    Attributes:
        trees: What is in it.
        is_row: End to end in one row; else each sequence, of which a tree then has one, is a padded row of its own.
        needs_grad: Whether anything is learned from it.
    """

    trees: list[_Tree]
    is_row: bool
    needs_grad: bool


def score_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int | None = None,
    *,
    needs_judged_grad: bool = True,
    passes: Passes = PLAIN,
) -> Tensor:
    """Log-probability of every response token of a micro-batch.

    What a sequence gets does not depend on what else is in the batch. The head sees response positions only.

    Args:
        model: A causal language model, bare or with an adapter.
        batch: As made by `CutCollator`.
        chunk_size: Positions per chunk of the head.
        needs_judged_grad: False where nothing is learned from the context with the judgment, which then costs a
            forward pass only.
        passes: How the sequences go through the body.

    Returns:
        [R] float32, in the order of `batch["target_ids"]`.
    """
    language_model = unwrap_peft(model)
    lengths, response_lengths = batch["sequence_lengths"], batch["response_lengths"]
    sequences = batch["input_ids"].split(lengths)
    judged = range(batch.get("num_unsatisfactory", 0), 2 * batch.get("num_unsatisfactory", 0))
    hidden: list[Tensor] = [batch["input_ids"]] * len(sequences)
    limit = _GROUP_TOKENS["cuda" if batch["input_ids"].device.type == "cuda" else "cpu"]
    for one in _plan_passes(batch, passes, needs_judged_grad, limit):
        with torch.set_grad_enabled(one.needs_grad and torch.is_grad_enabled()):
            run = _run_row if one.is_row else _run_padded
            for index, states in run(language_model, one.trees, sequences):
                hidden[index] = states[len(states) - response_lengths[index] :]
    if not needs_judged_grad:
        hidden = [states.detach() if index in judged else states for index, states in enumerate(hidden)]
    head = get_head(language_model)
    return token_logprobs(
        torch.cat(hidden),
        head.weight,
        batch["target_ids"],
        chunk_size,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )


# ---- What goes together ----


def _plan_passes(batch: Mapping[str, Any], passes: Passes, needs_judged_grad: bool, limit: int) -> Iterator[_Pass]:
    """Divides a micro-batch into passes; every sequence is in one of them."""
    lengths, num_judged = batch["sequence_lengths"], batch.get("num_unsatisfactory", 0)
    is_split = torch.is_grad_enabled() and not needs_judged_grad
    shared = batch.get("shared_lengths", []) if passes.is_sharing else []
    trees = [
        _Tree((first, first + num_judged), num_shared, lengths[first] + lengths[first + num_judged] - num_shared)
        for first, num_shared in enumerate(shared)
        if _is_worth_sharing(num_shared, lengths[first], lengths[first + num_judged], is_split)
    ]
    in_trees = {index for tree in trees for index in tree.indices}
    alone = [_Tree((index,), 0, length) for index, length in enumerate(lengths) if index not in in_trees]
    if passes.is_single:
        yield _Pass([*trees, *alone], passes.is_packed or passes.is_sharing, True)
        return
    for group in _cut_rows(trees, limit):
        yield _Pass(group, True, True)
    judged = range(num_judged, 2 * num_judged)
    unlearned = [tree for tree in alone if is_split and tree.indices[0] in judged]
    learned = [tree for tree in alone if tree not in unlearned]
    for part, needs_grad in ((learned, True), (unlearned, False)):
        for group in _cut_rows(part, limit) if passes.is_packed else _group_by_length(part, limit):
            yield _Pass(group, passes.is_packed, needs_grad)


def _is_worth_sharing(num_shared: int, length: int, judged_length: int, is_split: bool) -> bool:
    """Whether one pass over a tree is less work than one over each sequence.

    A pass that is learned from counts three times, for the way back. Where nothing is learned from the judged context
    (`is_split`), it counts once by itself, but three times in a tree.
    """
    tree = 3 * (length + judged_length - num_shared)
    apart = 3 * length + (1 if is_split else 3) * judged_length
    return apart - tree >= _LEAST_SHARED * apart


def _cut_rows(trees: Sequence[_Tree], limit: int) -> Iterator[list[_Tree]]:
    """Cuts trees into rows of at most `limit` tokens, longest first; a longer tree is a row of its own."""
    group: list[_Tree] = []
    num_tokens = 0
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        if group and num_tokens + tree.num_tokens > limit:
            yield group
            group, num_tokens = [], 0
        group.append(tree)
        num_tokens += tree.num_tokens
    if group:
        yield group


def _group_by_length(sequences: Sequence[_Tree], limit: int) -> Iterator[list[_Tree]]:
    """Groups sequences, longest first, so that a group's padded tokens stay within `limit` and are few."""
    group: list[_Tree] = []
    num_tokens = 0
    for sequence in sorted(sequences, key=lambda sequence: -sequence.num_tokens):
        if group:
            size = (len(group) + 1) * group[0].num_tokens
            if size > limit or size > (1 + _MAX_PADDING) * (num_tokens + sequence.num_tokens):
                yield group
                group, num_tokens = [], 0
        group.append(sequence)
        num_tokens += sequence.num_tokens
    if group:
        yield group


# ---- Running ----


def _run_padded(model: nn.Module, trees: Sequence[_Tree], sequences: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Runs sequences as rows of one tensor, padded on the right.

    Yields:
        The index of each sequence and its hidden states [L, H].
    """
    indices = [tree.indices[0] for tree in trees]
    ids = nn.utils.rnn.pad_sequence([sequences[index] for index in indices], batch_first=True)
    states = _run_body(model, input_ids=ids)
    for row, index in enumerate(indices):
        yield index, states[row, : len(sequences[index])]


def _run_row(model: nn.Module, trees: Sequence[_Tree], sequences: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Runs trees end to end in one row.

    Yields:
        The index of each sequence and its hidden states but for those of a shared beginning, [L - num_shared, H].
    """
    parts, positions, owners, branches, places = [], [], [], [], []
    device = sequences[0].device
    start = 0
    for number, tree in enumerate(trees):
        first = sequences[tree.indices[0]]
        # The shared beginning, then each sequence's own tokens; the first one's follow at once.
        pieces = [(0, first[: tree.num_shared], 0)] if tree.num_shared else []
        pieces += [
            (branch, sequences[index][tree.num_shared :], tree.num_shared)
            for branch, index in enumerate(tree.indices, start=1)
        ]
        for branch, ids, position in pieces:
            parts.append(ids)
            positions.append(torch.arange(position, position + len(ids), device=device))
            owners.append(torch.full((len(ids),), number, device=device))
            branches.append(torch.full((len(ids),), branch, device=device))
            if branch:
                places.append((tree.indices[branch - 1], start, start + len(ids)))
            start += len(ids)
    inputs = {"input_ids": torch.cat(parts)[None], "position_ids": torch.cat(positions)[None]}
    # Attention of variable length goes by the position ids alone.
    if start > len(parts[0]) and _name_attention(model) in _MASKED:
        inputs["attention_mask"] = _make_mask(model, torch.cat(owners), torch.cat(branches))
    states = _run_body(model, **inputs)[0]
    for index, begin, end in places:
        yield index, states[begin:end]


def _make_mask(model: nn.Module, owners: Tensor, branches: Tensor) -> Tensor:
    """Who sees whom: a token sees those before it in its own branch, and the beginning that its tree shares.

    Args:
        model: Whose attention takes it.
        owners: [L] the tree of each token.
        branches: [L] its branch, 0 for the shared beginning.

    Returns:
        [1, 1, L, L], True (or 0.0, for attention that adds it to its logits) where a row's token sees a column's.
    """
    is_seen = (owners[:, None] == owners) & ((branches == 0) | (branches[:, None] == branches))
    is_seen = is_seen.tril()[None, None]
    if _name_attention(model) != "eager":
        return is_seen
    dtype = next(model.parameters()).dtype
    return torch.zeros(is_seen.shape, dtype=dtype, device=owners.device).masked_fill(~is_seen, torch.finfo(dtype).min)


def _run_body(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]


# ---- What a model bears ----


def choose_passes(model: nn.Module, *, is_sharded: bool = False) -> Passes:
    """Finds out which layouts a model bears, by trying them on a few tokens.

    Args:
        model: A causal language model, bare or with an adapter, all of whose weights are here.
        is_sharded: Whether it will be trained with its weights spread over processes.
    """
    language_model = unwrap_peft(model)
    if not is_at_hand(language_model):
        return Passes(is_single=is_sharded)
    attention = _name_attention(language_model)
    # A mask of ours stands for all layers, so all must look at everything before them.
    is_masked = attention in _MASKED and _looks_back_whole(language_model)
    # Flash attention, flex attention and their like; on a CPU the second is compiled anew for each length.
    is_other = attention not in _MASKED and (attention != "flex_attention" or language_model.device.type == "cuda")
    return Passes(
        is_packed=is_other and _keeps_apart(language_model, num_shared=0),
        is_sharing=is_masked and _keeps_apart(language_model, num_shared=3),
        is_single=is_sharded,
    )


def is_at_hand(language_model: nn.Module) -> bool:
    """Whether a model's weights are in this process, and not on others or nowhere yet."""
    return not any(weight.is_meta or hasattr(weight, "ds_id") for weight in language_model.parameters())


def _name_attention(language_model: nn.Module) -> str:
    return str(getattr(language_model.config, "_attn_implementation", None) or "eager")


def _looks_back_whole(language_model: Any) -> bool:
    config = language_model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


def _keeps_apart(language_model: Any, num_shared: int) -> bool:
    """Whether sequences in one row get the hidden states that they have alone."""
    vocab_size = language_model.config.get_text_config().vocab_size
    device = language_model.device
    ids = [(number * 7 + 3) % vocab_size for number in range(20)]
    sequences = [torch.tensor(part, device=device) for part in (ids[:9], [*ids[:3], *ids[12:]], ids[5:12])]
    trees = [_Tree((0,), 0, 9), _Tree((1,), 0, 11)]
    if num_shared:
        trees = [_Tree((0, 1), num_shared, 20 - num_shared)]
    trees.append(_Tree((2,), 0, 7))
    try:
        with evaluating(language_model), torch.no_grad():
            in_row = dict(_run_row(language_model, trees, sequences))
            alone = {
                index: states
                for tree in ((0, 9), (1, 11), (2, 7))
                for index, states in _run_padded(language_model, [_Tree((tree[0],), 0, tree[1])], sequences)
            }
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, KeyError) as error:
        logger.debug("sequences are run apart from each other: %s", error)
        return False
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.05
    return all(
        (states - alone[index][-len(states) :]).float().norm() <= tolerance * alone[index].float().norm()
        for index, states in in_row.items()
    )


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


def run_inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(module, *args)` inside the forward pass of what wraps the module.

    DistributedDataParallel and FSDP prepare parameters and gradients only around their own forward; this lends it
    to a computation that is not the module's forward.

    Args:
        wrapper: The wrapped module, or the module itself.
        module: The module inside.
        function: What to call.
        *args: Its further arguments.
    """
    if wrapper is module:
        return function(module, *args)
    had_own_forward = "forward" in module.__dict__
    forward = module.forward

    def restore() -> None:
        if had_own_forward:
            module.forward = forward
        else:
            module.__dict__.pop("forward", None)

    def call(*inner_args: Any) -> Any:
        restore()
        return function(module, *inner_args)

    module.forward = call
    try:
        return wrapper(*args)
    finally:
        restore()


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
