"""Recognize files and rows in other formats than cutlm's, and say how to convert them."""

import io
import json
import re
import shlex
import zipfile
from collections.abc import Mapping
from typing import Any

from cutlm.data.conversations import ends_with_response, is_conversation_row, read_json_text

_POINTERS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer instead of the file itself; run git lfs pull in its folder, or download it again",
    ),
    (b"/annex/objects/", "a git-annex pointer instead of the file itself; run git annex get on it"),
)
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<body")
_ICONV = "run: iconv -f {} -t UTF-8 FILE > NEW"
_EXPORT = "export the rows as JSON Lines"
_NO_TEXT = "a file of records has text, one JSON object per line"
# How files begin that are no text of ours, what they are, and what to do.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"ORC", "an ORC file", _EXPORT),
    (b"Obj\x01", "an Avro file", _EXPORT),
    (b"\x89HDF", "an HDF5 file", _EXPORT),
    (b"SQLite format 3\0", "a SQLite database", _EXPORT),
    *(
        (
            b"BZh%d1AY&SY" % level,
            "a file compressed with bzip2",
            "decompress it first (bunzip2 FILE), or use gzip or xz",
        )
        for level in range(1, 10)
    ),
    (b"\x04\x22\x4d\x18", "a file compressed with LZ4", "decompress it first (lz4 -d FILE), or use gzip or xz"),
    (b"\x5d\x00\x00", "a file compressed with LZMA", "decompress it first (unlzma FILE), or use gzip or xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "extract the file of records"),
    (b"Rar!\x1a\x07", "a RAR archive", "extract the file of records"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Office file", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"%PDF-", "a PDF file", _NO_TEXT),
    (b"\x89PNG", "a picture", _NO_TEXT),
    (b"\xff\xd8\xff", "a picture", _NO_TEXT),
    (b"GGUF", "the weights of a model (GGUF)", _NO_TEXT),
    (b"\x7fELF", "a program", _NO_TEXT),
    (b"\xff\xfe\0\0", "UTF-32 text", _ICONV.format("UTF-32")),
    (b"\0\0\xfe\xff", "UTF-32 text", _ICONV.format("UTF-32")),
)
_NUM_BYTES_EXAMINED = 1000
_CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # besides those that text may have
_FIELDS = "instruction, output and judgment"
_NO_JUDGMENTS = "cutlm judge adds judgments to rows with instruction and output"
# Fields of other tools' rows that a record has under another name.
_OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "instruct", "problem", "user"),
    "output": ("response", "completion", "answer", "reply", "generation", "model_output", "assistant", "text"),
    "judgment": ("critique", "feedback", "judgement", "criticism", "review", "comment"),
    **dict.fromkeys(("input", "score", "system", "history", "tools"), ()),
}


def describe_stand_in(content: bytes) -> str | None:
    """Describe a pointer or a web page that a download left in place of the file; None for any other content."""
    for beginning, description in _POINTERS:
        if content.startswith(beginning):
            return description
    if content[:_NUM_BYTES_EXAMINED].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE):
        return "a web page, perhaps one that asks to log in or reports an error; download the file itself"
    return None


def has_beginning(content: bytes, *beginnings: bytes) -> bool:
    """Whether a file begins in one of these ways, and not as text whose first word is the same, such as a column."""
    found = next((beginning for beginning in beginnings if content.startswith(beginning)), b"")
    return bool(found) and not (found.isalnum() and _is_text(content))


def _is_text(content: bytes) -> bool:
    return _CONTROL_CHARACTER.search(content[:_NUM_BYTES_EXAMINED]) is None


def describe_file_format(content: bytes) -> str | None:
    """Describe a file that cannot hold records, and say what to do; None if it may hold records.

    Args:
        content: The file's bytes, after decompression.

    Example:

        >>> describe_file_format(b"ORC" + bytes(9))
        'an ORC file; export the rows as JSON Lines'
    """
    if stand_in := describe_stand_in(content):
        return stand_in
    for beginning, name, advice in _BEGINNINGS:
        if has_beginning(content, beginning):
            return f"{name}; {advice}"
    if content.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _describe_zip(content)
    if content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle, which could run code and is not opened; {_EXPORT} with the program that wrote it"
    if content[257:262] == b"ustar" and not _is_text(content):
        return "a tar archive; extract the file of records"
    head = content[:_NUM_BYTES_EXAMINED]
    if len(head) > 1 and (encoding := _guess_encoding_without_mark(head)):
        return f"{encoding[:6]} text; {_ICONV.format(encoding)}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<?xml", b"<!doctype")):
        return f"an XML file; {_EXPORT}"
    return None


