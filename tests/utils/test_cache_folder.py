"""The cache folder: what belongs to it, what is removed when it is full, and `rlchat cache`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlchat.__main__ import main
from rlchat.utils.cache_folder import BASE_MODELS, clear, entries, mark_used, prune


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four entries, the longest unused first: data a (100 bytes), model m (60), data b (50), data c (10)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "rlchat"
    model = folder / BASE_MODELS / f"m-{'0' * 16}"
    model.mkdir(parents=True)
    (model / "config.json").write_bytes(bytes(20))
    (model / "model.safetensors").write_bytes(bytes(40))
    for letter, size in (("a", 100), ("b", 50), ("c", 10)):
        (folder / f"{letter * 64}.pt").write_bytes(bytes(size))
    for age, path in enumerate(
        (folder / f"{'c' * 64}.pt", folder / f"{'b' * 64}.pt", model, folder / f"{'a' * 64}.pt")
    ):
        os.utime(path, (2e9 - age, 2e9 - age))
    return folder


def strangers(folder: Path) -> list[Path]:
    """Files that are not rlchat's entries, although they are in its folder."""
    paths = [
        folder / "notes.pt",
        folder / f"{'a' * 63}.pt",
        folder / f".{'a' * 64}.pt.x1y2",
        folder / "thesis" / "a.txt",
    ]
    paths += [folder / BASE_MODELS / ".unpacking-xyz" / "model.safetensors"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
    return paths


def test_entries_from_the_longest_unused_to_the_last_used(folder: Path) -> None:
    strangers(folder)
    found = [(entry.path.name[:1], entry.what, entry.size) for entry in entries(folder)]
    tokenized = "tokenized data"
    assert found == [("a", tokenized, 100), ("m", "base model", 60), ("b", tokenized, 50), ("c", tokenized, 10)]


@pytest.mark.parametrize(
    ("limit", "removed"), [(220, ""), (219, "a"), (120, "a"), (119, "am"), (60, "am"), (59, "amb"), (0, "amb")]
)
def test_the_longest_unused_are_removed_until_the_rest_fits(folder: Path, limit: int, removed: str) -> None:
    others = strangers(folder)
    assert "".join(entry.path.name[0] for entry in prune(folder, limit)) == removed
    assert "".join(entry.path.name[0] for entry in entries(folder)) == "ambc"[len(removed) :]
    assert all(path.exists() for path in others)


def test_an_entry_that_is_used_again_stays(folder: Path) -> None:
    for entry in entries(folder):
        os.utime(entry.path, (1e9, 1e9))
    mark_used(folder / f"{'a' * 64}.pt")
    prune(folder, 0)
    assert [entry.path.name[0] for entry in entries(folder)] == ["a"]
    mark_used(folder / "missing")  # no error


def test_no_folder_is_an_empty_cache(tmp_path: Path) -> None:
    assert entries(tmp_path / "missing") == prune(tmp_path / "missing") == clear(tmp_path / "missing") == []


def test_the_command_shows_and_clears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = strangers(folder)
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(folder) in shown
    assert [line.split()[:4] for line in shown.splitlines() if "0.0" in line] == [
        ["base", "model", "1", "0.0"],
        ["tokenized", "data", "3", "0.0"],
        ["total", "4", "0.0"],
    ]
    assert main(["cache", "clear", "--folder", str(folder)]) == 0
    assert "removed 4 of 4 entries" in capsys.readouterr().out
    assert entries(folder) == []
    assert all(path.exists() for path in others)
    assert main(["cache", "clear"]) == 0
    assert "contains no tokenized data" in capsys.readouterr().out


def test_what_cannot_be_removed_is_counted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "clear"]) == 1
    assert "removed 1 of 4 entries" in capsys.readouterr().out
