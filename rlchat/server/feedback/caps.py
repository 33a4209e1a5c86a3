"""How many verdicts are taken in an hour: from one client, and in all."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlchat.errors import counted

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Caps:
    """Verdicts per hour: from one client, and in all."""

    per_client: int = 200
    in_all: int = 1000


class VerdictCounter:
    """Counts the verdicts of the last hour, at most ``caps.in_all`` of them. Not for several threads at once.

    Args:
        caps: the limits.
        before: the age in seconds and the client of each verdict that was taken before, the oldest first.
        clock: the time in seconds.
    """

    def __init__(
        self, caps: Caps, before: Iterable[tuple[float, str]] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.caps = caps
        self._clock = clock
        self._taken: deque[tuple[float, str]] = deque()
        self._by_client: Counter[str] = Counter()
        now = clock()
        for age, client in before:
            self._add(now - age, client)

    def refusal(self, client: str) -> tuple[str, int] | None:
        """Why no verdict of ``client`` can be taken now, and in how many seconds one can; None if one can.

        The sentence also says when, in minutes that are rounded up, or in seconds below two minutes.
        """
        now = self._clock()
        while self._taken and now - self._taken[0][0] >= HOUR:
            _, gone = self._taken.popleft()
            self._by_client[gone] -= 1
            self._by_client += Counter()  # drops those without any
        if len(self._taken) >= self.caps.in_all:
            return self._refused(self.caps.in_all, "", self._taken[0][0] - now)
        if self._by_client[client] >= self.caps.per_client:
            first = next(time for time, one in self._taken if one == client)
            return self._refused(self.caps.per_client, " from a client", first - now)
        return None

    def take(self, client: str) -> None:
        """One more verdict of ``client``."""
        self._add(self._clock(), client)

    def _add(self, when: float, client: str) -> None:
        self._taken.append((when, client))
        self._by_client[client] += 1

    def _refused(self, cap: int, of: str, first: float) -> tuple[str, int]:
        """The sentence and the seconds, if the ``first`` verdict that counts was given that many seconds from now."""
        seconds = max(1, math.ceil(first + HOUR))
        when = counted(seconds, "second") if seconds < 120 else counted(math.ceil(seconds / 60), "minute")
        return f"this server takes {counted(cap, 'verdict')} per hour{of}: try again in {when}", seconds
