"""Find the files of a source of rows: a file, a glob, a folder, or a data set of the hub.

A data set is named `org/name`, with `:config`, `@revision` and `[split]` after it if needed; the same holds for a
folder in the layout of the hub. The library `datasets` finds its files and downloads them.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cutlm.errors import ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".xz", ".zst")
_HUB_SCHEME = "hf://datasets/"
_SELECTORS = re.compile(r"(?P<name>.+?)(?P<selectors>(?::[\w.-]+)?(?:@[\w./-]+)?(?:\[[^\[\]]*\])?)")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# What `datasets` and cutlm's own commands write next to the rows.
_METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_LISTS = (".failures.jsonl", ".left_out.jsonl", ".disputed.jsonl", ".todo.jsonl", ".todo.csv")
_REPORTS = (".report.json", *_LISTS)
_JOURNALS = ".studio"  # the folder of the journals of reviewers, after the name of the file of records


@dataclass(frozen=True)
class DataFile:
    """A file of rows: the name for messages, and where it is."""

    name: str
    path: Path


def strip_compression(name: str) -> str:
    """Return the name of a file without the suffix of its compression."""
    return next((name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix)), name)


def as_sources(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one or several sources as a list."""
    return [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]


def describe_sources(sources: str | Path | Sequence[str | Path]) -> str:
    """Name one or several sources in a message."""
    return " ".join(as_sources(sources))


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raises a ConfigError unless the columns are a mapping from different names to different names."""
    names = list(columns.values()) if isinstance(columns, dict) else []
    is_text = all(isinstance(name, str) and name for name in names)
    if columns is not None and (not isinstance(columns, dict) or not is_text or len(set(names)) < len(names)):
        raise ConfigError(
            f"""columns: expected a name in the file and the field it is, such as {{"prompt": "instruction"}}, each"""
            f" field once, got {columns!r}"
        )


def find_local_files(source: str) -> list[Path]:
    """Return the existing local files that a source names; empty if no such file exists."""
    path = Path(source)
    if path.is_dir():
        return _list_folder(path)
    if path.exists():
        return [path]
    name, selectors = _split(source)
    if selectors and Path(name).is_dir():
        return _list_folder(Path(name))
    return _match(source)


def find_hub_names(sources: Sequence[str]) -> list[str]:
    """Return the names of the data sets of the hub among sources, each once."""
    names = [_split(source.removeprefix(_HUB_SCHEME))[0] for source in sources if not find_local_files(source)]
    return list(dict.fromkeys(name for name in names if _is_hub_name(name)))


def check_lists(sources: Sequence[str]) -> None:
    """Raises a DataError if lists of failures and the like are named among other sources, as by a shell's pattern.

    Their rows have no judgments, so responses would count as satisfactory. A pattern that is not expanded skips them.
    """
    lists = [source for source in sources if source.endswith(_LISTS) and Path(source).is_file()]
    if lists and len(lists) < len(sources):
        raise DataError(
            f"{', '.join(lists)}: expected data, got what cutlm lists next to its output; leave it out, or write a"
            " pattern in quotes, such as 'records/*.jsonl', which skips it"
        )


def find_missing(sources: Sequence[str]) -> list[str]:
    """Return the sources that name neither existing files nor a data set of the hub."""
    return [source for source in sources if not find_local_files(source) and not _is_hub_name(_split(source)[0])]


def find_files(source: str) -> list[DataFile]:
    """Find the files of a source; raise a DataError if none match.

    Args:
        source: A file; a glob, such as `data/*.jsonl`; a folder; or a data set, see the docstring of this module.
    """
    path = Path(source)
    name, selectors = _split(source)
    if path.is_dir() or (selectors and not path.exists() and Path(name).is_dir()):
        return _find_in_data_set(source, name, selectors, is_local=True)
    if path.exists():
        return [DataFile(source, path)]
    if found := _match(source):
        return [DataFile(str(file), file) for file in found]
    if glob.has_magic(source) and not (selectors and _is_hub_name(name)):
        raise DataError(f"{source}: no file matches this pattern; check the path")
    if _is_hub_name(name):
        return _find_in_data_set(source, name, selectors, is_local=False)
    return [DataFile(source, path)]  # reading it says that it does not exist


def _split(source: str) -> tuple[str, str]:
    found = _SELECTORS.fullmatch(source)
    return (found["name"], found["selectors"]) if found and not Path(source).exists() else (source, "")


def _is_hub_name(name: str) -> bool:
    """Whether a name is that of a data set rather than that of a missing file."""
    is_file = strip_compression(name).endswith((*SUFFIXES, ".txt", ".yaml")) or Path(name).parent.is_dir()
    return _HUB_NAME.fullmatch(name) is not None and not is_file


def _match(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        return []
    files = [path for name in sorted(glob.glob(pattern, recursive=True)) if (path := Path(name)).is_file()]
    return [file for file in files if not _is_report(file)] or files


def _is_data_file(path: Path) -> bool:
    return strip_compression(path.name.lower()).endswith(SUFFIXES) and not _is_report(path)


def _is_report(path: Path) -> bool:
    records = path.parent.name.removesuffix(_JOURNALS)
    is_journal = records != path.parent.name and strip_compression(records).endswith(SUFFIXES)
    return is_journal or path.name in _METADATA or path.name.endswith(_REPORTS)


def _list_folder(folder: Path) -> list[Path]:
    """List the data files below a folder that are not hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data_file(path))
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _find_in_data_set(source: str, name: str, selectors: str, *, is_local: bool) -> list[DataFile]:
    config, revision, split = (
        found.group(1) if (found := re.search(pattern, selectors)) else None
        for pattern in (r"^:([\w.-]+)", r"@([\w./-]+)", r"\[(.*)\]$")
    )
    if is_local and revision:
        raise DataError(f"{source}: a folder has no revisions; remove @{revision}")
    if is_local and not _list_folder(Path(name)):
        raise DataError(f"{source}: no data files in this folder; expected {', '.join(SUFFIXES)}, also compressed")
    splits = _list_splits(source, name, config, revision)
    if split is None and len(splits) > 1:
        names = ", ".join(f"{source}[{key}]" for key in splits)
        raise DataError(f"{source}: expected the name of a split, because there are several; use one of {names}")
    if split is not None and split not in splits:
        raise DataError(f"{source}: no split named {split!r}; there are {', '.join(splits)}")
    files = [file for file in splits[split or next(iter(splits))] if not _is_report(Path(file))]
    if foreign := [file for file in files if not _is_data_file(Path(file))]:
        raise DataError(f"{source}: expected files of rows ({', '.join(SUFFIXES)}), got {Path(foreign[0]).name}")
    if not is_local:
        return _download(source, files)
    # Its files may be links to elsewhere, as in the cache of the hub.
    folder = Path(name).expanduser().resolve()
    if split is None and config is None and not _has_card(Path(name)):
        others = set(_list_folder(folder)) - {Path(file) for file in files}
        if others:
            raise DataError(
                f"{source}: it is not clear which files belong together ({min(others).name} is not in the split"
                f" {next(iter(splits))!r}); name them, such as '{name.rstrip('/')}/*.jsonl'"
            )
    paths = [Path(name) / Path(file).relative_to(folder) for file in files]
    return [DataFile(str(path), path) for path in paths]


