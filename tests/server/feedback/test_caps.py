"""Verdicts per hour, also over a restart."""

from __future__ import annotations

from rlchat.server.feedback.caps import HOUR, Caps, VerdictCounter


def test_a_client_and_all_clients_have_a_limit_per_hour() -> None:
    now = [0.0]
    counter = VerdictCounter(Caps(per_client=2, in_all=3), clock=lambda: now[0])
    assert counter.refusal("a") is None
    counter.take("a")
    now[0] = 10.0
    counter.take("a")
    assert counter.refusal("a") == ("this server takes 2 verdicts per hour from a client", 3590)
    assert counter.refusal("b") is None
    counter.take("b")
    assert counter.refusal("c") == ("this server takes 3 verdicts per hour", 3590)
    now[0] = HOUR
    assert counter.refusal("a") is None
    counter.take("a")
    assert counter.refusal("c") == ("this server takes 3 verdicts per hour", 10)
    now[0] = 3 * HOUR
    assert counter.refusal("c") is None
    assert not counter._taken
    assert not counter._by_client


def test_verdicts_before_the_start_count() -> None:
    now = [50.0]
    before = [(3000.0, "a"), (600.0, "b"), (0.0, "a")]
    counter = VerdictCounter(Caps(per_client=2, in_all=4), before, clock=lambda: now[0])
    assert counter.refusal("a") == ("this server takes 2 verdicts per hour from a client", 600)
    assert counter.refusal("b") is None
    counter.take("b")
    assert counter.refusal("c") == ("this server takes 4 verdicts per hour", 600)
    now[0] = 650.0
    assert counter.refusal("a") is None
