"""Settings of the online loop: one flat file, of which each stage gets its part, checked whole before anything runs.

How a stage is run is left to `cutlm.loop.stages`. torch and transformers, which only the checking needs, stay out of
the process that watches over the loop: see `read_plan`.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from cutlm.errors import ConfigError

# What the loop itself says to a command.
_OWN_OPTIONS = {
    "generate": (
        "--model",
        "--prompts",
        "--out",
        "--seed",
        "--overwrite",
        "--template",
        "--tokenizer",
        "--max_failure_rate",
    ),
    "judge": ("--responses", "--judge", "--out", "--overwrite", "--labels"),
}
# What decides how a stage is run, and not what comes of it: it may change from one start to the next.
_FREE_OPTIONS = (
    "concurrency",
    "timeout",
    "max_retries",
    "max_requests",
    "max_tokens_total",
    "cache",
    "device",
)
FREE_SETTINGS = (
    # These are compared by what is in them; see `cutlm.loop.loop`.
    "instructions",
    "eval_instructions",
    "output_dir",
    "launcher",
    "server_command",
    "server_wait",
    "max_failure_rate",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
    "dataloader_num_workers",
)


@dataclass
class AlignArguments:
    """What the loop does beside training, whose settings stand in the same file.

    Attributes:
        instructions: A file of instructions to draw from.
        num_iterations: Rounds; more may be asked for later.
        num_instructions: Fresh ones a round.
        generate: Further options of `cutlm generate`.
        judge: A kind of judge and the options of `cutlm judge` that go with it.
        max_failure_rate: The largest share of responses without a judgment with which a round goes on, and of
            instructions to which a server has no answer.
        eval_instructions: Held-out instructions that every model answers, greedily, and that `eval_judge` judges.
        eval_judge: As `judge`, which it is where it is not given.
        eval_command: A shell command; `{model}` is the model's folder, `{out}` a JSON file of figures to write.
        server_command: A shell command that serves `{model}` where `generate` has --base_url; stopped afterwards.
        server_wait: Seconds in which it must answer.
        launcher: What training is started by, such as torchrun with its options.
    """

    instructions: str | None = field(default=None, metadata={"help": "a file of instructions to draw from"})
    num_iterations: int = field(default=5, metadata={"help": "rounds"})
    num_instructions: int = field(default=1000, metadata={"help": "fresh instructions a round"})
    generate: str = field(default="", metadata={"help": "options of cutlm generate"})
    judge: str | None = field(default=None, metadata={"help": "kind of judge, and options of cutlm judge"})
    max_failure_rate: float = field(default=0.02, metadata={"help": "largest share of responses without a judgment"})
    eval_instructions: str | None = field(default=None, metadata={"help": "held-out instructions"})
    eval_judge: str | None = field(default=None, metadata={"help": "as judge; default: the same"})
    eval_command: str | None = field(default=None, metadata={"help": "shell command with {model} and {out}"})
    server_command: str | None = field(default=None, metadata={"help": "shell command that serves {model}"})
    server_wait: float = field(default=1800.0, metadata={"help": "seconds in which the server must answer"})
    launcher: str | None = field(default=None, metadata={"help": "what training is started by"})

    def __post_init__(self) -> None:
        problems = []
        if not self.instructions:
            problems.append("instructions: expected a file of instructions, got none; give instructions: FILE")
        if not self.judge:
            problems.append(
                'judge: expected a kind of judge and its options, such as "rules --rules package.module:function", got'
                " none"
            )
        for name in ("num_iterations", "num_instructions"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: expected a whole number of at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_failure_rate < 1:
            problems.append(f"max_failure_rate: expected a share from 0 to below 1, got {self.max_failure_rate}")
        if not self.server_wait > 0:
            problems.append(f"server_wait: expected seconds above 0, got {self.server_wait}")
        problems += self._check_options()
        for name, locations in (("eval_command", ("{model}", "{out}")), ("server_command", ("{model}",))):
            missing = [place for place in locations if getattr(self, name) and place not in getattr(self, name)]
            if missing:
                problems.append(f"{name}: expected {' and '.join(missing)} in it, got {getattr(self, name)!r}")
        if problems:
            raise ConfigError(problems)

    def _check_options(self) -> list[str]:
        problems = []
        parsed: dict[str, dict[str, Any]] = {}
        for name in ("generate", "judge", "eval_judge"):
            text = getattr(self, name)
            if text is None:
                continue
            try:
                parsed[name] = parse_options(name.removeprefix("eval_"), text)
            except ConfigError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
        server = parsed.get("generate", {}).get("base_url")
        if self.server_command and "generate" in parsed and not server:
            problems.append("server_command: expected --base_url URL in generate, where to ask, got none")
        judge = parsed.get("eval_judge", parsed.get("judge", {}))
        if self.eval_instructions and judge.get("judge") == "human":
            problems.append("eval_judge: expected a judge that answers at once, got human; give rules, http or local")
        return problems


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        arguments: Of the loop.
        folder: Where everything goes.
        model: To begin with.
        seed: Of which the seed of every stage is made.
        is_blaming: Whether tokens are blamed by the model as it was before each round.
        server: Address of the server that generates; None where a local model does.
        is_refining: Whether the objective learns from refined responses.
        is_adapting: Whether an adapter is trained, to be merged; else the whole model.
        training: Settings of `cutlm train` that all rounds share.
        blaming: Options of `cutlm blame`.
        refining: Options of `cutlm refine`.
        prompt_files: Of the judges, by the setting that names one.
        resolved: All settings, as they are saved.
    """

    arguments: AlignArguments
    folder: Path
    model: str
    seed: int
    server: str | None
    is_blaming: bool
    is_refining: bool
    is_adapting: bool
    training: dict[str, Any]
    blaming: list[str]
    refining: list[str]
    prompt_files: dict[str, str]
    resolved: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_options(command: str, text: str) -> dict[str, Any]:
    """Parses the options that a setting gives to a command.

    Args:
        command: "generate", or "judge", whose text begins with the kind of judge.
        text: As on a command line.

    Raises:
        ConfigError: They are not the command's, or are the loop's to give.
    """
    from cutlm.cli import build_parser

    try:
        options = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"expected options as on a command line, got {text!r} ({error})") from None
    own = [option for option in options if option.partition("=")[0] in _OWN_OPTIONS[command]]
    if own:
        raise ConfigError(f"{', '.join(own)}: given by the loop itself; leave it out")
    fixed = {
        "generate": ["--model=-", "--prompts=-", "--out=-", "--template=alpaca"],
        "judge": ["--responses=-", "--out=-"],
    }[command]
    if command == "judge":
        fixed += ["--judge", *options[:1]]
        options = options[1:]
    parsed, rest = build_parser(_Parser).parse_known_args([command, *fixed, *options])
    if rest:
        raise ConfigError(f"unknown arguments of cutlm {command}: {' '.join(rest)}")
    if command == "judge":
        from cutlm.cli.judge import fill_options

        fill_options(parsed)
    else:
        from cutlm.cli.generate import check_options

        check_options(parsed)
    return {name: value for name, value in vars(parsed).items() if name not in ("command", "run")}


