"""The supervisor: when a round begins, what becomes of its version, and what a kill or bad input leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.chat_models import random_policy
from helpers.full_disk import largest_file
from helpers.servers import wait_until
from helpers.supervisors import folder_of, give, read_state, supervising, wait_for_failures, wait_for_rounds

from rlchat.chat.learning.state import State
from rlchat.chat.versions import Versions
from rlchat.errors import UserError
from rlchat.models.model_file import save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


@pytest.fixture
def model(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    path = tmp_path / "chat.pt"
    save_bundle(path, random_policy(tokenizer))
    return path


def test_a_round_begins_with_enough_new_verdicts(model: Path) -> None:
    with supervising(model) as (supervisor, swaps):
        assert supervisor.active() == (0, model)
        give(model, "a")
        wait_until(lambda: supervisor.status().new == 1)
        assert supervisor.status().training_since is None
        give(model, "b")
        wait_for_rounds(supervisor, 1)
        status = supervisor.status()
        first = folder_of(model) / "1.pt"
        assert (status.active, status.path, status.new, status.verdicts) == (1, first, 0, 2)
        assert swaps == [(1, first)]
        assert status.rounds[0].sentence == (
            "version 1 has learned from 2 verdicts: agrees with 2 of 2 held-back verdicts, before: 1"
        )
        assert (status.accepted, status.rejected, status.training_seconds, status.error) == (1, 0, 0.75, None)
        give(model, "c", "d", name="1.pt")
        wait_for_rounds(supervisor, 2)
        assert supervisor.status().rounds[1].verdicts == 4
        assert json.loads((folder_of(model) / "2.json").read_text())["current"] == str(first)
    with supervising(model) as (supervisor, swaps):
        assert supervisor.active() == (2, folder_of(model) / "2.pt")
        assert (supervisor.status().new, len(supervisor.status().rounds), swaps) == (0, 2, [])


def test_verdicts_that_come_during_a_round_are_for_the_next(model: Path) -> None:
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model, "--wait", str(gate)) as (supervisor, _):
        wait_until(lambda: supervisor.status().training_since is not None)
        give(model, "c", "d", "e")
        gate.touch()
        wait_for_rounds(supervisor, 2)
        assert [outcome.verdicts for outcome in supervisor.status().rounds] == [2, 5]


def test_a_rejected_version_changes_nothing(model: Path) -> None:
    give(model, "a", "b")
    with supervising(model, "--reject") as (supervisor, swaps):
        wait_for_rounds(supervisor, 1)
        status = supervisor.status()
        assert (status.active, status.new, status.rejected, status.error, swaps) == (0, 0, 1, None, [])
        assert status.rounds[0].sentence == "rejected: it forgets"


def test_a_failed_round_is_tried_again_with_the_next_verdict(model: Path) -> None:
    give(model, "a", "b")
    with supervising(model, "--crash") as (supervisor, swaps):
        wait_until(lambda: supervisor.status().error is not None)
        status = supervisor.status()
        assert status.error == f"{model.with_name('feedback.jsonl')}: none of 2 verdicts can be used"
        assert status.new == 2
        begun = read_state(model)["rounds"]
        give(model, "a", "b")  # nothing new
        for _ in range(3):
            supervisor.notify()
        assert read_state(model)["rounds"] == begun == 1
        give(model, "c")
        wait_until(lambda: read_state(model)["rounds"] == 2)
        assert supervisor.active() == (0, model)
        assert swaps == []


def test_each_failure_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a round, and of one that cannot begin. A state that cannot be written is reported once, not twice a second."""
    give(model, "a", "b")
    with supervising(model, "--crash") as (supervisor, _):
        for number, question in enumerate("cd", 1):
            wait_for_failures(supervisor, number)
            give(model, question)
        wait_for_failures(supervisor, 3)
        error = f"{model.with_name('feedback.jsonl')}: none of 2 verdicts can be used"
        assert (supervisor.status().error, [one.getMessage() for one in caplog.records]) == (error, [error] * 3)

        def full(*_: object) -> None:
            raise UserError("the disk is full")

        caplog.clear()
        monkeypatch.setattr(supervisor._folder, "snapshot", full)
        for number, question in enumerate("ef", 4):
            give(model, question)
            wait_for_failures(supervisor, number)
        monkeypatch.setattr(supervisor, "_is_due", full)
        for _ in range(3):
            supervisor.notify()
            wait_until(lambda: not supervisor._wake.is_set())
        assert [one.getMessage() for one in caplog.records] == ["the disk is full"] * 2
        assert supervisor.status().failures == 5


