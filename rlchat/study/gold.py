"""The gold reward of the study: a known function of the prompt and the text of a response.

A rater of the demo's world would agree with it: the right answer matters most, then a complete and polite sentence that
does not ramble. It counts words, so a small change of the text changes it a little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable

from rlchat.conversation import Check, Conversation
from rlchat.rewards import Reply, ReplyFactor

RIGHT = 2.0
"""Points for the right answer, without another one."""
WRONG = -1.0
"""Points if the response contains another answer of the same kind of talk."""
COMPLETE, COMPLETE_WORDS = 1.0, 5
"""Points for a complete sentence: a fifth of them for each of the first five different words."""
LONG, MOST_WORDS = -0.25, 8
"""Points for each word after the eighth."""
REPEATED = -0.25
"""Points for each word that has occurred before in the response, up to the eighth word."""
RUDE = -1.5
"""Points for an insult."""
UNFINISHED = -0.5
"""Points if the last character does not end a sentence."""
GIBBERISH = -0.5
"""Points for each word that the people of the demo's world do not use."""
KNOWN = 3
"""A word is known if people's replies contain it this many times. Some of their replies have a piece missing."""

_RUDE = re.compile(r"\b(fool|even a child|stop asking)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['-]\w+)*")


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case; an apostrophe or a hyphen joins the parts of a word."""
    return _WORD.findall(text.lower())


def known_words(replies: Iterable[str]) -> frozenset[str]:
    """The words that occur at least :data:`KNOWN` times in ``replies``."""
    counts = Counter(word for reply in replies for word in words_of(reply))
    return frozenset(word for word, count in counts.items() if count >= KNOWN)


def gold_points(check: Check, text: str, known: Container[str]) -> float:
    """The gold reward of the response ``text`` to a prompt with ``check``, in points; ``known`` are words.

    Example: to "Where does a bee live?", the response "A bee lives in a hive." gets 2 for the answer, 1 for five
    different words, and -0.25 for the second "a".
    """
    words = words_of(text)
    early = words[:MOST_WORDS]
    points = COMPLETE * min(len(set(words)), COMPLETE_WORDS) / COMPLETE_WORDS
    points += LONG * max(0, len(words) - MOST_WORDS)
    points += REPEATED * sum(count - 1 for count in Counter(early).values())
    if check.passes(text):
        points += RIGHT
    elif Check(check.none_of).passes(text):
        points += WRONG
    points += GIBBERISH * sum(word not in known for word in words)
    if _RUDE.search(text):
        points += RUDE
    if not text.endswith((".", "!", "?")):
        points += UNFINISHED
    return points


class Gold(ReplyFactor):
    """The gold reward as a factor, to measure it or to train on it. The prompt needs a check.

    Args:
        known: the words of the world.
        weight: of the factor.
    """

    def __init__(self, known: Container[str], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.known = known

    def score(self, prompt: Conversation, reply: Reply) -> float:
        """Points; 0 for a prompt without a check."""
        return 0.0 if prompt.check is None else gold_points(prompt.check, reply.text, self.known)
