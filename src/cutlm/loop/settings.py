"""Settings of the online loop: one flat file, from which each stage takes its part, checked before anything runs."""

import contextlib
import datetime
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from cutlm.errors import ConfigError, UserError

# Parses the options that a setting passes on to a command: the command ("generate" or "judge") and the setting's text
# (for "judge" it starts with the kind of judge). Returns the options by name, raises ConfigError.
ParseOptions = Callable[[str, str], dict[str, Any]]

# Settings and options that do not change the results, so they may differ when a run is resumed.
_FREE_SETTINGS = {
    # compared by content, see `cutlm.loop.loop`
    *("instructions", "eval_instructions"),
    *("output_dir", "launcher", "server_command", "server_timeout", "max_failure_rate"),
    *("logging_steps", "report_to", "save_steps", "save_total_limit", "disable_tqdm", "dataloader_num_workers"),
    *("sensitivity_records", "teacher_gain_records"),
}
SETTINGS_FILE = "align.yaml"
_FREE_OPTIONS = {"concurrency", "timeout", "max_retries", "max_requests", "max_tokens_total", "cache", "device"}
_FREE_OPTIONS |= {"requests_per_minute", "tokens_per_minute"}


@dataclass
class AlignArguments:
    """Settings of the loop other than those of training, which are in the same file."""

    instructions: str | None = None  # a file of instructions to sample from
    num_iterations: int = 5  # a finished run can be extended
    num_instructions: int = 1000  # new ones per iteration
    generate: str = ""  # options for `cutlm generate`
    judge: str | None = None  # kind of judge, followed by options for `cutlm judge`
    # Largest tolerated share of responses without a judgment, or of instructions without an answer from a server.
    max_failure_rate: float = 0.02
    # Held-out instructions. Every model answers them greedily, and `eval_judge` judges the answers.
    eval_instructions: str | None = None
    eval_judge: str | None = None  # default: `judge`
    # For objectives with a teacher: unsatisfactory records on which its prompt is compared with the plain one; 0: off.
    teacher_gain_records: int = 64
    eval_command: str | None = None  # shell command; {model} is a folder, {out} a JSON file of metrics to write
    server_command: str | None = None  # shell command that serves {model} while responses are generated
    server_timeout: float = 1800.0  # seconds to wait for that server's first answer
    launcher: str | None = None  # command that starts training, such as torchrun with its options

    def find_problems(self, parse_options: ParseOptions) -> list[str]:
        """Return one sentence for each invalid setting."""
        problems = []
        if not self.instructions:
            problems.append("instructions: expected a file of instructions, got none; set instructions: FILE")
        if not self.judge:
            problems.append(
                'judge: expected a judge and its options, such as "rules --rules module:function", got none'
            )
        for name in ("num_iterations", "num_instructions"):
            if (number := getattr(self, name)) < 1:
                problems.append(f"{name}: expected a whole number of at least 1, got {number}")
        if self.teacher_gain_records < 0:
            problems.append(
                f"teacher_gain_records: expected a whole number of at least 0, got {self.teacher_gain_records}"
            )
        if not 0 <= self.max_failure_rate < 1:
            problems.append(f"max_failure_rate: expected a share from 0 to below 1, got {self.max_failure_rate}")
        if not self.server_timeout > 0:
            problems.append(f"server_timeout: expected seconds above 0, got {self.server_timeout}")
        parsed: dict[str, dict[str, Any]] = {}
        for name in ("generate", "judge", "eval_judge"):
            if (text := getattr(self, name)) is not None:
                try:
                    parsed[name] = parse_options(name.removeprefix("eval_"), text)
                except ConfigError as error:
                    problems += [f"{name}: {problem}" for problem in error.problems]
        if self.server_command and "generate" in parsed and not parsed["generate"].get("base_url"):
            problems.append("server_command: expected the server's address in generate, got none; add --base_url URL")
        judge = parsed.get("eval_judge", parsed.get("judge", {}))
        if self.eval_instructions and judge.get("judge") == "human":
            problems.append("eval_judge: expected a judge that needs no person, got human; set rules, http or local")
        for name, placeholders in (("eval_command", ("{model}", "{out}")), ("server_command", ("{model}",))):
            text = getattr(self, name)
            missing = [placeholder for placeholder in placeholders if text and placeholder not in text]
            if missing:
                problems.append(f"{name}: expected {' and '.join(missing)} in it, got {text!r}")
        return problems


