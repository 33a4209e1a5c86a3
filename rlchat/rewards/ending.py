"""A penalty for truncated responses."""

from __future__ import annotations

from rlchat.conversation import Conversation
from rlchat.rewards.base import Reply, ReplyFactor


class MissingEnd(ReplyFactor):
    """Penalty for a response that reached the token limit before its end-of-turn token: -1, else 0."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 0.0 if reply.ended else -1.0
