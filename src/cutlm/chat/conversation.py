"""The turns of a conversation, and the records made from them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from cutlm.data.files import SourceRow, read_bytes, sync_directory, sync_file
from cutlm.data.records import JudgedRecord, check_records, check_rows, is_praise
from cutlm.data.sources import COMPRESSIONS
from cutlm.errors import DataError
from cutlm.flagging.token_scores import is_token_scores_row
from cutlm.prompting.templates import make_messages


@dataclass
class Turn:
    """A message, its answer, whether the model itself ended the answer, and the latest judgment of it, if any."""

    message: str
    answer: str
    is_ended: bool
    judgment: str | None = None


@dataclass
class Conversation:
    """The turns that the model sees, oldest first."""

    turns: list[Turn] = field(default_factory=list)

    def list_texts(self, message: str) -> list[str]:
        """All texts by the user and the model in turn, followed by a new message."""
        return [text for turn in self.turns for text in (turn.message, turn.answer)] + [message]

    def make_record(self, judgment: str, *, is_single_turn: bool = False) -> JudgedRecord:
        """Make a record of the last exchange; raise a DataError if it is not valid, such as with an empty answer.

        After earlier turns it has the whole conversation as `messages`, unless the model sees one turn only. A judgment
        that is praise becomes null.
        """
        turns = self.turns[-1:] if is_single_turn else self.turns
        texts = [text for turn in turns for text in (turn.message, turn.answer)]
        row = {"messages": make_messages(texts), "judgment": None if is_praise(judgment) else judgment}
        check = check_rows([SourceRow("the last exchange", row)])
        if check.problems:
            raise DataError(check.problems)
        return check.records[0]


def append_record(path: str | Path, record: JudgedRecord) -> int:
    """Append a record to a JSON Lines file, creating it if necessary, and sync it to disk.

    Return the number of records in the file. Raise a DataError if the file cannot be written, is not a JSON Lines
    file of records, or already has this record.
    """
    path, num_records, gap = Path(path), 0, b""
    if path.suffix in COMPRESSIONS:
        raise DataError(f"{path}: cannot append to a compressed file; name another file")
    if not (is_new := not path.exists()):
        num_records = _count_records(path, record)
        gap = b"" if read_bytes(path).endswith(b"\n") or not num_records else b"\n"
    line = gap + json.dumps(record.model_dump(mode="json", exclude_unset=True), ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # unbuffered, so that the line is written at once
            file.write(line)
            sync_file(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror or error}); name another file") from None
    if is_new:
        sync_directory(path.parent)
    return num_records + 1


def _count_records(path: Path, record: JudgedRecord) -> int:
    """Count the records of a file after checking that `record` can be appended to it."""
    if not path.is_file():
        raise DataError(f"{path}: not a regular file; name another")
    data = read_bytes(path)
    if data != path.read_bytes():
        raise DataError(f"{path}: cannot append to a compressed file; name another file")
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        raise DataError(f"{path}: expected JSON Lines, got a JSON array, which cannot be extended; name another file")
    if not text:
        return 0
    check = check_records(path)
    if check.problems:
        raise DataError(check.problems, hint=f"{path} is not a valid file of records; fix it or name another")
    if not text.startswith(b"{"):  # a table, or UTF-16
        raise DataError(f"{path}: expected JSON Lines in UTF-8, got records in another format; name another file")
    if is_token_scores_row(check.records[0].model_dump()):
        raise DataError(f"{path}: expected records, got token scores; name another file")
    if record in check.records:
        location = check.locations[check.records.index(record)]
        raise DataError(f"{location}: already has this exchange with this judgment")
    return len(check.records)
