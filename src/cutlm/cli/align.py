"""The online loop: a model answers new instructions, a judge judges the answers, the model learns from it; repeat.

Settings come from a flat YAML file (--config) and from options, which take precedence: those of cutlm train except
data, and

  instructions      a file of instructions to sample from    num_iterations    iterations (default 5)
  num_instructions  new ones per iteration (default 1000)    output_dir        a folder for everything
  generate          options for cutlm generate, such as "--temperature 1 --num_samples 4 --base_url URL"
  judge             a kind of judge and options for cutlm judge, such as "rules --rules package.module:function"
  max_failure_rate  largest tolerated share of responses without a judgment, and of instructions without an
                    answer (default 0.02)
  eval_instructions held-out instructions; every model's answers to them are judged by eval_judge (default: judge)
  eval_command      a shell command; {model} is the model, {out} a JSON file of metrics that it writes
  teacher_gain_records
                    for objectives with a teacher: unsatisfactory records on which each iteration compares its prompt
                    with the plain one by the judge (default 64; 0: off)
  server_command    a shell command that serves {model} while responses are generated (generate has --base_url)
  server_timeout    seconds to wait for the server's first answer (default 1800)
  launcher          a command that starts training, such as "torchrun --nproc_per_node 8"

  cutlm align --config my.yaml                     # start, or resume
  cutlm align --config my.yaml --until 1.judge     # stop after a stage, to look at its files
  cutlm align --config my.yaml --from 1.blame      # run a stage and all later ones again
  cutlm align --config my.yaml --status            # show the progress

Each stage is another cutlm command and leaves its file in output_dir/iteration-N, where manifest.json lists the
complete stages. The loop can be killed at any time: started again, it neither repeats nor loses complete work."""

import argparse
import shlex
import sys
from typing import Any, NoReturn

from cutlm.cli import generate, judge
from cutlm.errors import ConfigError

# Options that the loop itself sets.
_LOOP_OPTIONS = {
    "generate": (
        *("model", "prompts", "out", "seed", "overwrite", "template", "tokenizer", "max_failure_rate"),
        *("chat_template_kwargs", "template_date", "judgment_role"),
    ),
    "judge": ("responses", "judge", "out", "overwrite", "labels", "compare_prompts"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage: judge, 2.judge, or 2")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all later ones again")
    parser.add_argument("--status", action="store_true", help="print the progress and exit")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and exit")


def run(args: argparse.Namespace) -> int:
    from cutlm.loop.loop import collect_metrics, list_iterations, read_stage_ref, run_loop
    from cutlm.loop.processes import Interrupted
    from cutlm.loop.report import make_status, make_summary, summarize
    from cutlm.loop.settings import read_plan
    from cutlm.loop.stages import StageFailed, WaitingForPerson

    plan = read_plan(args.config, args.rest, parse_stage_options)
    if args.dry_run:
        import yaml

        print(yaml.safe_dump(plan.resolved, sort_keys=False, allow_unicode=True), end="")
        return 0
    if args.status:
        iterations = collect_metrics(plan)
        table = make_summary([summarize(iteration) for iteration in iterations])
        print(f"{make_status(iterations)}\n\n{table}" if iterations else f"no iteration has started in {plan.folder}")
        return 0
    until = read_stage_ref(plan, "--until", args.until) if args.until else None
    start = read_stage_ref(plan, "--from", args.start) if args.start else None
    again = shlex.join(["cutlm", "align", *(["--config", args.config] if args.config else []), *args.rest])
    try:
        is_complete = run_loop(plan, until=until, start=start)
    except StageFailed as error:
        print(f"cutlm align: {error}", file=sys.stderr)
        return error.status
    except WaitingForPerson as waiting:
        print(f"Fill in {waiting.labels} (or the .jsonl file next to it), then resume with:\n  {again}")
        return 0
    except Interrupted as stopped:
        print(f"\nStopped; resume with:\n  {again}", flush=True)
        return 128 + stopped.number
    if not is_complete:
        print(f"Stopped after {args.until}; resume with:\n  {again}")
        return 0
    print(make_summary([summarize(iteration) for iteration in collect_metrics(plan)]))
    model = shlex.quote(list_iterations(plan)[-1].new_model)
    print(
        f"{plan.arguments.num_iterations} iterations are complete, see {plan.folder}/report.md and report.png. Next:\n"
        f"  cutlm generate --model {model} --prompts FILE --out FILE"
    )
    return 0


class _OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_stage_options(command: str, text: str) -> dict[str, Any]:
    """Parse the options that a setting passes on to `cutlm generate` or `cutlm judge`, and return all of its options.

    The text is as on a command line, for judge with the kind of judge first. Raise ConfigError if an option is unknown
    or invalid, or if the loop sets it itself.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"expected options as on a command line, got {text!r} ({error})") from None
    names = [f"--{name}" for name in _LOOP_OPTIONS[command]]
    if own := [option for option in options if option.partition("=")[0] in names]:
        raise ConfigError(f"{', '.join(own)}: set by the loop itself; remove it")
    parser = _OptionParser(prog=f"cutlm {command}", allow_abbrev=False)
    if command == "generate":
        generate.add_arguments(parser)
        fixed = ["--model=-", "--prompts=-", "--out=-", "--template=alpaca"]
    else:
        judge.add_arguments(parser)
        fixed = ["--responses=-", "--out=-", "--judge", *options[:1]]
        options = options[1:]
    parsed, rest = parser.parse_known_args([*fixed, *options])
    if rest:
        raise ConfigError(f"unknown arguments of cutlm {command}: {' '.join(rest)}")
    if command == "generate":
        generate.check_options(parsed)
    else:
        judge.fill_options(parsed)
    return vars(parsed)
