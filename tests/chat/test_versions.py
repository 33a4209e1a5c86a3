"""Versions of a model: numbers, files, figures, a full disk, and one learner at a time."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from rlchat.chat.versions import Versions
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically


def write(path: Path) -> None:
    write_atomically(path, lambda file: file.write(b"weights"))


def test_numbers_increase_also_after_a_deleted_version(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    assert (versions.numbers(), versions.next_number()) == ([], 1)
    found = [versions.accept(write, {"accepted": True}) for _ in range(3)]
    folder = tmp_path / "chat.versions"
    assert found == [(n, folder / f"{n}.pt") for n in (1, 2, 3)]
    assert json.loads((folder / "2.json").read_text()) == {
        "version": 2,
        "path": str(folder / "2.pt"),
        "accepted": True,
    }
    (folder / "3.pt").unlink()
    (folder / "1.reward.pt").touch()
    assert (versions.numbers(), versions.next_number()) == ([1, 2], 4)


def test_rejected_versions_are_recorded(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    assert versions.reject({"n": 1}) == versions.reject({"n": 2}) == tmp_path / "chat.versions" / "rejected.jsonl"
    assert [json.loads(line) for line in (tmp_path / "chat.versions/rejected.jsonl").open()] == [{"n": 1}, {"n": 2}]
    assert versions.next_number() == 1


def test_another_file_or_folder(tmp_path: Path) -> None:
    model = tmp_path / "chat.pt"
    assert Versions(model, tmp_path / "mine").accept(write, {}) == (1, tmp_path / "mine" / "1.pt")
    Versions(model).accept(write, {})
    one = Versions(model, tmp_path / "new.pt")
    assert one.reject({}) == tmp_path / "new.rejected.jsonl"
    assert one.accept(write, {}) == (None, tmp_path / "new.pt")  # the numbers are those of a folder
    assert json.loads((tmp_path / "new.json").read_text())["version"] is None
    assert Versions(model, tmp_path / "chat.versions" / "7.pt").accept(write, {})[0] == 7
    with pytest.raises(UserError, match="no version replaces a file"):
        Versions(model, tmp_path / "new.pt")
    with pytest.raises(UserError, match="expected a folder"):
        Versions(model, tmp_path / "new.json")
    (tmp_path / "new.pt").unlink()
    with pytest.raises(UserError, match=r"new\.json exists, and no version replaces a file"):
        Versions(model, tmp_path / "new.pt")
    (tmp_path / "chat2.reward.pt").touch()
    with pytest.raises(UserError, match=r"chat2\.reward\.pt exists"):
        Versions(model, tmp_path / "chat2.pt")


def test_a_full_disk_leaves_no_version(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        def fail(file: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomically(path, fail)

    versions = Versions(tmp_path / "chat.pt")
    with pytest.raises(UserError, match=r"1\.pt: cannot be written: No space left on device"):
        versions.accept(full, {})
    assert list((tmp_path / "chat.versions").iterdir()) == []
    assert versions.accept(write, {})[0] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no such lock")
def test_one_learner_at_a_time(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    refused = pytest.raises(UserError, match="another `rlchat learn` is at work here")
    with versions.locked(), refused, versions.locked():
        pass
    with versions.locked():
        pass


def test_whose_responses_are_its_own(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    assert [versions.owns(name) for name in ("chat.pt", "3.pt", "", "other.pt", "3.pt.bak")] == [True] * 3 + [False] * 2
