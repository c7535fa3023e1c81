"""Flag the tokens that a judgment objects to (eq. 5 of the paper), by a frozen model, into a file to inspect, edit and
train on.

Each response is scored without and with its judgment; a token that the judgment makes more likely by the threshold is
flagged. The output is JSON Lines: the records with their tokens, log-probabilities, flags and weights. An interrupted
run resumes when started again with the same settings. OUT.report.json holds counts and flag_signal: 1 if other
records' judgments flag nothing, 0 if they flag as much, so that the flags are noise.

  cutlm blame --model MODEL --data records.jsonl --out scores.jsonl
  cutlm blame --base_url http://localhost:8000/v1 --model NAME --tokenizer MODEL --data records.jsonl --out scores.jsonl

The server must return log-probabilities of the prompt's own tokens (prompt_logprobs), as vLLM does. Its key is read
from the environment variable OPENAI_API_KEY."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli import importing_libraries
from cutlm.cli.model_options import (
    SERVER_OPTIONS,
    ModelOptions,
    add_options,
    check_output,
    make_encoder,
    make_server,
)
from cutlm.data.sources import describe_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cutlm.flagging.scoring import Scorer
    from cutlm.flagging.teacher import TeacherSettings

_OPTIONS = ModelOptions(("base", "dtype", "device", "bf16", "max_tokens_per_batch"), ("tokenizer", *SERVER_OPTIONS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "model", "data", "columns", "out", "overwrite")
    add_scoring_arguments(parser)
    add_teacher_arguments(parser)


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring, each with a default."""
    parser.add_argument(
        "--threshold",
        type=_read_threshold,
        default=1.1,
        metavar="LAMBDA",
        help="lambda of eq. 5; auto: the smallest one at which judgments of other records flag at most 1%% of the"
        " tokens (default: 1.1)",
    )
    parser.add_argument(
        "--contrast",
        choices=("judgment", "foreign", "perfect"),
        default="judgment",
        help="compare the log-probability with the judgment with that without it (judgment), with the mean under"
        ' judgments of other records (foreign), or with that under "Perfect." (perfect) (default: judgment)',
    )
    parser.add_argument(
        "--num_foreign", type=int, default=4, metavar="N", help="judgments for --contrast foreign (default: 4)"
    )
    parser.add_argument(
        "--surprise_weight",
        type=float,
        default=0.0,
        metavar="KAPPA",
        help="how much it counts for a flag that a token is unlikely, besides its log ratio; with --threshold auto"
        " (default: 0)",
    )
    parser.add_argument(
        "--drop_ineffective",
        action="store_true",
        help="leave out unsatisfactory records whose judgment has no larger effect on the response than most of four"
        " judgments of other records; they are listed in OUT.report.json",
    )
    parser.add_argument(
        "--weigh_by_effect",
        action="store_true",
        help="find the share of these four judgments that have a smaller effect (judgment_rank), by which cutlm train"
        " --detector frozen --weigh_by_effect weighs the record",
    )
    parser.add_argument("--unlikelihood_weight", type=float, default=1.0, help="alpha of eq. 6 (default: 1)")
    parser.add_argument("--gamma", type=float, default=1.0, help="dynamic weight of eq. 6; 0: off (default: 1)")
    parser.add_argument(
        "--template", choices=("alpaca", "chat"), default="alpaca", help="as in training (default: alpaca)"
    )
    add_options(parser, "chat_template_kwargs", "template_date", "judgment_role")
    parser.add_argument("--max_length", type=int, default=2048, help="of prompt and response (default: 2048)")
    parser.add_argument(
        "--with_praise",
        action="store_true",
        help="score satisfactory records with their praise too, to calibrate thresholds; they are never flagged",
    )
    parser.add_argument(
        "--sensitivity_records",
        type=int,
        default=64,
        help="records on which to measure whether the flags depend on the judgments' content; 0 turns it off"
        " (default: 64)",
    )
    _OPTIONS.add(parser)


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a teacher, whose distributions are stored with the flags; all of them as in training."""
    teacher = parser.add_argument_group("a teacher, by a local model (docs/objectives.md)")
    objectives = ("cut", "self_distillation", "redirect")
    stored = (
        "training objective: redirect stores a teacher's distributions for flagged tokens, self_distillation for all"
    )
    teacher.add_argument("--objective", choices=objectives, default="cut", help=f"{stored} (default: cut, without any)")
    teacher.add_argument("--teacher_context", choices=("praise", "advice"), help="its prompt (default: praise)")
    teacher.add_argument("--teacher_sees_response", action="store_const", const=True, help="show it the response")
    strength = "how far it is guided away from the judgment, for"
    teacher.add_argument("--guidance", type=float, metavar="BETA", help=f"{strength} self_distillation (default: 1)")
    teacher.add_argument("--redirect_strength", type=float, metavar="BETA", help=f"{strength} redirect (default: 1)")
    teacher.add_argument(
        "--distillation", choices=("topk", "sampled"), help="for self_distillation: its 20 tokens (default), or one"
    )


def _make_teacher(args: argparse.Namespace) -> "TeacherSettings | None":
    """Make the settings of the teacher, and refuse options that the objective does not use."""
    from cutlm.errors import ConfigError
    from cutlm.flagging.teacher import NUM_COLUMNS, TeacherSettings

    shared = ("teacher_context", "teacher_sees_response")
    used = {
        "cut": (),
        "self_distillation": (*shared, "guidance", "distillation"),
        "redirect": (*shared, "redirect_strength"),
    }
    given = [name for names in used.values() for name in names if getattr(args, name) is not None]
    unused = [f"--{name}" for name in dict.fromkeys(given) if name not in used[args.objective]]
    if unused:
        raise ConfigError(f"{', '.join(unused)}: not used by --objective {args.objective}; leave them out")
    if args.objective == "cut":
        return None
    if args.base_url:
        raise ConfigError("--objective: a teacher needs a local model, because servers do not return its distributions")
    strength = args.redirect_strength if args.objective == "redirect" else args.guidance
    return TeacherSettings(
        args.teacher_context or "praise",
        bool(args.teacher_sees_response),
        1.0 if strength is None else strength,
        None if args.distillation == "sampled" else NUM_COLUMNS,
        flagged_only=args.objective == "redirect",
    )


def _read_threshold(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    score_file(args, _make_teacher(args))
    print(f"{args.out} has the token scores; cutlm inspect shows them. Next: {_suggest_training(args)}")
    return 0


def score_file(args: argparse.Namespace, teacher: "TeacherSettings | None" = None) -> None:
    """Score the records of `args.data`, write `args.out` and print counts."""
    _OPTIONS.fill(args)
    check_output(args, args.data)

    with importing_libraries():
        from cutlm.data.records import check_records, raise_problems
        from cutlm.flagging.detector import FlagSettings, blame_file
        from cutlm.prompting.encoding import describe_unused_template

    settings = FlagSettings(
        args.threshold,
        args.unlikelihood_weight,
        args.gamma,
        args.max_length,
        args.with_praise,
        args.contrast,
        args.num_foreign,
        args.surprise_weight,
        args.drop_ineffective,
        args.weigh_by_effect,
        teacher=teacher,
    )
    check = check_records(args.data, args.columns)
    raise_problems(check, describe_sources(args.data))
    tokenizer, score, detector, backend = _prepare_server(args) if args.base_url else _prepare_model(args, teacher)
    if unused := describe_unused_template(tokenizer, args.template):
        print(f"warning: {unused}")
    encoder = make_encoder(args, tokenizer, args.template)
    for sentence in encoder.describe_omissions(check.records):
        print(f"warning: {sentence}")
    try:
        report = blame_file(
            check.records,
            check.locations,
            args.out,
            encoder,
            score,
            settings,
            detector=detector,
            backend=backend,
            overwrite=args.overwrite,
            sensitivity_records=args.sensitivity_records,
        )
    except KeyboardInterrupt:
        if Path(f"{args.out}.partial").exists():
            print(f"\nprogress is saved in {args.out}.partial; run the same command to resume", file=sys.stderr)
        raise
    for sentence in report.left_out:
        print(sentence)
    if report.num_resumed:
        print(f"{report.num_resumed} records were scored by an interrupted run")
    print(report.describe())


def _prepare_model(
    args: argparse.Namespace, teacher: "TeacherSettings | None"
) -> "tuple[PreTrainedTokenizerBase, Scorer, str, dict[str, Any]]":
    from cutlm.errors import ConfigError
    from cutlm.flagging.scoring import load_scorer
    from cutlm.model.loading import is_adapter_folder

    if args.max_tokens_per_batch is not None and args.max_tokens_per_batch < 1:
        raise ConfigError(
            f"max_tokens_per_batch: expected a whole number of at least 1, got {args.max_tokens_per_batch}"
        )
    if args.base is not None and not is_adapter_folder(args.model):
        raise ConfigError(f"--base: only for an adapter, which {args.model} is not; remove it")
    return load_scorer(
        args.model,
        base=args.base,
        dtype=args.dtype,
        device=args.device,
        is_bf16=args.bf16,
        max_length=args.max_length,
        max_tokens_per_batch=args.max_tokens_per_batch,
        teacher=teacher,
    )


def _prepare_server(args: argparse.Namespace) -> "tuple[PreTrainedTokenizerBase, Scorer, str, dict[str, Any]]":
    from cutlm.flagging.server import score_rows_by_server
    from cutlm.model.loading import load_tokenizer
    from cutlm.servers.client import Client

    client = Client(make_server(args, args.model))
    tokenizer = load_tokenizer(args.tokenizer or args.model)

    def score(rows: Any, done: Any) -> Any:
        return score_rows_by_server(client, rows, done=done)

    server = client.server
    backend = {"extra_body": server.extra_body} if server.extra_body else {}
    return tokenizer, score, f"{server.url} {server.model}", backend


def _suggest_training(args: argparse.Namespace) -> str:
    import shlex

    from cutlm.model.loading import find_base_model, is_adapter_folder
    from cutlm.training.checkpoints import is_taught

    # The model's name on a server may mean nothing elsewhere.
    model, merging = args.tokenizer or args.model, ""
    if not args.base_url and is_taught(args.model):
        model = find_base_model(args.model, args.base)  # the adapter is for blame only
    elif not args.base_url and is_adapter_folder(args.model):
        # Training starts from a whole model.
        model = f"{args.model.rstrip('/')}-merged"
        command = ["cutlm", "merge", "--adapter", args.model, "--out", model]
        if args.base is not None:
            command += ["--base", args.base]
        merging = f"{shlex.join(command)}, then: "
    command = ["cutlm", "train", "--data", args.out, "--model_name_or_path", model]
    if args.template != "alpaca":
        command += ["--template", args.template]
    if args.chat_template_kwargs:
        command += ["--chat_template_kwargs", json.dumps(args.chat_template_kwargs)]
    if args.judgment_role == "system":
        command += ["--judgment_role", "system"]
    if getattr(args, "objective", "cut") != "cut":
        command += ["--objective", args.objective]
        for name in ("teacher_context", "teacher_sees_response", "guidance", "redirect_strength", "distillation"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name}", str(value)]
    if args.weigh_by_effect:
        # Without its detector, `cutlm train` refuses the setting before it reads the data.
        command += ["--detector", "frozen"] * (args.objective == "cut") + ["--weigh_by_effect"]
    if args.max_length != 2048:
        command += ["--max_length", str(args.max_length)]
    return merging + shlex.join([*command, "--output_dir", "runs/NAME"])
