"""Penalties and bonuses for length."""

from __future__ import annotations

import math

from rlchat.conversation import Conversation
from rlchat.errors import UserError, at_least_one
from rlchat.rewards.base import Reply, ReplyFactor
from rlchat.rewards.text import sentences, words


class TooShort(ReplyFactor):
    """Penalty for a short response: -1 without any word, rising linearly to 0 at ``min_words``."""

    def __init__(self, weight: float = 1.0, min_words: int = 3) -> None:
        super().__init__(weight)
        self.min_words = at_least_one("TooShort", "min_words", min_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return min(0.0, len(words(reply.text)) / self.min_words - 1)


class TooLong(ReplyFactor):
    """Penalty for a long response: 0 up to ``max_words``, falling linearly to -1 at twice as many."""

    def __init__(self, weight: float = 1.0, max_words: int = 200) -> None:
        super().__init__(weight)
        self.max_words = at_least_one("TooLong", "max_words", max_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return max(-1.0, min(0.0, 1 - len(words(reply.text)) / self.max_words))


class TooManySentences(ReplyFactor):
    """Penalty for many sentences: 0 up to ``max_sentences``, falling linearly to -1 at twice as many.

    Sentences are counted by :func:`rlchat.rewards.text.sentences`, so that each line of a list counts.
    """

    def __init__(self, weight: float = 1.0, max_sentences: int = 3) -> None:
        super().__init__(weight)
        self.max_sentences = at_least_one("TooManySentences", "max_sentences", max_sentences)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return max(-1.0, min(0.0, 1 - len(sentences(reply.text)) / self.max_sentences))


class AppropriateLength(ReplyFactor):
    """Bonus for a response of ``low`` to ``high`` words: 1 there, 0 for an empty one and from ``2 * high`` words on.

    Half a cosine period joins them smoothly: the bonus is 1/2 at ``low / 2`` and at ``1.5 * high`` words.
    """

    def __init__(self, weight: float = 1.0, low: int = 8, high: int = 100) -> None:
        super().__init__(weight)
        self.low = at_least_one("AppropriateLength", "low", low)
        if high < low:
            raise UserError(f"invalid value {high} for AppropriateLength.high: expected at least low, {low}")
        self.high = high

    def score(self, prompt: Conversation, reply: Reply) -> float:
        length = len(words(reply.text))
        inside = min(length / self.low, 2 - length / self.high)
        return (1 - math.cos(math.pi * min(1.0, max(0.0, inside)))) / 2
