"""An exponential moving average of the trained weights: a teacher that follows the student slowly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cutlm.errors import UserError

EMA_FILE = "teacher_ema.safetensors"


class AveragedWeights:
    """The moving average of a model's trainable weights, in float32; at first the weights themselves.

    Args:
        model: The model, whole on this process.
        rate: How far the average moves to the weights in an update.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.weights: dict[str, Tensor] = {
            name: weight.detach().to(torch.float32, copy=True) for name, weight in _list_trained(model)
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights as they are now."""
        for name, weight in _list_trained(model):
            self.weights[name].lerp_(weight.detach().float(), self.rate)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        own = {name: weight.data for name, weight in _list_trained(model)}
        try:
            for name, weight in _list_trained(model):
                weight.data = self.weights[name].to(weight.dtype)
            torch.clear_autocast_cache()  # it holds the weights in lower precision
            yield
        finally:
            for name, weight in _list_trained(model):
                weight.data = own[name]
            torch.clear_autocast_cache()

    def save(self, checkpoint: str | Path) -> None:
        """Save the average with a checkpoint."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, Path(checkpoint) / EMA_FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Load the average of a checkpoint.

        Raises:
            UserError: The checkpoint has none, or that of other weights.
        """
        path = Path(checkpoint) / EMA_FILE
        found = load_file(path) if path.is_file() else {}
        shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (found, self.weights)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{checkpoint}: expected {EMA_FILE} with the average of the trained weights (teacher: ema), found none"
                " that fits; resume from another checkpoint, or start over with --overwrite_output_dir"
            )
        for name, weight in found.items():
            self.weights[name].copy_(weight)


def _list_trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
