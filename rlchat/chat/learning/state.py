"""What a supervisor remembers between two starts: `state.json` in the folder of versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rlchat.errors import UserError
from rlchat.utils.files import write_atomically


@dataclass(frozen=True, slots=True)
class State:
    """Which version is active, and what the rounds so far have used.

    Attributes:
        on: whether new verdicts start a round.
        active: the number of the version that answers; 0: the original model.
        previous: the versions that were active before it, the last one last.
        rounds: the number of rounds that were begun.
        running: the number of the round that was begun and has no outcome yet.
        used: digests of the verdicts that are not new: those of the last round, or all at the last rollback.
    """

    on: bool = True
    active: int = 0
    previous: tuple[int, ...] = ()
    rounds: int = 0
    running: int | None = None
    used: frozenset[str] = field(default_factory=frozenset)

    def activate(self, number: int) -> State:
        """Version ``number`` is active. If it was active before, what came after it is forgotten."""
        if number == self.active:
            return self
        before = (*self.previous, self.active)
        kept = before[: before.index(number)] if number in before else before
        return replace(self, active=number, previous=kept)

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
    on, active, previous, rounds, running, used = (values[one.name] for one in fields(State))
    numbers = [active, rounds, *previous, *([] if running is None else [running])]
    if type(on) is not bool or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError
    if not all(isinstance(one, str) for one in used):
        raise ValueError
    return State(on, active, tuple(previous), rounds, running, frozenset(used))
