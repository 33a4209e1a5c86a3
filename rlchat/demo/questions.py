"""Which questions the demo's conversations ask: every question that stands on its own is asked only once."""

from __future__ import annotations

import random
import re
from collections import deque
from typing import NamedTuple

from rlchat.demo.first_messages import FIRST_MESSAGES, plain_words
from rlchat.demo.kind import CHANGE_OPENERS, Kind
from rlchat.demo.kinds import KINDS, OUTSIDE
from rlchat.demo.outside import outside_prompts
from rlchat.demo.world import World

OUTSIDE_PER_PASS = 28
"""Prompts about the outside world in one pass over all subjects."""

CASUAL = 0.25
"""The share of questions of a casual kind that are typed in lower case without punctuation."""


class Question(NamedTuple):
    """A question that stands on its own: ``text`` is ``opener`` + the question."""

    kind: Kind
    subject: str
    text: str
    opener: str

    def after_another(self) -> str:
        """The text of the same question in the middle of a conversation, where few people say hello again.

        Each opener becomes another one, so that different texts stay different. Greetings stay as they are.
        """
        if not self.opener or self.kind.greets:
            return self.text
        question = self.text[len(self.opener) :]
        changed = CHANGE_OPENERS[self.kind.openers.index(self.opener) - 1]  # the first opener is the empty one
        if self.text[:1].islower():
            return changed.lower() + question
        return changed + question[:1].upper() + question[1:]


class Questions:
    """Draws questions, no text twice; each pass asks about every subject of every kind, in random order.

    Prompts that equal a first message of :mod:`rlchat.demo.first_messages`, case and punctuation aside, are left out.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self._rng = rng
        self._taken = {plain_words(message.text) for message in FIRST_MESSAGES}
        self._pools: dict[tuple[str, str], list[Question]] = {}
        self._kinds = {kind.name: kind for kind in KINDS}
        self._pass: deque[Question] = deque()
        seen: set[str] = set()
        for kind in KINDS:
            for subject in world[kind.name]:
                self._pools[kind.name, subject] = self._phrasings(kind, subject, seen)

    def draw(self) -> Question | None:
        """The next question, or None when all have been asked."""
        if not self._pass:
            self._pass.extend(self._new_pass())
        return self._pass.popleft() if self._pass else None

    def _new_pass(self) -> list[Question]:
        """One pass over all subjects; empty only when every pool is."""
        drawn: list[Question] = []
        while not drawn and any(self._pools.values()):
            for (name, _), pool in self._pools.items():
                share = OUTSIDE_PER_PASS if name == OUTSIDE.name else self._kinds[name].share
                times = int(share) + (self._rng.random() < share % 1)
                drawn += [pool.pop() for _ in range(min(times, len(pool)))]
        self._rng.shuffle(drawn)
        return drawn

    def _phrasings(self, kind: Kind, subject: str, seen: set[str]) -> list[Question]:
        """Ways to ask ``kind`` about ``subject`` that are not in ``seen``, in random order; adds them to ``seen``."""
        asks = outside_prompts(self._rng) if kind is OUTSIDE else [fill(ask, subject) for ask in kind.asks]
        questions = [
            Question(kind, subject, text, opener)
            for opener in kind.openers
            for ask in asks
            for closer in kind.closers
            for text in [self._typed(joined(opener, ask + closer), kind)]
        ]
        self._rng.shuffle(questions)
        fresh = []
        for question in questions:
            if question.text not in seen and plain_words(question.text) not in self._taken:
                seen.add(question.text)
                fresh.append(question)
        return fresh

    def _typed(self, text: str, kind: Kind) -> str:
        casual = kind.casual and self._rng.random() < CASUAL
        return text.lower().rstrip("?!. ") if casual else text


def joined(opener: str, text: str) -> str:
    """``opener`` and ``text`` as one; after a comma, the text goes on in lower case, except for names and "I"."""
    if opener.endswith(", ") and not text.startswith(("I ", "Pip")):
        return opener + text[:1].lower() + text[1:]
    return opener + text


def fill(template: str, subject: str, answer: str = "") -> str:
    """The template with its gaps filled, beginning with a capital letter; "a" becomes "an" before a vowel."""
    text = template.format(x=subject, w=subject.split(), a=answer)
    text = re.sub(r"\b([Aa]) (?=[AEIOUaeiou])", r"\1n ", text)
    return text[:1].upper() + text[1:]