def test_roll_back(model: Path) -> None:
    with supervising(model) as (supervisor, swaps):
        with pytest.raises(UserError, match="no earlier version"):
            supervisor.rollback()
        for number, questions in enumerate(("ab", "cd", "ef"), 1):
            give(model, *questions)
            wait_for_rounds(supervisor, number)
        assert supervisor.status().versions == (0, 1, 2, 3)
        assert supervisor.rollback() == (2, folder_of(model) / "2.pt")
        assert supervisor.rollback(0) == (0, model)
        with pytest.raises(UserError, match="no version 7; expected one of 0, 1, 2, 3"):
            supervisor.rollback(7)
        with pytest.raises(UserError, match="no earlier version"):
            supervisor.rollback()
        assert supervisor.rollback(3)[0] == 3
        assert [number for number, _ in swaps] == [1, 2, 3, 2, 0, 3]
        assert supervisor.status().previous == (0,)
    with supervising(model) as (supervisor, _):
        assert supervisor.active()[0] == 3


def test_a_roll_back_waits_for_new_verdicts(model: Path) -> None:
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
    give(model, "c", "d")
    with supervising(model, "--wait", str(gate)) as (supervisor, _):
        wait_until(lambda: supervisor.status().training_since is not None)
        give(model, "e")
        supervisor.rollback()  # also ends the round
        status = supervisor.status()
        assert (status.active, status.new, status.verdicts, status.training_since) == (0, 0, 5, None)
        assert not list(folder_of(model).glob("round-*"))
        gate.touch()
        give(model, "f")
        wait_until(lambda: supervisor.status().new == 1)
        assert supervisor.status().training_since is None
        give(model, "g")
        wait_for_rounds(supervisor, 2)
        assert (supervisor.status().active, supervisor.status().rounds[1].verdicts) == (2, 7)


def test_learning_can_be_turned_off(model: Path) -> None:
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model, "--wait", str(gate)) as (supervisor, _):
        wait_until(lambda: supervisor.status().training_since is not None)
        supervisor.set_learning(False)
        gate.touch()
        assert (supervisor.status().on, supervisor.status().training_since) == (False, None)
    with supervising(model) as (supervisor, _):
        give(model, "c")
        wait_until(lambda: supervisor.status().new == 3)
        assert (supervisor.status().on, supervisor.status().training_since) == (False, None)
        supervisor.set_learning(True)
        wait_for_rounds(supervisor, 1)
        assert supervisor.status().rounds[0].verdicts == 3


def test_old_versions_are_deleted_but_not_the_active_one(model: Path) -> None:
    with supervising(model, keep=1) as (supervisor, _):
        for number, questions in enumerate(("ab", "cd"), 1):
            give(model, *questions)
            wait_for_rounds(supervisor, number)
        assert supervisor.status().versions == (0, 2)
        assert (folder_of(model) / "1.json").exists()
        assert supervisor.rollback() == (0, model)
        assert model.exists()


def test_versions_and_files_of_the_users_own_rounds_stay(model: Path) -> None:
    versions = Versions(model)
    figures = {"accepted": True, "date": "2026-11-01", "feedback": {"verdicts": 2}, "feedback_file": "feedback.jsonl"}
    versions.accept(lambda path: shutil.copy(model, path), figures)
    with supervising(model, keep=1) as (supervisor, _):
        assert supervisor.active() == (0, model)
        for number, questions in enumerate(("ab", "cd"), 2):
            give(model, *questions)
            wait_for_rounds(supervisor, number)
        assert supervisor.status().versions == (0, 1, 3)
        with versions.locked():
            unfinished = folder_of(model) / ".4.pt.abc"
            unfinished.touch()
            give(model, "e", "f")
            wait_until(lambda: supervisor.status().error is not None)
            assert supervisor.status().error == (
                f"{folder_of(model)}: another `rlchat learn` is at work here; wait until it has ended"
            )
            assert unfinished.exists()


def test_a_version_that_cannot_be_loaded_is_not_used(model: Path) -> None:
    def refuse(number: int, path: Path) -> None:
        raise UserError(f"{path.name} cannot be loaded")

    give(model, "a", "b")
    with supervising(model, on_version=refuse) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
        assert supervisor.active() == (0, model)
        assert supervisor.status().error == "version 1 is not in use: 1.pt cannot be loaded"


