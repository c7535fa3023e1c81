"""From the settings of `cutlm train` to a trainer: data, model and tokenizer loaded, tokens blamed once.

Reading the settings is left to `cutlm.settings`, running and saving to `cutlm.cli.train`.
"""

import os
import random
from pathlib import Path
from typing import Any

from trl import get_peft_config, get_quantization_config

from cutlm.blame import BlameSettings, blame_file
from cutlm.checkpoints import SCORES_FILE
from cutlm.encoding import Encoder
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.generation import fingerprint_model
from cutlm.jsonl import read_rows
from cutlm.model import check_bitsandbytes, load_model, load_tokenizer
from cutlm.preferences import PairTrainer
from cutlm.records import check_records, raise_problems
from cutlm.scoring import score_rows
from cutlm.token_scores import (
    TokenScores,
    fingerprint_template,
    fingerprint_tokenizer,
    is_token_scores,
    read_token_scores,
)
from cutlm.trainer import CUTTrainer


def build_trainer(data_args: Any, model_args: Any, config: Any) -> "CUTTrainer | PairTrainer":
    """Loads records or token scores, tokenizer and model, and makes the trainer of them."""
    rows, places = load_data(data_args.data)
    train, evaluate = _split(list(zip(rows, places, strict=True)), data_args.eval_split, config.seed)
    eval_records = load_data(data_args.eval_data)[0] if data_args.eval_data else [record for record, _ in evaluate]
    if model_args.load_in_4bit or model_args.load_in_8bit:
        check_bitsandbytes()
    path = model_args.model_name_or_path
    tokenizer = load_tokenizer(path, revision=model_args.model_revision)
    dtype = model_args.dtype or ("auto" if model_args.use_peft else "float32")
    model_args.dtype = "bfloat16" if model_args.load_in_4bit and dtype == "auto" else dtype
    model = load_model(
        path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization=get_quantization_config(model_args),
        device=config.device,
    )
    train_rows, train_places = [record for record, _ in train], [place for _, place in train]
    if config.objective == "cut" and config.detector == "frozen" and not isinstance(train_rows[0], TokenScores):
        train_rows, train_places = blame_once(model, tokenizer, train_rows, train_places, config, path)
    is_pairs = config.objective in ("dpo", "ilf_dpo")
    if is_pairs and eval_records:
        raise ConfigError(f"eval_data, eval_split: not for objective {config.objective}; leave them out")
    kwargs = {} if is_pairs else {"eval_dataset": eval_records or None}
    try:
        return (PairTrainer if is_pairs else CUTTrainer)(
            model=model,
            args=config,
            train_dataset=train_rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            places=train_places,
            **kwargs,
        )
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:  # what the libraries say of settings that are theirs
        raise ConfigError(str(error).strip().split("\n")[0]) from error


def load_data(path: str) -> tuple[list[Any], list[str]]:
    """Reads a file of records or of token scores, and where each row stands in it."""
    if is_token_scores(path):
        return list(read_token_scores(path)), [row.where for row in read_rows(path)[0]]
    check = check_records(path)
    raise_problems(check, path)
    return list(check.records), check.places


def blame_once(
    model: Any, tokenizer: Any, records: list[Any], places: list[str], config: Any, model_name: str
) -> tuple[list[Any], list[str]]:
    """Token scores of the records by the model as it is, kept in the output folder for a run that goes on."""
    path = str(Path(config.output_dir) / SCORES_FILE)
    detector, encoder = fingerprint_model(model_name), Encoder(tokenizer, config.template)
    settings = BlameSettings(config.threshold, config.unlikelihood_weight, config.gamma, config.max_length)

    def score(rows: Any, done: Any) -> Any:
        model.to(config.device)
        return score_rows(model, rows, done=done, is_bf16=bool(config.bf16), show_progress=not config.disable_tqdm)

    with config.main_process_first(desc="blame"):
        if int(os.environ.get("RANK", "0")) == 0:
            if Path(path).exists() and _are_scores_of(path, records, encoder, settings, detector):
                print(f"{path} holds the token scores of these records by this model; they are used again")
            else:
                counts = blame_file(
                    records,
                    places,
                    path,
                    encoder,
                    score,
                    settings,
                    detector=detector,
                    backend={"is_bf16": bool(config.bf16)},
                )
                print("\n".join([*counts.left_out, counts.describe()]))
        return load_data(path)


def _are_scores_of(path: str, records: list[Any], encoder: Encoder, settings: BlameSettings, detector: str) -> bool:
    """Whether a file of token scores is what blaming these records would make again."""
    try:
        scores = read_token_scores(path)
    except DataError:
        return False
    wanted = (
        detector,
        fingerprint_tokenizer(encoder.tokenizer),
        fingerprint_template(encoder),
        settings.threshold,
        settings.unlikelihood_weight,
        settings.gamma,
    )
    return [row.record.model_dump() for row in scores] == [record.model_dump() for record in records] and all(
        (row.detector, row.tokenizer, row.template, row.threshold, row.unlikelihood_weight, row.gamma) == wanted
        for row in scores
    )


def _split(records: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Draws a share of the records to evaluate on; both parts keep the order of the file."""
    num_eval = round(share * len(records))
    if share and not 0 < num_eval < len(records):
        raise DataError(f"eval_split: {share} of {len(records)} records leaves none on one side; give another share")
    chosen = set(random.Random(seed).sample(range(len(records)), num_eval))
    return (
        [record for index, record in enumerate(records) if index not in chosen],
        [record for index, record in enumerate(records) if index in chosen],
    )