@dataclass(frozen=True)
class Plan:
    """Everything that the loop needs to know."""

    arguments: AlignArguments
    folder: Path  # where all files go
    model: str  # the initial one: the absolute path of a folder, or a name on the hub
    seed: int  # every stage's seed is derived from it
    server_url: str | None  # of the server that generates; None for a local model
    has_blame: bool  # whether the model before each training flags the tokens, or teaches
    has_comparison: bool  # whether a teacher's prompt is compared with the plain one
    has_refine: bool  # whether the objective learns from refined responses
    has_merge: bool  # whether an adapter is trained, rather than the whole model
    train_settings: dict[str, Any]  # of `cutlm train`, shared by all iterations
    prompt_options: list[str]  # for commands that encode prompts here
    blame_options: list[str]  # for `cutlm blame`
    comparison_options: list[str]  # for `cutlm judge --compare_prompts`
    refine_options: list[str]  # for `cutlm refine`
    prompt_files: dict[str, str]  # of the judges, by the setting that names one
    resolved: dict[str, Any]  # all settings, as they are saved
    parse_options: ParseOptions


def find_differences(before: dict[str, Any], now: dict[str, Any], parse_options: ParseOptions) -> list[str]:
    """Return one sentence for each setting that differs from `before` and changes the results."""

    def normalize(name: str, value: Any) -> Any:
        if value is None or name not in ("generate", "judge", "eval_judge"):
            return value
        options = parse_options(name.removeprefix("eval_"), value)
        # A server may move, but whether there is one matters.
        options["base_url"] = bool(options.get("base_url"))
        return {key: option for key, option in options.items() if key not in _FREE_OPTIONS}

    problems = []
    for name in sorted((before.keys() | now.keys()) - _FREE_SETTINGS):
        old, new = before.get(name), now.get(name)
        is_extended = name == "num_iterations" and old and new and old < new
        if old == new or is_extended or normalize(name, old) == normalize(name, new):
            continue
        problems.append(f"{name}: this run was started with {old!r}, got {new!r}")
    return problems


