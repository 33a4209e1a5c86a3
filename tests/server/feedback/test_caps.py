"""Verdicts per hour, also over a restart."""

from __future__ import annotations

import pytest

from rlchat.server.feedback.caps import HOUR, Caps, VerdictCounter


def test_a_client_and_all_clients_have_a_limit_per_hour() -> None:
    now = [0.0]
    counter = VerdictCounter(Caps(per_client=2, in_all=3), clock=lambda: now[0])
    assert counter.refusal("a") is None
    counter.take("a")
    now[0] = 10.0
    counter.take("a")
    assert counter.refusal("a") == (
        "this server takes 2 verdicts per hour from a client: try again in 60 minutes",
        3590,
    )
    assert counter.refusal("b") is None
    counter.take("b")
    assert counter.refusal("c") == ("this server takes 3 verdicts per hour: try again in 60 minutes", 3590)
    now[0] = HOUR
    assert counter.refusal("a") is None
    counter.take("a")
    assert counter.refusal("c") == ("this server takes 3 verdicts per hour: try again in 10 seconds", 10)
    now[0] = 3 * HOUR
    assert counter.refusal("c") is None
    assert not counter._taken
    assert not counter._by_client


def test_verdicts_before_the_start_count() -> None:
    now = [50.0]
    before = [(3000.0, "a"), (600.0, "b"), (0.0, "a")]
    counter = VerdictCounter(Caps(per_client=2, in_all=4), before, clock=lambda: now[0])
    assert counter.refusal("a") == ("this server takes 2 verdicts per hour from a client: try again in 10 minutes", 600)
    assert counter.refusal("b") is None
    counter.take("b")
    assert counter.refusal("c") == ("this server takes 4 verdicts per hour: try again in 10 minutes", 600)
    now[0] = 650.0
    assert counter.refusal("a") is None


@pytest.mark.parametrize(
    ("waited", "when", "seconds"),
    [
        (0.0, "60 minutes", 3600),
        (0.5, "60 minutes", 3600),
        (60.0, "59 minutes", 3540),
        (3479.0, "3 minutes", 121),
        (3480.5, "2 minutes", 120),
        (3481.0, "119 seconds", 119),
        (3598.9, "2 seconds", 2),
        (3599.5, "1 second", 1),
    ],
)
def test_when_the_next_verdict_can_be_taken(waited: float, when: str, seconds: int) -> None:
    now = [0.0]
    counter = VerdictCounter(Caps(per_client=1, in_all=9), clock=lambda: now[0])
    counter.take("a")
    now[0] = waited
    assert counter.refusal("a") == (f"this server takes 1 verdict per hour from a client: try again in {when}", seconds)
    now[0] = waited + seconds
    assert counter.refusal("a") is None
