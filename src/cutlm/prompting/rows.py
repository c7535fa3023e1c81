"""Encode records into a table of rows: batch by batch, in several processes, and once for the same content.

Rows are kept in Arrow, in memory or in a file of the cache of `datasets`, not as Python objects: a token takes four
bytes instead of forty.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset, config, is_caching_enabled
from datasets.fingerprint import generate_random_fingerprint
from tqdm import tqdm

from cutlm.data import conversations
from cutlm.data import records as data_records
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.prompting import encoding, spans, templates
from cutlm.prompting.encoding import EncodedBatch, Encoder, View, encode_batch, join_errors, view_both_contexts

# Records that are rendered, then tokenized together: enough for every thread of a tokenizer.
_BATCH_SIZE = 1000
# Fewer records are encoded faster than a file is worth.
_MIN_CACHED = 2000
_ID_COLUMNS = ("prompt_ids", "judged_prompt_ids", "response_ids")
_ROWS, _COUNTS = "rows.arrow", "counts.json"


@dataclass
class EncodedCounts:
    """What became of the records of a data set."""

    num_satisfactory: int = 0  # among the rows
    num_truncated: int = 0  # number of records with a truncated prompt
    indices: list[int] = field(default_factory=list)  # for each row, the index of its record
    left_out: list[str] = field(default_factory=list)  # a sentence for each record whose response is too long
    skipped: dict[str, int] = field(default_factory=dict)  # number of records that a view leaves out, by reason


@dataclass
class EncodedRecords(EncodedCounts):
    """The records of a data set as rows, and those left out.

    Columns: `prompt_ids`, `judged_prompt_ids`, `response_ids`, `location`, `is_satisfactory` and those of a view.
    """

    rows: Dataset = field(default_factory=lambda: Dataset.from_dict({}))

    @property
    def num_left_out(self) -> int:
        return len(self.left_out) + sum(self.skipped.values())

    def describe_left_out(self) -> list[str]:
        """Return a sentence for each reason of a view and for each record that is too long."""
        return [f"{num} records left out: {reason}" for reason, num in self.skipped.items()] + self.left_out

    def describe(self, max_length: int) -> str:
        """Return the counts as one line."""
        num_rows = len(self.rows)
        return (
            f"{num_rows} records encoded ({self.num_satisfactory} satisfactory, {num_rows - self.num_satisfactory}"
            f" unsatisfactory); {self.num_truncated} prompts truncated on the left to fit max_length {max_length};"
            f" {self.num_left_out} records left out"
        )


def encode_records(
    records: Sequence[Any],  # `JudgedRecord`s, or objects with a record
    locations: Sequence[str],  # where each is from, such as `data.jsonl:17`
    encoder: Encoder,
    max_length: int,
    view: View = view_both_contexts,
    *,
    num_processes: int | None = None,
    show_progress: bool = True,
    check: Callable[[pyarrow.Table], None] | None = None,
) -> EncodedRecords:
    """Encode records and report those that do not fit; see `Encoder.fit`.

    Args:
        records: The records.
        locations: The location of each.
        encoder: Tokenizer and template.
        max_length: Maximum number of tokens of a prompt and the response.
        view: Selects the training data of a record, or returns the reason for leaving it out.
        num_processes: Processes that encode; None for this one, in which the tokenizer uses several threads.
        show_progress: Show a progress bar.
        check: Called with the rows of each batch; what it raises stops the encoding at once.

    Raises:
        DataError: A chat template refuses records, or a view does; all are named by their locations.
    """
    job = _Job(records, locations, encoder, max_length, view)
    folder = _choose_cache_folder(job)
    if folder is not None and folder.is_dir():
        counts = EncodedCounts(**json.loads((folder / _COUNTS).read_text("utf-8")))
        return EncodedRecords(**vars(counts), rows=Dataset.from_file(str(folder / _ROWS)))
    counts, skipped, problems = EncodedCounts(), Counter[str](), list[tuple[str, str]]()
    tables = []
    options: Any = {} if show_progress else {"disable": True}  # an explicit False would override TQDM_DISABLE
    # Many thousand records take a minute; few take no bar.
    with tqdm(total=len(records), desc="tokenizing", unit=" records", delay=2, leave=False, **options) as progress:
        for start, (table, batch) in zip(job.starts, _encode_batches(job, num_processes), strict=True):
            if check is not None:
                check(table)
            tables.append(table)
            counts.num_satisfactory += batch.num_satisfactory
            counts.num_truncated += batch.num_truncated
            counts.indices += [start + index for index in batch.indices]
            counts.left_out += batch.left_out
            skipped.update(batch.skipped)
            problems += batch.problems
            progress.update(min(_BATCH_SIZE, len(records) - start))
    if problems:
        raise join_errors(problems)
    counts.skipped = dict(skipped)
    table = pyarrow.concat_tables(tables, promote_options="default") if tables else pyarrow.table({})
    if folder is not None and _store(folder, table, counts):
        rows = Dataset.from_file(str(folder / _ROWS))
    else:
        rows = Dataset(table, fingerprint=generate_random_fingerprint())
    return EncodedRecords(**vars(counts), rows=rows)


class _Job(NamedTuple):
    """What every process needs to encode batches."""

    records: Sequence[Any]
    locations: Sequence[str]
    encoder: Encoder
    max_length: int
    view: View

    @property
    def starts(self) -> range:
        """The index of the first record of each batch."""
        return range(0, len(self.records), _BATCH_SIZE)

    def encode(self, start: int) -> tuple[pyarrow.Table, EncodedBatch]:
        """Encode a batch; return its rows as a table and its counts."""
        part = slice(start, start + _BATCH_SIZE)
        batch = encode_batch(self.records[part], self.locations[part], self.encoder, self.max_length, self.view)
        names = dict.fromkeys(name for row in batch.rows for name in row)
        types = dict.fromkeys(_ID_COLUMNS, pyarrow.list_(pyarrow.int32()))
        columns = {name: pyarrow.array([row.get(name) for row in batch.rows], types.get(name)) for name in names}
        batch.rows = []
        return pyarrow.table(columns), batch


# ---- Threads and processes ----

_job: _Job | None = None  # of a process that encodes batches for another


def _encode_batches(job: _Job, num_processes: int | None) -> Iterator[tuple[pyarrow.Table, EncodedBatch]]:
    num_processes = min(num_processes or 1, len(job.starts))
    if num_processes < 2:
        yield from _encode_in_threads(job)
        return
    with _tokenize_in_one_thread():
        pool = ProcessPoolExecutor(num_processes, initializer=_receive_job, initargs=(job,))
        try:
            yield from pool.map(_encode_in_process, job.starts)
        except BrokenProcessPool:
            raise UserError(
                f"dataset_num_proc: one of {num_processes} processes was killed, probably because the memory was full;"
                " set a smaller number"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_in_threads(job: _Job) -> Iterator[tuple[pyarrow.Table, EncodedBatch]]:
    """Encode two batches at a time: one is tokenized, outside of Python, while the other one is rendered or packed."""
    starts = iter(job.starts)
    with ThreadPoolExecutor(2) as pool:
        # A third batch waits, so that no thread does.
        running = deque(pool.submit(job.encode, start) for start in islice(starts, 3))
        while running:
            encoded = running.popleft().result()
            running.extend(pool.submit(job.encode, start) for start in islice(starts, 1))
            yield encoded


@contextmanager
def _tokenize_in_one_thread() -> Iterator[None]:
    """Let new processes tokenize in one thread: after a fork, the threads of a tokenizer would wait for each other."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _receive_job(job: _Job) -> None:
    global _job
    _job = job