def _has_card(folder: Path) -> bool:
    """Whether the folder has a card that says which files belong together."""
    card = folder / "README.md"
    is_declared = card.is_file() and re.search(rb"^configs:", card.read_bytes(), re.MULTILINE) is not None
    return is_declared or (folder / ".huggingface.yaml").is_file()


def _list_splits(source: str, name: str, config: str | None, revision: str | None) -> dict[str, list[str]]:
    """Return the paths or addresses of the files of each split of a data set."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        # The builder locks its cache, which may be read-only; downloads have a separate cache.
        with TemporaryDirectory() as cache:
            builder = load_dataset_builder(name, config, revision=revision, cache_dir=cache)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # OSError: no such data set, or no network
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        hint = "check the name, or download its files and name those" if not Path(name).is_dir() else "check its files"
        if "Config name is missing" in reason:
            hint = f"name one of them: {name}:CONFIG"
        raise DataError(f"{source}: cannot be read as a data set ({reason}); {hint}") from None
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}


def _download(source: str, addresses: list[str]) -> list[DataFile]:
    from datasets import DownloadManager

    try:
        paths = DownloadManager().download(addresses)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{source}: cannot be downloaded ({reason}); try again") from None
    names = [address.removeprefix(_HUB_SCHEME) for address in addresses]
    return [DataFile(name, Path(path)) for name, path in zip(names, paths, strict=True)]
