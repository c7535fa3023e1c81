"""Write one self-contained HTML page of token scores: see which tokens each judgment flags, at any threshold.

  cutlm inspect --scores scores.jsonl --out report.html
  cutlm inspect --scores before.jsonl --scores after.jsonl --out report.html
  cutlm inspect --model MODEL --data records.jsonl --out report.html
  cutlm inspect --data records.jsonl --out report.html

The scores come from cutlm blame. Two files compare two models on the same records, such as before and after training;
records are paired by conversation, response and judgment. With --data alone, the page shows the passages that
the judge marked (wrong_spans). With --model, the records are first scored as cutlm blame does with the options below,
into a file next to the page (report.scores.jsonl). The page can be searched and sorted, and loads nothing from the
network."""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlm.cli.blame import add_scoring_arguments, score_file
from cutlm.cli.model_options import SOURCES, add_options, check_output
from cutlm.cli.reuse import list_given
from cutlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cutlm.flagging.token_scores import TokenScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scores = "token scores from cutlm blame; pass it twice to compare before and after training"
    parser.add_argument("--scores", action="append", metavar="FILE", help=scores)
    parser.add_argument(
        "--model", metavar="MODEL", help="instead of --scores: a model or adapter folder, GGUF file, or hub name"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=f"the records to score with --model, or marked by the judge: {SOURCES}",
    )
    add_options(parser, "columns")
    parser.add_argument(
        "--max_records",
        type=int,
        default=2000,
        metavar="N",
        help="records on the page, drawn at random if there are more; 0 shows all (default: 2000)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the page and, with --model, its scores")
    add_scoring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    if Path(args.out).is_dir():
        raise ConfigError(f"--out {args.out or repr('')}: expected a file to write, got a folder; name a file in it")
    files = args.scores or ([str(Path(args.out).with_suffix(".scores.jsonl"))] if args.model else args.data)
    check_output(args, [*files, *(args.data or [])])
    if args.model:
        score_file(argparse.Namespace(**vars(args) | {"out": files[0]}))
        print(f"{files[0]} holds the token scores")

    from cutlm.flagging.report import read_sensitivity
    from cutlm.flagging.token_scores import open_token_scores, read_token_scores
    from cutlm.inspect.page import PageRecord, write_page

    rows: list[tuple[TokenScores, ...]]
    if args.model or args.scores:
        rows, num_all, num_unpaired = _choose_rows(
            files, [open_token_scores(file) or read_token_scores(file) for file in files], args.max_records
        )
    else:
        rows, num_all = _mark_spans(args)
        num_unpaired = ()
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else files
    if not (args.model or args.scores):
        names = [", ".join(names)]  # one set of records; two names are two scores of each
    left_out = ""
    if len(rows) < num_all:
        left_out = f"{len(rows):,} of {num_all:,} records, drawn at random; --max_records 0 shows all."
    num_bytes = write_page(
        args.out,
        [PageRecord(row) for row in rows],
        lead=[left_out] if left_out else [],
        names=names,
        num_unpaired=num_unpaired,
        sensitivities=[read_sensitivity(file) for file in files],
    )
    if left_out:
        print(f"{args.out} shows {left_out}")
    pairs = "pairs of " if num_unpaired else ""
    print(f"{args.out}: {len(rows)} {pairs}records, {num_bytes / 1e6:.1f} MB; open it in a browser")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if args.max_records < 0:
        raise ConfigError(f"--max_records: expected a whole number of at least 0, got {args.max_records}")
    if args.scores and len(args.scores) > 2:
        raise ConfigError(f"--scores: expected one file or two, got {len(args.scores)}")
    if bool(args.scores) == bool(args.model or args.data) or (args.model and not args.data):
        got = " and ".join(name for name in ("--scores", "--model", "--data") if getattr(args, name[2:]))
        raise ConfigError(
            f"expected either --scores or both --model and --data, got {got or 'none of them'}; or --data alone, for"
            " records with wrong_spans"
        )
    given = list_given(args, add_scoring_arguments) + (["--columns"] if args.columns else [])
    if args.scores and given:
        raise ConfigError(f"{', '.join(given)}: used only with --model, because --scores are already computed; remove")
    if not args.model and (given := list_given(args, add_scoring_arguments)):
        raise ConfigError(f"{', '.join(given)}: used only with --model; set it, or remove")


def _mark_spans(args: argparse.Namespace) -> "tuple[list[tuple[TokenScores, ...]], int]":
    """Flag the passages that the judge marked in the records."""
    from cutlm.data.records import check_records, raise_problems
    from cutlm.data.sources import describe_sources
    from cutlm.inspect.tokens import mark_spans

    check = check_records(args.data, args.columns)
    raise_problems(check, describe_sources(args.data))
    if not any(record.wrong_spans for record in check.records):
        raise DataError(
            f"{describe_sources(args.data)}: expected records with wrong_spans, got none; set --model to score them"
        )
    records = check.records
    return [(mark_spans(records[place]),) for place in _draw(len(records), args.max_records)], len(records)


def _draw(num_records: int, max_records: int) -> Sequence[int]:
    """Draw the records to show, in their order; 0 shows all."""
    if not max_records or num_records <= max_records:
        return range(num_records)
    return sorted(random.Random(0).sample(range(num_records), max_records))


def _choose_rows(
    files: list[str], scores: "list[Sequence[TokenScores]]", max_records: int
) -> "tuple[list[tuple[TokenScores, ...]], int, tuple[int, ...]]":
    """Choose the records to show, and read the scores of each.

    Returns:
        The scores; the number of records from which they were chosen; for two files, how many records only one has,
        which is also printed.
    """
    from cutlm.flagging.token_scores import list_records
    from cutlm.inspect.tokens import has_same_tokens, pair_records

    if len(scores) == 1:
        return [(scores[0][place],) for place in _draw(len(scores[0]), max_records)], len(scores[0]), ()
    places, num_unpaired = pair_records(*map(list_records, scores))
    if not places:
        raise DataError(
            f"{files[0]} and {files[1]}: expected scores of the same records, found none with the same instruction,"
            " input, output and judgment in both; score one file of records with both models"
        )
    chosen = [places[number] for number in _draw(len(places), max_records)]
    pairs = [(scores[0][one], scores[1][other]) for one, other in chosen]
    for file, number in zip(files, num_unpaired, strict=True):
        if number:
            print(f"{file}: skipped {number} records that the other file does not have", file=sys.stderr)
    if num_other := sum(not has_same_tokens(*pair) for pair in pairs):
        print(f"{num_other} responses have different tokens in the second file and are not compared token by token")
    return [*pairs], len(places), num_unpaired
