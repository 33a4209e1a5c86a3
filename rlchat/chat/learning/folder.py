"""The files of a supervisor, in the folder of a model's versions."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal

from rlchat.chat.learning.original import Original, Stamp, stamp_of, version_at
from rlchat.chat.learning.rounds import Outcome, outcomes
from rlchat.chat.learning.state import ROUND, State, read_state
from rlchat.chat.learning.tally import Tally
from rlchat.chat.versions import Versions, number_of
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

Condition = Literal["usable", "deleted", "damaged", "foreign"]
"""Of a version. A foreign one is of another model, which the file of the original model held before."""

_REMARKS: dict[Condition, str] = {
    "usable": "",
    "deleted": "its model file was deleted",
    "damaged": "its model file is damaged",
    "foreign": "of another model with the same name",
}
# Files that a process which was killed left behind: those of an atomic write have a random end.
_SNAPSHOT = re.compile(rf"round-{ROUND}\.jsonl")
_UNFINISHED = re.compile(rf"\.(\d+(\.reward)?\.(pt|json)|state\.json|{_SNAPSHOT.pattern})\.\w+")
_LOCK = ".supervisor"
_END_SECONDS = 10.0  # a round whose supervisor was killed ends in less time


class VersionFolder:
    """The folder of the versions of ``model``, with what a supervisor writes there.

    Args:
        model: the original model file.
        keep: the number of versions whose model files are kept.
    """

    def __init__(self, model: Path, keep: int) -> None:
        self.versions = Versions(model)
        self._keep = keep
        self._lock: IO[bytes] | None = None
        self._original: Original | None = None
        self._seen: dict[int, tuple[Stamp, str | None]] = {}  # the identity of each version; None: it is damaged

    @property
    def original(self) -> Original:
        """The original model. Raises :class:`UserError` if it is missing, damaged, or no chat model."""
        if self._original is None:
            self._original = Original(self.versions.model)
        return self._original

    @property
    def log(self) -> Path:
        """The output of the last round."""
        return self.versions.folder / "learn.log"

    @property
    def scratch(self) -> Path:
        """The temporary files of a round."""
        return self.versions.folder / ".scratch"

    @property
    def _state_file(self) -> Path:
        return self.versions.folder / "state.json"

    def path(self, number: int) -> Path:
        """The model file of version ``number``; of the original for 0."""
        return self.versions.path(number) if number else self.versions.model

    def condition(self, number: int) -> Condition:
        """Whether version ``number`` can be used. A file is read only if it has changed since the last call."""
        path = self.path(number)
        stamp = stamp_of(path)
        if stamp is None or not path.with_suffix(".json").exists():
            return "deleted"
        identity = self._identity(number, stamp)
        if identity is None:
            return "damaged"
        return "usable" if identity == self.original.model_id else "foreign"

    def usable(self) -> tuple[int, ...]:
        """0, and the numbers of the versions of the original model that can be used, in ascending order."""
        return (0, *self._numbers("usable"))

    def outcomes(self) -> list[Outcome]:
        """The outcomes of all rounds so far, also of those of another model with the same name, the oldest first."""
        return outcomes(self.versions)

    def is_own(self, outcome: Outcome) -> bool:
        """Whether ``outcome`` is that of a round of the original model. Old figures do not say it; then it is."""
        if outcome.model_id:
            return outcome.model_id == self.original.model_id
        return outcome.number is None or self.condition(outcome.number) != "foreign"

    def own_outcomes(self) -> list[Outcome]:
        """The outcomes of all rounds of the original model, the oldest first."""
        return [outcome for outcome in self.outcomes() if self.is_own(outcome)]

    def remark(self, outcome: Outcome) -> str:
        """Why the version of ``outcome`` cannot be used, or empty."""
        if not self.is_own(outcome):
            return _REMARKS["foreign"]
        return "" if outcome.number is None else _REMARKS[self.condition(outcome.number)]

    def model_id(self, name: str) -> str:
        """The identity of the model file called ``name``; empty if there is no such file here."""
        number = number_of(name)
        if not number:
            return self.original.model_id if name == self.versions.model.name else ""
        stamp = stamp_of(self.path(number))
        return "" if stamp is None else self._identity(number, stamp) or ""

    def has_state(self) -> bool:
        """Whether a supervisor has worked here."""
        return self._state_file.exists()

    def write(self, state: State) -> None:
        """Writes ``state`` atomically. Raises :class:`UserError` if that fails."""
        state.write(self._state_file)

    def recover(self) -> tuple[State, list[str]]:
        """Takes the folder, and finishes what a supervisor that was killed has begun.

        The active version is the last one that was accepted or rolled back to, if it is a version of the model and its
        file can be loaded; else the one before.

        Returns:
            The state, and a sentence about each thing that the user should know.

        Raises:
            UserError: the model is missing, no chat model, or a version, and then no folder is made; another supervisor
                works here; the folder cannot be written; its state is damaged.
        """
        _refuse_version(self.versions.model)
        original = self.original
        self.take()
        state = read_state(self._state_file)
        if state.running is not None:
            self._wait_for_round()
            state = self._settled(state, state.running)
        state = replace(state, highest=max(state.highest, self.versions.next_number() - 1))
        state, notices = self._usable_state(state)
        if original.is_version:
            notices.append(f"{original.path} was itself learned from feedback; its versions are compared with it")
        self.write(state)
        self.clean()
        return state, notices

    def take(self) -> None:
        """Makes the folder if it is missing, and keeps other supervisors out of it.

        Raises:
            UserError: another supervisor works here; the folder cannot be written.
        """
        self.release()
        self._lock = _taken(self.versions.folder)

    def is_taken(self) -> bool:
        """Whether the folder is still the one that was taken. Somebody may have deleted it since."""
        if self._lock is None:
            return False
        try:
            now = (self.versions.folder / _LOCK).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        mine = os.fstat(self._lock.fileno())
        return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        """Lets another supervisor take the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def snapshot(self, name: str, feedback: Path, size: int) -> Path:
        """Copies the first ``size`` bytes of ``feedback`` for the round ``name``, which is to read just these.

        Raises:
            UserError: a file cannot be read or written.
        """
        path = self.snapshot_path(name)
        try:
            with feedback.open("rb") as source:
                write_atomically(path, lambda file: _copy(source, file, size))
        except OSError as error:
            raise UserError(f"{feedback}: cannot be read: {error.strerror}") from error
        return path

    def settle(self, name: str) -> Outcome | None:
        """The outcome of the round ``name``, whose process has ended; None if it has none.

        Figures of a version whose model file was not written are deleted.
        """
        file = self.snapshot_path(name).name
        for outcome in self.outcomes():
            if outcome.feedback_file == file:
                if outcome.number is None or self.path(outcome.number).exists():
                    return outcome
                self.path(outcome.number).with_suffix(".json").unlink(missing_ok=True)
        self.clean()
        return None

    def clean(self) -> None:
        """Deletes what an ended round left unfinished, and the copies of the verdicts. Call it while none runs.

        If a `rlchat learn` that the user has started works here, its files stay.
        """
        with contextlib.suppress(UserError), self.versions.locked():
            for path in self.versions.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name) or _SNAPSHOT.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def prune(self, state: State) -> None:
        """Deletes the model files of old versions that rounds have made, but not the active one. Their figures stay.

        Versions of another model stay: it may come back.
        """
        self.clean()
        made = {one.number for one in self.own_outcomes() if _SNAPSHOT.fullmatch(one.feedback_file)}
        for number in [one for one in self.versions.numbers() if one in made][: -self._keep]:
            if number != state.active:
                self.path(number).unlink(missing_ok=True)
                self.path(number).with_suffix(".reward.pt").unlink(missing_ok=True)

    def snapshot_path(self, name: str) -> Path:
        """The copy of the feedback file for the round ``name``."""
        return self.versions.folder / f"round-{name}.jsonl"

    def _settled(self, state: State, name: str) -> State:
        """The state after the round ``name``, whose supervisor was killed."""
        state = replace(state, running=None)
        outcome = self.settle(name)
        if outcome is None or not self.is_own(outcome):
            return state
        tally = Tally(self.snapshot_path(name), self.versions.owns, model_id=self.original.model_id)
        tally.update()
        state = replace(state, used=tally.digests)
        return state if outcome.number is None else state.activate(outcome.number)

    def _usable_state(self, state: State) -> tuple[State, list[str]]:
        """``state`` with a version that can be used, and sentences about those that cannot."""
        notices: list[str] = []
        lost: list[int] = []
        foreign = self._numbers("foreign")
        if foreign:
            was = f"versions {', '.join(map(str, foreign))} in {self.versions.folder} are"
            was = was if len(foreign) > 1 else f"version {foreign[0]} in {self.versions.folder} is"
            notices.append(
                f"{was} of another model named {self.versions.model.name}, and not used; no file is replaced: "
                f"the next version has the number {state.highest + 1}"
            )
        if state.active in foreign:  # and so are those that were active before it
            state = replace(state, active=0, previous=())
        while state.active and not self._loads(state.active):
            if not lost or self.condition(state.active) == "damaged":  # older ones are deleted by `prune`
                lost.append(state.active)
            *before, last = state.previous or (0,)
            state = replace(state, active=last, previous=tuple(before))
        usable = self.usable()
        state = replace(state, previous=tuple(number for number in state.previous if number in usable))
        if lost:
            now = f"version {state.active}" if state.active else "the original model"
            names = " and ".join(f"version {number}" for number in lost)
            notices.append(f"{names} in {self.versions.folder} cannot be loaded, so {now} answers")
        return state, notices

    def _loads(self, number: int) -> bool:
        """Whether version ``number`` can be used. Its weights are checked too; a damaged file is remembered."""
        from rlchat.models.model_file import load_policy

        if self.condition(number) != "usable":
            return False
        path = self.path(number)
        stamp = stamp_of(path)
        try:
            load_policy(path, "cpu")
        except UserError:
            if stamp is not None:
                self._seen[number] = stamp, None
            return False
        return True

    def _numbers(self, condition: Condition) -> list[int]:
        return [number for number in self.versions.numbers() if self.condition(number) == condition]

    def _identity(self, number: int, stamp: Stamp) -> str | None:
        from rlchat.models.model_file import stored_identity

        if number not in self._seen or self._seen[number][0] != stamp:
            identity = None
            with contextlib.suppress(UserError):
                identity, _ = stored_identity(self.path(number))
            self._seen[number] = stamp, identity
        return self._seen[number][1]

    def _wait_for_round(self) -> None:
        """Waits until a round of a supervisor that was killed has ended."""
        until = time.monotonic() + _END_SECONDS
        while True:
            try:
                with self.versions.locked():
                    return
            except UserError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)


def _taken(folder: Path) -> IO[bytes]:
    """The lock of the folder, which is released when the file is closed. Windows has no such lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("ab")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; copy the model to another folder") from error
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"{folder}: another chat already learns from feedback on this model; end it, or start without --learn"
            ) from None
    return lock


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size and (block := source.read(min(size, 1 << 20))):
        target.write(block)
        size -= len(block)


def _refuse_version(model: Path) -> None:
    """Raises :class:`UserError` if ``model`` is a version: its own versions would have the same names."""
    if number_of(model.name) is None:
        return
    found = version_at(model)
    if found is not None and VersionFolder(found[1], keep=1).condition(found[0]) == "usable":
        number, original = found
        raise UserError(
            f"{model} is version {number} of {original}, and learning begins with the original: pass {original} with "
            f"--learn, and roll back to version {number} if another one answers"
        )
    raise UserError(f"{model} has the name of a version: copy it to a file with another name, to learn from that")
