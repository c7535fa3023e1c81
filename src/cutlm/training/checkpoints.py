"""Stopping, saving and resuming: a folder named `checkpoint-N` is always complete.

A checkpoint is written to a hidden folder, synced and renamed, so a kill at any moment leaves the previous one intact.
`CheckpointingTrainer` is the base of both trainers; the functions below it check an output folder before a run starts
and compare a resumed run with the one that it continues.
"""

import dataclasses
import json
import logging
import os
import shlex
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerState
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from cutlm.data.files import open_atomic, sync_directory, sync_tree
from cutlm.data.sources import describe_sources
from cutlm.errors import ConfigError, NonFiniteError, UserError
from cutlm.flagging.report import name_report_file
from cutlm.model.card import describe_base, write_card
from cutlm.model.forward import run_inside
from cutlm.model.generation_config import stopping_at
from cutlm.model.loading import check_saved_tokenizer, unwrap_peft
from cutlm.model.saving import (
    PROBE_FILE,
    choose_probe_ids,
    compute_logits,
    convert_to_plain_lora,
    make_probe,
    repair_generation_config,
    write_probe,
)
from cutlm.training.config import Settings
from cutlm.training.facts import describe_progress, hash_rows

logger = logging.getLogger(__name__)

# What transformers, PEFT and tokenizers raise for what they cannot save. Errors of the disk are reported as such.
_SAVING_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, LookupError, StrictDataclassError)

