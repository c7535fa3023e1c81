"""`cutlm inspect`: the page it makes of one file or two, and what it says of bad input. No browser is needed."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from inspected_rows import OUTPUTS, make_rows
from report_scores import make_scores
from tiny import save_tiny_model

from cutlm.blame.token_scores import read_token_scores, write_token_scores
from cutlm.cli import main
from cutlm.inspect.columns import make_columns
from cutlm.inspect.inspection import render_inspection
from cutlm.inspect.tokens import pair_scores


def test_records_are_paired_by_what_they_say_and_how_often():
    rows = make_rows()
    first = [rows[0], rows[0], rows[1], rows[2]]
    second = [rows[2], replace(rows[0], detector="other"), rows[4], rows[3]]
    pairs, num_unpaired = pair_scores(first, second)
    assert pairs == [(rows[0], second[1]), (rows[2], rows[2])]
    assert num_unpaired == (2, 2)
    changed = replace(rows[0], record=rows[0].record.model_copy(update={"judgment": "Other."}))
    assert pair_scores([rows[0]], [changed]).num_unpaired == (1, 1)


def run(*options: str) -> int:
    return main(["inspect", *options])


def test_the_command_makes_a_page_of_one_file_or_of_two(tmp_path, capsys):
    before, after = str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")
    write_token_scores(before, make_rows())
    write_token_scores(after, make_rows(50)[1:])
    page = tmp_path / "report.html"
    assert run("--scores", before, "--out", str(page)) == 0
    assert "report.html: 5 records, " in capsys.readouterr().out
    assert run("--scores", before, "--out", str(page)) == 2
    assert "report.html: exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert run("--scores", before, "--scores", after, "--out", str(page), "--overwrite") == 0
    printed = capsys.readouterr()
    assert "report.html: 4 pairs of records, " in printed.out
    assert "before.jsonl: 1 records are not in the other file, and are left out" in printed.err
    content = re.search('<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"))
    assert content is not None
    data = json.loads(content[1])
    assert data["unpaired"] == [1, 0]
    assert data["records"][0]["sides"][0]["without"] == make_rows()[1].logps_without


def test_a_model_scores_records_first_and_leaves_the_scores_beside_the_page(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"instruction": "i", "output": o, "judgment": "Bad."}) + "\n" for o in OUTPUTS))
    page = tmp_path / "report.html"
    assert run("--model", str(model), "--data", str(data), "--out", str(page), "--threshold", "1.3") == 0
    printed = capsys.readouterr().out
    assert "5 records scored (0 satisfactory, 5 unsatisfactory)" in printed
    scores = read_token_scores(tmp_path / "report.scores.jsonl")
    assert {row.threshold for row in scores} == {1.3}
    assert page.read_text("utf-8") == render_inspection(
        make_columns(["report.scores.jsonl"], [(row,) for row in scores])
    )


def test_what_is_wrong_is_said_in_a_sentence(tmp_path, capsys):
    scores, out = str(tmp_path / "scores.jsonl"), str(tmp_path / "report.html")
    write_token_scores(scores, make_rows())
    other = tmp_path / "other.jsonl"
    write_token_scores(other, [make_scores("Something else.")])
    records = tmp_path / "records.jsonl"
    records.write_text('{"instruction": "i", "output": "o"}\n')
    for options, sentence in (
        ([], "expected --scores FILE, or --model MODEL and --data FILE; give the one or the other"),
        (["--model", "m"], "expected --scores FILE, or --model MODEL and --data FILE"),
        (["--scores", scores, "--data", "d"], "--scores: of no use with --model and --data"),
        (["--scores", scores] * 3, "--scores: expected one file or two, got 3"),
        (["--scores", scores, "--threshold", "2"], "--threshold: of use with --model alone, for the scores are there"),
        (["--scores", str(tmp_path / "none")], "none: no such file; check the path"),
        (["--scores", str(records)], "records.jsonl:1: field 'schema_version': expected 1, got no such field"),
        (
            ["--scores", scores, "--scores", str(other)],
            "got none with the same instruction, input, output and judgment",
        ),
        (["--scores", scores, "--out", scores], "got one of the inputs"),
        (["--model", "m", "--data", "d", "--out", ""], "--out '': expected a file to write, got a folder; name a file"),
        (["--scores", scores, "--out", "."], "--out .: expected a file to write, got a folder; name a file inside it"),
    ):
        assert run("--out", out, *options) == 2
        assert sentence in capsys.readouterr().err
    assert not Path(out).exists()


def test_help_and_a_page_of_scores_need_no_torch(tmp_path):
    write_token_scores(tmp_path / "s.jsonl", make_rows())
    code = "import sys; from cutlm.cli import main; {}; assert 'torch' not in sys.modules"
    for options in (["--scores", "s.jsonl", "--out", "r.html"],):
        call = f"main(['inspect', *{options!r}])"
        subprocess.run([sys.executable, "-c", code.format(call)], cwd=tmp_path, check=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cutlm", "inspect", "--help"], capture_output=True, text=True, check=True
    )
    assert "--scores" in done.stdout
    assert time.perf_counter() - started < 5
