"""Reading and writing JSON and JSON Lines: every row comes back, and no half-written file is ever seen."""

import errno
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlm.data.files import MAX_DEPTH, open_atomic, read_bytes, read_rows, sync_tree, write_rows
from cutlm.data.journal import Journal
from cutlm.errors import DataError

NAMES = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz", "rows.jsonl.xz", "rows.json.xz", "rows.jsonl.zst"]

# Any text, with Unicode line breaks, quotes and halves of surrogate pairs.
texts = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from('\n\r\u2028\u2029\x85"\\'))
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(rows=st.lists(st.dictionaries(texts, values, max_size=4), max_size=6))
def test_rows_survive_a_round_trip(name, rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    assert write_rows(path, rows) == len(rows)
    read, problems = read_rows(path)
    assert problems == []
    assert [row.value for row in read] == rows


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b"])
def test_only_a_newline_ends_a_line(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": text}, ensure_ascii=False) + "\n", newline="")
    rows, _ = read_rows(path)
    assert [(row.location, row.value) for row in rows] == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": text})]


def test_half_a_surrogate_pair_is_escaped_and_other_rows_stay_readable(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": "é\ud800"}, {"a": "é"}])
    assert path.read_text("utf-8").splitlines() == ['{"a": "\\u00e9\\ud800"}', '{"a": "é"}']


def test_the_suffix_json_gives_one_array_and_any_other_json_lines(tmp_path):
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


def test_the_suffix_selects_the_compression_and_no_time_is_written(tmp_path):
    for name, unpack in (("rows.jsonl.gz", gzip.decompress), ("rows.jsonl.xz", lzma.decompress)):
        write_rows(tmp_path / name, [{"a": 1}])
        assert unpack((tmp_path / name).read_bytes()) == b'{"a": 1}\n'
    # Byte 3 of gzip holds the flags, 4 to 7 the time: the same rows give the same bytes.
    assert (tmp_path / "rows.jsonl.gz").read_bytes()[3:8] == bytes(5)


def test_compression_is_recognized_by_the_first_bytes(tmp_path):
    for pack in (gzip.compress, lzma.compress, lambda content: pyarrow.compress(content, "zstd", asbytes=True)):
        path = tmp_path / "rows.txt"
        path.write_bytes(pack(b'{"a": 1}\n'))
        assert [row.value for row in read_rows(path)[0]] == [{"a": 1}]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.location, row.value) for row in read_rows(path)[0]] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": 2}),
    ]


def test_rows_of_an_array_are_located_by_index(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(' [{"a": 1},\n {"a": 2}]')
    assert [row.location for row in read_rows(path)[0]] == [f"{path}[0]", f"{path}[1]"]


def fail_midway():
    yield {"a": 1}
    raise ZeroDivisionError


@pytest.mark.parametrize("name", NAMES)
def test_after_an_error_the_old_file_is_unchanged_and_no_other_file_is_left(name, tmp_path):
    path = tmp_path / name
    write_rows(path, [{"a": "old"}])
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_rows(path, fail_midway())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_is_not_json_is_refused_and_no_file_is_left(tmp_path):
    for value in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_rows(tmp_path / "rows.jsonl", [{"a": value}])
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_appears_only_when_complete(tmp_path):
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
        (b"hello\nworld\n", r"bad: not JSON; expected a JSON array or JSON Lines"),
        (
            b'{\n "data": [1],\n "b": 2\n}',
            r"bad: expected an array of records, or one record per line, got one JSON object with the keys 'data', 'b'",
        ),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"bad:2: expected UTF-8 text, got the byte 0xff"),
        (
            b'[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            r"bad:3: not JSON \(Expecting ',' delimiter, column 2\)",
        ),
        (b'[{"a": NaN}]', r"bad: not JSON \(NaN is not JSON\)"),
        (b"[" * 100_000, r"bad: not JSON \(.*recursion"),
        (gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"bad: the compressed file is damaged"),
        (lzma.compress(b'{"a": 1}\n' * 99)[:-9], r"bad: the compressed file is damaged"),
        (b"\x1f\x8brubbish", r"bad: the compressed file is damaged"),
        (b"\x28\xb5\x2f\xfd\x04\x58", r"bad: the compressed file is damaged"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(data, message, tmp_path):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_lines_that_are_not_json_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": Infinity}\n' + "[" * 100_000 + '\n{"a": 2}\n')
    rows, problems = read_rows(path)
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}]
    reasons = ("2: not JSON (Expecting value)", "3: not JSON (Infinity is not JSON)", "4: not JSON (")
    for problem, reason in zip(problems, reasons, strict=True):
        assert problem.startswith(f"{path}:{reason}")


@pytest.mark.parametrize("number", ["1e999", "-1e999", '[0, {"b": [1, 2e308]}]', "1" * 310 + ".0"])
def test_an_infinite_number_is_refused_with_its_location_and_field(number, tmp_path):
    message = "field 'a': expected finite numbers, got one beyond 1.8e308; write a smaller one, or null"
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f'{{"a": 1e308}}\n{{"b": 1, "a": {number}}}\n')
    rows, problems = read_rows(lines)
    assert ([row.location for row in rows], problems) == ([f"{lines}:1"], [f"{lines}:2: {message}"])
    array.write_text(f'[{{"a": 1e308}}, {{"b": 1, "a": {number}}}]')
    rows, problems = read_rows(array)
    assert ([row.location for row in rows], problems) == ([f"{array}[0]"], [f"{array}[1]: {message}"])


def test_too_deeply_nested_values_are_refused_with_their_location_and_field(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep, deeper = ("[" * depth + "]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1))
    objects = '{"b": ' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    path.write_text("".join(f'{{"a": {value}}}\n' for value in (deep, deeper, objects, "[" * 300 + "]" * 300)))
    rows, problems = read_rows(path)
    assert [row.location for row in rows] == [f"{path}:1"]
    message = "field 'a': expected values nested at most 100 deep, got deeper ones; flatten or remove them"
    assert problems == [f"{path}:{number}: {message}" for number in (2, 3, 4)]


def test_each_row_is_named_even_if_none_is_usable(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1e999}\n')
    rows, problems = read_rows(path)
    assert (rows, len(problems)) == ([], 1)
    assert problems[0].startswith(f"{path}:1: field 'a': expected finite numbers")


def test_paths_that_are_not_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such file; check the path"):
        read_rows(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no data files in this folder"):
        read_rows(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be read \(Not a directory\)"):
        read_rows(tmp_path / "file" / "inside")
    with pytest.raises(DataError, match=r"expected a file to write, got a directory; name a file inside it"):
        write_rows(tmp_path, [])
    with pytest.raises(DataError, match=r"cannot be written \(File exists\)"):
        write_rows(Path(tmp_path / "file" / "inside"), [])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_written_to(number, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert write_rows(tmp_path / "a.jsonl", [{"a": 1}]) == 1
    sync_tree(tmp_path)
    with Journal(tmp_path / "b.jsonl", {"seed": 1}) as journal:
        journal.append([{"index": 0}])
    assert list(Journal(tmp_path / "b.jsonl", {"seed": 1}).lines) == [{"index": 0}]
    journal.remove()


def test_an_error_of_the_disk_while_syncing_is_not_hidden(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_rows(tmp_path / "a.jsonl", [{"a": 1}])
    assert list(tmp_path.iterdir()) == []
