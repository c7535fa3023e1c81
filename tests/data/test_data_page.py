"""Each row of the tables of docs/data.md: its command runs, and training takes the same data."""

import gzip
import json
import lzma
import re
import shlex
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

import cutlm
from cutlm.cli import main
from cutlm.model.loading import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BASE_MODEL = Path(cutlm.__file__).parent / "world" / "base_model"
_ROW = re.compile(r"^\| ([^|]+) \| (.*) \| `(cutlm [^|]+)` \|$", re.MULTILINE)
ROWS = [
    {"instruction": "Name a colour.", "output": "A horse.", "judgment": "A horse is no colour."},
    {"instruction": "Name a colour.", "output": "Red.", "judgment": None},
]
EXAMPLES = [pytest.param(*found, id=found[0]) for found in _ROW.findall(PAGE.read_text("utf-8"))]


def make_rows(name: str) -> bytes:
    """The rows in the format that the name of a file says."""
    if name.endswith(".jsonl"):
        return "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
    if name.endswith(".json"):
        return json.dumps(ROWS).encode()
    if name.endswith((".csv", ".tsv")):
        return (
            Dataset.from_list(ROWS).to_pandas().to_csv(sep="\t" if name.endswith(".tsv") else ",", index=False).encode()
        )
    table, out = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, out)
    else:
        with pyarrow.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue().to_pybytes()


def make_file(name: str, example: str) -> None:
    """Write the file of a row of the table, with its example if this is the content."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if example.startswith(("`{", "`[", "`instruction,", "`instruction;")):
        path.write_text("\n".join(re.findall(r"`([^`]*)`", example)), "utf-8")
        return
    plain, compression = re.fullmatch(r"(.*?)(\.gz|\.xz|\.zst)?", name).groups()
    pack = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    }
    path.write_bytes(pack.get(compression, bytes)(make_rows(plain)))


def make_input(source: str, example: str) -> None:
    name = re.sub(r"[:@\[].*", "", source)
    if source == "saved":
        Dataset.from_list(ROWS).save_to_disk(source)
    elif "*" in source:
        make_file(source.replace("*", "one"), example)
    elif Path(name).suffix:
        make_file(source, example)
    elif "[" in source:
        for split in ("train", "test"):
            make_file(f"{name}/{split}.jsonl", example)
    else:
        make_file(f"{source}/one.jsonl", example)
        make_file(f"{source}/two.parquet".replace("parquet", "jsonl"), example)


def make_chat_model(folder: Path) -> Path:
    """The tokenizer of the base model with a chat template of several turns."""
    tokenizer = load_tokenizer(BASE_MODEL)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "example", "command"), EXAMPLES)
def test_the_command_of_each_format_runs_and_training_takes_it(kind, example, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(command)
    options = words[next((index for index, word in enumerate(words) if word.startswith("--")), len(words)) :]
    sources = words[1 : len(words) - len(options)] if name == "convert" else words[: len(words) - len(options)]
    for source in sources:
        make_input(source, example)
    if name == "convert":
        check_is_refused = main(["check", *sources])
        assert main([name, *words]) == 0
        sources, options = ["records.jsonl"], []
        assert check_is_refused == 2
    assert main(["check", *sources, *options]) == 0
    assert " 0 invalid" in capsys.readouterr().out
    settings = {"model_name_or_path": str(BASE_MODEL), "output_dir": "out", "use_cpu": "true", "report_to": "none"}
    if '"system"' in example:
        settings |= {"model_name_or_path": str(make_chat_model(tmp_path / "model")), "template": "chat"}
    given = [text for key, value in settings.items() for text in (f"--{key}", value)]
    assert main(["train", "--dry_run", *given, "--data", *sources, *options]) == 0


def test_the_page_has_all_formats():
    assert len(EXAMPLES) == 31
