"""Verdicts per hour."""

from __future__ import annotations

from rlchat.server.feedback.caps import HOUR, Caps, VerdictCounter


def test_a_client_and_all_clients_have_a_limit_per_hour() -> None:
    now = [0.0]
    counter = VerdictCounter(Caps(per_client=2, in_all=3), lambda: now[0])
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
