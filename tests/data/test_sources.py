"""Where rows come from: formats, compression, several files, globs, folders, data sets in the hub's layout, columns."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from cutlm.data.files import check_out_file, hash_sources, read_data, read_rows, write_rows
from cutlm.data.sources import check_columns, find_files, find_hub_names
from cutlm.errors import ConfigError, DataError

ROW = {"instruction": "Name a colour.", "output": 'Blue,\nor "navy".', "judgment": "Name one."}
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: other
  data_files: other/*.jsonl
---
"""


def compress_zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": compress_zstd}


def make_file(path: Path, rows: list[dict], kind: str) -> None:
    """Write rows by other libraries than cutlm's own."""
    table = Dataset.from_list(rows)
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind in (".csv", ".tsv"):
        table.to_pandas().to_csv(path, sep="\t" if kind == ".tsv" else ",", index=False)
    elif kind == ".parquet":
        table.to_parquet(path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.data.schema) as writer:
            writer.write_table(table.data.table)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_every_format_gives_the_same_rows_with_their_places(kind, compression, tmp_path):
    plain = tmp_path / f"rows{kind}"
    make_file(plain, [ROW, ROW | {"output": "Red."}], kind)
    path = tmp_path / f"rows{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](plain.read_bytes()))
    rows, problems = read_rows(path)
    assert problems == []
    assert [row.value for row in rows] == [ROW, ROW | {"output": "Red."}]
    # The response of the first row has a line break.
    places = {".jsonl": (":1", ":2"), ".csv": (":2", ":4"), ".tsv": (":2", ":4")}.get(kind, ("[0]", "[1]"))
    assert [row.location for row in rows] == [f"{path}{place}" for place in places]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    make_file(tmp_path / "a.parquet", [ROW], ".parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: the Parquet or Arrow file is damaged"):
        read_rows(tmp_path / "a.parquet")


# ---- Several files ----


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "in" / "b.jsonl", [{"n": 2}])
    write_rows(tmp_path / "in" / "a.jsonl", [{"n": 1}])
    write_rows(tmp_path / "in" / "deep" / "c.json.gz", [{"n": 3}])
    write_rows(tmp_path / "in" / ".hidden" / "d.jsonl", [{"n": 4}])
    (tmp_path / "in" / "notes.txt").write_text("not data")
    (tmp_path / "in" / "b.jsonl.report.json").write_text('{"num_records": 1}')
    write_rows(tmp_path / "in" / "b.jsonl.failures.jsonl", [{"reason": "none"}])
    write_rows(tmp_path / "in" / "b.jsonl.disputed.jsonl", [{"n": 5, "verdicts": []}])
    write_rows(tmp_path / "in" / "b.jsonl.studio" / "ann.jsonl", [{"key": "a"}])
    return tmp_path / "in"


def number(sources):
    rows, problems = read_rows(sources)
    assert problems == []
    return [row.value["n"] for row in rows]


def test_a_folder_is_read_whole_without_hidden_files_and_files_of_other_kinds(folder):
    assert number(folder) == [1, 2, 3]


def test_globs_and_lists_are_read_in_their_order(folder):
    assert number(f"{folder}/?.jsonl") == number(f"{folder}/*.jsonl") == [1, 2]
    assert [row.value for row in read_rows(f"{folder}/*.failures.jsonl")[0]] == [{"reason": "none"}]
    assert number(f"{folder}/**/?.json.gz") == [3]
    assert number([f"{folder}/b.jsonl", f"{folder}/a.jsonl"]) == [2, 1]


@pytest.mark.parametrize("suffix", ["failures.jsonl", "left_out.jsonl", "disputed.jsonl", "todo.jsonl", "todo.csv"])
def test_a_pattern_that_the_shell_expands_names_no_list_of_failures(suffix, tmp_path):
    record, listed = tmp_path / "a.jsonl", tmp_path / f"b.jsonl.{suffix}"
    write_rows(record, [{"instruction": "Name a city.", "output": "Sydney.", "judgment": None}])
    listed.write_text('{"instruction": "Name a river.", "output": "Sydney.", "reason": "the answer is empty"}\n')
    with pytest.raises(DataError, match="pattern in quotes") as error:
        read_rows([record, listed])
    assert str(listed) in error.value.problems[0]
    assert str(record) not in error.value.problems[0]
    # Alone it is meant: judge reads failures again, and studio what is disputed.
    assert len(read_rows(listed)[0]) == len(read_rows([listed, listed])[0]) / 2 == 1