def _encode_in_process(start: int) -> tuple[pyarrow.Table, EncodedBatch]:
    assert _job is not None
    return _job.encode(start)


# ---- The cache ----


def _choose_cache_folder(job: _Job) -> Path | None:
    """Choose the folder of the cache for rows of this content; None if they are not to be stored."""
    is_plain = all(isinstance(record, JudgedRecord) for record in job.records)
    if len(job.records) < _MIN_CACHED or not is_plain or not is_caching_enabled():
        return None
    view, options = (job.view.func, job.view.keywords) if isinstance(job.view, partial) else (job.view, {})
    tokenizer = job.encoder.tokenizer
    if not tokenizer.is_fast or not inspect.isfunction(view) or view.__closure__:
        return None  # what they depend on cannot be read
    modules = {inspect.getmodule(one) for one in (view, encode_batch)}
    modules |= {conversations, data_records, encoding, spans, templates, inspect.getmodule(encode_records)}
    sources = sorted(inspect.getsource(module) for module in modules if module is not None)
    settings = [
        *(version(name) for name in ("transformers", "tokenizers", "jinja2")),
        *(view.__qualname__, options, job.max_length),
        *(job.encoder.fingerprint, job.encoder.template_date, tokenizer.chat_template),
        *(sorted(map(str, tokenizer.special_tokens_map.items())), tokenizer.backend_tokenizer.to_str()),
    ]
    digest = hashlib.sha256(json.dumps([sources, settings], sort_keys=True, default=str).encode())
    for record, location in zip(job.records, job.locations, strict=True):
        digest.update(record.model_dump_json().encode())
        digest.update(f"\0{location}\0".encode())
    return Path(config.HF_DATASETS_CACHE) / "cutlm" / digest.hexdigest()[:32]


def _store(folder: Path, table: pyarrow.Table, counts: EncodedCounts) -> bool:
    """Store rows in the cache; return whether they are there. A cache that cannot be written to is not used."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        with pyarrow.OSFile(str(temporary / _ROWS), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, max_chunksize=_BATCH_SIZE)
        (temporary / _COUNTS).write_text(json.dumps(asdict(counts)), "utf-8")
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder.is_dir()  # also if another process stored them first
