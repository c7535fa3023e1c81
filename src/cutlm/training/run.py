"""From the settings of `cutlm train` to a trainer: data, model and tokenizer loaded, tokens blamed once.

Reading the settings is left to `cutlm.training.settings`, running and saving to `cutlm.cli.train`.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl import get_peft_config, get_quantization_config

from cutlm.blame.detector import FlagSettings, blame_file, describe_run, make_scores
from cutlm.blame.scoring import check_rows, score_rows
from cutlm.blame.token_scores import TokenScores, is_token_scores, read_token_scores, strip_scores
from cutlm.data.files import open_atomic, read_bytes, read_rows
from cutlm.data.records import check_records, raise_problems
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.model.forward import check_head
from cutlm.model.loading import (
    check_bitsandbytes,
    check_lora_targets,
    fingerprint_model,
    load_model,
    load_tokenizer,
    unwrap_peft,
)
from cutlm.prompting.encoding import Encoder
from cutlm.training.checkpoints import SCORES_FILE, SCORES_HEADER_FILE
from cutlm.training.pairs import PairTrainer
from cutlm.training.preparation import refuse_sharded_blame
from cutlm.training.trainer import CUTTrainer


def build_trainer(
    data_args: Any, model_args: Any, config: Any, prepare: Callable[[list[Any]], list[Any]] = list
) -> "CUTTrainer | PairTrainer":
    """Loads records or token scores, tokenizer and model, and makes the trainer of them.

    Args:
        data_args: What to train on.
        model_args: Which model.
        config: Settings of training.
        prepare: What is made of the rows of each file before anything is learned from them; nothing by default.
    """
    rows, locations = load_data(data_args.data)
    rows = prepare(rows)
    train, evaluate = _split(list(zip(rows, locations, strict=True)), data_args.eval_split, config.seed)
    eval_records = [record for record, _ in evaluate]
    if data_args.eval_data:
        eval_records = prepare(load_data(data_args.eval_data)[0])
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
    with _say_in_a_sentence():
        peft_config = get_peft_config(model_args)
    train_rows, train_places = [record for record, _ in train], [place for _, place in train]
    if config.objective == "cut" and config.detector == "frozen" and not isinstance(train_rows[0], TokenScores):
        # What can be known to be wrong is said before the long pass.
        refuse_sharded_blame(config)
        check_head(model)
        if peft_config is not None:
            check_lora_targets(model, peft_config)
        train_rows, train_places = blame_once(
            model,
            tokenizer,
            train_rows,
            train_places,
            config,
            detector=fingerprint_model(path),
            backend=_describe_backend(model, model_args, config),
            overwrite=data_args.overwrite_output_dir,
        )
    is_pairs = config.is_of_pairs
    if is_pairs and eval_records:
        raise ConfigError(f"eval_data, eval_split: not for objective {config.objective}; leave them out")
    kwargs = {} if is_pairs else {"eval_dataset": eval_records or None}
    with _say_in_a_sentence():
        trainer = (PairTrainer if is_pairs else CUTTrainer)(
            model=model,
            args=config,
            train_dataset=train_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            locations=train_places,
            **kwargs,
        )
    # Some would hold on to the weights.
    can_look = not any(word in str(config.optim) for word in ("layerwise", "lomo"))
    if can_look and not config.is_sharded:
        # Made for a look, and again by training: what is wrong with it is said before anything gives way.
        with _say_in_a_sentence("optim, optim_args, adam_*, lr_scheduler_*"):
            trainer.create_optimizer()
            trainer.create_scheduler(num_training_steps=10**6)
        trainer.optimizer = trainer.lr_scheduler = None
    return trainer


@contextmanager
def _say_in_a_sentence(names: str = "") -> Iterator[None]:
    """Turns what the libraries say of settings that are theirs into an error of the user's.

    Args:
        names: Of these settings, where the libraries may not say them.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{names}: {said}" if names else said) from error


def load_data(path: str) -> tuple[list[Any], list[str]]:
    """Reads a file of records or of token scores, and where each row stands in it.

    Raises:
        DataError: It cannot be read, or is of both kinds.
    """
    if is_token_scores(path):
        return list(read_token_scores(path)), [row.location for row in read_rows(path)[0]]
    check = check_records(path)
    raise_problems(check, path)
    for record, place in zip(check.records, check.locations, strict=True):
        if strip_scores(record) is not record:
            raise DataError(
                f"{place}: expected a plain record, as the first row is one, got token scores, whose flags would be"
                " ignored; put plain records and token scores into files of their own"
            )
    return list(check.records), check.locations