@pytest.mark.parametrize("killed", ["round", "before", "after"])
def test_a_kill_at_any_moment_loses_nothing(model: Path, killed: str) -> None:
    """Of the round; of the supervisor before its version was written; after that, but before it became active."""
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model, "--wait", str(gate)) as (supervisor, _):
        wait_until(lambda: supervisor.status().training_since is not None)
        begun = (folder_of(model) / "state.json").read_bytes()
        (snapshot,) = folder_of(model).glob("round-1-*.jsonl")
        copied = snapshot.read_bytes()
        if killed == "round":
            assert supervisor._round is not None
            os.kill(supervisor._round.pid, signal.SIGKILL)
            wait_until(lambda: supervisor.status().error is not None)
            assert (
                supervisor.status().error == "learning was ended by signal 9, as the system does when memory runs out"
            )
        elif killed == "after":
            gate.touch()
            wait_for_rounds(supervisor, 1)
    # What a killed supervisor leaves: the state of the moment when the round began, and unfinished files.
    (folder_of(model) / "state.json").write_bytes(begun)
    snapshot.write_bytes(copied)
    for unfinished in (".2.pt.abc", f".{snapshot.name}.abc"):
        (folder_of(model) / unfinished).touch()
    gate.touch()
    with supervising(model) as (supervisor, swaps):
        if killed == "after":
            assert (supervisor.active()[0], supervisor.status().new, swaps) == (1, 0, [])
        wait_for_rounds(supervisor, 1)
        assert (supervisor.active()[0], supervisor.status().new) == (1, 0)
        assert sorted(path.name for path in folder_of(model).iterdir()) == [
            ".lock",
            ".supervisor",
            "1.json",
            "1.pt",
            "learn.log",
            "state.json",
        ]


@pytest.mark.parametrize("clock", ["2026-01-01", "2099-01-01"])
def test_no_round_takes_the_outcome_of_another(model: Path, clock: str) -> None:
    """State.json was deleted, so the numbers of rounds begin again, and the clock was changed. Then a round fails."""
    give(model, "a", "b")
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
    (folder_of(model) / "state.json").unlink()
    figures = json.loads((folder_of(model) / "1.json").read_text())
    assert figures["feedback_file"].startswith("round-1-")
    (folder_of(model) / "1.json").write_text(json.dumps({**figures, "date": f"{clock}T00:00:00+00:00"}))
    with supervising(model, "--crash") as (supervisor, swaps):
        wait_for_failures(supervisor, 1)
        assert read_state(model)["rounds"] == 1
        status = supervisor.status()
        assert (status.active, status.new, len(status.rounds), swaps) == (0, 2, 1, [])


def test_figures_without_a_model_file_are_no_version(model: Path) -> None:
    """A round that was killed between the figures and the model file."""
    give(model, "a", "b")
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
        assert read_state(model)["rounds"] == 1
    figures = json.loads((folder_of(model) / "1.json").read_text())
    (folder_of(model) / "2.json").write_text(json.dumps({**figures, "version": 2, "feedback_file": "round-2-ab.jsonl"}))
    state = {**read_state(model), "rounds": 2, "running": "2-ab"}
    (folder_of(model) / "state.json").write_text(json.dumps(state))
    with supervising(model) as (supervisor, _):
        assert supervisor.active()[0] == 1
        assert len(supervisor.status().rounds) == 1
        assert not (folder_of(model) / "2.json").exists()


def test_a_damaged_version_is_not_active_after_a_restart(model: Path) -> None:
    with supervising(model) as (supervisor, _):
        for number, questions in enumerate(("ab", "cd"), 1):
            give(model, *questions)
            wait_for_rounds(supervisor, number)
    (folder_of(model) / "2.pt").write_bytes(b"half")
    with supervising(model) as (supervisor, _):
        assert supervisor.active()[0] == 1


def test_one_supervisor_per_model(model: Path) -> None:
    with (
        supervising(model),
        pytest.raises(UserError, match="another chat already learns from feedback on this model"),
        supervising(model),
    ):
        pass


def test_damaged_state(model: Path) -> None:
    folder_of(model).mkdir()
    (folder_of(model) / "state.json").write_text('{"on": 1}')
    with pytest.raises(UserError, match=r"state\.json is damaged; delete it"), supervising(model):
        pass


def test_feedback_on_another_model(model: Path) -> None:
    give(model, "a", "b", name="other.pt")
    with supervising(model) as (supervisor, _):
        wait_until(lambda: supervisor.status().error is not None)
        status = supervisor.status()
        assert status.error is not None
        assert status.error.endswith("feedback.jsonl are on responses of other.pt, not of chat.pt")
        assert (status.verdicts, status.training_since) == (0, None)


