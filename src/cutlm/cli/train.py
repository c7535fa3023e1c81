"""Align a model with judged records: by Contrastive Unlikelihood Training, or by a method to compare it with.

Settings come from a flat YAML file (--config) and from options, which take precedence:

  data              a file of judged records                  model_name_or_path  a folder, or a name on the hub
  eval_data         records to evaluate on                    output_dir          where the adapter or model goes
  eval_split        share of data to evaluate on instead      use_peft            LoRA (default); false: all weights
  overwrite_output_dir  start anew in a folder that is not empty, checkpoints in it removed
  objective         cut (default), dual_cut, likelihood, hindsight, forward_prediction, ilf_mle, unlikelihood; by TRL:
                    dpo (several responses an instruction), ilf_dpo (i_ans over output)
  detector          which model finds the inappropriate tokens: current (default; the paper's), frozen (the model before
                    training, once; also for a file of cutlm blame), spans (the records' wrong_spans), off (all tokens)
  use_contrast_loss, use_satisfactory_loss, use_judged_loss  parts of CUT's loss (eq. 6, eq. 7): false leaves one out
  satisfactory_only of objective likelihood                   praise_weight       of objective dual_cut
  map_spans         token scores of another tokenizer         dpo_beta            of dpo and ilf_dpo
  threshold         lambda of eq. 5           (default 1.1)   lora_r, lora_alpha  16, 16
  unlikelihood_weight  alpha of eq. 6         (default 1)     lora_dropout        0.05
  gamma             dynamic weight of eq. 6   (default 1)     lora_target_modules gate_proj down_proj up_proj
  normalization     token (default) or record                 load_in_4bit, load_in_8bit   quantized base model
  template          alpaca (default) or chat                  dtype               of the base model's weights
  max_length        of prompt and response    (default 2048)  attn_implementation as of transformers
  downsample        most satisfactory records per unsatisfactory one  (default: all are kept)
  head_chunk_size   positions whose logits are held at a time
  max_tokens_per_batch  most tokens that go forward and backward at a time (default: by the device)
  lora_target_modules all-linear  adapts every linear layer, for models without modules of the default names

and every field of transformers.TrainingArguments: per_device_train_batch_size, gradient_accumulation_steps,
num_train_epochs, max_steps, learning_rate (default 4e-4), lr_scheduler_type (default cosine), warmup_steps, bf16,
activation_checkpointing, eval_strategy, eval_steps, save_steps, save_total_limit, logging_steps, report_to, seed, ...

Each is explained in docs/settings.md.

  cutlm train --config recipes/shepherd-13b.yaml --output_dir runs/shepherd
  cutlm train --config my.yaml --resume_from_checkpoint last
  torchrun --nproc_per_node 8 -m cutlm train --config my.yaml
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.errors import ConfigError

if TYPE_CHECKING:
    from cutlm.training.safe_trainer import SafeTrainer
    from cutlm.training.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")


def run(args: argparse.Namespace) -> int:
    from cutlm.training.config import CUTConfig
    from cutlm.training.settings import DataArguments, ModelArguments, read_settings

    settings = read_settings((DataArguments, ModelArguments, CUTConfig), args.config, args.rest)
    if args.dry_run:
        print(settings.to_yaml(), end="")
        return 0
    data_args, _, config = settings.parts
    if (data_args.eval_data or data_args.eval_split) and config.eval_strategy == "no" and not config.eval_on_start:
        raise ConfigError(
            "eval_data, eval_split: nothing would be evaluated, as eval_strategy is no; give --eval_strategy epoch (or"
            " steps), or leave them out"
        )
    return train(settings, ["--config", args.config, *args.rest] if args.config else args.rest)


def train(
    settings: "Settings",
    options: list[str],
    command: str = "train",
    prepare: Callable[[list[Any]], list[Any]] = list,
) -> int:
    """Trains, saves, and says how to go on.

    Args:
        settings: Data, model and training settings.
        options: As given on the command line, for the message after an interruption.
        command: As given on the command line, for messages.
        prepare: What is made of the rows of the data before anything is learned from them; nothing by default.
    """
    from cutlm.model.loading import count_parameters
    from cutlm.training.checkpoints import check_output_dir, clear_output_dir, find_checkpoint
    from cutlm.training.resuming import compare_settings, describe_run, save_settings
    from cutlm.training.run import build_trainer

    data_args, model_args, config = settings.parts
    is_main = int(os.environ.get("RANK", "0")) == 0
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.output_dir, str(config.resume_from_checkpoint))
    is_own = checkpoint is not None and Path(checkpoint).parent.resolve() == Path(config.output_dir).resolve()
    if is_main and not is_own:
        check_output_dir(config.output_dir, data_args.overwrite_output_dir)
    run_facts = describe_run(data_args.data) if is_main else {}
    if is_main and checkpoint is not None:
        compare_settings(settings, run_facts, Path(checkpoint).parent)
    with _log_to_stdout():
        trainer = build_trainer(data_args, model_args, config, prepare)
    if not len(trainer.get_train_dataloader()):
        raise ConfigError("dataloader_drop_last: the records fill no batch; give a smaller per_device_train_batch_size")
    if is_main:
        if not is_own:
            clear_output_dir(config.output_dir)  # not before everything that can be wrong has been looked at
        counts = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        print(f"training {counts['trained']:,} of {counts['all']:,} parameters; output in {config.output_dir}")
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
        save_settings(settings, run_facts, Path(config.output_dir))
        sys.stdout.flush()
    with _stop_on_signals(trainer, is_main) as signals, _log_to_stdout():
        trainer.train(resume_from_checkpoint=checkpoint)
    if signals and trainer.state.global_step < trainer.state.max_steps:
        if is_main:
            program = "cutlm" if config.world_size == 1 else f"torchrun --nproc_per_node {config.world_size} -m cutlm"
            print(
                f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; saved"
                f" {config.output_dir}/checkpoint-{trainer.state.global_step}. Go on with:\n"
                f"  {program} {command} {shlex.join(_without_resume(options))} --resume_from_checkpoint last",
                flush=True,
            )
        return 128 + signals[0]
    if not trainer.state.global_step:
        raise ConfigError("num_train_epochs, max_steps: expected at least one step, got none; nothing was saved")
    trainer.save_model()
    trainer.save_state()
    if is_main:
        out = shlex.quote(config.output_dir)
        what = "adapter" if model_args.use_peft else "model"
        then = f"cutlm merge --adapter {out} --out {out}-merged"
        if command == "train-judge":
            then = f"cutlm judge --responses FILE --judge local --judge_model {out} --out FILE"
        elif not model_args.use_peft:
            then = f"cutlm generate --model {out} --prompts FILE --out FILE"
        print(f"Trained {trainer.state.global_step} steps; the {what} is in {config.output_dir}. Next:\n  {then}")
    return 0


@contextmanager
def _log_to_stdout() -> Iterator[None]:
    """Lets what the trainer logs of the data stand among the rest of the output."""
    logger, handler = logging.getLogger("cutlm"), logging.StreamHandler(sys.stdout)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextmanager
def _stop_on_signals(trainer: "SafeTrainer", is_main: bool) -> Iterator[list[int]]:
    """Lets Ctrl-C and SIGTERM save first: lends a list that will hold the signal that came."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.request_stop()
        if is_main:
            print("\nStopping: this step is finished and saved first (once more to stop at once)", flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_resume(options: list[str]) -> list[str]:
    """The options less those that say how to start."""
    kept: list[str] = []
    is_kept = True
    for option in options:
        if option.startswith("--"):
            is_kept = option.partition("=")[0] not in ("--overwrite_output_dir", "--resume_from_checkpoint")
        if is_kept:
            kept.append(option)
    return kept