def read_plan(config: str | None, options: Sequence[str], parse_options: ParseOptions) -> Plan:
    """Read a YAML file and options, which take precedence; raise one ConfigError with all problems.

    This happens in a separate process: the checks import torch and transformers, and may initialize a GPU, whose
    memory the process that supervises the loop must not hold. `parse_options` must be a function of a module, so that
    it pickles.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_read_plan, config, list(options), parse_options).result()


def _read_plan(config: str | None, options: list[str], parse_options: ParseOptions) -> Plan:
    from cutlm.model.collator import warn_of_long_limit
    from cutlm.model.loading import load_config
    from cutlm.training.config import CUTConfig, ModelArguments, read_settings

    @dataclass
    class CheckedArguments(AlignArguments):
        def __post_init__(self) -> None:  # so that these problems are reported together with those of training
            if problems := self.find_problems(parse_options):
                raise ConfigError(problems)

    settings = read_settings((CheckedArguments, ModelArguments, CUTConfig), config, options, "align")
    checked, model_args, train_args = settings.parts
    # A model of the hub is not asked for: reading settings needs no network, and training gives the same warning.
    if model_args.model_name_or_path and Path(model_args.model_name_or_path).exists():
        with contextlib.suppress(UserError):  # such as a model that cannot be read, which the first stage reports
            warn_of_long_limit(load_config(model_args.model_name_or_path), train_args.max_length)
    arguments = AlignArguments(**vars(checked))  # unlike a local class, this one pickles
    if train_args.resume_from_checkpoint:
        raise ConfigError("resume_from_checkpoint: the loop resumes by itself; remove this setting")
    own = {item.name for item in fields(AlignArguments)}
    training = {name: value for name, value in settings.resolved.items() if name not in own}
    if "save_steps" not in training and "save_strategy" not in training:
        training |= {"save_steps": 0.25, "save_total_limit": 1}  # a kill then costs at most a quarter of a training
    prompt_options = [f"--template={train_args.template}"]
    if train_args.template == "chat":
        # One date for all stages and for a resumed run, for chat templates that print one.
        training["template_date"] = settings.resolved["template_date"] = (
            train_args.template_date or _read_date(Path(train_args.output_dir)) or datetime.date.today().isoformat()
        )
        prompt_options.append(f"--template_date={training['template_date']}")
    if train_args.chat_template_kwargs:
        prompt_options.append(f"--chat_template_kwargs={json.dumps(train_args.chat_template_kwargs)}")
    shared = ("threshold", "unlikelihood_weight", "gamma", "max_length", "sensitivity_records")
    contrast = ["contrast", "num_foreign"] if train_args.contrast != "judgment" else []
    contrast += ["surprise_weight"] if train_args.surprise_weight else []
    blame_options = [*prompt_options] + [f"--{name}={getattr(train_args, name)}" for name in (*shared, *contrast)]
    blame_options += [f"--judgment_role={train_args.judgment_role}"] * (train_args.judgment_role != "user")
    if train_args.has_teacher:
        strength = "redirect_strength" if train_args.objective == "redirect" else "guidance"
        blame_options += [
            f"--{name}={getattr(train_args, name)}" for name in ("objective", "teacher_context", strength)
        ]
        blame_options += ["--teacher_sees_response"] * train_args.teacher_sees_response
        blame_options += ["--distillation=sampled"] * (train_args.distillation == "sampled")
    blame_options += ["--drop_ineffective"] * train_args.drop_ineffective
    blame_options += ["--weigh_by_effect"] * train_args.weigh_by_effect
    blame_options += ["--bf16"] * bool(train_args.bf16) + ["--device=cpu"] * bool(train_args.use_cpu)
    blame_options += [f"--dtype={model_args.dtype}"] if model_args.dtype else []
    generate = parse_options("generate", arguments.generate)
    names = ("max_new_tokens", "temperature", "top_p", "batch_size", "dtype", "device")
    refine_options = [f"--{name}={generate[name]}" for name in names if generate.get(name) is not None]
    judge = parse_options("judge", str(arguments.judge))["judge"]
    comparison_options = [*prompt_options, f"--num_records={arguments.teacher_gain_records}"]
    comparison_options += [f"--teacher_context={train_args.teacher_context}"]
    comparison_options += ["--teacher_sees_response"] * train_args.teacher_sees_response
    comparison_options += [f"--judgment_role={train_args.judgment_role}"] * (train_args.judgment_role != "user")
    if (longest := generate.get("max_new_tokens")) is not None:
        comparison_options.append(f"--max_response_tokens={longest}")
    if judge != "local":  # which has these options itself
        of_model = ("batch_size", "dtype", "device")
        comparison_options += [f"--{name}={generate[name]}" for name in of_model if generate.get(name) is not None]
    model = model_args.model_name_or_path
    judges = {"judge": arguments.judge, "eval_judge": arguments.eval_judge}
    prompts = {name: parse_options("judge", text).get("prompt_file") for name, text in judges.items() if text}
    return Plan(
        arguments=arguments,
        folder=Path(train_args.output_dir),
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        seed=train_args.seed,
        server_url=generate.get("base_url"),
        # Under FSDP and DeepSpeed, training cannot ask the model before it for flags or the teacher's distributions.
        has_blame=train_args.has_frozen_detector or train_args.objective == "self_distillation",
        has_comparison=train_args.has_teacher and arguments.teacher_gain_records > 0 and judge != "human",
        has_refine=train_args.objective in ("ilf_mle", "ilf_dpo"),
        has_merge=model_args.use_peft,
        train_settings=training,
        blame_options=blame_options,
        comparison_options=comparison_options,
        refine_options=[*prompt_options, *refine_options],
        prompt_options=prompt_options,
        prompt_files={name: path for name, path in prompts.items() if path},
        resolved=settings.resolved,
        parse_options=parse_options,
    )


def _read_date(folder: Path) -> str | None:
    """The date in the prompts of the run that is resumed; `loop` checks the file."""
    try:
        settings = yaml.safe_load((folder / SETTINGS_FILE).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings.get("template_date") if isinstance(settings, dict) else None
