"""Make one self-contained HTML page of token scores: every token shaded by what the judgment changes, flags at any
threshold, search, and with two files what training changed.

  cutlm inspect --scores scores.jsonl --out report.html
  cutlm inspect --scores before.jsonl --scores after.jsonl --out report.html
  cutlm inspect --model MODEL --data records.jsonl --out report.html

The scores are those of cutlm blame. Two files hold the scores that two models give to the same records; records are
paired by instruction, input, response and judgment. With --model the records are scored first, as cutlm blame does with
the options below, into a file beside the page (report.scores.jsonl). The page loads nothing from anywhere."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cutlm.cli.blame import add_scoring_arguments, score_file
from cutlm.cli.reuse import list_given

if TYPE_CHECKING:
    from cutlm.blame.token_scores import TokenScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores",
        action="append",
        metavar="FILE",
        help="token scores, as of cutlm blame; twice: before and after training",
    )
    parser.add_argument("--model", metavar="MODEL", help="in place of --scores: a model or adapter folder, or hub name")
    parser.add_argument("--data", metavar="FILE", help="the records that --model scores: JSON array or JSON Lines")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the page, and the scores that --model made")
    add_scoring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cutlm.data.files import refuse_overwriting
    from cutlm.errors import ConfigError, UserError

    _check_options(args)
    if Path(args.out).is_dir():
        raise ConfigError(
            f"--out {args.out or repr('')}: expected a file to write, got a folder; name a file inside it"
        )
    files = args.scores or [str(Path(args.out).with_suffix(".scores.jsonl"))]
    refuse_overwriting([*files, *([args.data] if args.data else [])], args.out)
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists; name another file, or replace it with --overwrite")
    if args.model:
        score_file(argparse.Namespace(**vars(args) | {"out": files[0]}))
        print(f"{files[0]} holds the token scores")

    from cutlm.blame.token_scores import read_token_scores
    from cutlm.inspect.columns import make_columns
    from cutlm.inspect.inspection import write_inspection

    scores = [read_token_scores(file) for file in files]
    rows, num_unpaired = _put_together(files, scores)
    num_bytes = write_inspection(args.out, make_columns(_shorten(files), rows, num_unpaired))
    print(
        f"{args.out}: {len(rows)} {'pairs of ' if num_unpaired else ''}records, {num_bytes / 1e6:.1f} MB;"
        " open it in a browser"
    )
    return 0


def _check_options(args: argparse.Namespace) -> None:
    from cutlm.errors import ConfigError

    if args.scores and len(args.scores) > 2:
        raise ConfigError(f"--scores: expected one file or two, got {len(args.scores)}; leave some out")
    if args.scores and (args.model or args.data):
        raise ConfigError("--scores: of no use with --model and --data; give the scores, or what to make them of")
    if not args.scores and not (args.model and args.data):
        raise ConfigError("expected --scores FILE, or --model MODEL and --data FILE; give the one or the other")
    given = list_given(args, add_scoring_arguments)
    if args.scores and given:
        raise ConfigError(f"{', '.join(given)}: of use with --model alone, for the scores are there; leave out")


def _put_together(
    files: list[str], scores: "list[list[TokenScores]]"
) -> "tuple[list[tuple[TokenScores, ...]], tuple[int, ...]]":
    """The scores of each record, and of two files what the other does not have, which is printed."""
    from cutlm.errors import DataError
    from cutlm.inspect.tokens import has_same_tokens, pair_scores

    if len(scores) == 1:
        return [(one,) for one in scores[0]], ()
    pairs, num_unpaired = pair_scores(*scores)
    if not pairs:
        raise DataError(
            f"{files[0]} and {files[1]}: expected scores of the same records, got none with the same instruction,"
            " input, output and judgment in both; score one file of records with both models"
        )
    for file, number in zip(files, num_unpaired, strict=True):
        if number:
            print(f"{file}: {number} records are not in the other file, and are left out", file=sys.stderr)
    num_other = sum(not has_same_tokens(*pair) for pair in pairs)
    if num_other:
        print(f"{num_other} responses are split into other tokens in the second file: not compared token by token")
    return [*pairs], num_unpaired


def _shorten(files: list[str]) -> list[str]:
    """The names of files without their folders, where that tells them apart."""
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else files
