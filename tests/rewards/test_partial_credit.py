"""Partial credit for answers that are almost right."""

from __future__ import annotations

import pytest

from rlchat.conversation import Check, Conversation, Message
from rlchat.rewards import PartialCredit, Reply, Reward, Verified


def prompt(check: Check | None) -> Conversation:
    return Conversation((Message("user", "Spell this word backward: card"),), check=check)


def score(check: Check | None, text: str) -> float:
    return PartialCredit().score(prompt(check), Reply(text, len(text), True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drac", 1.0),
        (" DRAC. ", 1.0),  # it passes the check
        ("dRat", 3 / 4),
        ("dr", 2 / 4),
        ("dracula", 4 / 7),  # the longer one counts
        ("card", 0.0),
        ("xdrac", 0.0),  # no letter at its place
        ("", 0.0),
    ],
)
def test_the_share_of_characters_at_their_place(text: str, expected: float) -> None:
    assert score(Check(("drac",), kind="exact"), text) == pytest.approx(expected)


def test_the_nearest_of_several_answers_counts() -> None:
    assert score(Check(("drac", "dice"), kind="exact"), "dine") == 3 / 4


@pytest.mark.parametrize("check", [Check(("1234",), kind="number"), Check(("^1234$",), kind="regex")])
def test_numbers_and_patterns_are_right_or_wrong(check: Check) -> None:
    assert [score(check, text) for text in ("1234", "1235")] == [1.0, 0.0]


def test_a_prompt_without_an_answer_scores_0() -> None:
    assert score(None, "drac") == 0.0
    assert PartialCredit().unavailable(prompt(None)) == "the prompt has no answer to check"
    assert PartialCredit().unavailable(prompt(Check(("drac",)))) is None


def test_beside_verified_an_almost_right_answer_is_worth_its_share() -> None:
    reward = Reward([Verified(), PartialCredit(weight=0.5)])
    asked = prompt(Check(("drac",), kind="exact"))
    scores = reward([asked] * 3, [Reply(text, 5, True) for text in ("drac", "drak", "kkkk")])
    assert scores.tolist() == [1.5, 0.375, 0.0]
