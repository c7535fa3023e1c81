"""Settings of a command: a flat YAML file, then options on the command line, into dataclasses.

Read with TRL's `TrlParser`; what it lets pass or reports one at a time is checked here first: unknown keys (the
nearest one is named), values of the wrong kind, all of them at once.
"""

import dataclasses
import difflib
import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from cutlm.errors import ConfigError
from cutlm.training.config import CUTConfig


@dataclasses.dataclass
class DataArguments:
    """What to train on.

    Attributes:
        data: A file of judged records.
        eval_data: A file of judged records to evaluate on.
        eval_split: A share of `data`, drawn by `seed`, to evaluate on instead.
        overwrite_output_dir: Start anew in a folder that is not empty; checkpoints in it are removed.
    """

    data: str | None = dataclasses.field(default=None, metadata={"help": "a file of judged records"})
    eval_data: str | None = dataclasses.field(default=None, metadata={"help": "a file of records to evaluate on"})
    eval_split: float = dataclasses.field(default=0.0, metadata={"help": "share of data to evaluate on instead"})
    overwrite_output_dir: bool = dataclasses.field(default=False, metadata={"help": "start anew in a filled folder"})

    def __post_init__(self) -> None:
        problems = []
        if not self.data:
            problems.append("data: expected a file of judged records, got none; give data: FILE")
        if not 0 <= self.eval_split < 1:
            problems.append(f"eval_split: expected a share from 0 to below 1, got {self.eval_split}")
        if self.eval_split and self.eval_data:
            problems.append("eval_split and eval_data: expected one of them, got both")
        if problems:
            raise ConfigError(problems)


@dataclasses.dataclass
class ModelArguments(ModelConfig):
    """Which model, and how to adapt it: TRL's fields, with the paper's LoRA as the default.

    Attributes:
        dtype: None: that of the checkpoint under LoRA, float32 for full fine-tuning.
        use_peft: LoRA; false trains the whole model.
    """

    dtype: str | None = dataclasses.field(
        default=None, metadata={"help": "dtype of the weights", "choices": ["auto", "bfloat16", "float16", "float32"]}
    )
    use_peft: bool = dataclasses.field(default=True, metadata={"help": "train a LoRA adapter; false: the whole model"})
    lora_alpha: int = dataclasses.field(default=16, metadata={"help": "LoRA alpha"})
    lora_target_modules: list[str] | None = dataclasses.field(
        default_factory=lambda: ["gate_proj", "down_proj", "up_proj"], metadata={"help": "modules that LoRA adapts"}
    )

    def __post_init__(self) -> None:
        problems = []
        if not self.model_name_or_path:
            problems.append("model_name_or_path: expected a model folder or hub name, got none")
        if self.lora_r < 1:
            problems.append(f"lora_r: expected a whole number of at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout: expected a share from 0 to below 1, got {self.lora_dropout}")
        if self.load_in_4bit and self.load_in_8bit:
            problems.append("load_in_4bit and load_in_8bit: expected one of them, got both")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            problems.append("load_in_4bit and load_in_8bit train an adapter; expected use_peft: true, got false")
        if problems:
            raise ConfigError(problems)
        # PEFT takes a single name such as "all-linear" as more than a module's name.
        if isinstance(self.lora_target_modules, list) and self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was read.

    Attributes:
        parts: One instance of each dataclass asked for.
        resolved: Every setting that is cutlm's own, and those of `transformers` that differ from its defaults.
    """

    parts: tuple[Any, ...]
    resolved: dict[str, Any]

    def to_yaml(self) -> str:
        """The resolved settings, as a file that reads back to the same."""
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raises instead of printing a usage of 200 lines."""
        raise ConfigError(message)


