"""CSV as spreadsheets and programs write it, and values of Parquet that JSON does not have."""

import datetime
import decimal

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Array2D, Dataset, Features, Value

from cutlm.data.files import read_rows
from cutlm.data.records import check_records
from cutlm.errors import DataError


def read_csv(tmp_path, content, name="a.csv"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = read_rows(tmp_path / name)
    return [(row.location.removeprefix(str(tmp_path / name)), row.value) for row in rows], problems


EXPECTED = [(":2", {"instruction": "a;b,\tc", "output": 'say "x"\nor ü'}), (":4", {"instruction": "d", "output": "e"})]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("quoted", ["", '"'])
def test_the_delimiter_the_encoding_and_the_line_ends_are_recognized(delimiter, encoding, ending, quoted, tmp_path):
    header = delimiter.join(f"{quoted}{name}{quoted}" for name in ("instruction", "output"))
    lines = [header, f'"a;b,\tc"{delimiter}"say ""x""\nor ü"', f"d{delimiter}e", ""]
    assert read_csv(tmp_path, ending.join(lines).encode(encoding)) == (EXPECTED, [])


def test_a_first_line_that_names_the_delimiter_is_followed(tmp_path):
    assert read_csv(tmp_path, "sep=;\r\na,b;c\r\n1;2\r\n") == ([(":3", {"a,b": "1", "c": "2"})], [])


@pytest.mark.parametrize(
    "name", ["ORC name", "PAR1", "ARROW1", "GGUF", "BZh", "Rar!", "Obj", "%PDF", "SQLite format 3"]
)
def test_a_column_may_be_named_as_another_format_begins(name, tmp_path):
    assert read_csv(tmp_path, f"{name},instruction\nü,b\n") == ([(":2", {name: "ü", "instruction": "b"})], [])


def test_a_table_may_have_text_where_an_archive_has_its_format(tmp_path):
    assert read_csv(tmp_path, f"instruction,output\n{'a' * 237},ustar\n")[0][0][1]["output"] == "ustar"


def test_a_header_with_delimiters_in_quotes_is_read(tmp_path):
    assert read_csv(tmp_path, '"a, b";"c"\n1;2\n') == ([(":2", {"a, b": "1", "c": "2"})], [])


def test_empty_cells_are_missing_values_and_empty_rows_are_skipped(tmp_path):
    rows, problems = read_csv(tmp_path, "instruction,input,output,judgment,score\na,,b,,\n,,,,\nc,d,,e,3\n")
    assert problems == []
    assert rows == [
        (":2", {"instruction": "a", "output": "b"}),
        (":4", {"instruction": "c", "input": "d", "output": "", "judgment": "e", "score": 3.0}),
    ]


def test_missing_judgments_of_a_table_are_counted_as_such(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,judgment\na,b,\nc,d,Wrong.\n")
    records = check_records(tmp_path / "a.csv").records
    assert ["judgment" in record.model_fields_set for record in records] == [False, True]


@pytest.mark.parametrize(
    ("cell", "score"), [("7", 7.0), ('"7,5"', 7.5), (" 2.5 ", 2.5), ("good", "good"), ("nan", "nan")]
)
def test_scores_are_numbers(cell, score, tmp_path):
    rows, _ = read_csv(tmp_path, f"instruction,score\n1,{cell}\n")
    assert rows == [(":2", {"instruction": "1", "score": score})]


def test_lists_and_messages_are_json_and_other_text_stays_text(tmp_path):
    cells = {
        "messages": '[{"role": "user", "content": "Hi."}]',
        "wrong_spans": "[[0, 2]]",
        "prompt": "[1, 2]",
        "output": '{"a": 1}',
        "tools": "[not JSON",
    }
    quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in cells.values()]
    rows, _ = read_csv(tmp_path, f"{','.join(cells)}\n{','.join(quoted)}\n")
    parsed = {"messages": [{"role": "user", "content": "Hi."}], "wrong_spans": [[0, 2]]}
    assert rows == [(":2", cells | parsed)]


def test_rows_that_do_not_fit_the_header_are_named(tmp_path):
    rows, problems = read_csv(tmp_path, "a,b\n1,2,3\n4\n5,6,\n7,8\n")
    assert [place for place, _ in rows] == [":4", ":5"]
    expected = "expected 2 cells, one for each column of the header, got"
    assert [problem.partition(";")[0] for problem in problems] == [
        f"{tmp_path}/a.csv:2: {expected} 3",
        f"{tmp_path}/a.csv:3: {expected} 1",
    ]


def test_the_index_of_pandas_is_left_out_and_other_columns_need_a_name(tmp_path):
    assert read_csv(tmp_path, ",a\n0,1\n") == ([(":2", {"a": "1"})], [])
    assert read_csv(tmp_path, "a,,\n1,,\n") == ([(":2", {"a": "1"})], [])
    rows, problems = read_csv(tmp_path, "a,\n1,2\n")
    assert (rows, len(problems)) == ([], 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n1,"2\n', r"a\.csv:2: not CSV \(unexpected end of data\)"),
        ('a,b\n1,"2" 3\n', r"a\.csv:2: not CSV"),
        ("a,a\n1,2\n", r"the column 'a' occurs twice"),
        ("a,b\né,2\n".encode("cp1252"), r"a\.csv:2: expected UTF-8 text"),
        ("a,b\n1,2\n".encode("utf-16")[:-1], r"not UTF-16"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path, content)


def test_long_cells_are_read(tmp_path):
    rows, _ = read_csv(tmp_path, f"a,b\n{'x' * 200_000},y\n")
    assert len(rows[0][1]["a"]) == 200_000


def test_json_is_read_whatever_the_file_is_called(tmp_path):
    for content in ('{"a": 1}\n', '[{"a": 1}]', ' [\n {"a": 1}]'):
        assert [value for _, value in read_csv(tmp_path, content)[0]] == [{"a": 1}]
    assert read_csv(tmp_path, '{"a": 1}\n'.encode("utf-16"), "a.jsonl")[0] == [(":1", {"a": 1})]


# ---- Parquet ----


def test_values_of_a_column_become_json(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {
            "score": [float("nan"), 1.5],
            "day": [datetime.date(2026, 11, 26), None],
            "price": [decimal.Decimal("1.50"), None],
            "messages": [[{"role": "user", "content": "Hi.", "tool_calls": None}], None],
            "counts": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
            "id": pyarrow.array([bytes(16), None], pyarrow.uuid()),
        }
    )
    pyarrow.parquet.write_table(table, path)
    rows, problems = read_rows(path)
    assert problems == []
    assert [row.value for row in rows] == [
        {
            "score": None,
            "day": "2026-11-26",
            "price": 1.5,
            "messages": [{"role": "user", "content": "Hi."}],
            "counts": {"a": 1},
            "kind": "x",
            "id": "00000000-0000-0000-0000-000000000000",
        },
        {"score": 1.5, "day": None, "price": None, "messages": None, "counts": {}, "kind": "y", "id": None},
    ]


def test_values_of_mixed_types_are_read_as_datasets_writes_them(tmp_path):
    rows = [{"tools": [{"name": "a", "parameters": {"x": 1}}, {"name": "b", "parameters": {"y": "z"}}]}]
    rows.append({"tools": [{"name": "c", "parameters": 3}]})
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    assert [row.value for row in read_rows(tmp_path / "a.parquet")[0]] == rows


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_binary_columns_are_refused(kind, tmp_path):
    path = tmp_path / "a.arrow"
    column = pyarrow.array([b"x"], getattr(pyarrow, kind)())
    table = pyarrow.table({"image": pyarrow.StructArray.from_arrays([column], ["bytes"])})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    rows, problems = read_rows(path)
    assert (rows, problems) == (
        [],
        [f"{path}: column 'image': expected text, numbers or lists, got {kind}; remove the column"],
    )


def test_matrices_are_read_as_datasets_writes_them(tmp_path):
    features = Features({"output": Value("string"), "scores": Array2D((2, 2), "int32")})
    row = {"output": "Red.", "scores": [[1, 2], [3, 4]]}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    assert [one.value for one in read_rows(tmp_path / "a.parquet")[0]] == [row]


def test_times_out_of_range_are_refused(tmp_path):
    column = pyarrow.array([10**14], pyarrow.timestamp("s"))  # milliseconds that were taken for seconds
    pyarrow.parquet.write_table(pyarrow.table({"day": column}), tmp_path / "a.parquet")
    rows, problems = read_rows(tmp_path / "a.parquet")
    assert rows == []
    (problem,) = problems
    assert problem.startswith(f"{tmp_path}/a.parquet: column 'day': a value of type timestamp[ms] cannot be read")
