"""ROUGE: values computed by hand, which references count, and the command with responses and with a model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.evaluation.paper import ROUGE_LSUM
from cutlm.evaluation.rouge import KINDS, list_references, measure_rouge
from cutlm.model.card import write_card

RECORDS: list[dict[str, Any]] = [
    {"instruction": "One", "output": "a bad one", "judgment": "Bad.", "i_ans": "the cat sat"},
    {"instruction": "Two", "output": "dogs bark", "judgment": None},
    {"instruction": "Three", "output": "bad", "judgment": "Bad."},
    {"instruction": "Four", "input": "Here", "output": "a\nb c", "judgment": "Perfect."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rouge_matches_values_by_hand():
    result = measure_rouge([("the cat", "the cat sat"), ("cats", "dogs bark")])
    # First pair: precision 2/2 and recall 2/3 of words, F = 2 * 1 * 2/3 / (1 + 2/3) = 0.8; precision 1/1 and recall
    # 1/2 of bigrams, F = 2 * 1 * 1/2 / (1 + 1/2) = 2/3. The second pair has nothing in common.
    assert result["rouge1"] == pytest.approx(100 * (0.8 + 0) / 2)
    assert result["rouge2"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert result["rougeL"] == pytest.approx(100 * (0.8 + 0) / 2)
    assert result["num_pairs"] == 2


def test_rouge_lsum_compares_lines_and_rouge_l_whole_texts():
    # Each line has a match; as one text, only one line is in order.
    result = measure_rouge([("c d\na b", "a b\nc d")])
    assert result["rougeLsum"] == pytest.approx(100)
    assert result["rougeL"] == pytest.approx(100 * 2 / 4)


def test_stemmer_matches_stems():
    assert measure_rouge([("walking", "walked")])["rouge1"] == 0
    assert measure_rouge([("walking", "walked")], use_stemmer=True)["rouge1"] == 100


def test_interval_depends_on_the_seed_only():
    pairs = [("the cat", "the cat sat")] * 30 + [("cats", "dogs bark")] * 30
    result = measure_rouge(pairs, seed=1)
    assert result == measure_rouge(pairs, seed=1)
    assert result != measure_rouge(pairs, seed=2)
    # 60 values, half 80 and half 0: the mean is 40, its standard error 40 / sqrt(60) = 5.2.
    assert result["rouge1_low"] == pytest.approx(40 - 1.96 * 5.2, abs=2)
    assert result["rouge1_high"] == pytest.approx(40 + 1.96 * 5.2, abs=2)


def test_empty_responses_and_unreadable_references_are_counted():
    result = measure_rouge([("", "the cat"), ("你好", "你好")])
    assert (result["num_empty_responses"], result["num_unreadable_references"]) == (1, 1)


def test_references_are_improved_or_satisfactory_responses():
    records = [JudgedRecord(**row) for row in RECORDS]
    references = list_references(records, [f"r:{number}" for number in range(4)])
    assert [(row.location, row.output) for row in references] == [
        ("r:0", "the cat sat"),
        ("r:1", "dogs bark"),
        ("r:3", "a\nb c"),
    ]


def test_command_compares_responses_with_references(tmp_path: Path, capsys):
    references = write(tmp_path / "references.jsonl", RECORDS)
    outputs = write(
        tmp_path / "outputs.jsonl",
        [
            {"instruction": "Two", "output": "cats", "generator": "mine"},
            {"instruction": "One", "output": "the cat", "generator": "mine"},
            {"instruction": "Five", "output": "alone", "generator": "mine"},
            {"instruction": "Four", "output": "another input", "generator": "mine"},
        ],
    )
    out = tmp_path / "out"
    assert main(["eval", "rouge", "--outputs", outputs, "--references", references, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    assert result["rouge1"] == pytest.approx(40)
    assert result["num_pairs"] == 2
    assert result["num_without_reference"] == 1  # Three
    assert result["num_without_response"] == 1  # Four, with its input
    assert result["num_responses_left_out"] == 2  # Five, and Four without one
    assert result["versions"]["rouge-score"] == "0.1.2"
    table = (out / "result.md").read_text("utf-8")
    assert "| mine | 40.00 (" in table
    assert f"| paper: CUT |  |  |  | {ROUGE_LSUM['CUT']:.2f} |" in table
    assert table.strip() in capsys.readouterr().out


def test_responses_are_generated_once_and_used_again(tmp_path: Path, capsys):
    model = save_tiny_model(tmp_path / "model", chat=True)
    write_card(model, {"kind": "model", "objective": "cut"})
    references = write(tmp_path / "references.jsonl", RECORDS)
    out = tmp_path / "out"
    command = ["eval", "rouge", "--model", str(model), "--references", references, "--out", str(out)]
    command += ["--max_new_tokens", "4", "--device", "cpu"]
    assert main(command) == 0
    first = (out / "result.json").read_bytes()
    results = ModelCard.load(model / "README.md").data.eval_results
    assert {each.metric_type: each.metric_value for each in results} == {
        kind: json.loads(first)[kind] for kind in KINDS
    }
    rows = json.loads((out / "outputs.json").read_text("utf-8"))
    assert [row["instruction"] for row in rows] == ["One", "Two", "Four"]
    (out / "result.json").unlink()
    rows[1]["output"] = "dogs bark"  # shows whether the file is used
    (out / "outputs.json").write_text(json.dumps(rows))
    assert main(command) == 0
    assert json.loads((out / "result.json").read_text("utf-8"))["rouge1"] >= 100 / 3
    assert main([*command, "--temperature", "1"]) == 2
    assert "temperature differ" in capsys.readouterr().err
    command[command.index("4")] = "3"
    assert main([*command, "--overwrite"]) == 0
    command[command.index("3")] = "4"
    assert main([*command, "--overwrite"]) == 0
    assert (out / "result.json").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "--model or --outputs: expected"),
        (["--model", "m", "--outputs", "o"], "--model or --outputs: expected"),
        (["--model", "m", "--concurrency", "4"], "--concurrency"),
        (
            ["--outputs", "o", "--temperature", "3", "--base_url", "http://x", "--seed", "1"],
            "--temperature, --base_url",
        ),
        (["--outputs", "o", "--seed", "-1"], "--seed: expected"),
    ],
)
def test_conflicting_options_are_refused(tmp_path: Path, capsys, options, part):
    references = write(tmp_path / "references.jsonl", RECORDS)
    assert main(["eval", "rouge", "--references", references, "--out", str(tmp_path / "out"), *options]) == 2
    assert part in capsys.readouterr().err


def test_files_without_pairs_are_refused(tmp_path: Path, capsys):
    outputs = write(tmp_path / "outputs.jsonl", [{"instruction": "Nine", "output": "x"}])
    references = write(tmp_path / "references.jsonl", RECORDS)
    command = ["eval", "rouge", "--outputs", outputs, "--out", str(tmp_path / "out"), "--references"]
    assert main([*command, references]) == 2
    assert "no response to any instruction of" in capsys.readouterr().err
    assert main([*command, write(tmp_path / "none.jsonl", RECORDS[2:3])]) == 2
    assert "none.jsonl: expected records that are satisfactory" in capsys.readouterr().err


def test_missing_package_is_reported_with_the_command_to_install_it(tmp_path: Path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rouge_score"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    references = write(tmp_path / "references.jsonl", RECORDS)
    assert main(["eval", "rouge", "--model", "m", "--references", references, "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'cutlm[eval]'" in capsys.readouterr().err


def test_nothing_old_is_used_after_overwriting(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", chat=True)
    references = write(tmp_path / "references.jsonl", RECORDS)
    out = tmp_path / "out"
    command = ["eval", "rouge", "--references", references, "--out", str(out)]
    options = ["--model", str(model), "--max_new_tokens", "4", "--device", "cpu", "--overwrite"]
    out.mkdir()
    (out / "outputs.json").write_text(json.dumps([{"instruction": "Two", "output": "dogs bark"}]))
    assert main([*command, *options]) == 0
    assert [row["instruction"] for row in json.loads((out / "outputs.json").read_text("utf-8"))] == [
        *("One", "Two", "Four")
    ]
    # After a failure, no result of other settings remains.
    assert main([*command, *options, "--template", "alpaca", "--max_new_tokens", "100000"]) == 2
    assert not list(out.glob("result.*"))


def test_folder_without_results_takes_other_settings(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model")
    references = write(tmp_path / "references.jsonl", RECORDS)
    command = ["eval", "rouge", "--references", references, "--out", str(tmp_path / "out"), "--model", str(model)]
    command += ["--max_new_tokens", "4", "--device", "cpu"]
    assert main(command) == 2  # it has no chat template
    assert main([*command, "--template", "alpaca"]) == 0
    assert main(command) == 2


def test_test_split_of_critiques_is_measured_from_the_published_file(tmp_path: Path):
    def answer(text: str, rating: int, *refinements: str) -> dict[str, Any]:
        critiques = [{"text": "It is bad.", "refinement": refinement} for refinement in refinements]
        return {"answer": text, "feedback": {"skip": False, "rating": rating, "critiques": critiques}}

    questions = [
        {"question": "What is it on?", "rankings": [0], "answers": [answer("Dogs.", 3, "A cat.", "The cat sat.")]},
        {"question": "Is it long?", "rankings": [0, 1], "answers": [answer("Yes.", 3, "No."), answer("No, no.", 7)]},
        {"question": "Is it new?", "rankings": [0], "answers": [answer("Maybe.", 3)]},
    ]
    line = {"id": "p", "data": {"passage": {"title": None, "text": "A passage."}, "questions": questions}}
    raw, records = tmp_path / "test.jsonl", tmp_path / "records.jsonl"
    raw.write_text(json.dumps(line) + "\n")
    assert main(["convert", "critiques", str(raw), "--out", str(records)]) == 0
    outputs = write(
        tmp_path / "outputs.jsonl",
        [
            {"instruction": "A passage.\nWhat is it on?", "output": "The cat"},
            {"instruction": "A passage.\nIs it long?", "output": "No, no."},
        ],
    )
    command = ["eval", "rouge", "--references", str(records), "--out", str(tmp_path / "out")]
    assert main([*command, "--outputs", outputs]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    # The first is compared with the last refinement (0.8 as above); the second is the satisfactory answer.
    assert result["rouge1"] == pytest.approx(100 * (0.8 + 1) / 2)
    assert result["num_pairs"] == 2
    table = (tmp_path / "out" / "result.md").read_text("utf-8")
    for method, value in ROUGE_LSUM.items():
        assert f"| paper: {method} |  |  |  | {value:.2f} |" in table
    model = save_tiny_model(tmp_path / "model", chat=True)
    options = ["--model", str(model), "--max_new_tokens", "4", "--device", "cpu", "--overwrite"]
    assert main([*command, *options]) == 0
    rows = json.loads((tmp_path / "out" / "outputs.json").read_text("utf-8"))
    assert [row["instruction"] for row in rows] == ["A passage.\nWhat is it on?", "A passage.\nIs it long?"]
