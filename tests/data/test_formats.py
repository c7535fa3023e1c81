"""Files and rows in other formats are named, with what to do about them."""

import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.orc
import pytest

from cutlm.data.files import read_rows
from cutlm.data.formats import describe_row_format
from cutlm.data.records import check_records
from cutlm.errors import DataError

ROW = {"instruction": "Add 1 and 2.", "output": "4", "judgment": "The sum is 3."}
LINE = json.dumps(ROW) + "\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def make_zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, LINE)
    return out.getvalue()


def make_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return out.getvalue()


def make_orc() -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.orc.write_table(pyarrow.table({"output": ["4"]}), out)
    return out.getvalue().to_pybytes()


CONTENTS = {
    "Git LFS pointer": LFS,
    "bzip2": b"BZh91AY&SY",
    "ORC": make_orc(),
    "Excel": make_zip("xl/workbook.xml"),
    "ZIP archive of records.jsonl": make_zip("records.jsonl"),
    "PyTorch": make_zip("archive/data.pkl"),
    "pickle": pickle.dumps([ROW]),
    "tar archive": make_tar(),
    "UTF-16 text; run: iconv -f UTF-16LE": LINE.encode("utf-16-le"),
    "UTF-16 text; run: iconv -f UTF-16BE": LINE.encode("utf-16-be"),
    "UTF-32 text": LINE.encode("utf-32"),
    "UTF-32 text; run: iconv -f UTF-32LE": LINE.encode("utf-32-le"),
    "a web page": b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "an XML file": b"<?xml version='1.0'?><a/>",
    "a table; rename it to .csv": b"instruction,output,judgment\nAdd 1 and 2.,4,The sum is 3.\n",
    "begins with 'Entry not found'": b"Entry not found\n",
}


def fail(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_rows(path)
    return str(error.value)


@pytest.mark.parametrize(("name", "content"), CONTENTS.items())
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_a_file_in_another_format_is_named(name, content, compress, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(compress(content))
    assert name in fail(path)


def test_a_sqlite_database_is_named(tmp_path):
    with sqlite3.connect(tmp_path / "data.jsonl") as connection:
        connection.execute("create table t (a)")
    assert "SQLite" in fail(tmp_path / "data.jsonl")


@pytest.mark.parametrize("text", ["{}", "[]", '{"a": "été 你好"}', "[\n\n" + LINE + "]", "", "\ufeff" + LINE, "0"])
def test_json_is_not_taken_for_another_format(text, tmp_path):
    (tmp_path / "data.jsonl").write_text(text, "utf-8")
    assert read_rows(tmp_path / "data.jsonl")[1] == []


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hi."}]},
            ["a ShareGPT conversation ('conversations')", "cutlm convert conversations"],
        ),
        (
            {"prompt": "Hi.", "response": "Ho."},
            ['{"prompt": "instruction", "response": "output"}', "cutlm judge"],
        ),
        (
            {"Instruction": "Hi.", "Model Output": "Ho.", "Score": 2, "Critique": "No."},
            [
                '{"Instruction": "instruction", "Model Output": "output", "Critique": "judgment", "Score": "score"}',
                "--columns",
            ],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}], "critique": "No."},
            ['--columns \'{"conversations": "messages", "critique": "judgment"}\''],
        ),
        ({"instruction": "Hi.", "response": "Ho."}, ['--columns \'{"response": "output"}\'']),
        ({"user's": [{"role": "user", "content": "Hi."}], "review": 3}, ["""'{"user'"'"'s": "messages"}'"""]),
        (
            {"log": '[{"role": "user", "content": "Hi."}]', "review": "No."},
            ['{"log": "messages", "review": "judgment"}'],
        ),
        ({"question": "Hi.", "answer": "Ho.", "critique": "No."}, ['"critique": "judgment"']),
        ({"prompt": "Hi.", "chosen": "a", "rejected": "b"}, ["cutlm convert pairs"]),
        ({"instruction": "Hi.", "input": "", "chosen": "a", "rejected": "b"}, ["cutlm convert pairs"]),
        ({"messages": [], "chosen": [], "rejected": []}, ["cutlm convert pairs"]),
        ({"prompt": "Hi.", "completion": "a", "label": False}, ["cutlm convert pairs"]),
        ({"instruction": "?", "output": "?", "orig_instruction": "a", "orig_response": "b"}, ["convert prometheus"]),
        ({"orig_instruction": "a", "orig_response_A": "b", "orig_response_B": "c"}, ["cutlm convert prometheus"]),
        ({"prompt": "a", "response": "b", "helpfulness": 3}, ["cutlm convert helpsteer"]),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1}, ["convert helpsteer"]),
        ({"context": [], "response1": "b", "response2": "c", "overall_preference": 1}, ["convert helpsteer"]),
        ({"context": [], "response1": "b", "response2": "c", "feedback1": []}, ["cutlm convert helpsteer"]),
        ({"context": [], "original_response": "b", "edited_response": "c"}, ["cutlm convert helpsteer"]),
        ({"mapping": {}, "current_node": "a", "title": "b"}, ["cutlm convert conversations"]),
        ({"instruction": "Hi.", "completions": []}, ["cutlm convert ultrafeedback"]),
        (
            {"id": 1, "question": "Hi.", "answer": "a", "feedback": "b"},
            ["cutlm convert shepherd", '"feedback": "judgment"'],
        ),
        ({"error": "Repository not found"}, ["Repository not found"]),
    ],
)
def test_a_row_in_another_format_is_named(row, texts):
    found = describe_row_format(row)
    assert all(text in found for text in texts)


@pytest.mark.parametrize("row", [ROW, ROW | {"messages": []}, {}, {"input": "x", "output": "y"}, {"outputs": "y"}, 1])
def test_records_and_unknown_rows_are_not_taken_for_another_format(row):
    assert describe_row_format(row) is None


def test_rows_of_one_format_give_one_problem(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi.", "response": "Ho."}\n' * 3 + LINE)
    check = check_records(path)
    assert len(check.problems) == 1
    assert check.problems[0].startswith(f"{path}:1 and 2 more rows: expected a record")
    assert (check.num_rows, len(check.records)) == (4, 1)