def _describe_zip(content: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "a damaged ZIP archive; download it again"
    if "xl/workbook.xml" in names:
        return f"an Excel file; {_EXPORT}"
    if any(name.endswith("data.pkl") for name in names):
        return f"a file of PyTorch, which could run code and is not opened; {_EXPORT} with the program that wrote it"
    return f"a ZIP archive of {', '.join(names[:3]) or 'nothing'}; extract the file of records"


def _guess_encoding_without_mark(head: bytes) -> str | None:
    """Return the encoding of text in which most characters have null bytes, as JSON has in UTF-16 and UTF-32."""
    for encoding, size, places in (
        ("UTF-32LE", 4, (1, 2, 3)),
        ("UTF-32BE", 4, (0, 1, 2)),
        ("UTF-16LE", 2, (1,)),
        ("UTF-16BE", 2, (0,)),
    ):
        units = [head[start : start + size] for start in range(0, len(head) - size + 1, size)]
        ascii_units = [unit for unit in units if all(unit[place] == 0 for place in places) and any(unit)]
        # JSON begins with an ASCII character.
        if units and units[0] in ascii_units and 2 * len(ascii_units) > len(units):
            return encoding
    return None


def describe_row_format(row: Any) -> str | None:
    """Name the format of a row that is not a record but of a kind that other tools read, and how to convert it.

    Returns:
        Words that follow "got", or None for a row that has `instruction` and `output` or is of no known kind.
    """
    if found := _find_converter(row):
        return found
    if not isinstance(row, Mapping) or {"instruction", "output"} <= row.keys() or is_conversation_row(row):
        return None
    fields = set(row)
    if "completions" in fields and "instruction" in fields:
        return "a row of UltraFeedback; run: cutlm convert ultrafeedback"
    if {"question", "answer", "feedback"} <= fields:
        return (
            "a row of Shepherd; run: cutlm convert shepherd; for data of your own, pass"
            """ --columns '{"question": "instruction", "answer": "output", "feedback": "judgment"}'"""
        )
    names = ("messages", "conversations", "conversation", "turns")
    as_messages = (name for name in ("prompt", "completion") if isinstance(row.get(name), list))
    if messages := next((name for name in names if name in fields), next(as_messages, None)):
        name = "a ShareGPT conversation" if messages == "conversations" else "a conversation"
        is_judged = bool(row.get("judgment") or find_judgment_column(row))
        if is_judged and messages in names[1:] and ends_with_response({"messages": row[messages]}):
            return f"{name} with a judgment; pass --columns {_rename_to_messages(row, messages)}"
        return (
            f"{name} ({messages!r}); to use the user's next message as the judgment, run: cutlm convert conversations;"
            f" {_NO_JUDGMENTS}"
        )
    spelled = {_normalize_name(name): name for name in row}
    renamed = {
        ours: theirs
        for ours, names in _OTHER_NAMES.items()
        if ours not in fields and (theirs := next((spelled[name] for name in (ours, *names) if name in spelled), None))
    }
    if {"instruction", "output"} <= fields | renamed.keys():
        columns = shlex.quote(json.dumps({theirs: ours for ours, theirs in renamed.items()}, ensure_ascii=False))
        has_judgment = "judgment" in fields | renamed.keys()
        return f"the fields {', '.join(map(repr, row))}; pass --columns {columns}" + (
            "" if has_judgment else f"; {_NO_JUDGMENTS}"
        )
    if set(row) == {"error"} or ("error" in fields and len(fields) <= 2):
        return (
            f"an error of the server from which the file was downloaded ({str(row['error'])[:100]}); download it again"
        )
    if messages := next((name for name in row if _holds_messages(row[name])), None):
        return f"the fields {', '.join(map(repr, row))}; pass --columns {_rename_to_messages(row, messages)}"
    return None


def _rename_to_messages(row: Mapping[str, Any], messages: str) -> str:
    """Write the columns that make a row with messages a record."""
    judgment = None if "judgment" in row else find_judgment_column(row)
    renamed = {messages: "messages"} | ({judgment: "judgment"} if judgment else {})
    return shlex.quote(json.dumps(renamed, ensure_ascii=False))


def _normalize_name(name: Any) -> str:
    """Return the name of a column as it would be without capital letters and spaces, which spreadsheets have."""
    return "_".join(str(name).lower().split())


def find_judgment_column(row: Mapping[str, Any]) -> str | None:
    """Return the field of a row that probably holds its judgment under another name."""
    spelled = {_normalize_name(name): name for name in row}
    names = (spelled[name] for name in _OTHER_NAMES["judgment"] if name in spelled)
    return next((name for name in names if isinstance(row[name], str) and row[name]), None)


def _holds_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or such a list as JSON, as in a table."""
    value = read_json_text(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _find_converter(row: Any) -> str | None:
    """Name a row that `cutlm convert` reads, also if it could be taken for a record."""
    if not isinstance(row, Mapping):
        return None
    fields = set(row)
    if "orig_instruction" in fields and fields & {"orig_response", "orig_response_A"}:
        return "a row of Prometheus's Feedback or Preference Collection; run: cutlm convert prometheus"
    if "###Response to evaluate:" in str(row.get("instruction")) and "[RESULT]" in str(row.get("output")):
        return "the prompt and the answer of an evaluator such as Prometheus; run: cutlm convert prometheus"
    if {"instruction", "output"} <= fields:
        return None
    if {"chosen", "rejected"} <= fields:
        return (
            "a preference pair ('chosen' and 'rejected'), which does not say what is wrong; run: cutlm convert pairs,"
            " and cutlm judge for the rejected responses"
        )
    if {"prompt", "completion", "label"} <= fields and isinstance(row["label"], bool):
        return "a response that is liked or not ('label'); run: cutlm convert pairs"
    helpsteer = ({"prompt", "response", "helpfulness"}, {"prompt", "response_1", "preference_strength"})
    if any(names <= fields for names in helpsteer) or (
        "context" in fields and fields & {"overall_preference", "feedback1", "original_response"}
    ):
        return "a row of HelpSteer; run: cutlm convert helpsteer"
    if "mapping" in fields and "current_node" in fields:
        return "a conversation of ChatGPT's export; run: cutlm convert conversations"
    return None
