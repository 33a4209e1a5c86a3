"""Where learning stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlchat.chat.learning.rounds import Outcome


@dataclass(frozen=True, slots=True)
class Status:
    """Where learning stands.

    Attributes:
        on: whether new verdicts start a round.
        every: the number of new verdicts that starts a round.
        verdicts: the number of verdicts that count.
        new: how many of them no round has used.
        bad_lines: damaged lines of the feedback file, which are skipped.
        others: the number of verdicts on responses of other models, which do not count, by the name of the model.
        active: the number of the version that answers; 0: the original model.
        path: its model file.
        previous: the versions that were active before it, the last one last.
        versions: the numbers of the versions that :meth:`Supervisor.rollback` can take, 0 among them.
        training_since: when the round began that runs now, in seconds since 1970; None if none runs.
        rounds: the outcomes of all rounds of this model so far, the oldest first.
        accepted, rejected: how many outcomes of each kind there are.
        training_seconds: the time of all rounds with an outcome.
        error: why the last round or swap failed, in one sentence; None after a success.
        notices: a sentence about each thing that the user should know, since the start, the oldest first: versions of
            another model, a version that cannot be loaded, a folder that was deleted.
        failures: how many rounds and swaps have failed since the start. It rises also if the reason is the same again.
    """

    on: bool
    every: int
    verdicts: int
    new: int
    bad_lines: int
    others: dict[str, int]
    active: int
    path: Path
    previous: tuple[int, ...]
    versions: tuple[int, ...]
    training_since: float | None
    rounds: tuple[Outcome, ...]
    error: str | None
    notices: tuple[str, ...]
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
