"""Stop strings: however a response is split into pieces, its text ends before the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlchat.server.stop_strings import StopStrings


def through(strings: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """The output for each piece until a stop string is found, then at the end."""
    stop, pushed = StopStrings(strings), []
    for piece in pieces:
        pushed.append(stop.push(piece))
        if stop.found:
            break
    return [*pushed, stop.finish()], stop.found


@pytest.mark.parametrize(
    ("strings", "pieces", "pushed", "found"),
    [
        ([], ["Hel", "lo"], ["Hel", "lo", ""], False),
        (["\n"], ["one\ntwo"], ["one", ""], True),
        (["END"], ["a E", "N", "D b"], ["a ", "", "", ""], True),
        (["END"], ["a E", "NO"], ["a ", "ENO", ""], False),
        (["END"], ["to the EN"], ["to the ", "EN"], False),
        (["aab"], ["aa", "ab"], ["", "a", ""], True),  # what began at the first a was none
        (["two", "one"], ["one two"], ["", ""], True),
        (["x"], ["x"], ["", ""], True),
    ],
)
def test_cases_worked_out_by_hand(strings: list[str], pieces: list[str], pushed: list[str], found: bool) -> None:
    assert through(strings, pieces) == (pushed, found)


letters = st.text("ab", min_size=1, max_size=4)


@given(strings=st.lists(letters, max_size=3), pieces=st.lists(letters, max_size=8))
def test_pieces_give_the_result_of_the_whole_text(strings: list[str], pieces: list[str]) -> None:
    pushed, found = through(strings, pieces)
    text, out = "".join(pieces), "".join(pushed)
    assert found == any(string in text for string in strings)
    assert text.startswith(out)
    assert not any(string in out for string in strings)
    if found:  # it ends where one begins
        assert any(text[len(out) :].startswith(string) for string in strings)
    else:
        assert out == text
