"""`LiveLearning`: what `rlchat chat --learn` does between two responses."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlchat.chat.learning.folder import VersionFolder
from rlchat.chat.learning.original import version_at
from rlchat.chat.learning.rounds import Outcome
from rlchat.chat.learning.status import Status
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.chat.learning.table import version_table
from rlchat.chat.learning.tally import names_of
from rlchat.errors import counted

if TYPE_CHECKING:
    from rlchat.chat.interface import ChatInterface
    from rlchat.models.model_file import PolicyBundle

_LOGGER = logging.getLogger("rlchat.chat.learning")


class LiveLearning:
    """Learning in one chat. The supervisor's thread loads a new version, and :meth:`news` swaps to it.

    Load the chat's model from :attr:`path`, then call :meth:`start`, and :meth:`news` whenever no response is being
    generated and lines may be printed. All methods are for the thread of the chat.

    Args:
        model: the original model file.
        feedback: the file of verdicts.
        base_model: where the base of ``model`` is, if that is an adapter file; None: as in training.
        arguments: more arguments of :class:`Supervisor`.

    Raises:
        UserError: as :class:`Supervisor`.
    """

    def __init__(self, model: Path, feedback: Path, base_model: str | None = None, **arguments: Any) -> None:
        self.model, self._base_model = model, base_model
        self._chat: ChatInterface | None = None
        self._lock = threading.Lock()
        self._loaded: tuple[int, PolicyBundle, Path] | None = None  # a version that the chat does not use yet
        self._supervisor = Supervisor(model, feedback, on_version=self._load, **arguments)
        status = self._supervisor.status()
        self._begun_with, self.path = status.active, status.path
        self._told = len(status.rounds)
        self._noticed = len(status.notices)
        self._error: str | None = None
        self._failures = self._bad_lines = self._others = 0

    @property
    def base_model(self) -> str | None:
        """Where the base of the model in :attr:`path` is; versions have none."""
        return self._base_of(self.path)

    def start(self, chat: ChatInterface) -> list[str]:
        """Begins to learn for ``chat``, which uses the model in :attr:`path`; returns lines to be printed."""
        from rlchat.models.model_file import identity  # imports torch

        self._chat = chat
        _LOGGER.addHandler(_Silent())  # what it reports is in the status; a thread must not print into a prompt
        _LOGGER.propagate = False
        self._supervisor.start(identity(chat.bundle))
        every = self._supervisor.every
        lines = [f"learning from good, bad and edit: after {counted(every, 'new verdict')}, a version is trained"]
        if self._begun_with:
            lines.append(f"version {self._begun_with} of {self.model.name} answers, as at the end of the last chat")
        return [*lines, *self._supervisor.status().notices[: self._noticed]]

    def close(self) -> list[str]:
        """Ends learning, with a round that runs; returns lines to be printed."""
        is_training = self._supervisor.status().training_since is not None
        self._supervisor.close()
        _LOGGER.propagate = True
        for handler in [one for one in _LOGGER.handlers if isinstance(one, _Silent)]:
            _LOGGER.removeHandler(handler)
        return ["the round of learning has ended; the next chat with --learn begins it again"] if is_training else []

    def notify(self) -> None:
        """A verdict was given."""
        self._supervisor.notify()

    def news(self) -> list[str]:
        """Uses the version that became active since the last call; returns a line about each event since then."""
        status = self._supervisor.status()
        self._swap(status)
        lines = [line for outcome in status.rounds[self._told :] for line in _lines(outcome, status)]
        lines += status.notices[self._noticed :]
        self._told, self._noticed = len(status.rounds), len(status.notices)
        if status.error is not None and (status.error != self._error or status.failures > self._failures):
            lines.append(f"no new version: {status.error}")
        if (bad := status.bad_lines - self._bad_lines) > 0:
            lines.append(f"{counted(bad, 'damaged line')} in {self._supervisor.feedback} cannot be used")
        others = sum(status.others.values())
        if others > self._others and status.verdicts:  # without verdicts that count, this is the error
            new = f"{counted(others - self._others, 'verdict')} on responses of {names_of(status.others)}"
            lines.append(f"left out: {new}, not of {self.model.name}")
        self._error, self._failures = status.error, status.failures
        self._bad_lines, self._others = status.bad_lines, others
        return lines

    def rollback(self, number: int | None) -> str:
        """Uses an earlier version, the one before if ``number`` is None; returns a line about it.

        Raises:
            UserError: as :meth:`Supervisor.rollback`.
        """
        before = self._supervisor.status()
        try:
            number, path = self._supervisor.rollback(number)
        finally:
            self._swap(self._supervisor.status())
        if number == before.active:
            return f"{_named(number)} ({path.name}) answers already; nothing has changed"
        ended = "; the round of learning was ended" if before.training_since is not None else ""
        every = f"after {counted(before.every, 'new verdict')}"
        following = f"the next round begins {every}" if before.on else "learning is off"
        return f"{_named(number)} ({path.name}) answers from now on{ended}; {following}"

    def set_learning(self, on: bool) -> str:
        """Turns learning on or off; returns a line about it. Raises :class:`UserError` if that cannot be saved."""
        self._supervisor.set_learning(on)
        return self.describe()

    def describe(self) -> str:
        """Where learning stands, in one line, and below it what was left out and why the last round has failed."""
        status = self._supervisor.status()
        state = f"{status.new} of {status.every} new verdicts for the next version" if status.on else "off"
        if status.training_since is not None:
            state = f"a version is being trained, for {_seconds(status)} s"
        total = f"{counted(status.verdicts, 'verdict')} in all"
        lines = [f"learning: {state}; {total}; {_named(status.active)} answers"]
        lines += [f"  left out: {left_out}"] if (left_out := _left_out(status)) else []
        lines += [f"  no new version: {status.error}"] if status.error is not None else []
        return "\n".join(lines)

    def toolbar(self) -> str:
        """Where learning stands, in a few words."""
        status = self._supervisor.status()
        state = f"{status.new} of {status.every} new verdicts" if status.on else "learning is off"
        if status.training_since is not None:
            state = f"training, {_seconds(status)} s"
        return f"{_named(status.active)} · {state}"

    def table(self) -> list[str]:
        """All versions, as :func:`version_table` shows them."""
        return self._supervisor.table()

    def _load(self, number: int, path: Path) -> None:
        from rlchat.models.model_file import load_policy

        assert self._chat is not None
        bundle = load_policy(path, self._chat.device, self._base_of(path))
        bundle.model.to(self._chat.dtype)
        with self._lock:
            self._loaded = number, bundle, path

    def _swap(self, status: Status) -> None:
        with self._lock:
            loaded = self._loaded
            if loaded is None or loaded[0] != status.active:  # it is loaded before it becomes active
                return
            self._loaded = None
        assert self._chat is not None
        _, bundle, path = loaded
        self._chat.swap(bundle, path)

    def _base_of(self, path: Path) -> str | None:
        return self._base_model if path == self.model else None


def table_of(model: Path) -> list[str]:
    """The versions of ``model`` that there are, for a chat that does not learn; ``model`` may be one of them."""
    number, model = version_at(model) or (0, model)
    folder = VersionFolder(model, keep=1)
    return version_table(folder.outcomes(), number, folder.remark)


class _Silent(logging.NullHandler):
    """Of this module, so that it can be removed."""


def _lines(outcome: Outcome, status: Status) -> list[str]:
    """What came of a round: a line, and one below it about what was left out and not measured, if there is any."""
    line = outcome.sentence if outcome.number is not None else f"no new version: {'; '.join(outcome.reasons)}"
    if outcome.number is not None and outcome.number == status.active:
        line = f"{line}; now in use"
    return [line, *([f"  {'; '.join(outcome.remarks)}"] if outcome.remarks else [])]


def _left_out(status: Status) -> str:
    """The lines of the feedback file that do not count, and why; empty if all do."""
    others = f"{counted(sum(status.others.values()), 'verdict')} on responses of {names_of(status.others)}"
    bad = counted(status.bad_lines, "damaged line")
    return ", ".join([others] * bool(status.others) + [bad] * bool(status.bad_lines))


def _named(number: int) -> str:
    return f"version {number}" if number else "the original model"


def _seconds(status: Status) -> str:
    assert status.training_since is not None
    return f"{max(0.0, time.time() - status.training_since):.0f}"
