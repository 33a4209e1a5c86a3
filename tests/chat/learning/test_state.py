"""What a supervisor remembers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlchat.chat.learning.state import State, read_state
from rlchat.errors import UserError


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(False, 3, (0, 1), 5, "5-a0", frozenset({"a", "b"}), 7)
    state.write(tmp_path / "state.json")
    assert read_state(tmp_path / "state.json") == state
    assert read_state(tmp_path / "none.json") == State()


def test_the_versions_before() -> None:
    state = State()
    for number in (1, 2, 3):
        state = state.activate(number)
    assert (state.active, state.previous) == (3, (0, 1, 2))
    assert state.activate(3) == state
    back = state.activate(1)
    assert (back.active, back.previous) == (1, (0,))
    assert back.activate(4).previous == (0, 1)
    assert back.activate(3).previous == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"on": 1},
        {"active": -1},
        {"active": True},
        {"previous": ["a"]},
        {"previous": None},
        {"rounds": 1.5},
        {"running": 1.5},
        {"running": "../1"},
        {"highest": "3"},
        {"used": [1]},
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "state.json"
    State(used=frozenset({"a"})).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"state\.json is damaged; delete it"):
        read_state(path)


def test_a_state_of_a_development_version(tmp_path: Path) -> None:
    """Rounds had numbers, and the highest number of a version was not remembered."""
    path = tmp_path / "state.json"
    State(active=2, rounds=3).write(path)
    values = {**json.loads(path.read_text()), "running": 3}
    del values["highest"]
    path.write_text(json.dumps(values))
    assert read_state(path) == State(active=2, rounds=3, running="3")


def test_names_of_rounds_do_not_repeat() -> None:
    names = {State(rounds=4).begin().running for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch("5-[0-9a-f]{12}", str(name)) for name in names)
    assert State(rounds=4).begin().rounds == 5


def test_the_highest_number_is_remembered() -> None:
    assert State().activate(3).activate(1).activate(0).highest == 3
