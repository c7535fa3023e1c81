"""A conversation: what was said, and the record that its last exchange becomes.

How it is put before a model is left to the engines (`cutlm.chat.local`, `cutlm.chat.server`).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cutlm.blame.token_scores import is_token_scores_row
from cutlm.data.files import SourceRow, read_bytes, sync_directory
from cutlm.data.records import JudgedRecord, check_records, check_rows, is_praise
from cutlm.errors import DataError

_SPEAKERS = ("User", "Assistant")


@dataclass
class Turn:
    """A message, and the answer to it.

    Attributes:
        message: What the user said.
        answer: What the model said.
        is_ended: Whether it came to an end by itself, and was not stopped.
        judgment: What was said of the answer last; None where nothing was.
    """

    message: str
    answer: str
    is_ended: bool
    judgment: str | None = None


@dataclass
class Conversation:
    """The turns that a model is shown.

    Attributes:
        turns: From the oldest to the last.
    """

    turns: list[Turn] = field(default_factory=list)

    def list_texts(self, message: str) -> list[str]:
        """What was said, by the user and the model in turn, and a message that is said now."""
        return [text for turn in self.turns for text in (turn.message, turn.answer)] + [message]

    def make_record(self, judgment: str) -> JudgedRecord:
        """The last exchange as a record.

        The instruction is the message or, where there are turns before it, all of the conversation up to the answer in
        plain text (`join_texts`): what the answer has to be right for.

        Args:
            judgment: What is said of the answer; praise becomes null.

        Raises:
            DataError: No such record can be: the answer is empty, or a text is none.
        """
        last = self.turns[-1]
        row = {
            "instruction": join_texts(Conversation(self.turns[:-1]).list_texts(last.message)),
            "output": last.answer,
            "judgment": None if is_praise(judgment) else judgment,
        }
        check = check_rows([SourceRow("the last exchange", row)])
        if check.problems:
            raise DataError(check.problems, hint="this exchange makes no record")
        return check.records[0]


def join_texts(texts: Sequence[str]) -> str:
    """A conversation in plain text: a single message as it is, several with the name of who says each.

    Example:

        >>> join_texts(["Hello.", "Hi!", "Count to two."])
        'User: Hello.\\n\\nAssistant: Hi!\\n\\nUser: Count to two.'
    """
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{_SPEAKERS[place % 2]}: {text}" for place, text in enumerate(texts))


def append_record(path: str | Path, record: JudgedRecord) -> int:
    """Appends a record to a JSON Lines file, which is made where there is none, and sees it to the disk.

    Returns:
        The number of records that are in the file now.

    Raises:
        DataError: The file is no JSON Lines of records, or has this record already; nothing was written.
    """
    path = Path(path)
    if path.suffix in (".gz", ".xz"):
        raise DataError(f"{path}: expected a plain file to append to, got a compressed one; name another")
    num_records, gap = 0, b""
    is_new = not path.exists()
    if not is_new:
        num_records = _check_file(path, record)
        gap = b"" if read_bytes(path).endswith(b"\n") or not num_records else b"\n"
    line = gap + json.dumps(record.model_dump(mode="json", exclude_unset=True), ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # the line goes out in one piece
            file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); name another file") from None
    if is_new:
        sync_directory(path.parent)
    return num_records + 1


def _check_file(path: Path, record: JudgedRecord) -> int:
    """Counts the records of a file that one more may be appended to."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file to append to, got something else; name another")
    data = read_bytes(path)
    if data != path.read_bytes():
        raise DataError(f"{path}: expected a plain file to append to, got a compressed one; name another")
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        raise DataError(f"{path}: expected JSON Lines to append to, got a JSON array; name another file")
    if not text:
        return 0
    check = check_records(path)
    if check.problems:
        raise DataError(check.problems, hint=f"{path} is not a file of records; mend it or name another")
    if is_token_scores_row(check.records[0].model_dump()):
        raise DataError(f"{path}: expected records to append to, got token scores; name another file")
    if record in check.records:
        place = check.locations[check.records.index(record)]
        raise DataError(f"{place}: this exchange with this judgment is there already; nothing was written")
    return len(check.records)
