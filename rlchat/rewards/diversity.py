"""Bonuses for variety and penalties for repetition within a response."""

from __future__ import annotations

import re

from rlchat.conversation import Conversation
from rlchat.errors import UserError, at_least_one
from rlchat.rewards.base import Reply, ReplyFactor
from rlchat.rewards.text import ngrams, repeated_share, sentences, words

# A unit of at most 20 characters, repeated four or more times. It does not start with white space, so indentation
# does not count.
_LOOP = re.compile(r"(\S.{0,19}?)\1{3,}", re.DOTALL)


class DistinctNgrams(ReplyFactor):
    """Bonus for varied words: the fraction of distinct n-grams, averaged over n = 1..``max_n``. 0..1.

    A single word is always distinct. To keep its bonus small, a response with fewer than ``min_words`` words is
    measured relative to the number of n-grams in ``min_words`` words.
    """

    def __init__(self, weight: float = 1.0, max_n: int = 2, min_words: int = 8) -> None:
        super().__init__(weight)
        self.max_n = at_least_one("DistinctNgrams", "max_n", max_n)
        self.min_words = min_words
        if min_words < max_n:
            raise UserError(f"invalid value {min_words} for DistinctNgrams.min_words: expected at least max_n, {max_n}")

    def score(self, prompt: Conversation, reply: Reply) -> float:
        found = words(reply.text)
        length = max(len(found), self.min_words)
        return sum(len(set(ngrams(found, n))) / (length - n + 1) for n in range(1, self.max_n + 1)) / self.max_n


class Repetition(ReplyFactor):
    """Penalty for repetition: minus the largest of three fractions, -1..0.

    - n-grams of ``n`` words that occurred earlier in the response (seq-rep-n of Welleck et al. 2020);
    - sentences or lines that occurred earlier in the response;
    - characters in a loop after its first period: a unit of up to 20 characters, repeated four or more times, as in
      ``!!!!!!`` or ``hahahahaha``; the other two fractions miss these because they compare words.
    """

    def __init__(self, weight: float = 1.0, n: int = 3) -> None:
        super().__init__(weight)
        self.n = at_least_one("Repetition", "n", n)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        looped = sum(len(match[0]) - len(match[1]) for match in _LOOP.finditer(reply.text))
        shares = (
            repeated_share(ngrams(words(reply.text), self.n)),
            repeated_share([tuple(words(sentence)) for sentence in sentences(reply.text)]),
            looped / max(1, len(reply.text)),
        )
        return 0.0 - max(shares)
