"""`Supervisor`: learns from the verdicts on a model's responses while the model is in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlchat.chat.learning.folder import VersionFolder
from rlchat.chat.learning.rounds import LEARN, Outcome, Round
from rlchat.chat.learning.state import State
from rlchat.chat.learning.tally import Tally
from rlchat.errors import UserError, one_line
from rlchat.utils.background import machine_memory

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Status:
    """Where learning stands.

    Attributes:
        on: whether new verdicts start a round.
        every: the number of new verdicts that starts a round.
        verdicts: the number of verdicts that count.
        new: how many of them no round has used.
        bad_lines: damaged lines of the feedback file, which are skipped.
        active: the number of the version that answers; 0: the original model.
        path: its model file.
        previous: the versions that were active before it, the last one last.
        versions: the numbers of the versions that :meth:`Supervisor.rollback` can take, 0 among them.
        training_since: when the round began that runs now, in seconds since 1970; None if none runs.
        rounds: the outcomes of all rounds so far, the oldest first.
        accepted, rejected: how many outcomes of each kind there are.
        training_seconds: the time of all rounds with an outcome.
        error: why the last round or swap failed, in one sentence; None after a success.
        failures: how many rounds and swaps have failed since the start. It rises also if the reason is the same again.
    """

    on: bool
    every: int
    verdicts: int
    new: int
    bad_lines: int
    active: int
    path: Path
    previous: tuple[int, ...]
    versions: tuple[int, ...]
    training_since: float | None
    rounds: tuple[Outcome, ...]
    error: str | None
    failures: int

    @property
    def accepted(self) -> int:
        """The number of accepted versions."""
        return sum(outcome.number is not None for outcome in self.rounds)

    @property
    def rejected(self) -> int:
        """The number of rejected versions."""
        return len(self.rounds) - self.accepted

    @property
    def training_seconds(self) -> float:
        """The seconds of all rounds with an outcome."""
        return sum(outcome.seconds for outcome in self.rounds)


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
        UserError: another supervisor works here; the folder cannot be written; its state is damaged.
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
        self._swap = threading.RLock()  # held while a version becomes active; taken before _lock
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rlchat-learning", daemon=True)
        self._round: Round | None = None
        self._error: str | None = None
        self._failures = 0
        self._unreadable: str | None = None
        self._tried: frozenset[str] | None = None  # digests of the round that runs, or of the last one if it failed
        try:
            self._state = self._folder.recover()
            self._tally = Tally(self.feedback, self._folder.versions.owns, self._state.used)
            self._outcomes = self._folder.outcomes()
        except BaseException:
            self._folder.release()
            raise

    def start(self, model_id: str = "") -> None:
        """Begins to watch the feedback file.

        Args:
            model_id: the :func:`rlchat.models.model_file.identity` of the model. Verdicts on responses of a model with
                another one do not count. Empty: only the names of model files are compared.
        """
        self._tally.model_id = model_id
        self._thread.start()

    def close(self) -> None:
        """Ends a round that runs, and waits for the thread. The next supervisor continues here."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._swap, self._lock:
            self._abandon_round()
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

    def notify(self) -> None:
        """Looks at the feedback file now, not only at the next of the regular times."""
        self._wake.set()

    def status(self) -> Status:
        """Where learning stands now."""
        with self._lock:
            number, path = self.active()
            return Status(
                on=self._state.on,
                every=self.every,
                verdicts=self._tally.total,
                new=self._tally.new,
                bad_lines=self._tally.bad_lines,
                active=number,
                path=path,
                previous=self._state.previous,
                versions=self._folder.usable(),
                training_since=None if self._round is None else self._round.since,
                rounds=tuple(self._outcomes),
                error=self._problem(),
                failures=self._failures,
            )

    def set_learning(self, on: bool) -> None:
        """Turns learning on or off, also for the next start. Off ends a round that runs; its verdicts stay new.

        Raises:
            UserError: the state cannot be written.
        """
        with self._swap, self._lock:
            if not on:
                self._abandon_round()
            self._set_state(replace(self._state, on=on))
        self._wake.set()

    def rollback(self, number: int | None = None) -> tuple[int, Path]:
        """Makes an earlier version active again; returns its number and model file.

        A round that runs is ended. The verdicts stay in the feedback file, but none of them is new any more: the next
        round begins after :attr:`every` further ones, and trains on all.

        Args:
            number: of the version, 0 for the original; None: the one that was active before.

        Raises:
            UserError: there is no such version; it cannot be loaded; the state cannot be written.
        """
        with self._swap:
            with self._lock:
                number = self._earlier(number)
                path = self._folder.path(number)
            self._on_version(number, path)
            with self._lock:
                self._abandon_round()
                self._count()
                used = self._tally.digests
                self._set_state(replace(self._state.activate(number), used=used))
                self._tally.use(used)
                self._error = self._tried = None
        self._wake.set()
        return number, path

    def _earlier(self, number: int | None) -> int:
        usable = self._folder.usable()
        if number is None:
            before = [one for one in self._state.previous if one in usable]
            if not before:
                raise UserError("there is no earlier version to roll back to")
            return before[-1]
        if number not in usable:
            raise UserError(f"there is no version {number}; expected one of {', '.join(map(str, usable))}")
        return number

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
        with self._lock:
            self._count()
            has_ended = self._round is not None and self._round.code is not None
            if self._round is None and self._is_due():
                try:
                    self._begin_round()
                except UserError as error:
                    self._fail(str(error))
        if has_ended:
            self._end_round()

    def _count(self) -> None:
        try:
            self._tally.update()
            self._unreadable = None
        except UserError as error:
            self._unreadable = str(error)

    def _problem(self) -> str | None:
        """Why there is nothing to learn from, or why learning has failed."""
        if self._unreadable is None and not self._tally.total and self._tally.others:
            names = ", ".join(sorted(self._tally.others))
            return f"the verdicts in {self.feedback} are on responses of {names}, not of {self.model.name}"
        return self._unreadable or self._error

    def _is_due(self) -> bool:
        """Whether a round should begin. After one that has failed, one more verdict is enough, but not none."""
        if self._closing or not self._state.on or self._tally.new < self.every:
            return False
        return self._tried is None or bool(self._tally.digests - self._tried)

    def _begin_round(self) -> None:
        begun = self._state.begin()
        assert begun.running is not None
        self._tried = self._tally.digests
        snapshot = self._folder.snapshot(begun.running, self.feedback, self._tally.size)
        self._folder.write(begun)
        self._state = begun
        arguments = [str(self.model), "--feedback", str(snapshot), "--on-bad-line", "skip", "--threads", "1"]
        arguments += ["--background", *(["--max-memory", f"{self._memory:g}"] if self._memory else [])]
        if begun.active:
            arguments += ["--current", str(self._folder.path(begun.active))]
        self._round = Round(self._command, [*arguments, *self._options], self._folder.log, self._folder.scratch)

    def _end_round(self) -> None:
        """Makes the version of a round that has ended active."""
        with self._swap:
            with self._lock:
                if self._round is None or self._round.code is None:  # ended by a rollback in the meantime
                    return
                ended, name = self._round, self._state.running
                assert name is not None
                outcome = self._folder.settle(name)
            if outcome is not None and outcome.number is not None:
                try:
                    self._on_version(outcome.number, self._folder.path(outcome.number))
                except Exception as error:  # it may also be the memory that is missing
                    if not isinstance(error, UserError):
                        _log.exception("the swap failed")
                    self._finish(ended, outcome, f"version {outcome.number} is not in use: {one_line(error)}")
                    return
            self._finish(ended, outcome, self._failure(ended, name) if outcome is None else None)

    def _failure(self, ended: Round, name: str) -> str:
        """Why a round has failed. It names the feedback file, not the copy that the round has read."""
        return ended.failure().replace(str(self._folder.snapshot_path(name)), str(self.feedback))

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
            self._set_state(state)
            self._folder.prune(state)
        self._wake.set()

    def _abandon_round(self) -> None:
        if self._round is not None:
            self._round.stop()
            self._round = None
            self._tried = None
            self._set_state(replace(self._state, running=None))
            self._folder.clean()
            self._outcomes = self._folder.outcomes()

    def _fail(self, error: str) -> None:
        """A round or a swap has failed. The reason is reported also if it is the same as before."""
        self._failures += 1
        self._error = None
        self._note(error)

    def _note(self, error: str) -> None:
        if error != self._error:
            _log.warning("%s", error)
        self._error = error

    def _set_state(self, state: State) -> None:
        """Also if it cannot be written: the next start then finds the outcome of the round on its own."""
        self._state = state
        self._folder.write(state)
