"""Hashes of files: remembered for unchanged files, computed again for those that may have changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rlchat.data import file_hashes
from rlchat.data.file_hashes import hashes_of
from rlchat.data.sources import data_file
from rlchat.errors import UserError
from rlchat.utils.cache_folder import FILE_HASHES


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes were read, in order. New files count as old enough."""
    names: list[str] = []
    plain = file_hashes._hash

    def watched(path: Path) -> bytes:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(file_hashes, "_hash", watched)
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", -3600.0)
    return names


def hashes(folder: Path, *paths: Path) -> list[bytes]:
    return hashes_of([data_file(path) for path in paths], folder / "cache")


def test_an_unchanged_file_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    expected = [hashlib.sha256(content).digest() for content in (b"one", b"two")]
    assert hashes(tmp_path, a, b) == expected
    assert hashes(tmp_path, b, a) == expected[::-1]
    assert hashed == ["a", "b"]


@pytest.mark.parametrize("change", ["size", "same size and time", "replaced", "time"])
def test_a_changed_file_is_read_again(tmp_path: Path, hashed: list[str], change: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    hashes(tmp_path, path)
    before = path.stat()
    new = {"size": b"three", "time": b"one"}.get(change, b"two")
    if change == "replaced":
        (tmp_path / "b").write_bytes(new)
        (tmp_path / "b").replace(path)
    else:
        path.write_bytes(new)
    if change == "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes(tmp_path, path) == [hashlib.sha256(new).digest()]
    assert hashed == ["a", "a"]


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within the same tick of the file system's clock."""
    path = tmp_path / "a"
    path.write_bytes(b"one")
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", 3600.0)
    hashes(tmp_path, path)
    hashes(tmp_path, path)
    assert hashed == ["a", "a"]


@pytest.mark.parametrize("content", [b"", b"[]", b"not JSON", b'{"PATH": 3}', b'{"PATH": [IDENTITY, "ff"]}'])
def test_damaged_hashes_are_not_used(tmp_path: Path, hashed: list[str], content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    (expected,) = hashes(tmp_path, path)
    remembered = tmp_path / "cache" / FILE_HASHES
    ((identity, _),) = json.loads(remembered.read_bytes()).values()
    known = content.replace(b"PATH", str(path).encode()).replace(b"IDENTITY", json.dumps(identity).encode())
    remembered.write_bytes(known)
    assert hashes(tmp_path, path) == [expected]
    assert hashed == ["a", "a"]


def test_only_the_last_files_are_remembered(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_MOST_REMEMBERED", 2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
        hashes(tmp_path, path)
    hashes(tmp_path, *paths)
    assert hashed == ["a", "b", "c", "a"]


def test_without_a_folder_that_can_be_written_every_start_reads_the_file(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert hashes(tmp_path, path) == hashes(tmp_path, path) == [hashlib.sha256(b"one").digest()]
    assert hashed == ["a", "a"]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such data file: .*missing; pass a file with --data\.path FILE"):
        hashes(tmp_path, tmp_path / "missing")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        hashes(tmp_path, tmp_path)
