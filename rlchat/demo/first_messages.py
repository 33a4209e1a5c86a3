"""Forty first messages that a newcomer might send to the demo's model, each with a pattern for a sensible reply.

No training prompt equals one of them, even without regard to case and punctuation: they measure how the model meets
people who do not know its world. The list stays fixed, so that figures of different versions can be compared.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class FirstMessage(NamedTuple):
    """A message, and the regular expression that a sensible reply contains (case is ignored)."""

    text: str
    pattern: str

    def accepts(self, reply: str) -> bool:
        """Whether ``reply`` is sensible."""
        return re.search(self.pattern, reply, re.IGNORECASE) is not None


_HELLO = r"^hello\b"
_WELL = r"\bI (am|feel) well\b"
_WELCOME = r"\byou are welcome\b"
_GOODBYE = r"\bgoodbye\b"
_NAME = r"\bPip\b"
_ABILITIES = r"\bI can .*\bBelan\b"
_LIMITS = r"\bI only know about Belan\b"

FIRST_MESSAGES = (
    FirstMessage("Hello, how are you?", _WELL),
    FirstMessage("hi", _HELLO),
    FirstMessage("Hey there", _HELLO),
    FirstMessage("Good morning!", _HELLO),
    FirstMessage("How are you doing today?", _WELL),
    FirstMessage("hi, how's it going?", _WELL),
    FirstMessage("thanks", _WELCOME),
    FirstMessage("Thank you very much!", _WELCOME),
    FirstMessage("Thanks for your help", _WELCOME),
    FirstMessage("bye", _GOODBYE),
    FirstMessage("Goodbye, Pip!", _GOODBYE),
    FirstMessage("See you tomorrow", _GOODBYE),
    FirstMessage("Who are you?", _NAME),
    FirstMessage("What's your name?", _NAME),
    FirstMessage("Are you a robot?", _NAME),
    FirstMessage("Hi! Who am I talking to?", _NAME),
    FirstMessage("What can you do?", _ABILITIES),
    FirstMessage("What can I ask you?", _ABILITIES),
    FirstMessage("Can you help me?", rf"{_ABILITIES}|how can I help|what can I do for you"),
    FirstMessage("What do you know about?", rf"{_ABILITIES}|{_LIMITS}"),
    FirstMessage("What is 2 plus 2?", r"\b4\b"),
    FirstMessage("3 + 4", r"\b7\b"),
    FirstMessage("5+5", r"\b10\b"),
    FirstMessage("How much is 9 plus 8?", r"\b17\b"),
    FirstMessage("what's 6 + 1?", r"\b7\b"),
    FirstMessage("What colour is the sky?", r"\bblue\b"),
    FirstMessage("What sound does a cow make?", r"\bmoo\b"),
    FirstMessage("Tell me a joke", _LIMITS),
    FirstMessage("What is the capital of France?", _LIMITS),
    FirstMessage("Who won the world cup?", _LIMITS),
    FirstMessage("Write a poem about love", _LIMITS),
    FirstMessage("How do I cook rice?", _LIMITS),
    FirstMessage("What's the weather like today?", _LIMITS),
    FirstMessage("Who is the president of the United States?", _LIMITS),
    FirstMessage("Can you write Python code?", _LIMITS),
    FirstMessage("What is the meaning of life?", _LIMITS),
    FirstMessage("Why is the sky blue?", _LIMITS),
    FirstMessage("Do you speak Spanish?", _LIMITS),
    FirstMessage("Recommend me a good movie", _LIMITS),
    FirstMessage("Explain quantum physics", _LIMITS),
)


def plain_words(text: str) -> str:
    """The words of ``text`` in lower case without punctuation: equal for texts that only differ in these."""
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.lower()))
