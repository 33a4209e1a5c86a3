"""`Supervisor`: learns from the verdicts on a model's responses while the model is in use."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlchat.chat.learning.folder import VersionFolder
from rlchat.chat.learning.rounds import LEARN, Outcome, Round, arguments_of
from rlchat.chat.learning.state import State
from rlchat.chat.learning.status import Status
from rlchat.chat.learning.table import version_table
from rlchat.chat.learning.tally import Tally, names_of
from rlchat.errors import UserError, one_line
from rlchat.utils.background import machine_memory

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


class Supervisor:
    """Starts a round of `rlchat learn` whenever enough new verdicts have come, and makes its version active.

    A thread watches the feedback file. At most one round runs at a time, as a process of low priority that ends with
    this one. What is remembered is in the folder of versions; it is written atomically after each step, so that a
    supervisor that was killed continues where it was. One folder has one supervisor at a time.

    Call :meth:`active` for the model file to begin with, then :meth:`start`.

    Args:
        model: the original model file.
        feedback: the file of verdicts. It need not exist yet.
        every: the number of new verdicts that starts a round.
        options: more arguments for `rlchat learn`, such as ``("--method", "ppo")``.
        memory: the most memory of a round, in GiB; None: half of the machine's.
        keep: the number of versions whose model files are kept; the active one is always kept.
        on_version: is called with the number and the model file of a version before it becomes active: after a round,
            and for a rollback. It loads the model. If it raises :class:`UserError`, the version does not become active.
            Calls do not overlap; they come from the supervisor's thread, or from that of :meth:`rollback`.
        command: runs a round; for tests.

    Raises:
        UserError: the model is missing, no chat model, or itself a version; another supervisor works here; the folder
            cannot be written; its state is damaged.
    """

    def __init__(
        self,
        model: str | Path,
        feedback: str | Path,
        *,
        on_version: Callable[[int, Path], object],
        every: int = 8,
        options: Sequence[str] = (),
        memory: float | None = None,
        keep: int = 8,
        command: Sequence[str] = LEARN,
    ) -> None:
        self.model, self.feedback = Path(model), Path(feedback)
        self.every = every
        self._options, self._command = options, command
        self._memory = memory or (machine_memory() or 0) / 2**31
        self._on_version = on_version
        self._folder = VersionFolder(self.model, keep)
        self._lock = threading.RLock()  # of everything that status() shows
        self._swap = threading.RLock()  # held while the state or the active version changes; taken before _lock
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rlchat-learning", daemon=True)
        self._round: Round | None = None
        self._error: str | None = None
        self._failures = 0
        self._unreadable: str | None = None
        self._lost: str | None = None  # why the folder is not this supervisor's any more
        self._tried: frozenset[str] | None = None  # digests of the round that runs, or of the last one if it failed
        try:
            self._state, notices = self._folder.recover()
            self._written: State | None = self._state  # what is in state.json
            self._notices = tuple(notices)
            self._model_id = self._folder.original.model_id
            self._tally = Tally(self.feedback, self._folder.versions.owns, self._state.used, self._model_id)
            self._outcomes = self._folder.own_outcomes()
        except BaseException:
            self._folder.release()
            raise

    def start(self, model_id: str = "") -> None:
        """Begins to watch the feedback file.

        Args:
            model_id: the :func:`rlchat.models.model_file.identity` of the model in use. Empty: that is not compared.

        Raises:
            UserError: the model in use is not :attr:`model` or a version of it.
        """
        if model_id not in ("", self._model_id):
            raise UserError(f"{self.model} was replaced while it was loaded; start again to use it")
        for notice in self._notices:
            _log.warning("%s", notice)
        self._thread.start()

    def close(self) -> None:
        """Ends a round that runs, and waits for the thread. The next supervisor continues here."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._swap, self._lock:
            if self._round is not None and self._folder.is_taken():
                with contextlib.suppress(UserError):  # the next start finds out that the round has ended
                    self._write(replace(self._state, running=None))
            self._stop_round()
            self._folder.release()

    def active(self) -> tuple[int, Path]:
        """The number of the active version, 0 for the original, and its model file."""
        with self._lock:
            return self._state.active, self._folder.path(self._state.active)

    def owns(self, name: str) -> bool:
        """Whether a model file of this name is the original or a version of it."""
        return self._folder.versions.owns(name)

    def path_of(self, name: str) -> Path:
        """The model file with a ``name`` that :meth:`owns` accepts; it may have been deleted."""
        return self.model if name in ("", self.model.name) else self._folder.versions.folder / name

    def model_id_of(self, name: str) -> str:
        """The identity of the model file that is called ``name``; empty if it is not known."""
        with self._lock:
            is_pruned = any(name == f"{outcome.number}.pt" for outcome in self._outcomes)
            return self._folder.model_id(name) or (self._model_id if is_pruned else "")

    def check_original(self) -> None:
        """Raises :class:`UserError` if the file of the original model was replaced since the start, or is damaged."""
        with self._lock:
            self._folder.original.check()

    def table(self) -> list[str]:
        """All versions, as :func:`version_table` shows them."""
        with self._lock:
            return version_table(self._folder.outcomes(), self._state.active, self._folder.remark)

    def notify(self) -> None:
        """Looks at the feedback file now, not only at the next of the regular times."""
        self._wake.set()

    def status(self) -> Status:
        """Where learning stands now."""
        with self._lock:
            return Status(
                on=self._state.on,
                every=self.every,
                verdicts=self._tally.total,
                new=self._tally.new,
                bad_lines=self._tally.bad_lines,
                others=dict(self._tally.others),
                active=self._state.active,
                path=self._folder.path(self._state.active),
                previous=self._state.previous,
                versions=self._folder.usable(),
                training_since=None if self._round is None else self._round.since,
                rounds=tuple(self._outcomes),
                error=self._problem(),
                notices=self._notices,
                failures=self._failures,
            )

    def set_learning(self, on: bool) -> None:
        """Turns learning on or off, also for the next start. Off ends a round that runs; its verdicts stay new.

        Raises:
            UserError: the state cannot be written; then nothing changes.
        """
        with self._swap, self._lock:
            self._keep_folder()
            self._set_state(replace(self._state, on=on, running=self._state.running if on else None))
            if not on:
                self._stop_round()
        self._wake.set()

    def rollback(self, number: int | None = None) -> tuple[int, Path]:
        """Makes an earlier version active again; returns its number and model file.

        A round that runs is ended. The verdicts stay in the feedback file, but none of them is new any more: the next
        round begins after :attr:`every` further ones, and trains on all. If the version is already in use, nothing
        changes.

        Args:
            number: of the version, 0 for the original; None: the one that was active before.

        Raises:
            UserError: there is no such version; it cannot be loaded; the state cannot be written. Nothing changes then.
        """
        with self._swap:
            with self._lock:
                self._keep_folder()
                number = self._state.earlier(number, self._folder.usable())
                path = self._folder.path(number)
                if number == self._state.active:
                    return number, path
                if number == 0:
                    self._folder.original.check()
                self._count()
                back = replace(self._state.activate(number), used=self._tally.digests, running=None)
                self._write(back)
            try:
                self._on_version(number, path)
            except BaseException:
                with self._lock, contextlib.suppress(UserError):  # else the next step writes it
                    self._write(self._state)
                raise
            with self._lock:
                self._state = back
                self._stop_round()
                self._tally.use(back.used)
                self._error = self._tried = None
        self._wake.set()
        return number, path

    def _work(self) -> None:
        while not self._closing:
            try:
                self._step()
            except UserError as error:
                self._note(str(error))  # the next step may fail in the same way, half a second later
            except Exception as error:  # a broken step must not end learning silently
                _log.exception("learning failed")
                self._note(f"{type(error).__name__}: {error}")
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _step(self) -> None:
        with self._swap:
            with self._lock:
                self._count()
                self._keep_folder()
                if self._written != self._state:  # the disk was full
                    self._write(self._state)
                    self._folder.prune(self._state)
                    self._error = None
                has_ended = self._round is not None and self._round.code is not None
                if self._round is None and self._is_due():
                    try:
                        self._begin_round()
                    except UserError as error:
                        self._fail(str(error))
            if has_ended:
                self._end_round()

    def _keep_folder(self) -> None:
        """Takes the folder again if it was deleted. A round that runs there is ended, and begins again.

        Raises:
            UserError: another supervisor works there, or has worked there; the folder cannot be made.
        """
        if self._lost is None and self._folder.is_taken():
            return
        self._stop_round()
        self._state, self._written = replace(self._state, running=None), None
        folder = self._folder.versions.folder
        if self._lost is not None or self._folder.has_state():
            self._lost = f"{folder} was replaced since the start; restart to learn again"
            raise UserError(self._lost)
        self._folder.take()
        self._outcomes = self._folder.own_outcomes()
        self._notice(f"{folder} was deleted, with the versions in it; {self._in_use} still answers")
        self._write(self._state)

    def _count(self) -> None:
        try:
            self._tally.update()
            self._unreadable = None
        except UserError as error:
            self._unreadable = str(error)

    def _problem(self) -> str | None:
        """Why there is nothing to learn from, or why learning has failed."""
        if self._unreadable is None and not self._tally.total and self._tally.others:
            names = names_of(self._tally.others)
            return f"the verdicts in {self.feedback} are on responses of {names}, not of {self.model.name}"
        return self._unreadable or self._error

    def _is_due(self) -> bool:
        """Whether a round should begin. After one that has failed, one more verdict is enough, but not none."""
        if self._closing or not self._state.on or self._tally.new < self.every:
            return False
        return self._tried is None or bool(self._tally.digests - self._tried)

    def _begin_round(self) -> None:
        """Raises :class:`UserError` if that fails; then no round is begun, and there are no files of it."""
        begun = self._state.begin()
        assert begun.running is not None
        self._tried = self._tally.digests
        self._folder.original.check()
        snapshot = self._folder.snapshot(begun.running, self.feedback, self._tally.size)
        current = self._folder.path(begun.active) if begun.active else None
        if begun.active and self._folder.condition(begun.active) != "usable":
            current = None
            self._notice(f"the file of {self._in_use} is gone, so the next version is compared with the original model")
        arguments = arguments_of(self.model, snapshot, current, self._memory)
        try:
            self._set_state(begun)
            self._round = Round(self._command, [*arguments, *self._options], self._folder.log, self._folder.scratch)
        except UserError:
            self._state = replace(self._state, running=None)
            self._folder.clean()
            raise

    def _end_round(self) -> None:
        """Makes the version of a round that has ended active."""
        with self._swap:
            with self._lock:
                if self._round is None or self._round.code is None:  # ended by a rollback in the meantime
                    return
                ended, name = self._round, self._state.running
                assert name is not None
                outcome = self._folder.settle(name)
            if outcome is not None and not self._folder.is_own(outcome):
                self._finish(ended, None, f"{self.model} was replaced since the start; restart to use it")
                return
            if outcome is not None and outcome.number is not None:
                try:
                    self._on_version(outcome.number, self._folder.path(outcome.number))
                except Exception as error:  # it may also be the memory that is missing
                    if not isinstance(error, UserError):
                        _log.exception("the swap failed")
                    self._finish(ended, outcome, f"version {outcome.number} is not in use: {one_line(error)}")
                    return
            failure = None
            if outcome is None:  # it names the feedback file, not the copy that the round has read
                failure = ended.failure().replace(str(self._folder.snapshot_path(name)), str(self.feedback))
            self._finish(ended, outcome, failure)

    def _finish(self, ended: Round, outcome: Outcome | None, error: str | None) -> None:
        with self._lock:
            ended.close()
            self._round = None
            self._error = None
            if error is not None:
                self._fail(error)
            state = replace(self._state, running=None)
            if outcome is not None:
                self._outcomes.append(outcome)
                used = self._tried or frozenset()
                state = replace(state, used=used, highest=max(state.highest, outcome.number or 0))
                if outcome.number is not None and error is None:
                    state = state.activate(outcome.number)
                self._tally.use(used)
                self._tried = None
            self._state = state  # also if it cannot be written: the version is in use, and the next start finds it
            self._write(state)
            self._folder.prune(state)
        self._wake.set()

    def _stop_round(self) -> None:
        """Ends the round that runs, if one does. The state no longer has it."""
        if self._round is not None:
            self._round.stop()
            self._round = None
            self._tried = None
            if self._folder.is_taken():
                self._folder.clean()
                self._outcomes = self._folder.own_outcomes()

    def _fail(self, error: str) -> None:
        """A round or a swap has failed. The reason is reported also if it is the same as before."""
        self._failures += 1
        self._error = None
        self._note(error)

    def _note(self, error: str) -> None:
        if error != self._error:
            _log.warning("%s", error)
        self._error = error

    def _notice(self, sentence: str) -> None:
        """The user should know it. It is said once until something else is."""
        if self._notices[-1:] != (sentence,):
            self._notices = (*self._notices, sentence)
            _log.warning("%s", sentence)

    @property
    def _in_use(self) -> str:
        return f"version {self._state.active}" if self._state.active else "the original model"

    def _set_state(self, state: State) -> None:
        """Writes ``state``, and then uses it. Raises :class:`UserError`, without a change, if it cannot be written."""
        self._write(state)
        self._state = state

    def _write(self, state: State) -> None:
        self._folder.write(state)
        self._written = state
