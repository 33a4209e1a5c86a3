"""Penalties and bonuses for length."""

from __future__ import annotations

import math

from rlchat.conversation import Conversation
from rlchat.errors import UserError, at_least_one
from rlchat.rewards.base import Reply, ReplyFactor
from rlchat.rewards.text import words


class TooShort(ReplyFactor):
    """Penalty for an overly short reply: -1 for no word at all, rising linearly to 0 at ``min_words``."""

    def __init__(self, weight: float = 1.0, min_words: int = 3) -> None:
        super().__init__(weight)
        self.min_words = at_least_one("TooShort", "min_words", min_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return min(0.0, len(words(reply.text)) / self.min_words - 1)


class TooLong(ReplyFactor):
    """Penalty for an overly long reply: 0 up to ``max_words``, falling to -1 at twice as many, and no lower."""

    def __init__(self, weight: float = 1.0, max_words: int = 200) -> None:
        super().__init__(weight)
        self.max_words = at_least_one("TooLong", "max_words", max_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return max(-1.0, min(0.0, 1 - len(words(reply.text)) / self.max_words))


class AppropriateLength(ReplyFactor):
    """Bonus for a reply of ``low`` to ``high`` words: 1 there, 0 for an empty reply and from ``2 * high`` words on.

    Half a cosine joins them, so that the bonus has neither a cliff nor a kink: half of it at ``low / 2`` and at
    ``1.5 * high`` words.
    """

    def __init__(self, weight: float = 1.0, low: int = 8, high: int = 100) -> None:
        super().__init__(weight)
        self.low = at_least_one("AppropriateLength", "low", low)
        if high < low:
            raise UserError(f"AppropriateLength: high is {high}, less than low, {low}: give a range from low to high")
        self.high = high

    def score(self, prompt: Conversation, reply: Reply) -> float:
        length = len(words(reply.text))
        inside = min(length / self.low, 2 - length / self.high)
        return (1 - math.cos(math.pi * min(1.0, max(0.0, inside)))) / 2
