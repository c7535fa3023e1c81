"""Measure how well flags find the wrong tokens, if these are known: precision, recall and F1 over thresholds, and
average precision.

  cutlm blame --model MODEL --data records.jsonl --out scores.jsonl
  cutlm eval detection --scores scores.jsonl --out DIR

The records must have wrong_spans: the wrong characters of output, marked by people or an oracle. A threshold flags a
token if the judgment multiplies its probability by more; flags and thresholds in the file are not used."""

import argparse
import math

from cutlm.cli.model_options import SOURCES
from cutlm.data.sources import describe_sources
from cutlm.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scores = f"token scores, as cutlm blame writes them: {SOURCES}"
    parser.add_argument("--scores", required=True, nargs="+", metavar="FILE", help=scores)
    parser.add_argument("--thresholds", metavar="LIST", help="such as 1.05,1.1,1.2 (default: ten from 1 to 3)")
    parser.add_argument("--by", metavar="FIELD", help="a field of the records, to measure each of its values alone")


def run(args: argparse.Namespace) -> int:
    from cutlm.evaluation import detection
    from cutlm.evaluation.shared import hash_data, open_folder, write_result
    from cutlm.flagging.token_scores import read_token_scores
    from cutlm.inspect.plots import draw_plot

    thresholds = list(detection.THRESHOLDS) if args.thresholds is None else _read_thresholds(args.thresholds)
    scores, name = read_token_scores(args.scores), describe_sources(args.scores)
    num_without = sum(args.by not in (score.record.model_extra or {}) for score in scores)
    if args.by is not None and num_without:
        raise DataError(
            f"--by {args.by}: expected this field in every record of {name}, but {num_without} of {len(scores)}"
            " lack it; name another field, or remove --by"
        )
    evidence = detection.gather_evidence(scores, args.by and (lambda score: str(score.record.model_extra[args.by])))
    if not evidence.num_records:
        reasons = ", ".join(f"{number} {reason}" for reason, number in evidence.left_out.items())
        raise DataError(
            f"{name}: expected unsatisfactory records with wrong_spans and log-probabilities, got {reasons}; add"
            " wrong_spans to the records before cutlm blame"
        )
    settings = {"measure": "detection", "scores": hash_data(args.scores), "thresholds": thresholds, "by": args.by}
    folder = open_folder(args.out, settings, overwrite=args.overwrite)
    result = detection.measure_detection(evidence, thresholds)
    whole = [row for row in result["thresholds"] if row["group"] is None]
    picture = draw_plot("Detection of wrong tokens", lambda axes: detection.plot_detection(axes, whole))
    detectors = sorted({score.detector for score in scores})
    write_result(folder, result | {"detectors": detectors}, detection.tabulate_detection(result), picture=picture)
    return 0


def _read_thresholds(text: str) -> list[float]:
    try:
        thresholds = sorted({float(part) for part in text.split(",")})
    except ValueError:
        thresholds = []
    if not thresholds or not all(0 <= threshold < math.inf for threshold in thresholds):
        raise ConfigError(f"--thresholds: expected numbers of at least 0 such as 1.05,1.1,1.2, got {text!r}")
    return thresholds
