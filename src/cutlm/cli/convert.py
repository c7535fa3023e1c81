"""Convert published judgment data to a file of records.

  shepherd       human_data_for_model.jsonl and human_data_raw.jsonl, or the folder that contains both
  critiques      OpenAI's critiques of summaries, one or more files
  ultrafeedback  UltraFeedback with instruction and completions, one or more files; with --pairs, preference pairs
  prometheus     Feedback Collection and Preference Collection
  helpsteer      HelpSteer, HelpSteer2, HelpSteer3: all subsets with responses; ratings alone are for --unjudged
  pairs          preference pairs, as for DPO (also UltraFeedback binarized), or responses with a label, as for KTO: the
                 preferred responses become satisfactory records, --unjudged gets the others
  conversations  chat logs (messages, ShareGPT, WildChat, ChatGPT's export): the user's next message is the judgment;
                 --feedback decides which replies are feedback
  alpaca         rows that already have instruction, input, output and judgment

Each reads one or more files, globs, folders or data sets of the hub (docs/data.md). Responses of helpsteer, pairs and
conversations about which nothing is said in words are unjudged: --unjudged writes them for cutlm judge. Those of other
sources are left out.

Prints how many rows were read, kept and left out, and why; for conversations, OUT.left_out.jsonl lists the responses
left out. If a row is invalid, nothing is written and the exit code is 2.

--feedback rules takes replies in which a rule finds an objection or approval: English phrases, or a function of yours
(--rules package.module:function) that gets the conversation, the response and the reply, and returns the judgment, true
for the reply itself, or null. --feedback http asks a model on a server. --feedback sensitivity scores the response with
a local model and keeps replies that shift its probabilities more than replies to other responses do. A run that was
stopped resumes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.feedback import Selection, add_feedback_arguments, check_feedback_options, select_feedback
from cutlm.cli.model_options import SOURCES, add_options
from cutlm.data.files import check_out_file, read_rows, write_rows
from cutlm.errors import DataError, UserError

if TYPE_CHECKING:
    from cutlm.data.convert import Conversion

CONVERTERS = ("alpaca", "conversations", "critiques", "helpsteer", "pairs", "prometheus", "shepherd", "ultrafeedback")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", choices=CONVERTERS, help=" | ".join(CONVERTERS))
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help=SOURCES)
    add_options(parser, "columns")
    out = "one array if it ends in .json, else JSON Lines; also .gz, .xz, .zst"
    parser.add_argument("--out", metavar="FILE", required=True, help=out)
    unjudged = "file for responses that have no judgment, to be judged by cutlm judge --responses FILE"
    parser.add_argument("--unjudged", metavar="FILE", help=unjudged)
    pairs = "ultrafeedback: write prompt, chosen and rejected, as TRL's trainers read"
    parser.add_argument("--pairs", action="store_true", help=pairs)
    add_feedback_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.records import check_rows, raise_problems

    if args.pairs and args.source != "ultrafeedback":
        raise UserError(f"--pairs: expected the source 'ultrafeedback', got {args.source!r}; remove --pairs")
    check_feedback_options(args)
    paths = _find_files(args.source, args.inputs)
    for out in filter(None, (args.out, args.unjudged)):
        check_out_file(paths, out)
    if args.unjudged and Path(args.unjudged).resolve() == Path(args.out).resolve():
        raise UserError(f"--unjudged {args.unjudged}: expected another file than --out; choose another name")
    conversion = _convert(args.source, paths, args.columns, args.pairs)
    selection = select_feedback(args, conversion) if args.source == "conversations" else Selection()

    reasons = selection.sentences
    reasons += [f"{count} left out: {reason}" for reason, count in conversion.left_out.most_common()]
    reasons += _write_list(conversion.listed, args.out)
    num_read, num_kept = conversion.num_read, len(conversion.rows)
    num_unjudged = len(conversion.unjudged)
    if num_unjudged and not args.unjudged:
        reasons.append(f"{num_unjudged} responses have no judgment; --unjudged FILE writes them for cutlm judge")
    if not num_kept and not (num_unjudged and args.unjudged) and not selection.num_undecided:
        if selection.journal is not None:
            selection.journal.remove()
        problem = f"{' '.join(args.inputs)}: nothing to write; {num_read} {conversion.unit} were read, none was kept"
        raise DataError([problem, *reasons])
    rows = [row.value for row in conversion.rows]
    summary = ""
    if rows and not args.pairs:
        check = check_rows(conversion.rows)
        raise_problems(check, " ".join(args.inputs))
        rows = [row | {"judgment": row.get("judgment")} for row in rows]
        summary = f", {check.num_satisfactory} satisfactory, {check.num_unsatisfactory} unsatisfactory"
        if num_without := sum("judgment" not in record.model_fields_set for record in check.records):
            reasons.append(f"{num_without} records have no field 'judgment' and count as satisfactory")
    if args.unjudged:
        write_rows(args.unjudged, [row.value for row in conversion.unjudged])
        reasons.append(f"{args.unjudged}: {num_unjudged} responses to judge")
    without = f", {num_unjudged} unjudged" if num_unjudged else ""
    print(f"{num_read} {conversion.unit} read, {num_kept} kept{without}, {conversion.left_out.total()} left out")
    for reason in reasons:
        print(reason)
    if rows:
        write_rows(args.out, rows)
        print(f"{args.out}: {num_kept} {'pairs' if args.pairs else 'records'}{summary}")
    else:
        print(f"{args.out}: not written, because there are no judgments")
    if selection.journal is not None:
        selection.journal.remove()
    if selection.num_undecided:
        print("run it again with the same options to ask only about the replies about which nothing is decided")
    return 1 if selection.num_undecided else 0


def _write_list(rows: Sequence[dict[str, Any]], out: str) -> list[str]:
    """Write the omitted responses next to the records, or remove an earlier list; return a sentence about the file."""
    path = Path(f"{out}.left_out.jsonl")
    if not rows:
        path.unlink(missing_ok=True)
        return []
    write_rows(path, rows)
    return [f"{path}: {len(rows)} responses that are not kept, each with the reason"]


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


def _convert(
    source: str, paths: Sequence[str | Path], columns: Mapping[str, str] | None, has_pairs: bool
) -> "Conversion":
    from cutlm.data.convert import (
        alpaca,
        conversations,
        critiques,
        helpsteer,
        pairs,
        prometheus,
        shepherd,
        ultrafeedback,
    )

    converters = {
        "alpaca": alpaca.convert,
        "conversations": conversations.convert,
        "critiques": critiques.convert,
        "helpsteer": helpsteer.convert,
        "pairs": pairs.convert,
        "prometheus": prometheus.convert,
        "ultrafeedback": ultrafeedback.convert_to_pairs if has_pairs else ultrafeedback.convert,
    }
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
    return converters[source]([row for rows in files for row in rows])
