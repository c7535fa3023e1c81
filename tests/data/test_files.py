"""Reading and writing JSON and JSON Lines: every row comes back, and no half-written file is ever seen."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.data.files import MAX_DEPTH, open_atomic, read_bytes, read_rows, write_rows
from cutlm.errors import DataError

NAMES = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz", "rows.jsonl.xz", "rows.json.xz"]

# Line ends of Unicode that are none of JSON Lines, quotes, and halves of surrogate pairs, beside all other text.
texts = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from('\n\r\u2028\u2029\x85"\\'))
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", NAMES)
@given(rows=st.lists(st.dictionaries(texts, values, max_size=4), max_size=6))
def test_rows_that_were_written_are_read_back_unchanged(name, rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    assert write_rows(path, rows) == len(rows)
    read, problems = read_rows(path)
    assert problems == []
    assert [row.value for row in read] == rows


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b"])
def test_a_line_ends_at_newline_alone(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": text}, ensure_ascii=False) + "\n", newline="")
    rows, _ = read_rows(path)
    assert [(row.location, row.value) for row in rows] == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": text})]


def test_half_a_surrogate_pair_is_written_as_an_escape_and_other_rows_stay_readable(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": "é\ud800"}, {"a": "é"}])
    assert path.read_text("utf-8").splitlines() == ['{"a": "\\u00e9\\ud800"}', '{"a": "é"}']


def test_a_name_ending_in_json_gives_one_array_and_any_other_json_lines(tmp_path):
    for name in NAMES:
        write_rows(tmp_path / name, [{"a": 1}, {"a": 2}])
        text = read_bytes(tmp_path / name).decode()
        assert text == ('[\n  {"a": 1},\n  {"a": 2}\n]\n' if ".json." in f"{name}." else '{"a": 1}\n{"a": 2}\n'), name


def test_no_rows_give_an_empty_array_or_an_empty_file(tmp_path):
    assert write_rows(tmp_path / "rows.json", []) == 0
    assert write_rows(tmp_path / "rows.jsonl", []) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == []
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert read_rows(tmp_path / "rows.jsonl") == ([], [])


def test_the_ending_decides_the_compression_and_no_time_is_written(tmp_path):
    for name, unpack in (("rows.jsonl.gz", gzip.decompress), ("rows.jsonl.xz", lzma.decompress)):
        write_rows(tmp_path / name, [{"a": 1}])
        assert unpack((tmp_path / name).read_bytes()) == b'{"a": 1}\n'
    # Bytes 4 to 8 of gzip are the time, 3 says whether a name follows: the same rows give the same bytes.
    assert (tmp_path / "rows.jsonl.gz").read_bytes()[3:8] == bytes(5)


def test_compression_is_recognised_by_the_first_bytes_whatever_the_name(tmp_path):
    for pack in (gzip.compress, lzma.compress):
        path = tmp_path / "rows.txt"
        path.write_bytes(pack(b'{"a": 1}\n'))
        assert [row.value for row in read_rows(path)[0]] == [{"a": 1}]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.location, row.value) for row in read_rows(path)[0]] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": 2}),
    ]


def test_rows_of_an_array_are_named_by_their_index(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(' [{"a": 1},\n {"a": 2}]')
    assert [row.location for row in read_rows(path)[0]] == [f"{path}[0]", f"{path}[1]"]


class TornError(Exception):
    pass


def rows_that_break_off():
    yield {"a": 1}
    raise TornError


@pytest.mark.parametrize("name", NAMES)
def test_after_an_error_the_old_file_is_as_it_was_and_nothing_lies_beside_it(name, tmp_path):
    path = tmp_path / name
    write_rows(path, [{"a": "old"}])
    before = path.read_bytes()
    with pytest.raises(TornError):
        write_rows(path, rows_that_break_off())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_is_not_json_is_refused_and_no_file_is_left(tmp_path):
    for value in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_rows(tmp_path / "rows.jsonl", [{"a": value}])
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "file.bin"
    with open_atomic(path) as out:
        out.write(b"half")
        out.flush()
        assert not path.exists()
        out.write(b" and whole")
    assert path.read_bytes() == b"half and whole"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello\nworld\n", r"bad: not JSON \(2 lines, none of them JSON\); expected a JSON array or JSON Lines"),
        (
            b'{\n "data": [1],\n "b": 2\n}',
            r"bad: JSON of another shape; expected an array of records or one record a line, got one JSON object with"
            r" the keys 'data', 'b'",
        ),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"bad:2: expected UTF-8 text, got the byte 0xff"),
        (
            b'[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            r"bad:3: not JSON \(Expecting ',' delimiter, column 2\); expected one JSON array of objects, or one JSON"
            r" object a line",
        ),
        (b'[{"a": NaN}]', r"bad: not JSON \(NaN is not JSON\)"),
        (b"[" * 100_000, r"bad: not JSON \(.*recursion"),
        (
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            r"bad: the compressed file is damaged \(.*\); fetch or compress it",
        ),
        (lzma.compress(b'{"a": 1}\n' * 99)[:-9], r"bad: the compressed file is damaged \(.*\); fetch or compress it"),
        (b"\x1f\x8brubbish", r"bad: the compressed file is damaged \(.*\); fetch or compress it again"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_refused_with_the_reason(data, message, tmp_path):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_lines_that_are_not_json_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": Infinity}\n' + "[" * 100_000 + '\n{"a": 2}\n')
    rows, problems = read_rows(path)
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}]
    assert problems[0] == f"{path}:2: not JSON (Expecting value); each line must be one JSON object"
    assert problems[1] == f"{path}:3: not JSON (Infinity is not JSON); each line must be one JSON object"
    assert problems[2].startswith(f"{path}:4: not JSON (")
    assert len(problems) == 3


@pytest.mark.parametrize("number", ["1e999", "-1e999", '[0, {"b": [1, 2e308]}]', "1" * 310 + ".0"])
def test_an_infinite_number_is_refused_with_its_place_and_field(number, tmp_path):
    message = "field 'a': expected finite numbers, got one beyond 1.8e308; write a smaller one, or null"
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f'{{"a": 1e308}}\n{{"b": 1, "a": {number}}}\n')
    rows, problems = read_rows(lines)
    assert ([row.location for row in rows], problems) == ([f"{lines}:1"], [f"{lines}:2: {message}"])
    array.write_text(f'[{{"a": 1e308}}, {{"b": 1, "a": {number}}}]')
    rows, problems = read_rows(array)
    assert ([row.location for row in rows], problems) == ([f"{array}[0]"], [f"{array}[1]: {message}"])


def test_values_nested_too_deep_are_refused_with_their_place_and_field(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep, deeper = ("[" * depth + "]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1))
    objects = '{"b": ' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    path.write_text("".join(f'{{"a": {value}}}\n' for value in (deep, deeper, objects, "[" * 300 + "]" * 300)))
    rows, problems = read_rows(path)
    assert [row.location for row in rows] == [f"{path}:1"]
    message = "field 'a': expected values nested at most 100 deep, got deeper ones; flatten or leave them out"
    assert problems == [f"{path}:{number}: {message}" for number in (2, 3, 4)]


def test_a_file_in_which_no_row_can_be_used_names_each(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1e999}\n')
    rows, problems = read_rows(path)
    assert (rows, len(problems)) == ([], 1)
    assert problems[0].startswith(f"{path}:1: field 'a': expected finite numbers")


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such file; check the path"):
        read_rows(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"expected a file, got a directory; name the file inside it"):
        read_rows(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be read \(Not a directory\)"):
        read_rows(tmp_path / "file" / "inside")
    with pytest.raises(DataError, match=r"expected a file to write, got a directory; name a file inside it"):
        write_rows(tmp_path, [])
    with pytest.raises(DataError, match=r"cannot be written \(File exists\)"):
        write_rows(Path(tmp_path / "file" / "inside"), [])
