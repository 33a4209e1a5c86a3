"""The cache folder: what belongs to it, what is removed when it is full, and `rlchat cache`."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from rlchat.__main__ import main
from rlchat.errors import UserError
from rlchat.utils import cache_folder
from rlchat.utils.cache_folder import BASE_MODELS, FILE_HASHES, MARKER, clear, entries, mark_used, prune

MEGABYTE = 10**6


def file(path: Path, megabytes: int) -> Path:
    """A sparse file: it takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.truncate(megabytes * MEGABYTE)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five entries, the least recently used first: data a (100 MB, a file of rlchat 0.1), model m (60), data b (50),
    data c (10), and a folder of 7 MB that a run left when it was stopped on 1 January 2020."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "rlchat"
    model = folder / BASE_MODELS / "m-0123"
    file(model / "config.json", 20)
    file(model / "model.safetensors", 40)
    (model / MARKER).touch()
    a = file(folder / f"{'a' * 64}.pt", 100)
    b, c = (file(folder / (name * 64) / "ids.bin", size).parent for name, size in (("b", 50), ("c", 10)))
    left = file(folder / f".{'d' * 64}.x1y2" / "ids.bin", 7).parent
    for path, day in ((a, 2), (model, 3), (b, 4), (c, 5), (left, 1)):
        noon = time.mktime((2020, 1, day, 12, 0, 0, 0, 0, -1))
        os.utime(path, (noon, noon))
    return folder


def strangers(folder: Path) -> list[Path]:
    """Files that are not rlchat's entries, although they are in its folder, or that are being written."""
    names = ["notes.pt", f"{'a' * 63}.pt", "a" * 64, f"{'b' * 64}.pt/a.txt", f".{'e' * 64}.fresh/ids.bin"]
    names += ["thesis/a.txt"]
    names += [f"{BASE_MODELS}/{name}/model.safetensors" for name in (".unpacking-xyz", "my-own-0123456789abcdef")]
    return [file(folder / name, 1000) for name in names]


def names(found: list[cache_folder.Entry]) -> str:
    return "".join(entry.path.name.strip(".")[0] for entry in found)


def test_entries_from_the_least_to_the_most_recently_used(folder: Path) -> None:
    strangers(folder)
    (folder / f"{'f' * 64}.pt").symlink_to(folder / "notes.pt")
    found = [(entry.path.name.strip(".")[0], entry.what, entry.size // MEGABYTE) for entry in entries(folder)]
    assert found == [
        ("d", "unfinished", 7),
        ("a", "tokenized data", 100),
        ("m", "base model", 60),
        ("b", "tokenized data", 50),
        ("c", "tokenized data", 10),
    ]


def test_another_folder_has_no_base_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "elsewhere"))
    assert names(entries(folder)) == "dabc"
    clear(folder)
    assert (folder / BASE_MODELS / "m-0123" / MARKER).exists()


@pytest.mark.parametrize(("limit", "removed"), [(160, ""), (159, "a"), (60, "a"), (59, "ab"), (0, "ab")])
def test_data_is_removed_until_the_rest_fits(
    folder: Path, limit: int, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "LIMIT", limit * MEGABYTE)
    others = strangers(folder)
    assert names(prune(folder)) == removed
    assert names(entries(folder)) == "dambc".translate(str.maketrans("", "", removed))
    assert all(path.exists() for path in others)


def test_data_that_is_used_again_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "LIMIT", 0)
    mark_used(folder / f"{'a' * 64}.pt")
    assert names(prune(folder)) == "bc"
    mark_used(folder / "missing")  # no error


def test_the_hashes_of_data_files_are_cleared_but_not_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "LIMIT", 0)
    hashes = file(folder / FILE_HASHES, 1)
    prune(folder)
    assert [entry.path for entry in entries(folder) if entry.what == "file hashes"] == [hashes]
    clear(folder)
    assert not hashes.exists()


def test_no_folder_is_an_empty_cache(tmp_path: Path) -> None:
    assert entries(tmp_path / "missing") == prune(tmp_path / "missing") == clear(tmp_path / "missing") == []


def test_a_folder_that_cannot_be_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"rlchat cannot be read: Permission denied"):
        entries(folder)


def test_an_interrupted_removal_leaves_no_model_that_looks_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(folder / f".{'d' * 64}.x1y2")
    (folder / f"{'a' * 64}.pt").unlink()  # the model is now the first to be removed
    monkeypatch.setattr("shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clear(folder)
    assert not (folder / BASE_MODELS / "m-0123").exists()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    clear(folder)
    assert entries(folder) == []


def test_the_command_shows_and_clears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = strangers(folder)
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(folder) in shown
    assert [line.split() for line in shown.splitlines() if ".0" in line] == [
        ["base", "model", "1", "60.0", "2020-01-03", "2020-01-03"],
        ["tokenized", "data", "3", "160.0", "2020-01-02", "2020-01-05"],
        ["unfinished", "1", "7.0", "2020-01-01", "2020-01-01"],
        ["total", "5", "227.0"],
    ]
    assert main(["cache", "clear", "--folder", str(folder)]) == 0
    assert "removed 5 of 5 entries" in (said := capsys.readouterr().out)
    assert "227.0 MB" in said
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
    assert "removed 4 of 5 entries" in capsys.readouterr().out
