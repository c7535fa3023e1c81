"""`cutlm check`: what it prints, its exit codes, and how fast it is."""

import json
import subprocess
import sys
import time

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
        f"{file}: 3 rows, 0 bad, 0 duplicates",
        "3 records: 2 satisfactory, 1 unsatisfactory",
        "1 records have no field 'judgment' and count as satisfactory",
    ]
    assert err == ""


def test_every_bad_row_is_named_on_stderr_and_gives_exit_code_2(tmp_path, capsys):
    rows = [GOOD, GOOD | {"judgment": ["x"]}, {"instruction": "x"}, {"instruction": "x", "output": 1, "judgement": ""}]
    file = write(tmp_path / "a.jsonl", rows)
    assert main(["check", file]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{file}:2: field 'judgment': expected a string or null, got a list",
        f"{file}:3: field 'output' is missing; the row has 'instruction'",
        f"{file}:4: unknown field 'judgement'; did you mean 'judgment'?",
        f"{file}:4: field 'output': expected a string, got a number (1)",
    ]
    assert out.splitlines() == [
        f"{file}: 4 rows, 3 bad, 0 duplicates",
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
def test_an_extra_field_that_could_not_be_written_again_is_refused_by_all_who_read_it(command, value, tmp_path, capsys):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text(f'{json.dumps(GOOD)}\n{json.dumps(GOOD)[:-1]}, "extra": {value}}}\n')
    assert main([{"FILE": str(file), "OUT": str(out)}.get(word, word) for word in command]) == 2
    problem = "finite numbers, got one beyond 1.8e308" if "e" in value else "values nested at most 100 deep, got deeper"
    assert f"{file}:2: field 'extra': expected {problem}" in capsys.readouterr().err
    assert not out.exists()


def test_duplicates_are_named_and_are_no_error(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [GOOD, GOOD])
    assert main(["check", file]) == 0
    assert f"{file}:2: the same instruction, response and judgment as {file}:1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{file}: no records; expected at least one"),
        ("[]", "{file}: no records; expected at least one"),
        ('{"data": []}', "{file}:1: field 'output' is missing; the row has 'data'"),
        (
            '{\n"data": []\n}',
            "cutlm check: {file}: JSON of another shape; expected an array of records or one record a",
        ),
        (
            "a,b\n1,2\n",
            "cutlm check: {file}: not JSON (2 lines, none of them JSON); expected a JSON array or JSON Lines",
        ),
    ],
)
def test_a_file_without_records_gives_exit_code_2_and_the_reason(content, message, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(content)
    assert main(["check", str(file)]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_no_file_and_a_folder_give_exit_code_2(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"cutlm check: {tmp_path / 'nothing'}: no such file; check the path\n"
    assert main(["check", str(tmp_path)]) == 2
    assert "expected a file, got a directory" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["chekc"], ["check"], ["check", "a", "b"], ["check", "a", "--nope"]])
def test_a_wrong_command_line_gives_exit_code_2_and_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: cutlm" in capsys.readouterr().err


def test_five_thousand_rows_are_checked_in_under_two_seconds(tmp_path):
    rows = [GOOD | {"instruction": f"Add {n} and {n}. " * 20, "output": f"{n} " * 200} for n in range(5000)]
    rows[4321] = GOOD | {"output": ""}
    file = write(tmp_path / "a.jsonl", rows)
    seconds = []
    while len(seconds) < 3 and min(seconds, default=2) >= 2:  # a busy machine may have been slow by chance
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cutlm", "check", file], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 2
    assert done.stderr == f"{file}:4322: field 'output': expected text, got an empty string\n"
    assert done.stdout.startswith(f"{file}: 5000 rows, 1 bad, 0 duplicates\n")
    assert min(seconds) < 2


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_none_of_the_heavy_libraries(argv):
    code = (
        "import sys\nfrom cutlm.cli import main\n"
        f"try:\n    main({argv!r})\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cutlm" in done.stdout