def read_settings(types: Sequence[Any], config: str | None, options: Sequence[str], command: str = "train") -> Settings:
    """Reads settings into dataclasses.

    Args:
        types: The dataclasses; no two have a field of the same name.
        config: A YAML file, or None.
        options: `--field value ...`, which take precedence over the file.
        command: Whose settings they are, for messages.

    Raises:
        ConfigError: Unknown keys, values of the wrong kind or out of range; all at once.
    """
    parser = _Parser(list(types))
    actions: dict[str, Any] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # a field that is true by default has a second one, `--no_field`
        if getattr(action.type, "__name__", "") == "dict":
            action.type = _read_json_object
    fixed = {field.name for kind in types for field in dataclasses.fields(kind) if not field.init}

    def describe_unknown(what: str, name: str, names: Iterable[str]) -> str:
        if name in fixed:
            return f"{what} is no setting of cutlm {command}; leave it out"
        nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
        return f"{what} is unknown; " + (f"did you mean {nearest[0]!r}?" if nearest else f"see cutlm {command} --help")

    problems = [] if config is None else _check_file(config, actions, describe_unknown)
    known = {text.removeprefix("--") for action in parser._actions for text in action.option_strings}
    problems += [
        describe_unknown(f"option {option}", option.removeprefix("--").partition("=")[0], known)
        for option in options
        if option.startswith("--") and option.removeprefix("--").partition("=")[0] not in known
    ]
    given = {option.removeprefix("--").partition("=")[0] for option in options if option.startswith("--")}
    if config is not None and not problems:
        given |= _load_yaml(config).keys()
    problems += [
        f"{name}: a key in settings would be saved with them; set HF_TOKEN in the environment instead"
        for name in sorted(given)
        if str(name).endswith("hub_token")
    ]
    if problems:
        raise ConfigError(problems)
    defaults = {dest: action.default for dest, action in actions.items()}
    if config is not None:
        # Not by `parse_args_and_config`: it builds one dataclass after the other, and so reports one's problems only.
        values = _load_yaml(config)
        parser.set_defaults_with_config(**{key: _as_default(value, actions[key]) for key, value in values.items()})
    values = vars(parser.parse_args([*options]))
    parts, problems = [], []
    for kind in types:
        fields = [field.name for field in dataclasses.fields(kind) if field.init]
        try:
            parts.append(kind(**{name: values[name] for name in fields}))
        except ConfigError as error:
            problems += error.problems
        except (ValueError, TypeError, KeyError, ImportError) as error:  # what `transformers` says of its own fields
            problems.append(_say_what_to_do(error))
    if problems:
        raise ConfigError(problems)
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)} - set(CUTConfig.__annotations__)
    resolved = {name: value for name, value in values.items() if name not in theirs or value != defaults[name]}
    return Settings(tuple(parts), {name: _as_plain(value) for name, value in resolved.items()})


def _as_plain(value: Any) -> Any:
    """A setting as YAML has it: members of an enumeration by their values."""
    return [_as_plain(item) for item in value] if isinstance(value, list) else getattr(value, "value", value)


def _read_json_object(text: str) -> dict[str, Any] | None:
    """Raises:
    ArgumentTypeError: It is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if value is None or isinstance(value, dict):
        return value
    raise ArgumentTypeError(f"""expected a JSON object such as '{{"name": true}}', got {text!r}""")


def _say_what_to_do(error: Exception) -> str:
    """The words of `transformers`, or our own where theirs do not say what to do here."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and "deepspeed" in text:
        return "deepspeed: the package deepspeed is missing; install it by: pip install deepspeed"
    if text.startswith("Your setup doesn't support bf16"):
        return "bf16: expected a GPU that computes in bfloat16, got none; add --use_cpu true, or --bf16 false"
    return text


def _load_yaml(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        raise ConfigError(f"{path}: expected a YAML file, got a directory")
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path after --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f":{place.line + 1}" if place else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, `key: value` a line, got {type(values).__name__}")
    return values


def _check_file(path: str, actions: dict[str, Any], describe_unknown: Callable[..., str]) -> list[str]:
    problems = []
    for key, value in _load_yaml(path).items():
        if key not in actions:
            problems.append(describe_unknown(f"{path}: key {key!r}", str(key), set(actions)))
        elif (problem := _check_value(value, actions[key])) is not None:
            problems.append(f"{path}: {key}: {problem}")
    return problems


def _check_value(value: Any, action: Any) -> str | None:
    """Says what is wrong with a value of the file for one option; None if nothing is."""
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, list):
        if action.nargs in ("+", "*"):
            return None
        return f"expected one value, got a list of {len(value)}"
    kind = getattr(action.type, "__name__", "value").replace("string_to_bool", "true or false").replace("_", " ")
    kind = {"int": "a whole number", "float": "a number", "str": "text", " read json object": "a mapping"}.get(
        kind, kind
    )
    try:
        converted = action.type(str(value)) if action.type else value
    except (ValueError, TypeError, ArgumentTypeError):
        return f"expected {kind}, got {value!r}"
    if action.choices is not None and converted not in action.choices:
        return f"expected one of {', '.join(map(str, action.choices))}, got {value!r}"
    return None


def _as_default(value: Any, action: Any) -> Any:
    """A value of the file as the text that the command line would give, so that both are converted alike."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return [action.type(str(item)) if action.type else item for item in value]
    return str(value)
