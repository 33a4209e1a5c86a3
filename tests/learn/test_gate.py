"""The gate: each reason against a version, each note, and the borders of the bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rlchat.chat.learning.settings import Bounds
from rlchat.errors import UserError
from rlchat.learn.gate import judge, kl_between
from rlchat.learn.measure import Figures

BEFORE = Figures(
    agrees=11, verdicts=20, reward_accuracy=0.5, perplexity=2.0, correct=90, controls=100, original_nll=0.5
)
BOUNDS = Bounds(perplexity_rise=0.05, control_drop=0.02, kl=0.1, reward_accuracy=0.6)


def reasons(new: Figures, original: Figures = BEFORE, current: Figures = BEFORE, alarms: tuple[str, ...] = ()) -> str:
    return "; ".join(judge(original, current, new, BOUNDS, "", alarms).reasons)


BETTER = replace(BEFORE, agrees=12, reward_accuracy=0.7)


def test_a_version_that_agrees_more_is_accepted() -> None:
    decision = judge(BEFORE, BEFORE, BETTER, BOUNDS, "", ())
    assert decision.accepted
    assert decision.notes == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"agrees": 11}, ""),
        (
            {"reward_accuracy": 0.594},
            "what it has learned does not carry over to the 20 held-back verdicts: "
            "the reward accuracy is 59%, below 60%",
        ),
        ({"reward_accuracy": 0.6}, ""),
        ({"reward_accuracy": 0.5, "verdicts": 9}, ""),  # too few
        ({"reward_accuracy": None}, ""),  # all held-back responses are liked, or all are disliked
        ({"agrees": 10}, "it agrees with 10 of 20 held-back verdicts, before: 11"),
        ({"perplexity": 2.1}, ""),
        ({"perplexity": 2.11}, "the perplexity on human replies rose from 2 to 2.11, more than 0.05 of it"),
        ({"perplexity": math.inf}, "the perplexity on human replies rose from 2 to inf, more than 0.05 of it"),
        ({"perplexity": math.nan}, "the perplexity on human replies rose from 2 to nan, more than 0.05 of it"),
        ({"correct": 88}, ""),
        ({"correct": 87}, "87 of 100 controls are correct, before: 90, a drop of more than 0.02"),
        ({"original_nll": 0.59}, ""),
        (
            {"original_nll": 0.7},
            "its responses to controls have moved too far from those of the original model: the KL is 0.2 nats per "
            "token, above 0.1",
        ),
    ],
)
def test_each_bound(change: dict[str, float], reason: str) -> None:
    assert reasons(replace(BETTER, **change)) == reason  # type: ignore[arg-type]


def test_an_alarm_and_all_reasons_together() -> None:
    found = reasons(replace(BETTER, agrees=0, correct=0), alarms=("alarm in training: it diverged",))
    assert found.startswith("alarm in training: it diverged; it agrees with 0 of 20")
    assert found.endswith("a drop of more than 0.02")


def test_agreement_is_compared_with_the_current_version_and_the_rest_with_the_original() -> None:
    """So that many versions in a row cannot drift away, each within the bounds."""
    current = replace(BEFORE, agrees=15, perplexity=2.09, correct=88)
    assert reasons(replace(BETTER, agrees=14), current=current).startswith("it agrees with 14 of 20")
    assert "perplexity" in reasons(replace(BETTER, agrees=15, perplexity=2.15), current=current)


def test_what_is_not_measured_is_said() -> None:
    nothing = Figures.none()
    decision = judge(nothing, nothing, nothing, BOUNDS, "9 verdicts are fewer than 10", ())
    assert decision.reasons == [
        "there are no prompts or replies to measure it on; pass --replay FILE with other conversations"
    ]
    assert decision.notes[0] == "agreement is not part of the gate: 9 verdicts are fewer than 10"
    assert ["perplexity is not part" in note for note in decision.notes] == [False, True, False]
    assert "there are no controls" in decision.notes[2]
    unchecked = replace(BETTER, correct=None)
    assert "no control has an answer" in judge(unchecked, unchecked, unchecked, BOUNDS, "", ()).notes[0]
    assert kl_between(nothing, BEFORE) is None


def test_one_of_a_few_controls_may_be_lost() -> None:
    few = replace(BETTER, correct=10, controls=12)
    assert reasons(replace(few, correct=9), original=few) == ""
    assert reasons(replace(few, correct=8), original=few).startswith("8 of 12 controls are correct, before: 10")
    assert [Bounds(control_drop=0.29).controls_to_lose(n) for n in (0, 3, 7, 100)] == [1, 1, 2, 29]
    assert Bounds(control_drop=0).controls_to_lose(100) == 0


def test_a_bound_out_of_range() -> None:
    with pytest.raises(UserError, match="control_drop"):
        Bounds(control_drop=-0.1)
    with pytest.raises(UserError, match="reward_accuracy"):
        Bounds(reward_accuracy=60)
