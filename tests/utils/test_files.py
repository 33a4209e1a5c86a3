"""Atomic writes, reading from the end, and renaming of files that would be overwritten."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rlchat.utils.files import lines_from_end, set_aside, write_atomically


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)], ids=oct)
def test_files_have_the_usual_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"words"))
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert (tmp_path / "file").read_bytes() == b"words"


def test_renamed_files_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content in (b"1", b"2", b"3"):
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        set_aside(path)
    names = sorted(tmp_path.iterdir(), key=lambda p: p.read_bytes())
    assert [p.read_bytes() for p in names] == [b"1", b"2", b"3"]
    assert all(p.suffix == ".pt" and p.name.startswith("model.2023111") for p in names)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_lines_from_the_end(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlchat.utils.files._BLOCK", block)
    path = tmp_path / "lines"
    path.write_bytes(b"one\n\nthree and more\nfour\n")
    assert list(lines_from_end(path, 1_000)) == [b"", b"four", b"three and more", b"", b"one"]
    assert list(lines_from_end(path, 10)) == [b"", b"four"]  # the line before is not whole
    path.write_bytes(b"one")
    assert list(lines_from_end(path, 1_000)) == [b"one"]
    assert list(lines_from_end(path, 2)) == []
    path.write_bytes(b"")
    assert list(lines_from_end(path, 1_000)) == [b""]
