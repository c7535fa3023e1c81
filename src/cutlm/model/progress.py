"""Progress bars that count tokens and move within a long forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from cutlm.model.loading import find_layers


def make_token_bar(label: str, num_tokens: int, *, num_done: int = 0, is_shown: bool = True) -> "tqdm[Any]":
    """Make a bar over tokens, which shows tokens per second and the time left."""
    options: Any = {} if is_shown else {"disable": True}  # an explicit False would override TQDM_DISABLE
    # With a fixed `miniters`, tqdm redraws by time alone; otherwise it would wait for as many tokens as before.
    return tqdm(total=num_tokens, initial=num_done, desc=label, unit=" tokens", unit_scale=True, miniters=1, **options)


@contextmanager
def advance_by_layers(bar: "tqdm[Any]", model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Advance a bar by `num_tokens` in all, a little after each layer of the forward passes inside.

    On a CPU, one pass of a large model takes minutes.
    """
    layers = [] if bar.disable else find_layers(model)
    left: float = num_tokens

    def advance(layer: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal left
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor):
            # Padding counts as well, so the tokens may run out early.
            step = min(left, states.shape[:-1].numel() / len(layers))
            left -= step
            bar.update(step)

    hooks = [layer.register_forward_hook(advance) for layer in layers]
    try:
        yield
        bar.update(left)
    finally:
        for hook in hooks:
            hook.remove()
