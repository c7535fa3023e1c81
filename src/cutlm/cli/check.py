"""Check a file of records: report every invalid row (location, field, expected, got), duplicates, and the counts.

Also names valid records that are probably wrong: a judgment that reads like praise but counts as an objection, a score
outside 1 to 10 or at odds with the judgment, fields that are ignored. Exits with 2 if a row is invalid or the file has
no rows; warnings do not change the exit code.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a JSON array or JSON Lines, plain or compressed (.gz, .xz)")


def run(args: argparse.Namespace) -> int:
    from cutlm.data.doubts import describe_doubts
    from cutlm.data.records import check_records
    from cutlm.errors import MAX_PROBLEMS_SHOWN

    check = check_records(args.file)
    for problem in check.problems:
        print(problem, file=sys.stderr)
    for duplicate in check.duplicates:
        print(duplicate)
    num_invalid = check.num_rows - len(check.records)
    print(f"{args.file}: {check.num_rows} rows, {num_invalid} invalid, {len(check.duplicates)} duplicates")
    print(
        f"{len(check.records)} records: {check.num_satisfactory} satisfactory,"
        f" {check.num_unsatisfactory} unsatisfactory"
    )
    if num_marked := sum(bool(record.wrong_spans) for record in check.records if not record.is_satisfactory):
        print(f"{num_marked} unsatisfactory records have wrong_spans, which detector: spans trains on")
    if num_without := sum("judgment" not in record.model_fields_set for record in check.records):
        print(f"{num_without} records have no field 'judgment' and count as satisfactory")
    for doubt in describe_doubts(check.records, check.locations, MAX_PROBLEMS_SHOWN):
        print(f"warning: {doubt}")
    if not check.num_rows:
        print(f"{args.file}: no records; expected at least one", file=sys.stderr)
    return 2 if num_invalid or not check.num_rows else 0