def test_a_file_with_the_characters_of_a_pattern_is_a_file(tmp_path):
    write_rows(tmp_path / "a[1].jsonl", [{"n": 1}])
    assert number(tmp_path / "a[1].jsonl") == [1]


def test_every_file_that_cannot_be_read_is_named(folder):
    (folder / "b.jsonl").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError) as error:
        read_rows([f"{folder}/none.jsonl", f"{folder}/b.jsonl", f"{folder}/*.csv", f"{folder}/a.jsonl"])
    assert [problem.partition(": ")[0] for problem in error.value.problems] == [
        f"{folder}/none.jsonl",
        f"{folder}/b.jsonl",
        f"{folder}/*.csv",
    ]


def test_the_hash_is_of_the_content_and_of_the_columns(folder):
    one = read_data(folder / "a.jsonl").sha256
    (folder / "a.jsonl.zst").write_bytes(compress_zstd((folder / "a.jsonl").read_bytes()))
    assert read_data(folder / "a.jsonl.zst").sha256 == one == hash_sources(folder / "a.jsonl")
    both = read_data([folder / "a.jsonl", folder / "b.jsonl"]).sha256
    assert both == hash_sources(f"{folder}/?.jsonl") != one
    assert read_data([folder / "b.jsonl", folder / "a.jsonl"]).sha256 != both
    assert read_data(folder / "a.jsonl", {"n": "m"}).sha256 not in (one, both)


def test_no_file_of_an_input_is_overwritten(folder):
    for source in (folder, f"{folder}/*.jsonl", folder / "a.jsonl"):
        with pytest.raises(DataError, match="one of the inputs"):
            check_out_file([source], folder / "a.jsonl")
    check_out_file([folder], folder / "notes.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.parquet", "a.arrow"])
def test_formats_that_are_only_read_are_refused_before_writing(name, tmp_path):
    with pytest.raises(DataError, match=r"name it \.jsonl or \.json"):
        check_out_file([], tmp_path / name)


# ---- Data sets ----


@pytest.fixture
def data_set(tmp_path):
    """A folder as `push_to_hub` lays it out, with two configurations."""
    path = tmp_path / "data_set"
    (path / "data").mkdir(parents=True)
    for split, value in (("train", 1), ("test", 2)):
        Dataset.from_list([{"n": value}]).to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    write_rows(path / "other" / "rows.jsonl", [{"n": 3}])
    (path / "README.md").write_text(CARD)
    return path


def test_a_split_and_a_configuration_select_files(data_set):
    rows, _ = read_rows(f"{data_set}[train]")
    assert [(row.location, row.value) for row in rows] == [
        (f"{data_set}/data/train-00000-of-00001.parquet[0]", {"n": 1})
    ]
    assert number(f"{data_set}[test]") == [2]
    assert number(f"{data_set}:other") == number(f"{data_set}:other[train]") == [3]
    assert number(f"{data_set}:default[test]") == [2]


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ("", r"expected the name of a split.*data_set\[train\], .*data_set\[test\]"),
        ("[validation]", "no split named 'validation'; there are train, test"),
        (":nope", "cannot be read as a data set .*'default', 'other'"),
        ("@main[train]", "a folder has no revisions"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(selectors, message, data_set):
    with pytest.raises(DataError, match=message):
        read_rows(f"{data_set}{selectors}")


def test_files_of_a_folder_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    write_rows(tmp_path / "blobs" / "abc", [{"n": 1}])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(tmp_path / "blobs" / "abc")
    assert number(tmp_path / "snapshot") == number(f"{tmp_path}/snapshot[train]") == [1]


def test_splits_are_found_by_the_names_of_files(tmp_path):
    for split, value in (("train", 1), ("validation", 2)):
        write_rows(tmp_path / f"{split}.jsonl", [{"n": value}])
    with pytest.raises(DataError, match="because there are several"):
        read_rows(tmp_path)
    assert number(f"{tmp_path}[validation]") == [2]


def test_a_folder_is_not_read_if_files_may_not_belong_together(tmp_path):
    write_rows(tmp_path / "records.jsonl", [{"n": 1}])
    write_rows(tmp_path / "test.jsonl", [{"n": 2}])
    with pytest.raises(DataError, match=r"records\.jsonl is not in the split 'test'"):
        read_rows(tmp_path)
    assert number(f"{tmp_path}/*.jsonl") == [1, 2]


def test_folders_of_save_to_disk_are_read(tmp_path):
    Dataset.from_list([{"n": 1}, {"n": 2}]).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_list([{"n": 3}]), "test": Dataset.from_list([{"n": 4}])}
    DatasetDict(splits).save_to_disk(tmp_path / "many")
    assert number(tmp_path / "one") == [1, 2]
    assert number(f"{tmp_path}/many[test]") == [4]
    with pytest.raises(DataError, match="because there are several"):
        read_rows(tmp_path / "many")


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(DataError, match="no data files in this folder"):
        read_rows(tmp_path)