def _describe_backend(model: Any, model_args: Any, config: Any) -> dict[str, Any]:
    """What else the log-probs depend on, or their last digits."""
    language_model = unwrap_peft(model)
    quantization = get_quantization_config(model_args)
    return {
        "revision": getattr(language_model.config, "_commit_hash", None) or model_args.model_revision,
        "dtype": f"{language_model.dtype}",
        "quantization": quantization and json.dumps(quantization.to_dict(), default=str, sort_keys=True),
        "attn_implementation": model_args.attn_implementation,
        "bf16": bool(config.bf16),
        "device": config.device.type,
    }


def blame_once(
    model: Any,
    tokenizer: Any,
    records: list[Any],
    locations: list[str],
    config: Any,
    *,
    detector: str,
    backend: dict[str, Any],
    overwrite: bool,
) -> tuple[list[Any], list[str]]:
    """Token scores of the records by the model as it is, kept in the output folder for a run that goes on.

    Args:
        model: The model.
        tokenizer: The model's.
        records: To be blamed.
        locations: Where each stands, for messages.
        config: Settings of training.
        detector: Fingerprint of the model.
        backend: What else the log-probs depend on, by name.
        overwrite: Whether scores that are not this run's give way.

    Returns:
        Token scores, and where each stands.

    Raises:
        UserError: Scores that are not this run's are in the way, or the model cannot read the records.
    """
    path = Path(config.output_dir) / SCORES_FILE
    encoder = Encoder(tokenizer, config.template)
    settings = FlagSettings(config.threshold, config.unlikelihood_weight, config.gamma, config.max_length)
    flagging = {name: getattr(settings, name) for name in ("threshold", "unlikelihood_weight", "gamma")}
    header = flagging | describe_run(records, encoder, settings, detector, backend)

    def score(rows: Any, done: Any) -> Any:
        check_rows(model, rows, config.max_length)
        model.to(config.device)
        return score_rows(model, rows, done=done, is_bf16=bool(config.bf16), show_progress=not config.disable_tqdm)

    # The folder is one for all machines, as for checkpoints; so one process writes, of all there are.
    with config.main_process_first(local=False, desc="blame"):
        difference = _find_difference(path, header)
        if difference is None:
            if config.process_index == 0:
                print(f"{path} holds the token scores of these records by this model; they are used again")
                print("".join(f"{sentence}\n" for sentence in _read_header(path)["left_out"]), end="")
        elif config.process_index:
            raise UserError(
                f"{path}: expected the token scores that the first process makes, found none; what was wrong stands in"
                " its own output, or this folder is not the one that it writes to"
            )
        else:
            if path.exists() and not overwrite and not _can_be_remade(path, records, encoder, settings, detector):
                raise UserError(
                    f"{path}: {difference}; train on it as it is by cutlm train --data {path}, make it anew with"
                    " --overwrite_output_dir, or name another output_dir"
                )
            path.with_name(SCORES_HEADER_FILE).unlink(missing_ok=True)
            counts = blame_file(
                records,
                locations,
                path,
                encoder,
                score,
                settings,
                detector=detector,
                backend=backend,
                overwrite=overwrite,
            )
            with open_atomic(path.with_name(SCORES_HEADER_FILE)) as file:
                further = {"left_out": counts.left_out, "sha256": _hash(path)}
                file.write(json.dumps(header | further, indent=2).encode())
            print("\n".join([*counts.left_out, counts.describe()]))
        return load_data(str(path))


def _hash(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    """What was noted beside a file of token scores; empty where nothing is, or nothing that can be read."""
    try:
        header = json.loads(read_bytes(path.with_name(SCORES_HEADER_FILE)))
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) and isinstance(header.get("left_out"), list) else {}


def _find_difference(path: Path, header: dict[str, Any]) -> str | None:
    """Why a file of token scores is not what a run would make again; None where it is."""
    if not path.exists():
        return "no such file"
    found = _read_header(path)
    if not found:
        return f"what made it is not known, as there is no {SCORES_HEADER_FILE} beside it"
    differing = [name for name in header if name not in found or found[name] != header[name]]
    if differing:
        return f"made with other settings ({', '.join(differing)} differ)"
    return None if found.get("sha256") == _hash(path) else "edited since it was made"


def _can_be_remade(path: Path, records: list[Any], encoder: Encoder, settings: FlagSettings, detector: str) -> bool:
    """Whether a file without a header holds nothing but what is made of these records again: no work of a person."""
    if _read_header(path):
        return False
    try:
        rows = read_token_scores(path)
    except DataError:
        return False
    own = {strip_scores(record).model_dump_json() for record in records}
    return all(
        row.logps_without is not None
        and row.record.model_dump_json() in own
        and row
        == make_scores(row.record, row.token_ids, row.logps_without, row.logps_with, encoder, settings, detector)
        for row in rows
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
