"""Which stages of an iteration are complete, with checksums of what they made: `manifest.json` in its folder.

A stage that stands here is not run again. What is run, and in which order, is left to `cutlm.loop.loop`.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.errors import DataError

_PACKAGES = ("cutlm", "torch", "transformers", "peft", "trl", "accelerate")


class Manifest:
    """The stages of one iteration.

    Args:
        folder: The iteration's.

    Attributes:
        stages: By name, what is known of each complete one.

    Raises:
        DataError: There is a file of this name that is no manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.stages = json.loads(self.path.read_text("utf-8"))["stages"]
                if not all(map(_is_whole, self.stages.values())):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(
                    f"{self.path}: not a manifest; restore it, or name another output_dir to begin anew"
                ) from None

    def record(self, stage: str, outputs: Iterable[Path], **known: Any) -> None:
        """Marks a stage as complete, with checksums of its files and whatever else is known of it."""
        self.stages[stage] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": read_versions(),
            **known,
            "outputs": {str(path.relative_to(self.folder)): _describe(path) for path in _list_files(outputs)},
        }
        self._save()

    def forget(self, stage: str) -> None:
        """Marks a stage as not complete."""
        if self.stages.pop(stage, None) is not None:
            self._save()

    def find_changes(self, stage: str) -> list[str]:
        """The files of a complete stage that are not what it made, each with what has become of it.

        A file of the same size and time passes; any other is read.
        """
        changes = []
        for name, known in self.stages[stage]["outputs"].items():
            path = self.folder / name
            if not path.is_file():
                changes.append(f"{path}: made by this run, and not there any more")
                continue
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]):
                continue
            if stat.st_size != known["size"] or hash_file(path) != known["sha256"]:
                changes.append(f"{path}: changed since it was made")
        return changes

    def accept(self, stage: str, figures: dict[str, Any]) -> None:
        """Takes the files of a stage as they are now, edited, and what is counted in them."""
        known = self.stages[stage]
        outputs = {name: _describe(self.folder / name) for name in known["outputs"]}
        figures = known["figures"] | figures
        self.stages[stage] = known | {"is_edited": True, "figures": figures, "outputs": outputs}
        self._save()

    def _save(self) -> None:
        with open_atomic(self.path) as file:
            file.write((json.dumps({"stages": self.stages}, indent=2, ensure_ascii=False) + "\n").encode())


def _is_whole(stage: dict[str, Any]) -> bool:
    """Whether a stage holds all that is read of it."""
    return (
        isinstance(stage["versions"], dict)
        and isinstance(stage["figures"], dict)
        and all({"size", "mtime_ns", "sha256"} <= file.keys() for file in stage["outputs"].values())
    )


def _list_files(outputs: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in outputs:
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files


def _describe(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": hash_file(path)}


def hash_file(path: str | Path) -> str:
    """A file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def read_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes of a run."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
