"""A penalty for responses of many sentences."""

from __future__ import annotations

from rlchat.conversation import Conversation
from rlchat.errors import at_least_one
from rlchat.rewards.base import Reply, ReplyFactor
from rlchat.rewards.text import sentences


class TooManySentences(ReplyFactor):
    """Penalty for many sentences: 0 up to ``max_sentences``, falling linearly to -1 at twice as many.

    Sentences are counted by :func:`rlchat.rewards.text.sentences`, so that each line of a list counts.
    """

    def __init__(self, weight: float = 1.0, max_sentences: int = 3) -> None:
        super().__init__(weight)
        self.max_sentences = at_least_one("TooManySentences", "max_sentences", max_sentences)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return max(-1.0, min(0.0, 1 - len(sentences(reply.text)) / self.max_sentences))
