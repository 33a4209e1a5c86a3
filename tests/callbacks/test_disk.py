"""The disk usage of a run, and the deletion of old checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torch import nn

from rlchat.callbacks import disk


def test_the_bytes_of_a_run() -> None:
    """10 · 100 + 10 weights of 4 bytes. AdamW keeps two moments of each, so a checkpoint is three times as large."""
    module = nn.Linear(100, 10)
    assert disk.bytes_of_run(module) == (3 * 4040, 2 * 3 * 4040 + 4040)
    module.weight.requires_grad_(False)
    assert disk.bytes_of_run(module)[0] == 4040 + 2 * 40


def test_a_large_run_says_how_much_it_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="rlchat")
    module = nn.Linear(100, 10)
    disk.announce_size(module, tmp_path / "checkpoints")
    assert caplog.text == ""
    monkeypatch.setattr(disk, "WORTH_A_MESSAGE", 28_279)
    disk.announce_size(module, tmp_path / "checkpoints")
    assert "this run will write up to 0.0 GB: best.ckpt and last.ckpt with 0.0 GB each" in caplog.text


def test_only_checkpoints_are_deleted_and_each_folder_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rlchat")
    old, empty = tmp_path / "old", tmp_path / "empty"
    old.mkdir()
    for name in ("best.ckpt", "last.ckpt", "notes.txt"):
        (old / name).touch()
    disk.delete_checkpoints([old, empty], ("best.ckpt", "last.ckpt"))
    assert [path.name for path in old.iterdir()] == ["notes.txt"]
    assert caplog.text.count("deleted") == 1
    assert f"deleted best.ckpt and last.ckpt in {old}" in caplog.text
