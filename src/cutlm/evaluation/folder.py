"""The folder of an evaluation: the settings it was begun with, and what came of it, as JSON, Markdown and a picture.

An evaluation that was stopped goes on in its folder, with what is whole in it; so a folder is of one set of settings.
"""

import hashlib
import importlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cutlm.data.files import open_atomic, read_bytes
from cutlm.errors import DataError, UserError

SETTINGS_FILE = "settings.json"
PROMPTS_FILE = "prompts.jsonl"
VERDICTS_FILE = "verdicts.sqlite"
_RESULT_FILES = ("result.json", "result.md", "result.png")
# What is right under any settings: it is made again at each start, or kept by what was asked.
_NEUTRAL_FILES = (SETTINGS_FILE, PROMPTS_FILE, VERDICTS_FILE)


def open_folder(
    out: str | Path, settings: Mapping[str, Any], parts: Iterable[str] = (), *, overwrite: bool = False
) -> Path:
    """Makes the folder of an evaluation, or goes on in one that was begun with the same settings.

    Args:
        out: The folder.
        settings: All that the results depend on; JSON values by name.
        parts: Names of files that a stopped evaluation can leave and that are gone on with.
        overwrite: Whether to begin anew where the settings differ, or are not known. Where something is begun, no part
            and no result of anything else stays.

    Raises:
        UserError: The folder is of other settings, or holds other things. Other settings of which nothing came, such as
            those of a model that could not be loaded, are no hindrance.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: expected a folder, got a file; name another one")
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS_FILE
    if file.exists():
        try:
            known = json.loads(read_bytes(file))
        except ValueError:
            known = None
        known = known if isinstance(known, dict) else {}
        differing = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
        if not differing:
            return folder
        if not overwrite and not all(path.name.startswith(_NEUTRAL_FILES) for path in folder.iterdir()):
            raise UserError(
                f"--out {folder}: begun with other settings ({', '.join(differing)} differ); give the same ones to go"
                " on, name another folder, or begin anew with --overwrite"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"--out {folder}: holds other things; name another folder, or write into it with --overwrite")
    for name in [*_RESULT_FILES, *(name for part in parts for name in (part, f"{part}.partial"))]:
        (folder / name).unlink(missing_ok=True)
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return folder


def hash_file(path: str | Path) -> str:
    """Names the content of a file.

    Raises:
        DataError: It cannot be read.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16]


def write_result(
    folder: Path,
    result: Mapping[str, Any],
    markdown: str,
    packages: Iterable[str] = (),
    *,
    picture: bytes | None = None,
) -> None:
    """Writes `result.json`, with the versions of packages, `result.md` and `result.png`, and prints the second.

    Args:
        folder: Where to.
        result: Figures by name.
        markdown: The same for people.
        packages: What the figures depend on, beside cutlm.
        picture: A PNG file's bytes; None for none.
    """
    versions = {name: find_version(name) for name in ("cutlm", *packages)}
    text = json.dumps({**result, "versions": versions}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "result.md", markdown.rstrip() + "\n")
    if picture is not None:
        with open_atomic(folder / "result.png") as file:
            file.write(picture)
    write_text(folder / "result.json", text + "\n")
    print(markdown.rstrip())
    print(f"\n{folder}/result.json and result.md hold it" + (", result.png shows it" if picture else ""))


def find_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Writes a file of text atomically."""
    with open_atomic(path) as file:
        file.write(text.encode())


def need_extra(module: str) -> Any:
    """Imports a module of the packages of the extra `eval`.

    Raises:
        UserError: It is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package of the module {error.name} is missing; install what measures a model by:"
            " pip install 'cutlm[eval]'"
        ) from None


def import_alpaca_eval(module: str) -> Any:
    """A module of the package, which changes the level of all logging when it is imported; that is undone.

    Raises:
        UserError: The package is missing.
    """
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is told that what it imports will be gone one day
            return need_extra(f"alpaca_eval.{module}")
    finally:
        logging.root.setLevel(level)