def test_a_disk_that_is_full_while_a_version_is_written(model: Path) -> None:
    give(model, "a", "b")
    with largest_file(20_000), supervising(model) as (supervisor, swaps):
        wait_until(lambda: supervisor.status().error is not None)
        status = supervisor.status()
        assert (
            status.error
            == f"{folder_of(model)}/1.pt: cannot be written: File too large; the existing file is unchanged"
        )
        assert (status.active, status.versions, status.rounds, swaps) == (0, (0,), (), [])
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
        assert supervisor.active()[0] == 1


class FullDisk:
    """``State.write`` while the disk is full; :meth:`free` makes room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write, self._is_full = State.write, True
        monkeypatch.setattr(State, "write", lambda state, path: self.write(state, path))

    def write(self, state: State, path: Path) -> None:
        if self._is_full:
            raise UserError(f"{path}: cannot be written: No space left on device; the existing file is unchanged")
        self._write(state, path)

    def free(self) -> None:
        self._is_full = False


@pytest.mark.parametrize("restart", [False, True])
def test_a_disk_that_is_full_while_the_state_is_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    """The version is in use nevertheless. It is written when there is room, and the next start finds it."""
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model, "--wait", str(gate)) as (supervisor, swaps):
        wait_until(lambda: supervisor.status().training_since is not None)
        disk = FullDisk(monkeypatch)
        gate.touch()
        wait_for_rounds(supervisor, 1)
        wait_until(lambda: supervisor.status().error is not None)
        assert "No space left on device" in str(supervisor.status().error)
        assert (supervisor.active()[0], len(swaps), read_state(model)["active"]) == (1, 1, 0)
        if not restart:
            disk.free()
            wait_until(lambda: supervisor.status().error is None)
            assert (read_state(model)["active"], read_state(model)["running"]) == (1, None)
            assert not list(folder_of(model).glob("round-*"))
    disk.free()
    with supervising(model) as (supervisor, _):
        assert (supervisor.active()[0], supervisor.status().new) == (1, 0)


def test_no_change_without_its_state(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, a switch and a rollback are errors that change nothing; a round that runs goes on."""
    give(model, "a", "b")
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
    gate = model.with_name("go")
    give(model, "c", "d")
    with supervising(model, "--wait", str(gate)) as (supervisor, swaps):
        wait_until(lambda: supervisor.status().training_since is not None)
        before, written = supervisor.status(), read_state(model)
        disk = FullDisk(monkeypatch)
        for change in (lambda: supervisor.set_learning(False), lambda: supervisor.rollback(0)):
            with pytest.raises(UserError, match="No space left"):
                change()
            assert supervisor.status() == before
            assert read_state(model) == written
        assert (before.on, before.active, before.new, swaps) == (True, 1, 2, [])
        disk.free()
        gate.touch()
        wait_for_rounds(supervisor, 2)
        assert supervisor.active()[0] == 2


def test_a_round_that_cannot_begin_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state cannot be written; then its process cannot be started."""
    with supervising(model) as (supervisor, _):
        disk = FullDisk(monkeypatch)
        give(model, "a", "b")
        wait_for_failures(supervisor, 1)
        disk.free()
        assert (read_state(model)["running"], supervisor.status().new) == (None, 2)
        monkeypatch.setattr(supervisor, "_command", ("/no/such/program",))
        give(model, "c")
        wait_for_failures(supervisor, 2)
        assert supervisor.status().error == (
            f"{folder_of(model)}: a round of learning cannot begin here: No such file or directory"
        )
        wait_until(lambda: read_state(model)["running"] is None)
        assert not list(folder_of(model).glob("round-*"))


def test_a_rollback_that_cannot_load_the_version_changes_nothing(model: Path) -> None:
    def refuse(number: int, path: Path) -> None:
        raise UserError(f"{path.name} cannot be loaded")

    give(model, "a", "b")
    with supervising(model) as (supervisor, _):
        wait_for_rounds(supervisor, 1)
    with supervising(model, on_version=refuse) as (supervisor, _):
        before = read_state(model)
        with pytest.raises(UserError, match="cannot be loaded"):
            supervisor.rollback(0)
        assert (supervisor.active()[0], read_state(model)) == (1, before)


def test_a_rollback_to_the_version_in_use_changes_nothing(model: Path) -> None:
    gate = model.with_name("go")
    give(model, "a", "b")
    with supervising(model, "--wait", str(gate)) as (supervisor, swaps):
        wait_until(lambda: supervisor.status().training_since is not None)
        before = supervisor.status()
        assert supervisor.rollback(0) == (0, model)
        assert supervisor.status() == before
        assert (before.new, swaps) == (2, [])
        gate.touch()
        wait_for_rounds(supervisor, 1)
        assert supervisor.active()[0] == 1
