"""What a supervisor remembers between two starts: `state.json` in the folder of versions."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

ROUND = r"\d+(-[0-9a-f]+)?"
"""A pattern for the names of rounds."""


@dataclass(frozen=True, slots=True)
class State:
    """Which version is active, and what the rounds so far have used.

    Attributes:
        on: whether new verdicts start a round.
        active: the number of the version that answers; 0: the original model.
        previous: the versions that were active before it, the last one last.
        rounds: the number of rounds that were begun.
        running: the name of the round that was begun and has no outcome yet, see :meth:`begin`.
        used: digests of the verdicts that are not new: those of the last round, or all at the last rollback.
        highest: the highest number of a version so far, also if its files were deleted since. No number is given twice.
    """

    on: bool = True
    active: int = 0
    previous: tuple[int, ...] = ()
    rounds: int = 0
    running: str | None = None
    used: frozenset[str] = field(default_factory=frozenset)
    highest: int = 0

    def begin(self) -> State:
        """A round is begun. Its name has a random part, so that no other round has it, whatever files were deleted."""
        number = self.rounds + 1
        return replace(self, rounds=number, running=f"{number}-{uuid.uuid4().hex[:12]}")

    def activate(self, number: int) -> State:
        """Version ``number`` is active. If it was active before, what came after it is forgotten."""
        if number == self.active:
            return self
        before = (*self.previous, self.active)
        kept = before[: before.index(number)] if number in before else before
        return replace(self, active=number, previous=kept, highest=max(self.highest, number))

    def earlier(self, number: int | None, usable: Collection[int]) -> int:
        """The version to roll back to: ``number``; for None, the one of ``usable`` that was active before.

        Raises:
            UserError: there is none, or ``number`` is not among ``usable``.
        """
        if number is None:
            before = [one for one in self.previous if one in usable]
            if not before:
                raise UserError("there is no earlier version to roll back to")
            return before[-1]
        if number not in usable:
            raise UserError(f"there is no version {number}; expected one of {', '.join(map(str, usable))}")
        return number

    def write(self, path: Path) -> None:
        """Writes it atomically. Raises :class:`UserError` if that fails."""
        values = {**asdict(self), "used": sorted(self.used)}
        text = json.dumps(values) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def read_state(path: Path) -> State:
    """The state in the file ``path``; a new one if there is no file.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    try:
        values = json.loads(path.read_bytes())
        return _state_of(values)
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged; delete it to begin with the original model, without a version being lost"
        ) from None


def _state_of(values: dict[str, Any]) -> State:
    values = {"highest": 0, **values}  # files of development versions do not have it
    on, active, previous, rounds, running, used, highest = (values[one.name] for one in fields(State))
    if type(on) is not bool or any(type(n) is not int or n < 0 for n in (active, rounds, highest, *previous)):
        raise ValueError
    if not all(isinstance(one, str) for one in used):
        raise ValueError
    running = str(running) if type(running) is int else running
    if running is not None and not re.fullmatch(ROUND, running):
        raise ValueError
    return State(on, active, tuple(previous), rounds, running, frozenset(used), highest)
