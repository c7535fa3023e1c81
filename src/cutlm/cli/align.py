"""The online loop: a model answers fresh instructions, a judge says what is wrong, the model learns from it; and again.

Settings come from a flat YAML file (--config) and from options, which take precedence: those of cutlm train, without
data, and

  instructions      a file of instructions to draw from      num_iterations    rounds (default 5)
  num_instructions  fresh ones a round (default 1000)        output_dir        a folder for everything
  generate          options of cutlm generate, such as "--temperature 1 --num_samples 4 --base_url URL"
  judge             a kind of judge and options of cutlm judge, such as "rules --rules package.module:function"
  max_failure_rate  largest share of responses without a judgment, and of instructions without an answer from a
                    server, with which a round goes on (default 0.02)
  eval_instructions held-out instructions; every model's answers to them are judged by eval_judge (default: judge)
  eval_command      a shell command; {model} is the model, {out} a JSON file of figures that it writes
  server_command    a shell command that serves {model} while responses are generated (generate has --base_url)
  launcher          what training is started by, such as "torchrun --nproc_per_node 8"

  cutlm align --config my.yaml                     start, or go on after whatever stopped it
  cutlm align --config my.yaml --until 1.judge     stop after a stage, to look at what it made
  cutlm align --config my.yaml --from 1.blame      have a stage and all after it made anew
  cutlm align --config my.yaml --status            what is done

Each stage is one of the other commands and leaves its file in output_dir/iteration-N; manifest.json there says which
stages are complete. Killed at any time and started again, finished work is neither repeated nor lost."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlm.loop.settings import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage: judge, 2.judge, or 2")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="have this stage and all after it made anew")
    parser.add_argument("--status", action="store_true", help="print what is done, and stop")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")


def run(args: argparse.Namespace) -> int:
    from cutlm.loop.judging import WaitingForPerson
    from cutlm.loop.loop import read_mark, run_loop
    from cutlm.loop.processes import Interrupted
    from cutlm.loop.runner import StageFailed
    from cutlm.loop.settings import read_plan

    plan = read_plan(args.config, args.rest)
    if args.dry_run:
        import yaml

        print(yaml.safe_dump(plan.resolved, sort_keys=False, allow_unicode=True), end="")
        return 0
    if args.status:
        _print_status(plan)
        return 0
    until = read_mark(plan, "--until", args.until) if args.until else None
    start = read_mark(plan, "--from", args.start) if args.start else None
    again = shlex.join(["cutlm", "align", *(["--config", args.config] if args.config else []), *args.rest])
    try:
        is_complete = run_loop(plan, until=until, start=start)
    except StageFailed as error:
        print(f"cutlm align: {error}", file=sys.stderr)
        return error.status
    except WaitingForPerson as waiting:
        print(f"{waiting.todo} (or the .jsonl beside it) waits to be filled; then go on with:\n  {again}")
        return 0
    except Interrupted as stopped:
        print(f"\nStopped; go on with:\n  {again}", flush=True)
        return 128 + stopped.number
    if not is_complete:
        print(f"Stopped after {args.until}, as asked; go on with:\n  {again}")
        return 0
    _print_end(plan)
    return 0


def _print_status(plan: "Plan") -> None:
    from cutlm.loop.loop import collect_figures
    from cutlm.loop.report import make_status, make_table, summarize

    iterations = collect_figures(plan)
    if not iterations:
        print(f"nothing is done yet in {plan.folder}")
        return
    print(f"{make_status(iterations)}\n\n{make_table([summarize(iteration) for iteration in iterations])}")


def _print_end(plan: "Plan") -> None:
    from cutlm.loop.loop import collect_figures, list_places
    from cutlm.loop.report import make_table, summarize

    print(make_table([summarize(iteration) for iteration in collect_figures(plan)]))
    model = shlex.quote(list_places(plan)[-1].new_model)
    print(
        f"{plan.arguments.num_iterations} iterations are complete: {plan.folder}/report.md, report.png. Next:\n"
        f"  cutlm generate --model {model} --prompts FILE --out FILE"
    )