def find_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for each setting that decides what comes of a run and is another one than before."""
    problems = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old == new or name in FREE_SETTINGS:
            continue
        if name in ("generate", "judge", "eval_judge") and _lasting(name, old) == _lasting(name, new):
            continue
        if name == "num_iterations" and old and new and old < new:
            continue
        problems.append(f"{name}: this folder was begun with {old!r}, got {new!r}")
    return problems


def _lasting(name: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    options = parse_options(name.removeprefix("eval_"), text)
    if options.get("base_url"):
        options["base_url"] = "any"  # where it is, is free to change; not that one answers
    return {name: value for name, value in options.items() if name not in _FREE_OPTIONS}


def read_plan(config: str | None, options: Sequence[str]) -> Plan:
    """Reads and checks all settings, in a process of its own: what it needs of memory, and of a GPU's, it gives back.

    Raises:
        ConfigError: Settings are unknown or wrong; all are named.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_read_plan, config, list(options)).result()


def _read_plan(config: str | None, options: list[str]) -> Plan:
    from cutlm.training.config import CUTConfig, ModelArguments, read_settings

    settings = read_settings((AlignArguments, ModelArguments, CUTConfig), config, options, "align")
    arguments, model_args, train_args = settings.parts
    if train_args.resume_from_checkpoint:
        raise ConfigError("resume_from_checkpoint: the loop goes on by itself where it was; leave it out")
    own = {item.name for item in fields(AlignArguments)}
    training = {name: value for name, value in settings.resolved.items() if name not in own}
    if "save_steps" not in training and "save_strategy" not in training:
        training |= {"save_steps": 0.25, "save_total_limit": 1}  # a kill costs a quarter of a training at most
    blaming = [
        f"--{name}={getattr(train_args, name)}"
        for name in ("threshold", "unlikelihood_weight", "gamma", "template", "max_length")
    ]
    blaming += ["--bf16"] * bool(train_args.bf16) + ["--device=cpu"] * bool(train_args.use_cpu)
    blaming += [f"--dtype={model_args.dtype}"] if model_args.dtype else []
    generating = parse_options("generate", arguments.generate)
    refining = [
        f"--{name}={generating[name]}"
        for name in ("max_new_tokens", "temperature", "top_p", "batch_size", "dtype", "device")
        if generating.get(name) is not None
    ]
    return Plan(
        arguments=arguments,
        folder=Path(train_args.output_dir),
        model=model_args.model_name_or_path,
        seed=train_args.seed,
        server=generating.get("base_url"),
        is_blaming=train_args.objective == "cut" and train_args.detector == "frozen",
        is_refining=train_args.objective in ("ilf_mle", "ilf_dpo"),
        is_adapting=model_args.use_peft,
        training=training,
        blaming=blaming,
        refining=[f"--template={train_args.template}", *refining],
        prompt_files=_find_prompt_files(arguments),
        resolved=settings.resolved,
    )


def _find_prompt_files(arguments: AlignArguments) -> dict[str, str]:
    judges = {"judge": arguments.judge, "eval_judge": arguments.eval_judge}
    found = {name: parse_options("judge", text).get("prompt_file") for name, text in judges.items() if text}
    return {name: path for name, path in found.items() if path}
