"""The files of a supervisor, in the folder of a model's versions."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from rlchat.chat.learning.rounds import Outcome, outcomes
from rlchat.chat.learning.state import ROUND, State, read_state
from rlchat.chat.learning.tally import Tally
from rlchat.chat.versions import Versions
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

_log = logging.getLogger(__name__)

# Files that a process which was killed left behind: those of an atomic write have a random end.
_SNAPSHOT = re.compile(rf"round-{ROUND}\.jsonl")
_UNFINISHED = re.compile(rf"\.(\d+(\.reward)?\.(pt|json)|state\.json|{_SNAPSHOT.pattern})\.\w+")
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

    def usable(self) -> tuple[int, ...]:
        """0, and the numbers of the versions with a model file and figures, in ascending order."""
        return (0, *(n for n in self.versions.numbers() if self.path(n).with_suffix(".json").exists()))

    def outcomes(self) -> list[Outcome]:
        """The outcomes of all rounds so far, the oldest first."""
        return outcomes(self.versions)

    def write(self, state: State) -> None:
        """Writes ``state`` atomically. Raises :class:`UserError` if that fails."""
        state.write(self._state_file)

    def recover(self) -> State:
        """Takes the folder, and finishes what a supervisor that was killed has begun; returns the state.

        The active version is the last one that was accepted or rolled back to, if its file can be loaded; else the
        one before.

        Raises:
            UserError: the model is missing or no chat model, and then no folder is made; another supervisor works here;
                the folder cannot be written; its state is damaged.
        """
        from rlchat.models.file_content import read_content  # imports torch

        read_content(self.versions.model, "policy", weights=False)
        self._lock = _taken(self.versions.folder)
        state = read_state(self._state_file)
        if state.running is not None:
            self._wait_for_round()
            snapshot = self.snapshot_path(state.running)
            outcome = self.settle(state.running)
            if outcome is not None:
                tally = Tally(snapshot, self.versions.owns)
                tally.update()
                state = replace(state, used=tally.digests)
                state = state.activate(outcome.number) if outcome.number is not None else state
        state = replace(state, running=None, highest=max(state.highest, self.versions.next_number() - 1))
        while state.active and not _loads(self.path(state.active)):
            *before, last = state.previous or (0,)
            _log.warning("version %d cannot be loaded; version %d is active", state.active, last)
            state = replace(state, active=last, previous=tuple(before))
        self.write(state)
        self.clean()
        return state

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
        """Deletes the model files of old versions that rounds have made, but not the active one. Their figures stay."""
        self.clean()
        made = {one.number for one in self.outcomes() if _SNAPSHOT.fullmatch(one.feedback_file)}
        for number in [one for one in self.versions.numbers() if one in made][: -self._keep]:
            if number != state.active:
                self.path(number).unlink(missing_ok=True)
                self.path(number).with_suffix(".reward.pt").unlink(missing_ok=True)

    def snapshot_path(self, name: str) -> Path:
        """The copy of the feedback file for the round ``name``."""
        return self.versions.folder / f"round-{name}.jsonl"

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
        lock = (folder / ".supervisor").open("ab")
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


def _loads(path: Path) -> bool:
    """Whether ``path`` and its figures are there, and a chat model can be loaded from it."""
    from rlchat.models.model_file import load_policy

    with contextlib.suppress(UserError):
        load_policy(path, "cpu")
        return path.with_suffix(".json").exists()
    return False