# Token scores of the frozen detector, and what they depend on with their SHA-256.
SCORES_FILE = "token_scores.jsonl"
SCORES_HEADER_FILE = "token_scores.json"
SETTINGS_FILE = "cutlm_train.yaml"
RUN_FILE = "cutlm_run.json"
_STAGING = ".saving"
_REPLACED = ".replaced"
# The files of a complete checkpoint; DeepSpeed keeps most of them in a separate folder.
_PARTS = {
    "weights": ("*model*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer state": ("optimizer*", "global_step*"),
    "scheduler state": (SCHEDULER_NAME, "global_step*"),
    "random state": ("rng_state*.pth",),
    "trainer state": (TRAINER_STATE_NAME,),
}
# Tools recognize a model folder by these files; they are moved last.
_MARKERS = ("config.json", "adapter_config.json")
# If one of these changed, a resumed run would skip records, see others, or not fit its checkpoint.
_SETTINGS_OF_A_RUN = (
    *("data_seed", "dataloader_drop_last", "detector", "downsample", "drop_ineffective", "eval_split"),
    "gradient_accumulation_steps",
    *("load_in_4bit", "load_in_8bit", "lora_alpha", "lora_modules_to_save", "lora_r", "lora_target_modules"),
    *("max_length", "objective", "optim", "per_device_train_batch_size", "satisfactory_only", "seed", "template"),
    *("chat_template_kwargs", "judgment_role"),
    *("train_sampling_strategy", "use_contrast_loss", "use_dora", "use_peft", "use_rslora", "use_satisfactory_loss"),
    "use_judged_loss",
)
# Files that are not pushed to the hub: checkpoints, hidden files, and the records in token scores.
_NOT_PUSHED = [f"{PREFIX_CHECKPOINT_DIR}-*", ".*", f"{SCORES_FILE}*", SCORES_HEADER_FILE, RUN_FILE, SETTINGS_FILE]
# Errors of huggingface_hub without a network, in offline mode, without a key, or for a name that it refuses.
_HUB_ERRORS = (OSError, HTTPError, HFValidationError)

# The private methods of transformers' and TRL's trainers that cutlm's trainers override, with the start of the SHA-256
# of their source in the versions that the overrides were checked against: transformers 5.23.0, trl 1.16.0. If
# `tests/training/test_checkpoints.py` reports a change, read the new source, adapt the override and update the hash.
TRAINER_OVERRIDES = {
    "DPOTrainer._prepare_dataset": "35e349e8e826",
    "DPOTrainer._save_checkpoint": "b6ee0a370c26",
    "Trainer._determine_best_metric": "7aa77355a0c3",
    "Trainer._finalize_training": "6d6d83d6a271",
    "Trainer._get_grad_norm": "913ba6f52f07",
    "Trainer._get_output_dir": "97172085342a",
    "Trainer._get_train_sampler": "1580d7493244",
    "Trainer._push_from_checkpoint": "2523da925347",
    "Trainer._run_epoch": "31aff00f34c3",
    "Trainer._save": "b136889e8792",
    "Trainer._save_checkpoint": "a9111e30faa9",
}


class CheckpointingTrainer(Trainer):
    """A `Trainer` that stops before a bad optimizer step, saves when asked to stop, and saves atomically."""

    # The first weights of an adapter that were subtracted from its base model.
    initial_adapter: Mapping[str, Tensor] | None = None
    template_date: str | None = None  # the date in the prompts, if they have one
    facts: Mapping[str, Any] = {}  # facts of the model card about the run, besides its progress
    _base: Mapping[str, Any] | None = None  # facts of the card about the base model
    _stop_requested = _is_stopping = _has_tried_saving = False
    _staging: str | None = None
    _num_done = _num_in_step = 0  # tokens of the optimizer step
    _step_start = _last_shown = 0.0

    def __init__(self, *, model: Any, end_of_turn_id: int | None = None, **kwargs: Any) -> None:
        self._end_of_turn_id = end_of_turn_id
        # The Trainer turns off the cache in the model's configuration, with which the model is saved. No forward pass
        # of training reads that setting.
        config = unwrap_peft(model).config
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model=model, **kwargs)
        config.use_cache = use_cache

    def request_stop(self) -> None:
        """Ask training to save a checkpoint and stop after the next optimizer step, on all ranks."""
        self._stop_requested = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning rate schedule; warn if it ends during the warmup."""
        num_warmup = self.args.get_warmup_steps(num_training_steps)
        is_endless = num_warmup >= num_training_steps and self.args.lr_scheduler_type != "constant"
        if is_endless and self.is_world_process_zero():
            logger.warning(
                "warmup_steps: all %d steps are warmup, so the learning rate never reaches %g; set fewer, or a share"
                " such as 0.1",
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of an optimizer step, and whether any rank was asked to stop."""
        fetched = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_done, self._num_in_step = 0, sum(batch["input_ids"].numel() for batch in fetched[0])
        self._step_start = time.monotonic()
        self._is_stopping = self._stop_requested
        if self.args.world_size > 1:
            # All ranks save at the same step.
            flag = torch.tensor(float(self._stop_requested), device=device)
            self._is_stopping = self.accelerator.reduce(flag, "sum").item() > 0
        return fetched

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward over a micro-batch, then show the progress of the step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._num_done += inputs["input_ids"].numel()
        rate = self._num_done / max(1e-6, time.monotonic() - self._step_start)
        self.show_progress(f"{self._num_done:,} of {self._num_in_step:,} tokens of the step, {rate:,.0f} tokens/s")
        return loss

    def show_progress(self, text: str) -> None:
        """Write behind the current progress bar, at most once a second, because steps and batches may take long."""
        now = time.monotonic()
        if now < self._last_shown + 1:
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                bar = callback.training_bar if callback.prediction_bar is None else callback.prediction_bar
                if bar is not None:
                    bar.set_postfix_str(text)
                    self._last_shown = now

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run one epoch, or none if resumed after the last step, where the Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # accelerate and transformers do not reach the sampler behind the batches that a resumed epoch skips on several
        # processes, which would take the order of the first epoch.
        sampler: Any = kwargs["train_dataloader"].batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if hasattr(sampler.sampler, "set_epoch"):
            sampler.sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, which is the last value computed before the optimizer step: check it here."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite(torch.as_tensor(grad_norm, dtype=torch.float32).item())
        if self._is_stopping:
            self.control.should_save = True
            self.control.should_training_stop = True
        return grad_norm

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to save after an evaluation under `save_strategy: best`: also if asked to stop."""
        is_best = super()._determine_best_metric(*args, **kwargs)
        return is_best or self._is_stopping

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training; if asked to stop, keep the checkpoint to resume from next to the best one."""
        limit = self.args.save_total_limit
        if self._is_stopping and limit is not None:
            self.args.save_total_limit = limit + 1
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _check_finite(self, grad_norm: float) -> None:
        """Fail before the optimizer step if the gradient norm is not finite."""
        # Under float16 an infinite norm is how the gradient scaler finds its scale; it skips the step itself.
        if self.accelerator.scaler is None and not torch.isfinite(torch.tensor(grad_norm)):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient norm is {grad_norm}. Stopped before the optimizer"
                " step; the weights are those of the last step. Lower the learning rate"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to the staging folder and rename it once it is complete and synced."""
        run_dir = super()._get_output_dir(trial)
        with _staged(run_dir, self.args.should_save, self.accelerator.wait_for_everyone) as staging:
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, push: bool = True) -> None:
        """Save the adapter or model so that a kill leaves either the previous files or the new ones.

        Args:
            output_dir: The folder; None for that of the settings.
            push: Push it, if the settings have `push_to_hub`.
        """
        if _internal_call:  # part of a checkpoint, which is renamed as a whole
            super().save_model(output_dir, _internal_call)
            self._save_probe(str(output_dir))
            return
        target = output_dir or self.args.output_dir
        assert target is not None
        with _staged(target, self.args.should_save, self.accelerator.wait_for_everyone) as staging:
            super().save_model(staging, _internal_call=True)
            self._save_probe(staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.initial_adapter:
                    convert_to_plain_lora(staging, self.initial_adapter)
                publish_files(staging, target)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and push:
            self.push_saved("Model save")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository to push to, before training.

        Raises:
            UserError: The hub cannot be reached, or refuses it.
        """
        try:
            super().init_hf_repo(token, private)
        except _HUB_ERRORS as error:
            raise UserError(
                f"push_to_hub: the repository cannot be created on the hub ({_first_line(error)}); check the network,"
                f" hub_model_id and your login (hf auth login), or leave out push_to_hub and upload"
                f" {self.args.output_dir} later"
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter or model and push it, without its checkpoints and training data.

        Args:
            commit_message: The message of the commit.
            blocking: Must be true.
            token: A key of the hub; None for that of the settings, or of the login.
            revision: The branch to push to; None for that of the settings.
            private: Whether a new repository is private.
            **kwargs: Not used; the model card is cutlm's own.

        Returns:
            The `CommitInfo`; None on other processes than the first.

        Raises:
            UserError: The hub cannot be reached, or refuses it; the saved files stay.
        """
        if not blocking:
            raise ConfigError("push_to_hub: expected blocking=True, got False; push in a thread of yours")
        self.save_model(push=False)
        return self.push_saved(commit_message, token, revision, private)

    def push_saved(
        self,
        commit_message: str | None = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """Push what `save_model` has saved; see `push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        folder, name = str(self.args.output_dir), str(self.hub_model_id)
        try:
            return HfApi().upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                ignore_patterns=_NOT_PUSHED,
            )
        except _HUB_ERRORS as error:
            raise UserError(
                f"push_to_hub: {folder} is saved, but was not pushed ({_first_line(error)}); push it later with:"
                f" hf upload {shlex.quote(name)} {shlex.quote(folder)} ."
                f" --exclude '{PREFIX_CHECKPOINT_DIR}-*' '{SCORES_FILE}*'"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: checkpoints would be copied into the output folder without protection from a kill."""

    def try_saving(self) -> None:
        """Save everything but the weights of a full model to a temporary folder, so that errors come before training.

        Raises:
            UserError: Something cannot be saved, or the disk is too full.
        """
        if self._has_tried_saving:
            return
        self._has_tried_saving = True
        model: Any = self.accelerator.unwrap_model(self.model)
        is_adapter = hasattr(model, "peft_config")
        for name in repair_generation_config(unwrap_peft(model)):
            logger.warning("generation_config: %s is not valid, and left out of the saved model", name)
        with _staged(str(self.args.output_dir), self.args.should_save, self.accelerator.wait_for_everyone) as staging:
            # Other processes save with this one only if the model is sharded, where weights have to be gathered.
            if not self.args.should_save or not isinstance(model, PreTrainedModel | PeftModel):
                return
            num_bytes = sum(
                w.numel() * w.element_size() for w in model.parameters() if w.requires_grad or not is_adapter
            )
            if num_bytes > (free := shutil.disk_usage(staging).free):
                raise UserError(
                    f"output_dir: {self.args.output_dir} has {free / 1e6:,.1f} MB free, expected at least"
                    f" {num_bytes / 1e6:,.1f} MB for the weights; free disk space, or name another folder"
                )
            try:
                if self.is_deepspeed_enabled:
                    pass  # its parameters may be spread over processes
                elif isinstance(model, PeftModel):
                    model.save_pretrained(staging)
                else:
                    remove_tied_weights_from_state_dict(model.state_dict(), model)  # raises if others are shared
                    model.save_pretrained(staging, state_dict={})
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(staging)
                    if isinstance(self.processing_class, PreTrainedTokenizerBase):
                        check_saved_tokenizer(self.processing_class, staging)
            except _SAVING_ERRORS as error:
                text = " ".join(str(error).split())
                raise UserError(
                    f"the trained model could not be saved ({type(error).__name__}: {text}); nothing was trained."
                    " Correct the files of the base model"
                ) from error

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, after trying whether the model can be saved."""
        self.try_saving()
        return super().train(*args, **kwargs)

    def _save_probe(self, folder: str) -> None:
        """Save log-probabilities of the trained model next to an adapter, for the check of `cutlm merge`."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            return
        ids = choose_probe_ids(unwrap_peft(model))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                # The model inside, without the autocast of mixed precision around it.
                logits = run_inside(self.model_wrapped, model, lambda module: compute_logits(unwrap_peft(module), ids))
        finally:
            model.train(was_training)
        if self.args.should_save:
            write_probe(folder, make_probe(unwrap_peft(model), logits, ids))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        language_model = unwrap_peft(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        with stopping_at(language_model, self._end_of_turn_id):
            super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if self.args.should_save and folder:
            # A pickle that nothing reads; the command line saves its settings as YAML.
            (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self._write_card(folder, language_model)

    def _write_card(self, folder: str, language_model: PreTrainedModel) -> None:
        """Write the model card, in place of the empty form that PEFT writes next to an adapter."""
        if self._base is None:
            self._base = describe_base(getattr(language_model, "name_or_path", ""))
        data = self.facts.get("data", {})
        if "sha256" not in data and isinstance(self.train_dataset, Dataset):
            self.facts = {**self.facts, "data": data | {"sha256": hash_rows(self.train_dataset)}}
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name
        # A checkpoint has the weights of the last step; after training, those of the best one may be loaded.
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end and not self._staging else None
        best_step = int(best.rpartition("-")[2]) if best else None
        write_card(folder, {"base": self._base, **describe_progress(self.state, best_step), **self.facts}, name)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- Writing ----


@contextmanager
def _staged(run_dir: str, is_writer: bool, wait_for_everyone: Callable[[], None]) -> Iterator[str]:
    """Create an empty hidden folder inside a run's folder on one rank, and remove it at the end."""
    staging = os.path.join(run_dir, _STAGING)
    if is_writer:
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(staging)
    wait_for_everyone()
    try:
        yield staging
    finally:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)


def publish_checkpoint(staging: str, run_dir: str, state: TrainerState, save_total_limit: int | None) -> None:
    """Move a complete checkpoint out of the staging folder, then remove those over the limit."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    source, target = os.path.join(staging, name), os.path.join(run_dir, name)
    if state.best_global_step:
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best == target or os.path.isdir(best):  # the Trainer has just recorded the name of the staging folder
            state.best_model_checkpoint = best
        elif not os.path.isdir(state.best_model_checkpoint or ""):  # else an earlier one is the best of those saved
            state.best_model_checkpoint = None
        state.save_to_json(os.path.join(source, TRAINER_STATE_NAME))
    sync_tree(source)
    if os.path.isdir(target):
        os.rename(target, os.path.join(staging, _REPLACED))
    os.rename(source, target)
    sync_directory(run_dir)
    rotate_checkpoints(run_dir, save_total_limit, state.best_model_checkpoint)


def publish_files(staging: str, target: str) -> None:
    """Move every file of a saved model out of the staging folder, its config last."""
    sync_tree(staging)
    for name in sorted(os.listdir(staging), key=lambda name: (name in _MARKERS, name)):
        source = os.path.join(staging, name)
        if os.path.isdir(source):
            shutil.copytree(source, os.path.join(target, name), dirs_exist_ok=True)
        else:
            os.replace(source, os.path.join(target, name))
    sync_directory(target)


# ---- Resuming ----


def find_checkpoint(output_dir: str, wanted: str) -> str:
    """Find a complete checkpoint to resume from: the newest of the run ("last" or "true"), or the one of this path."""
    if wanted.lower() in ("last", "true"):
        found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if found is None:
            raise UserError(f"{output_dir}: no checkpoint to resume from; remove --resume_from_checkpoint to start")
        wanted = found
    elif not os.path.exists(os.path.join(wanted, TRAINER_STATE_NAME)):
        raise UserError(
            f"{wanted}: expected a checkpoint folder with {TRAINER_STATE_NAME}, found none; name one, or 'last'"
        )
    folder = Path(wanted)
    absent = [part for part, names in _PARTS.items() if not any(any(folder.glob(name)) for name in names)]
    if absent:
        raise UserError(
            f"{folder}: expected a complete checkpoint, found no {', no '.join(absent)} (save_only_model saves none);"
            " resume from another, or start over with --overwrite_output_dir"
        )
    damaged = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not _is_readable(path)]
    if damaged:
        raise UserError(f"{folder}: {', '.join(damaged)} cannot be read; restore it, or resume from another checkpoint")
    return wanted


def _is_readable(path: Path) -> bool:
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    try:
        if path.name == TRAINER_STATE_NAME:
            return "global_step" in json.loads(path.read_text("utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (ValueError, TypeError, SafetensorError):
        return False
    return True


def check_output_dir(output_dir: str, overwrite: bool) -> None:
    """Refuse a folder with files of another run, unless they may be overwritten."""
    folder = Path(output_dir)
    if folder.is_file():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    reusable = (SCORES_FILE, SCORES_HEADER_FILE, f"{SCORES_FILE}.partial", name_report_file(SCORES_FILE).name)
    if overwrite or not folder.is_dir() or all(path.name in reusable for path in folder.iterdir()):
        return
    last = get_last_checkpoint(output_dir)
    found = f"holds {os.path.basename(last)}" if last else "is not empty"
    raise UserError(
        f"output_dir: {output_dir} {found}; resume with --resume_from_checkpoint last, start over with"
        " --overwrite_output_dir, or name another folder"
    )


def clear_output_dir(output_dir: str) -> None:
    """Remove the checkpoints and the model of an earlier run, and nothing else."""
    # An old checkpoint would be newer than the first ones of this run, and an old model would be taken for its result.
    folder = Path(output_dir)
    for name in (
        *_MARKERS,
        PROBE_FILE,
        "adapter_model.safetensors",
        "model.safetensors.index.json",
        TRAINER_STATE_NAME,
    ):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    for path in [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / _STAGING]:
        shutil.rmtree(path, ignore_errors=True)


def compare_settings(settings: Settings, run_facts: Mapping[str, Any], folder: Path) -> None:
    """Compare a resumed run with the one that it continues, in `folder`; print the settings that may differ.

    Raises:
        ConfigError: A setting differs that decides the order of the records, or which weights are trained.
    """
    path, run_path = folder / SETTINGS_FILE, folder / RUN_FILE
    if not path.is_file():
        print(f"{folder}: no {SETTINGS_FILE}, so the settings cannot be compared with the earlier run's")
        return
    try:
        before = dict(yaml.safe_load(path.read_text("utf-8")))
        run = read_run_facts(folder)
    except (ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{path}, {run_path.name}: damaged, so the run cannot be resumed; restore them") from None
    # A setting that an earlier version did not have has its default.
    fields = [item for part in settings.parts for item in dataclasses.fields(part) if item.name in settings.resolved]
    before = {item.name: item.default for item in fields if item.default is not dataclasses.MISSING} | before
    pairs = {name: (before.get(name), settings.resolved.get(name)) for name in before | settings.resolved}
    changed = {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}
    fixed = _SETTINGS_OF_A_RUN if "data_sha256" in run else ("data", *_SETTINGS_OF_A_RUN)
    problems = [
        f"{name}: the run to resume has {old!r}, got {new!r}; use the same, or start over"
        for name, (old, new) in changed.items()
        if name in fixed
    ]
    if run.get("data_sha256", run_facts["data_sha256"]) != run_facts["data_sha256"]:
        problems.append(
            f"data: {describe_sources(settings.parts[0].data)} has changed since the run began; restore it, or start"
            " over"
        )
    if run.get("num_processes", run_facts["num_processes"]) != run_facts["num_processes"]:
        problems.append(
            f"the run to resume has {run['num_processes']} processes, got {run_facts['num_processes']}; use as many, or"
            " start over with --overwrite_output_dir"
        )
    if problems:
        raise ConfigError(problems)
    for name, (old, new) in changed.items():
        if name not in ("resume_from_checkpoint", "overwrite_output_dir"):
            print(f"{name} was {old!r} before this resume, and is {new!r} now")


def read_run_facts(folder: Path) -> dict[str, Any]:
    """Read what `save_settings` wrote about a run besides its settings; empty without a file."""
    path = folder / RUN_FILE
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def is_taught(folder: str | Path) -> bool:
    """Whether a folder holds an adapter that was trained to read judgments, by the objective hindsight."""
    return read_run_facts(Path(folder)).get("objective") == "hindsight"


def save_settings(settings: Settings, run_facts: Mapping[str, Any], folder: Path) -> None:
    """Write the resolved settings to the output folder, and the facts that a resumed run must match."""
    with open_atomic(folder / SETTINGS_FILE) as file:
        file.write(settings.to_yaml().encode("utf-8"))
    with open_atomic(folder / RUN_FILE) as file:
        file.write(json.dumps(dict(run_facts)).encode("utf-8"))
