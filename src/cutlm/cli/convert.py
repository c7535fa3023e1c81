"""Convert published judgment data to a file of records.

  shepherd       human_data_for_model.jsonl and human_data_raw.jsonl, or the folder that contains both
  critiques      OpenAI's critiques of summaries, one or more files
  ultrafeedback  UltraFeedback with instruction and completions, one or more files; with --pairs, preference pairs
  alpaca         rows that already have instruction, input, output and judgment, one or more files

Prints how many rows were read, kept and left out, and why. If a row is invalid, nothing is written and the exit code
is 2.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlm.cli.model_options import SOURCES, add_options
from cutlm.data.files import read_rows, refuse_overwriting, write_rows
from cutlm.errors import DataError, UserError

if TYPE_CHECKING:
    from cutlm.data.convert import Conversion

CONVERTERS = ("alpaca", "critiques", "shepherd", "ultrafeedback")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", choices=CONVERTERS, help=" | ".join(CONVERTERS))
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help=SOURCES)
    add_options(parser, "columns")
    out = "one array if it ends in .json, else JSON Lines; also .gz, .xz, .zst"
    parser.add_argument("--out", metavar="FILE", required=True, help=out)
    pairs = "ultrafeedback: write prompt, chosen and rejected, as TRL's trainers read"
    parser.add_argument("--pairs", action="store_true", help=pairs)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.records import check_rows, raise_problems

    if args.pairs and args.source != "ultrafeedback":
        raise UserError(f"--pairs: expected the source 'ultrafeedback', got {args.source!r}; remove --pairs")
    paths = _find_files(args.source, args.inputs)
    refuse_overwriting(paths, args.out)
    conversion = _convert(args.source, paths, args.columns, args.pairs)

    reasons = [f"{count} left out: {reason}" for reason, count in conversion.left_out.most_common()]
    num_read, num_kept = conversion.num_read, len(conversion.rows)
    if not num_kept:
        problem = f"{' '.join(args.inputs)}: nothing to write; {num_read} {conversion.unit} were read, none was kept"
        raise DataError([problem, *reasons])
    rows = [row.value for row in conversion.rows]
    summary = ""
    if not args.pairs:
        check = check_rows(conversion.rows)
        raise_problems(check, " ".join(args.inputs))
        rows = [row | {"judgment": row.get("judgment")} for row in rows]
        summary = f", {check.num_satisfactory} satisfactory, {check.num_unsatisfactory} unsatisfactory"
        if num_without := sum("judgment" not in record.model_fields_set for record in check.records):
            reasons.append(f"{num_without} records have no field 'judgment' and count as satisfactory")
    write_rows(args.out, rows)
    print(f"{num_read} {conversion.unit} read, {num_kept} kept, {conversion.left_out.total()} left out")
    for reason in reasons:
        print(reason)
    print(f"{args.out}: {num_kept} {'pairs' if args.pairs else 'records'}{summary}")
    return 0


def _find_files(source: str, inputs: Sequence[str]) -> Sequence[str | Path]:
    """Return the files to read; Shepherd's two files may be given as their folder."""
    from cutlm.data.convert import shepherd

    if source != "shepherd":
        return inputs
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        return [Path(inputs[0]) / name for name in shepherd.FILE_NAMES]
    if len(inputs) != 2:
        names = " and ".join(shepherd.FILE_NAMES)
        raise UserError(f"shepherd: expected two files, {names}, or the folder of both, got {len(inputs)} inputs")
    return inputs


def _convert(source: str, paths: Sequence[str | Path], columns: Mapping[str, str] | None, pairs: bool) -> "Conversion":
    from cutlm.data.convert import alpaca, critiques, shepherd, ultrafeedback

    files, problems = [], []
    for path in paths:
        rows, invalid = read_rows(path, columns)
        files.append(rows)
        problems.extend(invalid)
    # Before converting: if a line is missing, Shepherd's two files do not match from there on.
    if problems:
        raise DataError(problems)
    if source == "shepherd":
        return shepherd.convert(*files)
    rows = [row for rows in files for row in rows]
    if source == "ultrafeedback":
        return ultrafeedback.convert_to_pairs(rows) if pairs else ultrafeedback.convert(rows)
    return critiques.convert(rows) if source == "critiques" else alpaca.convert(rows)
