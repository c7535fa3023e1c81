"""`cutlm check`: its output and exit codes."""

import json
import os
import subprocess
import sys

import pytest

from cutlm.cli import main

GOOD = {"instruction": "Add 1 and 2.", "output": "4", "judgment": "The sum is 3."}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def test_a_good_file_is_counted_and_gives_exit_code_0(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [GOOD, GOOD | {"judgment": None}, {"instruction": "x", "output": "y"}])
    assert main(["check", file]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{file}: 3 rows, 0 invalid, 0 duplicates",
        "3 records: 2 satisfactory, 1 unsatisfactory",
        "1 records have no field 'judgment' and count as satisfactory",
    ]
    assert err == ""


def test_every_invalid_row_is_named_on_stderr_and_gives_exit_code_2(tmp_path, capsys):
    rows = [GOOD, GOOD | {"judgment": ["x"]}, {"instruction": "x"}, {"instruction": "x", "output": 1, "judgement": ""}]
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["check", file]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{file}:{line}" for line in (2, 3, 4, 4)]
    assert out.splitlines() == [
        f"{file}: 4 rows, 3 invalid, 0 duplicates",
        "1 records: 0 satisfactory, 1 unsatisfactory",
    ]


@pytest.mark.parametrize("value", ["1e999", "[" * 300 + "]" * 300])
@pytest.mark.parametrize(
    "command",
    [
        ["check", "FILE"],
        ["convert", "alpaca", "FILE", "--out", "OUT"],
        ["blame", "--model", "nowhere", "--data", "FILE", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_value_that_cannot_be_written_again_is_refused_by_every_command(command, value, tmp_path, capsys):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text(f'{json.dumps(GOOD)}\n{json.dumps(GOOD)[:-1]}, "extra": {value}}}\n')
    assert main([{"FILE": str(file), "OUT": str(out)}.get(word, word) for word in command]) == 2
    assert f"{file}:2: field 'extra': expected" in capsys.readouterr().err
    assert not out.exists()


def test_duplicates_are_named_and_are_not_an_error(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [GOOD, GOOD])
    assert main(["check", file]) == 0
    assert f"{file}:2: the same instruction, response and judgment as {file}:1\n" in capsys.readouterr().out


def test_doubtful_records_are_named_as_warnings_and_give_exit_code_0(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [GOOD, GOOD | {"judgment": "The response is perfect."}, GOOD | {"score": 85}])
    assert main(["check", file]) == 0
    out, err = capsys.readouterr()
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert [line.rpartition(": ")[2] for line in warnings] == [f"{file}:2", f"{file}:3"]
    assert err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{file}: no records"),
        ("[]", "{file}: no records"),
        ('{"data": []}', "{file}:1: field 'output' is missing"),
        ('{\n"data": []\n}', "cutlm check: {file}: expected an array of records"),
        ("a,b\n1,2\n", "cutlm check: {file}: not JSON"),
    ],
)
def test_a_file_without_records_gives_exit_code_2_and_the_reason(content, message, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(content)
    assert main(["check", str(file)]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_a_missing_file_and_a_folder_give_exit_code_2(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert f"{tmp_path / 'nothing'}: no such file" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 2
    assert "no data files in this folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["chekc"], ["check"], ["check", "a", "--nope"], ["convert", "alpaca", "a", "--ou", "b"]],
)
def test_a_wrong_command_line_gives_exit_code_2_and_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "suggested"),
    [
        (["check", "a.jsonl", "--column", "{}"], ["--columns"]),
        (["blame", "--model_name_or_path", "m", "--data", "a.jsonl", "--out", "b.jsonl"], ["--model"]),
        (["generate", "--model", "m", "--prompts", "a.jsonl", "--output", "b.jsonl"], ["--out"]),
        (["eval", "rouge", "--model", "m", "--reference", "a.jsonl", "--out", "b"], ["--references"]),
        (["merge", "--adapters=a", "--ut", "b"], ["--adapter", "--out"]),
    ],
)
def test_a_misspelled_option_is_answered_by_the_one_that_was_meant(argv, suggested, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    error = capsys.readouterr().err
    assert all(f"did you mean '{option}'?" in error for option in suggested)


def test_a_judgment_under_another_name_is_not_ignored(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "critique": "No."}]
    file = write(tmp_path / "a.jsonl", rows * 3)
    assert main(["check", file]) == 2
    assert capsys.readouterr().err.startswith(f"{file}:1 and 2 more rows: ")
    assert main(["check", file, "--columns", '{"critique": "judgment"}']) == 0
    assert "0 satisfactory, 3 unsatisfactory" in capsys.readouterr().out
    # Beside a column of judgments, such a field is a remark.
    assert main(["check", write(tmp_path / "b.jsonl", [*rows, GOOD])]) == 0
    # And so it is if it says nothing.
    assert main(["check", write(tmp_path / "c.jsonl", [{"instruction": "x", "output": "y", "critique": ""}])]) == 0


def test_a_conversation_that_ends_with_a_reply_is_referred_to_its_converter(tmp_path, capsys):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "No."},
    ]
    for count, is_named in ((3, True), (1, False)):
        assert main(["check", write(tmp_path / "a.jsonl", [{"messages": messages[:count]}])]) == 2
        assert ("cutlm convert conversations" in capsys.readouterr().err) == is_named


