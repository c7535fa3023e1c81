"""Check records: report every invalid row (location, field, expected, got), duplicates, and the counts.

Also names valid records that are probably wrong: a judgment that reads like praise but counts as an objection, a score
outside 1 to 10 or at odds with the judgment, fields that are ignored. Exits with 2 if a row is invalid or the file has
no rows; warnings do not change the exit code.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from cutlm.cli.model_options import SOURCES, add_options
from cutlm.errors import MAX_PROBLEMS_SHOWN, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="FILE", nargs="+", help=f"records: {SOURCES}")
    add_options(parser, "columns")
    shown = f"problems, duplicates and locations to list (default: {MAX_PROBLEMS_SHOWN}); the counts are of all"
    parser.add_argument("--max_problems", type=int, default=MAX_PROBLEMS_SHOWN, metavar="N", help=shown)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.doubts import describe_doubts
    from cutlm.data.records import check_records
    from cutlm.data.sources import describe_sources

    if args.max_problems < 1:
        raise ConfigError(f"--max_problems: expected a whole number of at least 1, got {args.max_problems}")
    name = describe_sources(args.data)
    check = check_records(args.data, args.columns)
    _list(check.problems, args.max_problems, "problems", sys.stderr)
    _list(check.duplicates, args.max_problems, "duplicates", sys.stdout)
    num_invalid = check.num_rows - len(check.records)
    print(f"{name}: {check.num_rows} rows, {num_invalid} invalid, {len(check.duplicates)} duplicates")
    print(
        f"{len(check.records)} records: {check.num_satisfactory} satisfactory,"
        f" {check.num_unsatisfactory} unsatisfactory"
    )
    if num_marked := sum(bool(record.wrong_spans) for record in check.records if not record.is_satisfactory):
        print(f"{num_marked} unsatisfactory records have wrong_spans, which detector: spans trains on")
    if num_without := sum("judgment" not in record.model_fields_set for record in check.records):
        print(f"{num_without} records have no field 'judgment' and count as satisfactory")
    for doubt in describe_doubts(check.records, check.locations, args.max_problems):
        print(f"warning: {doubt}")
    if not check.num_rows:
        print(f"{name}: no records; expected at least one", file=sys.stderr)
    return 2 if check.problems or not check.num_rows else 0


def _list(sentences: Sequence[str], max_shown: int, what: str, stream: TextIO) -> None:
    for sentence in sentences[:max_shown]:
        print(sentence, file=stream)
    if len(sentences) > max_shown:
        print(f"... and {len(sentences) - max_shown} more {what}; --max_problems sets how many are listed", file=stream)
