"""The tiny world: instructions with verifiable answers, an oracle that judges, and a base model with known flaws, to
study alignment by judgments on a CPU."""

import argparse
import os

TABLES = ("methods", "ablations", "iterations", "rewards", "detection")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="train the world's base model from nothing, on a CPU",
        description="Train the world's base model from nothing, on a CPU: the one that comes with the package.",
        allow_abbrev=False,
    )
    build.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and corpus (default: 0)")
    build.add_argument("--num-steps", type=int, metavar="N", help="stop early, to try that everything runs")
    build.set_defaults(run_action=_build)
    compare = actions.add_parser(
        "compare",
        help="train by each method on the base model's responses, and measure",
        description="Train by each method on the base model's responses, and measure: tables, plots and JSON.\n"
        "What was run once is kept, and not run again by the same code.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("table", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    compare.add_argument("--out", metavar="DIR", help="where to (default: experiments, or experiments-quick)")
    compare.add_argument("--quick", action="store_true", help="one seed, a few steps: to see that everything runs")
    compare.add_argument("--seeds", type=int, metavar="N", help="seeds to test (default: 5; with --quick: 1)")
    compare.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    compare.add_argument("--cache", metavar="DIR", help="where results of runs are kept (default: OUT/.runs)")
    compare.set_defaults(run_action=_compare)
    tasks = actions.add_parser(
        "tasks",
        help="write instructions that the world's judge knows the answers to",
        description="Write instructions of a split to a file. Judge responses to them by\n"
        "  cutlm judge --judge rules --rules cutlm.world.judge:judge",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tasks.add_argument("--split", choices=("train", "dev", "test"), default="train", help="default: train")
    tasks.add_argument("--num", type=int, metavar="N", help="the first N (default: all)")
    tasks.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    tasks.set_defaults(run_action=_tasks)
    mark = actions.add_parser(
        "mark",
        help="put where responses are wrong into records of the world's tasks",
        description="Put wrong_spans and the task's family into records of responses to the world's tasks, as its\n"
        "oracle knows them, to measure by: cutlm eval detection --by family",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mark.add_argument("--records", required=True, metavar="FILE", help="as cutlm judge writes them")
    mark.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    mark.set_defaults(run_action=_mark)


def run(args: argparse.Namespace) -> int:
    # Where others use the processor too, threads that wait by spinning make this three times as slow. Read by the
    # OpenMP library when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return args.run_action(args)


def _tasks(args: argparse.Namespace) -> int:
    from cutlm.data.files import write_rows
    from cutlm.errors import UserError
    from cutlm.world.tasks import list_tasks

    tasks = list_tasks(args.split)
    num = len(tasks) if args.num is None else args.num
    if not 1 <= num <= len(tasks):
        raise UserError(f"--num: expected a number from 1 to {len(tasks)}, the size of split {args.split}, got {num}")
    rows = ({"instruction": task.instruction, "family": task.family} for task in tasks[:num])
    print(f"{write_rows(args.out, rows)} instructions in {args.out}")
    return 0


def _mark(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting, write_rows
    from cutlm.data.records import load_records
    from cutlm.world.judge import find_task, judge_task

    refuse_overwriting([args.records], args.out)
    rows = []
    for record in load_records(args.records):
        task = find_task(record.instruction)
        spans = judge_task(task, record.output).wrong_spans
        marks = {"wrong_spans": [list(span) for span in spans] or None, "family": task.family}
        rows.append(record.model_dump(mode="json", exclude_unset=True) | marks)
    num_marked = sum(row["wrong_spans"] is not None for row in rows)
    print(f"{write_rows(args.out, rows)} records in {args.out}, {num_marked} of them with wrong_spans")
    return 0


def _build(args: argparse.Namespace) -> int:
    from cutlm.errors import UserError
    from cutlm.world.base import NUM_STEPS, build_base

    num_steps = NUM_STEPS if args.num_steps is None else args.num_steps
    if num_steps < 1:
        raise UserError(f"--num-steps: expected a whole number of at least 1, got {num_steps}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed: expected a whole number from 0 to {2**32 - 1}, got {args.seed}")
    if build_base(args.out, args.seed, num_steps):
        print(f"the base model is in {args.out}")
    else:
        print(f"{args.out} holds this base model already, by the same recipe; nothing was done")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from cutlm.errors import UserError

    unknown = [name for name in args.table if name not in TABLES]
    if unknown:
        raise UserError(f"TABLE: expected some of {', '.join(TABLES)}, got {', '.join(unknown)}")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: expected a whole number of at least 1, got {args.workers}")

    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds: expected a whole number of at least 1, got {args.seeds}")

    from dataclasses import replace

    from cutlm.world.base import base_path
    from cutlm.world.compare import QUICK, Size, compare_table
    from cutlm.world.pool import Pool, hash_code, hash_folder
    from cutlm.world.tables import write_results

    # What is only tried does not take the place of the real tables.
    out = Path(args.out or ("experiments-quick" if args.quick else "experiments"))
    size = QUICK if args.quick else Size()
    if args.seeds is not None:
        size = replace(size, seeds=tuple(range(1, args.seeds + 1)))
    base = hash_folder(base_path())
    with Pool(Path(args.cache) if args.cache else out / ".runs", f"{base} {hash_code()}", args.workers) as pool:
        for name in args.table or TABLES:
            rows = compare_table(name, pool.run_all, size)
            command = f"cutlm world compare {name}" + " --quick" * args.quick
            command += "" if args.seeds is None else f" --seeds {args.seeds}"
            write_results(out, name, rows, size.seeds, command, base)
            print((out / f"{name}.md").read_text("utf-8"))
    print(f"tables, plots and JSON are in {out}")
    return 0
