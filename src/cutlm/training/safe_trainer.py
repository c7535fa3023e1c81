"""What every training here has over `transformers.Trainer`: it stops cleanly, and what it saves is whole.

Shared by CUT's trainer and TRL's for pairs. How a checkpoint gets to its place is `cutlm.training.checkpoints`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from cutlm.errors import NonFiniteError
from cutlm.training.checkpoints import publish_checkpoint, publish_files, staged

logger = logging.getLogger(__name__)

_CARD = """# An adapter trained by cutlm

What it was trained with stands in `cutlm_train.yaml`, where `cutlm train` made it. To fold it into its base model:

    cutlm merge --adapter FOLDER --out MODEL
"""


class SafeTrainer(Trainer):
    """A `Trainer` that stops before a bad optimizer step, saves when asked to stop, and saves all or nothing."""

    _stop_requested = _is_stopping = False
    _staging: str | None = None

    def request_stop(self) -> None:
        """Asks training to save a checkpoint and stop at the end of the next optimizer step, on all ranks."""
        self._stop_requested = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate; says so where it never comes to its peak."""
        num_warmup = self.args.get_warmup_steps(num_training_steps)
        is_endless = num_warmup >= num_training_steps and self.args.lr_scheduler_type != "constant"
        if is_endless and self.is_world_process_zero():
            logger.warning(
                "warmup_steps: %d of the %d steps warm up, so the learning rate never comes to %g; give fewer, or a"
                " share such as 0.1",
                min(num_warmup, num_training_steps),
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetches the micro-batches of an optimizer step, and whether any rank was asked to stop."""
        fetched = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._is_stopping = self._stop_requested
        if self.args.world_size > 1:
            # All of them save at the same step.
            flag = torch.tensor(float(self._stop_requested), device=device)
            self._is_stopping = self.accelerator.reduce(flag, "sum").item() > 0
        return fetched

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none when resumed from the last step, where the Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, the last thing computed before the optimizer step: here a bad one is caught."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite(grad_norm)
        if self._is_stopping:
            self.control.should_save = True
            self.control.should_training_stop = True
        return grad_norm

    def _check_finite(self, grad_norm: Any) -> None:
        """Stops before the optimizer step when the gradient norm is no number.

        Raises:
            NonFiniteError: As said.
        """
        norm = torch.as_tensor(grad_norm, dtype=torch.float32).cpu()
        # Under float16 an infinite norm is how the gradient scaler finds its scale; it skips the step itself.
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient norm is {norm.item()}. Stopped before the optimizer"
                " step, the weights are those of the last one; lower the learning rate"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint beside its place, and moves it there when it is whole and on the disk."""
        run_dir = super()._get_output_dir(trial)
        with staged(run_dir, self.args.should_save, self.accelerator.wait_for_everyone) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_checkpoint(staging, run_dir, self.state, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, the adapter or whole, so that a kill leaves the files that were there or the new ones."""
        if _internal_call:  # inside a checkpoint, which is moved as a whole
            super().save_model(output_dir, _internal_call)
            return
        target = output_dir or self.args.output_dir
        assert target is not None
        with staged(target, self.args.should_save, self.accelerator.wait_for_everyone) as staging:
            super().save_model(staging, _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_files(staging, target)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if self.args.should_save and folder:
            # A pickle that nothing of ours reads; the command line saves its settings as YAML.
            (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            _fill_card(Path(folder) / "README.md")


def _fill_card(path: Path) -> None:
    """Puts a few true lines in the place of the form that PEFT leaves beside an adapter, and keeps its header."""
    if not path.is_file() or "[More Information Needed]" not in (text := path.read_text("utf-8")):
        return
    header = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
    path.write_text(f"---\n{header}---\n\n{_CARD}", "utf-8")
