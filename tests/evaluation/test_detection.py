"""Detection of wrong tokens: values computed by hand and by scikit-learn, and the command on the tiny world."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from report_scores import make_scores

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.evaluation.detection import (
    Evidence,
    compute_average_precision,
    count_detected,
    gather_evidence,
    measure_detection,
    tabulate_detection,
)
from cutlm.flagging.token_scores import TokenScores, write_token_scores
from cutlm.world.base import base_path

# Ratio p(y_t|x,j) / p(y_t|x), and whether the token is wrong.
TOKENS = [
    (math.log(ratio), is_wrong) for ratio, is_wrong in ((3, True), (2, False), (1.5, True), (1, False), (0.5, True))
]


def score_words(output: str, ratios: list[float], wrong_spans: list[tuple[int, int]] | None, **fields) -> TokenScores:
    """Makes scores of a response with one token per word, plus the end-of-sequence token."""
    starts = [0, *(index + 1 for index, letter in enumerate(output) if letter == " ")]
    spans = [(start, start + len(word)) for start, word in zip(starts, output.split(), strict=True)]
    num = len(spans) + 1
    assert num == len(ratios)
    return replace(
        make_scores(output),
        record=JudgedRecord(instruction="Say it.", output=output, judgment="Wrong.", wrong_spans=wrong_spans, **fields),
        token_ids=list(range(num)),
        tokens=[*output.split(), "<eos>"],
        spans=[*spans, (len(output), len(output))],
        logps_without=[math.log(0.1)] * num,
        logps_with=[math.log(0.1 * ratio) for ratio in ratios],
        is_flagged=[False] * num,
        weights=[0.0] * num,
    )


def test_tokens_of_the_chat_template_do_not_count():
    own = score_words("Sydney is big.", [2, 1, 1, 1], [(0, 0)])
    ids, spans = [40, 41, *own.token_ids], [(0, 0), (0, 0), *own.spans]
    columns = {"token_ids": ids, "tokens": ["<think>", "</think>", *own.tokens], "spans": spans}
    logps = {"logps_without": [-1.0, -1.0, *own.logps_without], "logps_with": [-0.1, -0.1, *own.logps_with]}
    opened = replace(own, **columns, **logps, is_flagged=[False] * 6, weights=[0.0] * 6)
    assert gather_evidence([opened]) == gather_evidence([own])
    assert sum(is_wrong for _, is_wrong in gather_evidence([opened]).all_tokens) == 1


@pytest.mark.parametrize(
    ("threshold", "precision", "recall", "f1"),
    [
        (0, 3 / 5, 3 / 3, 6 / 8),  # flags all five
        (1.1, 2 / 3, 2 / 3, 4 / 6),  # flags 3, 2 and 1.5
        (1.9, 1 / 2, 1 / 3, 2 / 5),  # flags 3 and 2
        (2.5, 1 / 1, 1 / 3, 2 / 4),  # flags 3
        (5, 0, 0, 0),  # flags none
    ],
)
def test_precision_recall_and_f1_match_values_by_hand(threshold, precision, recall, f1):
    counts = count_detected(TOKENS, threshold)
    assert [counts.precision, counts.recall, counts.f1] == pytest.approx([precision, recall, f1])


def test_token_is_flagged_above_but_not_at_the_threshold():
    assert count_detected([(math.log(1.1), True)], 1.1).num_true == 0
    assert count_detected([(math.log(1.1000001), True)], 1.1).num_true == 1


def test_average_precision_matches_values_by_hand():
    # The wrong tokens are first, third and fifth, with precisions 1/1, 2/3 and 3/5.
    assert compute_average_precision(TOKENS) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # Equal ratios are flagged together: one of two is wrong.
    assert compute_average_precision([(1.0, True), (1.0, False)]) == pytest.approx(1 / 2)
    assert compute_average_precision([(1.0, False)]) is None


def test_average_precision_matches_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    tokens = [(round(rng.gauss(0, 1), 1), rng.random() < 0.2) for _ in range(500)]
    assert len({ratio for ratio, _ in tokens}) < 100  # with ties
    expected = metrics.average_precision_score([is_wrong for _, is_wrong in tokens], [ratio for ratio, _ in tokens])
    assert compute_average_precision(tokens) == pytest.approx(expected, abs=1e-12)


def test_evidence_comes_from_unsatisfactory_records_with_wrong_spans():
    marked = score_words("it is Sydney now", [1, 1, 2, 1.2, 1], [(6, 12)])
    scores = [
        marked,
        replace(marked, record=marked.record.model_copy(update={"judgment": None})),
        replace(marked, record=marked.record.model_copy(update={"wrong_spans": None})),
        replace(marked, logps_without=None),
    ]
    evidence = gather_evidence(scores)
    assert [is_wrong for _, is_wrong in evidence.all_tokens] == [False, False, True, False, False]
    assert [math.exp(ratio) for ratio, _ in evidence.all_tokens] == pytest.approx([1, 1, 2, 1.2, 1])
    assert evidence.num_records == 1
    assert evidence.left_out == {"satisfactory": 1, "without wrong_spans": 1, "without log-probs": 1}


def test_empty_span_at_the_end_points_to_the_end_of_sequence_token():
    evidence = gather_evidence([score_words("too short", [1, 1, 3], [(9, 9)])])
    assert [is_wrong for _, is_wrong in evidence.all_tokens] == [False, False, True]


def test_best_threshold_and_groups_are_reported():
    result = measure_detection(Evidence({"a": TOKENS[:2], "b": TOKENS[2:]}, 2), [1.1, 1.9])
    # F1 is 4/6 at 1.1 and 2/5 at 1.9.
    assert (result["best_threshold"], result["best_f1"]) == (1.1, pytest.approx(4 / 6))
    assert [(row["threshold"], row["group"]) for row in result["thresholds"]] == [
        (threshold, group) for threshold in (1.1, 1.9) for group in ("a", "b", None)
    ]
    # In b, 1.5 is flagged at 1.1 and nothing at 1.9.
    assert [row["precision"] for row in result["thresholds"] if row["group"] == "b"] == [1.0, None]
    # In b, the wrong tokens 1.5 and 0.5 are first and third: precisions 1/1 and 2/3.
    assert result["average_precision_by_group"] == {"a": 1.0, "b": pytest.approx((1 + 2 / 3) / 2)}
    assert (result["num_tokens"], result["num_wrong"]) == (5, 3)


def test_groups_may_have_any_name():
    result = measure_detection(Evidence({"all": TOKENS[:2], "None": TOKENS[2:]}, 2), [1.1])
    assert [(row["group"], row["num_flagged"]) for row in result["thresholds"]] == [("None", 1), ("all", 2), (None, 3)]
    assert sorted(result["average_precision_by_group"]) == ["None", "all"]
    assert "| all | 0.500 |" in tabulate_detection(result)


def test_command_writes_values_table_and_plot(tmp_path: Path, capsys):
    scores = [
        score_words("it is Sydney now", [1, 1, 2, 1.2, 1], [(6, 12)], kind="city"),
        score_words("too short", [1, 1, 1.05], [(9, 9)], kind="end"),
    ]
    file, out = tmp_path / "scores.jsonl", tmp_path / "out"
    write_token_scores(file, scores)
    command = ["eval", "detection", "--scores", str(file), "--out", str(out), "--by", "kind"]
    command += ["--thresholds", "1.02,1.1"]
    assert main(command) == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    # 1.02 flags 2 (wrong), 1.2 (not wrong) and 1.05 (wrong); 1.1 flags 2 and 1.2.
    whole = [row for row in result["thresholds"] if row["group"] is None]
    assert [(row["precision"], row["recall"], row["num_flagged"]) for row in whole] == [
        (pytest.approx(2 / 3), 1.0, 3),
        (1 / 2, 1 / 2, 2),
    ]
    assert result["versions"]["cutlm"]
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "result.md").read_text("utf-8")
    assert "| 1.02 | 0.667 | 1.000 | 0.800 | 3 |" in table
    assert "| city | 0.500 | 1.000 | 0.667 | 1.000 |" in table
    assert table.strip() in capsys.readouterr().out
    assert main(command) == 0  # again with the same settings
    command[-1] = "1.1"
    assert main(command) == 2
    assert "thresholds differ" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--thresholds", "1,x"], "--thresholds: expected"),
        (["--by", "family"], "--by family: expected"),
        ([], "got 1 without wrong_spans"),
    ],
)
def test_invalid_options_and_records_are_refused(tmp_path: Path, capsys, options, part):
    file = tmp_path / "scores.jsonl"
    write_token_scores(file, [score_words("a b", [1, 1, 1], None)])
    assert main(["eval", "detection", "--scores", str(file), "--out", str(tmp_path / "out"), *options]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_measure_the_base_model_of_the_world(tmp_path: Path, capsys):
    def name(file: str) -> str:
        return str(tmp_path / file)

    model = str(base_path())
    for command in (
        ["world", "tasks", "--split", "dev", "--num", "60", "--out", name("tasks.jsonl")],
        [
            *("generate", "--model", model, "--prompts", name("tasks.jsonl"), "--out", name("responses.jsonl")),
            *("--max_new_tokens", "40", "--batch_size", "64"),
        ],
        [
            *("judge", "--responses", name("responses.jsonl"), "--judge", "rules"),
            *("--rules", "cutlm.world.judge:judge", "--out", name("records.jsonl")),
        ],
        ["world", "mark", "--records", name("records.jsonl"), "--out", name("marked.jsonl")],
        ["blame", "--model", model, "--data", name("marked.jsonl"), "--out", name("scores.jsonl")],
        ["eval", "detection", "--scores", name("scores.jsonl"), "--out", name("detection")],
    ):
        assert main(command) == 0, command
    result = json.loads((tmp_path / "detection" / "result.json").read_text("utf-8"))
    rows = {row["threshold"]: row for row in result["thresholds"]}
    # On the whole split it is 0.93; 60 tasks vary more.
    assert rows[1.1]["f1"] > 0.8
    assert result["average_precision"] > 0.8
    assert result["num_records"] > 10
    assert rows[1.0]["recall"] >= rows[1.1]["recall"] >= rows[3.0]["recall"]
