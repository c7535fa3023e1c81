"""The tiny world: instructions with known answers, an oracle that judges responses, and a base model with known flaws,
for studying alignment with judgments on a CPU."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    tasks = actions.add_parser(
        "tasks",
        help="write instructions whose answers the oracle knows",
        description="Write the instructions of a split to a file. To judge responses to them:\n"
        "  cutlm judge --responses FILE --judge rules --rules cutlm.world.judge:judge --out FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tasks.add_argument("--split", choices=("train", "dev", "test"), default="train", help="default: train")
    tasks.add_argument("--num", type=int, metavar="N", help="only the first N (default: all)")
    tasks.add_argument("--out", required=True, metavar="FILE", help="output file")
    tasks.set_defaults(run_action=_tasks)

    mark = actions.add_parser(
        "mark",
        help="add wrong spans to records of the world's tasks",
        description="Add wrong_spans and the task's family to records of responses to the world's tasks, according to\n"
        "the oracle. To measure detection with them: cutlm eval detection --by family",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mark.add_argument("--records", required=True, metavar="FILE", help="records, as cutlm judge writes them")
    mark.add_argument("--out", required=True, metavar="FILE", help="output file")
    mark.set_defaults(run_action=_mark)


def run(args: argparse.Namespace) -> int:
    return args.run_action(args)


def _tasks(args: argparse.Namespace) -> int:
    from cutlm.data.files import write_rows
    from cutlm.errors import UserError
    from cutlm.world.tasks import list_tasks

    tasks = list_tasks(args.split)
    num = len(tasks) if args.num is None else args.num
    if not 1 <= num <= len(tasks):
        raise UserError(f"--num: expected 1 to {len(tasks)}, the number of {args.split} tasks, got {num}")
    rows = ({"instruction": task.instruction, "family": task.family} for task in tasks[:num])
    print(f"Wrote {write_rows(args.out, rows)} instructions to {args.out}")
    return 0


def _mark(args: argparse.Namespace) -> int:
    from cutlm.data.files import check_out_file, write_rows
    from cutlm.data.records import load_records
    from cutlm.world.judge import find_task, judge_task

    check_out_file([args.records], args.out)
    rows = []
    for record in load_records(args.records):
        task = find_task(record.instruction)
        spans = judge_task(task, record.output).wrong_spans
        marks = {"wrong_spans": [list(span) for span in spans] or None, "family": task.family}
        rows.append(record.model_dump(mode="json", exclude_unset=True) | marks)
    num_marked = sum(row["wrong_spans"] is not None for row in rows)
    print(f"Wrote {write_rows(args.out, rows)} records to {args.out}, {num_marked} of them with wrong_spans")
    return 0
