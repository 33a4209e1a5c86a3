"""Digests of the addresses of clients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlchat.errors import UserError
from rlchat.server.feedback.clients import Addresses


def test_a_digest_needs_the_key(tmp_path: Path) -> None:
    first = Addresses(tmp_path / "feedback.jsonl").digest("203.0.113.7")
    key = tmp_path / "feedback.jsonl.key"
    assert len(first) == 16
    assert first == Addresses(tmp_path / "feedback.jsonl").digest("203.0.113.7")
    assert first != Addresses(tmp_path / "feedback.jsonl").digest("203.0.113.8")
    assert first != Addresses(tmp_path / "other.jsonl").digest("203.0.113.7")
    if sys.platform != "win32":
        assert key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(key.read_bytes()[:5])  # the disk was full
    assert Addresses(tmp_path / "feedback.jsonl").digest("203.0.113.7") != first
    assert len(key.read_bytes()) == 32


def test_a_key_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "feedback.jsonl.key").mkdir()
    with pytest.raises(UserError, match=r"feedback\.jsonl\.key: cannot be read or written: Is a directory; choose"):
        Addresses(tmp_path / "feedback.jsonl")
