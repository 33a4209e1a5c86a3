"""A penalty for responses that were cut off."""

from __future__ import annotations

from rlchat.conversation import Conversation
from rlchat.rewards.base import Reply, ReplyFactor


class MissingEnd(ReplyFactor):
    """Penalty for a reply that ran out of tokens before it ended its turn: -1, else 0."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 0.0 if reply.ended else -1.0
