"""What all evaluations share: the result folder, pairs of responses, and packages of the extra `eval`.

A stopped evaluation resumes in its folder, so a folder belongs to one set of settings.
"""

import importlib
import json
import logging
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cutlm.data.files import hash_sources, open_atomic, read_bytes, write_text
from cutlm.errors import DataError, UserError
from cutlm.judges import Response
from cutlm.model.card import CARD_FILE, add_results

SETTINGS_FILE = "settings.json"
PROMPTS_FILE = "prompts.jsonl"
VERDICTS_FILE = "verdicts.sqlite"
_RESULT_FILES = ("result.json", "result.md", "result.png")
# Files that are valid under any settings: rewritten by each start, or a cache with the request as its key.
_NEUTRAL_FILES = (SETTINGS_FILE, PROMPTS_FILE, VERDICTS_FILE)


def open_folder(
    out: str | Path, settings: Mapping[str, Any], parts: Iterable[str] = (), *, overwrite: bool = False
) -> Path:
    """Create the folder of an evaluation, or open one with the same settings to resume.

    Args:
        out: The folder; UserError if it has results of other settings, or unknown files.
        settings: Everything that the results depend on, as JSON values by name.
        parts: Names of the files that a stopped evaluation leaves and resumes with.
        overwrite: Whether to start over, without any old part or result, if the settings differ or are unknown.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: expected a folder, got a file; choose another name")
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS_FILE
    if file.exists():
        try:
            known = dict(json.loads(read_bytes(file)))
        except (ValueError, TypeError):
            known = {}
        differing = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
        if not differing:
            return folder
        if not overwrite and not all(path.name.startswith(_NEUTRAL_FILES) for path in folder.iterdir()):
            raise UserError(
                f"--out {folder}: this evaluation was started with other settings ({', '.join(differing)} differ); use"
                " the same settings to resume, choose another folder, or start over with --overwrite"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"--out {folder}: not empty; choose another folder, or write into it with --overwrite")
    for name in [*_RESULT_FILES, *(name for part in parts for name in (part, f"{part}.partial"))]:
        (folder / name).unlink(missing_ok=True)
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return folder


def hash_data(sources: str | Path | Sequence[str | Path]) -> str:
    """Hash the content of files of rows; raise DataError if one cannot be read."""
    return hash_sources(sources)[:16]


def write_result(
    folder: Path, result: Mapping[str, Any], markdown: str, packages: Iterable[str] = (), *, picture: bytes | None
) -> None:
    """Write result.json, result.md and result.png, and print the Markdown.

    The result depends on cutlm and the packages; their versions go to result.json.
    """
    versions: dict[str, str | None] = dict.fromkeys(("cutlm", *packages))
    for name in versions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    text = json.dumps({**result, "versions": versions}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "result.md", markdown.rstrip() + "\n")
    if picture is not None:
        with open_atomic(folder / "result.png") as file:
            file.write(picture)
    write_text(folder / "result.json", text + "\n")
    names = "result.json, result.md and result.png" if picture else "result.json and result.md"
    print(f"{markdown.rstrip()}\n\nwrote {names} to {folder}")


def add_to_card(model: str | None, results: Mapping[str, Mapping[str, float]]) -> None:
    """Add results to the model card in a local folder of a model, if cutlm has written it, and say so."""
    try:
        is_added = model is not None and add_results(model, results)
    except DataError as error:  # a folder that cannot be written to
        print(f"the model card stays as it is ({error})")
        return
    if is_added:
        print(f"added the results to the metadata of {Path(str(model)) / CARD_FILE}")


# ---- Pairs of responses ----


@dataclass(frozen=True)
class Pairs:
    """Responses and references to the same instructions."""

    pairs: list[tuple[Response, Response]]  # response and reference, in the order of the references
    num_alone: int  # responses without a reference
    num_missing: int  # references without a response


def pair_responses(responses: Sequence[Response], references: Sequence[Response]) -> Pairs:
    """Pair each reference with a response to the same instruction; repeated instructions in their order.

    An instruction and its input are compared as one text, because files of verdicts have no input.
    """
    waiting: dict[str, deque[Response]] = defaultdict(deque)
    for response in responses:
        waiting[response.full_instruction].append(response)
    pairs = []
    for reference in references:
        if found := waiting[reference.full_instruction]:
            pairs.append((found.popleft(), reference))
    return Pairs(pairs, len(responses) - len(pairs), len(references) - len(pairs))


# ---- Packages ----


def need_extra(module: str) -> Any:
    """Import a module of a package of the extra `eval`; raise UserError if the package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"the module {error.name} is missing; install it with: pip install 'cutlm[eval]'") from None


def import_alpaca_eval(module: str) -> Any:
    """Import a module of alpaca-eval, and restore the log level that it changes; see `need_extra`."""
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated imports
            return need_extra(f"alpaca_eval.{module}")
    finally:
        logging.root.setLevel(level)
