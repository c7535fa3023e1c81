"""`cutlm inspect` and the data that it writes into a page. No browser is needed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected_rows import OUTPUTS, make_rows
from report_scores import NASTY, make_scores, read_page_data
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.data.records import load_records
from cutlm.flagging.token_scores import list_records, read_token_scores, write_token_scores
from cutlm.inspect.page import PageRecord, Picture, Table, render_page, write_page
from cutlm.inspect.tokens import mark_spans, pair_records, split_pieces


def run(*options: str) -> int:
    return main(["inspect", *options])


@pytest.mark.parametrize("kind", ["bpe", "bpe_unsplit", "llama", "unigram"])
@pytest.mark.parametrize("text", NASTY)
def test_pieces_joined_are_the_response(text, kind):
    pieces = split_pieces(make_scores(text, kind=kind))
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text or piece.is_end for piece in pieces), "the bytes of a character form one piece"
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_pieces_joined_are_the_response_for_edited_spans(pairs):
    spans = [(min(pair), max(pair)) for pair in pairs]
    num = len(spans)
    numbers = {"logps_without": [-1.0] * num, "logps_with": [-1.0] * num, "weights": [0.0] * num}
    scores = make_scores(
        "abc   ghi", token_ids=[1] * num, tokens=["?"] * num, spans=spans, is_flagged=[False] * num, **numbers
    )
    pieces = split_pieces(scores)
    assert "".join(piece.text for piece in pieces) == "abc   ghi"
    assert sorted(index for piece in pieces for index in piece.indices) == list(range(num))


def test_records_are_paired_by_content_as_often_as_both_files_have_them():
    rows = make_rows()
    first = [rows[0], rows[0], rows[1], rows[2]]
    second = [rows[2], replace(rows[0], detector="other"), rows[4], rows[3]]
    pairs, num_unpaired = pair_records(list_records(first), list_records(second))
    assert pairs == [(0, 1), (3, 0)]
    assert num_unpaired == (2, 2)
    changed = rows[0].record.model_copy(update={"judgment": "Other."})
    assert pair_records([rows[0].record], [changed]).num_unpaired == (1, 1)


def test_a_page_of_many_records_shows_some_and_says_so(tmp_path, capsys):
    scores, out = str(tmp_path / "scores.jsonl"), str(tmp_path / "page.html")
    rows = make_rows() * 20
    write_token_scores(scores, rows)
    for files in ([scores], [scores, scores]):
        options = [option for file in files for option in ("--scores", file)]
        assert main(["inspect", *options, "--out", out, "--max_records", "7", "--overwrite"]) == 0
        data = read_page_data(Path(out))
        assert len(data["records"]) == 7
        assert f"7 of {len(rows)} records" in data["lead"][0]
        assert f"7 of {len(rows)} records" in capsys.readouterr().out
    assert main(["inspect", "--scores", scores, "--out", out, "--max_records", "0", "--overwrite"]) == 0
    data = read_page_data(Path(out))
    assert len(data["records"]) == len(rows)
    assert not data["lead"]
    assert main(["inspect", "--scores", scores, "--out", out, "--max_records", "-1", "--overwrite"]) == 2


def test_page_of_one_file_and_of_two(tmp_path, capsys):
    before, after = str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")
    write_token_scores(before, make_rows())
    write_token_scores(after, make_rows(50)[1:])
    page = tmp_path / "report.html"
    assert run("--scores", before, "--out", str(page)) == 0
    assert "report.html: 5 records, " in capsys.readouterr().out
    assert run("--scores", before, "--out", str(page)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--scores", before, "--scores", after, "--out", str(page), "--overwrite") == 0
    printed = capsys.readouterr()
    assert "report.html: 4 pairs of records, " in printed.out
    assert "before.jsonl: skipped 1 records" in printed.err
    data = read_page_data(page)
    assert data["unpaired"] == [1, 0]
    assert data["records"][0]["sides"][0]["without"] == make_rows()[1].logps_without


def test_model_option_scores_records_and_keeps_the_scores(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"instruction": "i", "output": o, "judgment": "Bad."}) + "\n" for o in OUTPUTS))
    page = tmp_path / "report.html"
    assert run("--model", str(model), "--data", str(data), "--out", str(page), "--threshold", "1.3") == 0
    assert "5 records" in capsys.readouterr().out
    scores = read_token_scores(tmp_path / "report.scores.jsonl")
    assert {row.threshold for row in scores} == {1.3}
    expected = render_page([PageRecord((row,)) for row in scores], names=["report.scores.jsonl"], sensitivities=[None])
    assert page.read_text("utf-8") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either --scores or both --model and --data, got none of them"),
        (["--model", "m"], "expected either --scores or both --model and --data, got --model"),
        (["--scores", "S", "--data", "d"], "expected either --scores or both --model and --data, got --scores and"),
        (["--scores", "S", "--scores", "S", "--scores", "S"], "--scores: expected one file or two, got 3"),
        (["--scores", "S", "--threshold", "2"], "--threshold: used only with --model"),
        (["--scores", "none"], "none: "),
        (["--scores", "records.jsonl"], "records.jsonl:1: field 'schema_version'"),
        (["--scores", "S", "--scores", "other.jsonl"], "S and other.jsonl: expected scores of the same records"),
        (["--scores", "S", "--out", "S"], "S: "),
        (["--model", "m", "--data", "d", "--out", ""], "--out '': expected a file to write, got a folder"),
        (["--scores", "S", "--out", "."], "--out .: expected a file to write, got a folder"),
    ],
)
def test_bad_options_and_files_are_user_errors(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_token_scores("S", [make_scores("Something.")])
    write_token_scores("other.jsonl", [make_scores("Something else.")])
    Path("records.jsonl").write_text('{"instruction": "i", "output": "o"}\n')
    assert run("--out", "report.html", *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("report.html").exists()


@settings(max_examples=40)
@given(st.text(), st.text())
def test_any_text_survives_in_the_data(text, name):
    page = render_page(
        [PageRecord((make_scores("x"),), text, text, text)],
        title=text,
        lead=[text],
        sections=[Table(text, [text], [[text]]), Picture(b"", None, text)],
        names=[name],
    )
    content = page.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    data = json.loads(content)
    encodable = text.encode("utf-8", "replace").decode()
    answer = {"text": encodable, "judgment": encodable}
    assert (data["title"], data["lead"]) == (encodable, [encodable])
    assert data["records"][0]["answer"] == answer
    assert data["records"][0].get("group", "") == encodable
    assert data["sections"][0] == {"caption": encodable, "header": [encodable], "rows": [[encodable]]}
    assert data["names"] == [name.encode("utf-8", "replace").decode()]
    assert page.count("<script") == 2


def test_only_pages_with_pictures_allow_them(tmp_path):
    write_page(tmp_path / "page.html", [], sections=[Picture(b"light", None, "alt")])
    assert "img-src data:;" in (tmp_path / "page.html").read_text("utf-8")
    assert "img-src" not in render_page([])


def test_a_page_of_scores_needs_no_torch(tmp_path):
    write_token_scores(tmp_path / "s.jsonl", make_rows())
    code = "import sys; from cutlm.cli import main; main(['inspect', '--scores', 's.jsonl', '--out', 'r.html'])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=tmp_path, check=True)


def test_spans_of_the_judge_are_shown_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "Say it.", "output": "Sydney, it is  ", "judgment": "It is not."}
    rows = [row | {"wrong_spans": [[0, 6], [13, 13]]}, row | {"judgment": None}, row]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    out = tmp_path / "page.html"
    assert main(["inspect", "--data", str(data), "--out", str(out)]) == 0
    assert "Sydney" in out.read_text("utf-8")
    (first, second, third) = [mark_spans(record) for record in load_records(data)]
    assert [token for token, flag in zip(first.tokens, first.is_flagged, strict=True) if flag] == ["Sydney", ""]
    assert "".join(piece.text for piece in split_pieces(first)) == row["output"]
    assert not any(second.is_flagged + third.is_flagged)
    options = ["inspect", "--data", str(data), "--out", str(out), "--overwrite"]
    shutil.copy(data, other := tmp_path / "other.jsonl")
    assert main([*options, "--data", str(data), str(other)]) == 0
    page = read_page_data(out)
    assert page["names"] == ["records.jsonl, other.jsonl"], "two names would be those of two scores of each record"
    assert [len(record["sides"]) for record in page["records"]] == [1] * 6
    assert main([*options, "--threshold", "2"]) == 2, "only with a model"
    data.write_text(json.dumps(row) + "\n")
    assert main(options) == 2, "nothing is marked"
    assert "wrong_spans" in capsys.readouterr().err