def test_conversations_in_a_table_with_other_columns_are_named_once(tmp_path, capsys):
    messages = json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    cell = messages.replace('"', '""')
    file = tmp_path / "a.csv"
    file.write_text("dialog,critique\n" + f'"{cell}",No.\n' * 2)
    assert main(["check", str(file)]) == 2
    (problem,) = capsys.readouterr().err.splitlines()
    columns = problem.partition("--columns '")[2].rstrip("'")
    assert json.loads(columns) == {"dialog": "messages", "critique": "judgment"}
    assert main(["check", str(file), "--columns", columns]) == 0
    assert "2 records: 0 satisfactory, 2 unsatisfactory" in capsys.readouterr().out


def test_one_invalid_row_among_many_is_found(tmp_path, capsys):
    rows = [GOOD | {"instruction": f"Add {n} and {n}."} for n in range(5000)]
    rows[4321] = GOOD | {"output": ""}
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["check", file]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{file}:4322: field 'output'")
    assert out.startswith(f"{file}: 5000 rows, 1 invalid, 0 duplicates\n")


def test_problems_and_duplicates_are_listed_up_to_a_number_and_all_counted(tmp_path, capsys):
    rows = [*[GOOD] * 4, *[{"instruction": f"{number}"} for number in range(5)]]
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["check", file, "--max_problems", "2"]) == 2
    out, err = capsys.readouterr()
    assert (err.count(f"{file}:"), out.count("the same instruction")) == (2, 2)
    assert "and 3 more problems" in err
    assert "and 1 more duplicates" in out
    assert f"{file}: 9 rows, 5 invalid, 3 duplicates" in out
    assert main(["check", file, "--max_problems", "0"]) == 2


def test_several_files_are_checked_together_with_columns(tmp_path, capsys):
    files = [write(tmp_path / name, [{"prompt": name, "output": "x"}]) for name in ("a.jsonl", "b.jsonl")]
    assert main(["check", *files, "--columns", '{"prompt": "instruction"}']) == 0
    assert f"{' '.join(files)}: 2 rows, 0 invalid" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["check", *files, "--columns", '{"prompt": 1}'])
    assert "expected a name in the file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_none_of_the_heavy_libraries(argv):
    code = (
        "import sys\nfrom cutlm.cli import main\n"
        f"try:\n    main({argv!r})\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "names = {'torch', 'transformers', 'datasets', 'trl', 'peft', 'numpy', 'pyarrow', 'pandas'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cutlm" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_is_not_utf8_shows_escapes(encoding, tmp_path):
    file = write(tmp_path / "数据.jsonl", [GOOD, GOOD, GOOD | {"judgment": 1, "说明": ""}])
    for arguments in (
        ["check", file],
        ["check", "无"],
        ["convert", "alpaca", file, "--out", str(tmp_path / "出.json")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cutlm", *arguments],
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            capture_output=True,
        )
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert b"\\u" in done.stdout + done.stderr