def test_files_of_the_hub_are_downloaded_at_the_revision(tmp_path, monkeypatch):
    """The hub is replaced: two functions of `datasets` find and download its files."""
    write_rows(tmp_path / "cached", [{"n": 1}])
    asked = []

    class Builder:
        class config:
            data_files = {"train": ["hf://datasets/org/name@abc/train.jsonl"], "test": []}  # noqa: RUF012

    class Manager:
        def download(self, addresses):
            asked.append(addresses)
            return [str(tmp_path / "cached")]

    monkeypatch.setattr(
        "datasets.load_dataset_builder", lambda *names, revision, **_: asked.append((*names, revision)) or Builder
    )
    monkeypatch.setattr("datasets.DownloadManager", Manager)
    rows, _ = read_rows("org/name:config@refs/pr/1[train]")
    assert [(row.location, row.value) for row in rows] == [("org/name@abc/train.jsonl:1", {"n": 1})]
    assert asked == [
        ("org/name", "config", "refs/pr/1"),
        ["hf://datasets/org/name@abc/train.jsonl"],
    ]


def test_a_data_set_that_cannot_be_reached_is_named(monkeypatch):
    def refuse(*names, **options):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(DataError, match=r"org/name\[train\]: cannot be read as a data set \(Couldn't reach"):
        read_rows("org/name[train]")


@pytest.mark.parametrize("source", ["org/name.jsonl", "org/name.jsonl.gz", "nothing", "a/b/c", "/org/name"])
def test_a_missing_file_is_not_taken_for_a_data_set(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    assert [file.name for file in find_files(source)] == [source]
    with pytest.raises(DataError, match="no such file"):
        read_rows(source)


def test_a_missing_file_of_an_existing_folder_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"runs/records: no such file"):
        read_rows("runs/records")


# ---- Columns ----


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_columns_get_the_names_of_fields(kind, tmp_path):
    path = tmp_path / f"rows{kind}"
    make_file(path, [{"prompt": "Hi.", "reply": "Ho.", "stars": "7.5"}], kind)
    rows, _ = read_rows(path, {"prompt": "instruction", "reply": "output"})
    assert rows[0].value == {"instruction": "Hi.", "output": "Ho.", "stars": "7.5"}


def test_names_may_be_exchanged(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"input": "x", "instruction": "y"}])
    rows, _ = read_rows(tmp_path / "a.jsonl", {"input": "instruction", "instruction": "input"})
    assert rows[0].value == {"instruction": "x", "input": "y"}


def test_a_column_that_no_row_has_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"no row of .* has 'instruction'; the name in the file comes first"):
        read_rows(tmp_path / "a.jsonl", {"instruction": "prompt"})


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_new_name_that_is_taken_is_refused(kind, tmp_path):
    path = tmp_path / f"rows{kind}"
    make_file(path, [{"prompt": "x", "instruction": "y"}], kind)
    if kind == ".jsonl":
        assert len(read_rows(path, {"prompt": "instruction"})[1]) == 1
    else:
        with pytest.raises(DataError, match="the column 'instruction' occurs twice"):
            read_rows(path, {"prompt": "instruction"})


def test_data_sets_of_the_hub_are_named_once_and_files_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    sources = [str(path), "org/data:config@main[train]", "hf://org/data", "org/other"]
    assert find_hub_names(sources) == ["org/data", "org/other"]


@pytest.mark.parametrize("columns", [{"a": "x", "b": "x"}, {"a": 1}, {"a": ""}, ["a"], "a"])
def test_columns_map_names_to_different_names(columns):
    with pytest.raises(ConfigError, match="columns: expected"):
        check_columns(columns)
