"""The goal of the demo with a real model: a reply is one short sentence."""

from __future__ import annotations

import re

from rlchat.rewards import Reply
from rlchat.rewards.text import sentences, words

FEWEST_WORDS, MOST_WORDS = 3, 25

_LAST_MARK = re.compile(r"[.!?…][\"”’')\]]*$")


def meets_goal(reply: Reply) -> bool:
    """Whether ``reply`` is one complete sentence of 3 to 25 words, and the model ended it itself.

    The sentence ends with a full stop, a question mark or an exclamation mark. A list or a second line is more than one
    sentence.
    """
    text = reply.text.strip()
    short = FEWEST_WORDS <= len(words(text)) <= MOST_WORDS
    return reply.ended and short and len(sentences(text)) == 1 and _LAST_MARK.search(text) is not None
