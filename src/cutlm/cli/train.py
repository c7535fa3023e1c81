"""Align a model with judged records: by Contrastive Unlikelihood Training, or by a method to compare it with.

Settings come from a flat YAML file (--config) and from options, which take precedence:

  data              file of records or token scores       model_name_or_path  a folder, or a name on the hub
  eval_data         file to evaluate on                   output_dir          where the adapter or model is saved
  eval_split        share of data to evaluate on instead  use_peft            LoRA (default); false: all weights
  overwrite_output_dir  start over in a folder that is not empty; its checkpoints are removed
  objective         cut (default), dual_cut, likelihood, hindsight, forward_prediction, ilf_mle, unlikelihood,
                    self_distillation, redirect (docs/objectives.md); with TRL:
                    dpo (several responses per instruction), ilf_dpo (i_ans over output)
  detector          how CUT flags tokens: current (default; the paper's), frozen (by the model before training, once;
                    also for a file of cutlm blame), spans (the records' wrong_spans), off (all tokens)
  use_contrast_loss, use_satisfactory_loss, use_judged_loss  parts of CUT's loss (eq. 6, eq. 7)
  satisfactory_only of objective likelihood               praise_weight       of objective dual_cut
  map_spans         token scores of another tokenizer     dpo_beta            of dpo and ilf_dpo
  threshold         lambda of eq. 5       (default 1.1)   lora_r, lora_alpha  16, 16
  unlikelihood_weight  alpha of eq. 6     (default 1)     lora_dropout        0.05
  gamma             dynamic weight, eq. 6 (default 1)     lora_target_modules gate_proj down_proj up_proj
  normalization     token (default) or record             load_in_4bit, load_in_8bit   quantized base model
  template          alpaca (default) or chat              dtype               of the base model's weights
  max_length        prompt and response (default 2048)    attn_implementation as in transformers
  downsample        maximum satisfactory records per unsatisfactory one (default: keep all)
  dataset_num_proc  processes that encode the data    head_chunk_size     positions whose logits are in memory
  max_tokens_per_batch  maximum tokens in one forward and backward pass (default: by the device)
  lora_target_modules all-linear  adapts every linear layer

and every field of transformers.TrainingArguments: per_device_train_batch_size, gradient_accumulation_steps,
num_train_epochs, max_steps, learning_rate (default 4e-4), lr_scheduler_type (default cosine), warmup_steps, bf16,
activation_checkpointing, eval_strategy, eval_steps, save_steps, save_total_limit, logging_steps, report_to, seed, ...

docs/settings.md explains each.

  cutlm train --config recipes/shepherd-13b.yaml --output_dir runs/shepherd
  cutlm train --config my.yaml --resume_from_checkpoint last
  torchrun --nproc_per_node 8 -m cutlm train --config my.yaml
"""

import argparse
from typing import TYPE_CHECKING

from cutlm.cli import importing_libraries
from cutlm.errors import ConfigError

if TYPE_CHECKING:
    from cutlm.training.config import Settings
    from cutlm.training.run import Prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings, and the data as cutlm preview"
    )


def print_dry_run(settings: "Settings", prepare: "Prepare | None" = None) -> int:
    """Print the settings and, as comments, a preview of the data; files that do not exist are only named."""
    from cutlm.data.sources import find_missing
    from cutlm.training.preview import preview_run
    from cutlm.training.run import keep_rows

    print(settings.to_yaml(), end="")
    data_args = settings.parts[0]
    missing = find_missing([*data_args.data, *(data_args.eval_data or [])])
    for line in [f"{source}: no such file, so the data were not looked at" for source in missing] or preview_run(
        settings, prepare or keep_rows
    ):
        print(f"# {line}".rstrip())
    return 0


def run(args: argparse.Namespace) -> int:
    with importing_libraries():
        from cutlm.training.config import CUTConfig, DataArguments, ModelArguments, read_settings
        from cutlm.training.run import train

    settings = read_settings((DataArguments, ModelArguments, CUTConfig), args.config, args.rest)
    if args.dry_run:
        return print_dry_run(settings)
    data_args, _, config = settings.parts
    if (data_args.eval_data or data_args.eval_split) and config.eval_strategy == "no" and not config.eval_on_start:
        raise ConfigError(
            "eval_data, eval_split: nothing would be evaluated, as eval_strategy is no; set --eval_strategy epoch (or"
            " steps), or remove them"
        )

    return train(settings, ["--config", args.config, *args.rest] if args.config else args.rest)
