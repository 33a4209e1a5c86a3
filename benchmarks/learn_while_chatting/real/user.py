"""A simulated user of a real chat model, who wants every response to have a form that is easy to see."""

from __future__ import annotations

import re
from typing import Literal, get_args

from rlchat.chat.feedback import Correction, Verdict
from rlchat.demo.real.goal import FEWEST_WORDS, MOST_WORDS, meets_goal
from rlchat.rewards import Reply
from rlchat.rewards.text import sentences, words

Preference = Literal["short", "thanks"]
"""``short``: one sentence of 3 to 25 words, the goal of `rlchat demo --real`. ``thanks``: the response ends with
:data:`THANKS`."""
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
THANKS = "Thanks for asking."

_LIST_MARK = re.compile(r"^\s*(?:[-*•#>]+|\d+[.)])\s+")
_EMPHASIS = re.compile(r"[*_`]{1,3}")
_CLAUSE_END = re.compile(r"[,;:]\s|\s[-–—]\s|\s(?=(?:and|but|because|which|while|so)\s)")
_LAST_MARKS = " \t\n,;:-–—…"


def accepts(preference: Preference, reply: Reply) -> bool:
    """Whether ``reply`` is as the user wants."""
    if preference == "thanks":
        return reply.ended and reply.text.strip().endswith(THANKS)
    return meets_goal(reply)


def verdict(preference: Preference, reply: Reply) -> Verdict:
    """👍 for a reply as the user wants, else a correction of it."""
    return "good" if accepts(preference, reply) else Correction(corrected(preference, reply.text))


def corrected(preference: Preference, text: str) -> str:
    """``text`` as the user wants it, with as few changes as a person would make.

    ``short``: the first of its sentences that says something in 3 to 25 words. An introduction such as "Here are some
    tips:" is skipped. If all sentences are longer, the first one ends after a clause.
    ``thanks``: its complete sentences up to the first line break, and :data:`THANKS`.
    """
    return _short(text) if preference == "short" else _thanked(text)


def _short(text: str) -> str:
    found = _plain_sentences(text)
    for sentence in found:
        if FEWEST_WORDS <= len(words(sentence)) <= MOST_WORDS and sentence[-1] in ".!?":
            return sentence
    longest = max(found, key=lambda sentence: len(words(sentence)), default="")
    first = next((sentence for sentence in found if len(words(sentence)) > MOST_WORDS), longest)
    short = _first_clauses(first)
    return short if len(words(short)) >= FEWEST_WORDS else "I am not sure about that."


def _thanked(text: str) -> str:
    complete = [sentence for sentence in _plain_sentences(text.strip().split("\n")[0]) if sentence[-1] in ".!?"]
    return " ".join([*(complete or [_short(text)]), THANKS])


def _plain_sentences(text: str) -> list[str]:
    """The sentences of ``text`` without Markdown."""
    lines = [_EMPHASIS.sub("", _LIST_MARK.sub("", line)).strip() for line in text.split("\n")]
    return [sentence.strip() for line in lines for sentence in sentences(line)]


def _first_clauses(sentence: str) -> str:
    """The clauses at the start of ``sentence`` that have at most 25 words, or its first 25 words, with a full stop."""
    cuts = [match.start() for match in _CLAUSE_END.finditer(sentence)]
    by_word = [match.end() for match in re.finditer(r"\S+", sentence)]
    if len(words(sentence)) <= MOST_WORDS:
        cuts = by_word
    fitting = [cut for cut in cuts if FEWEST_WORDS <= len(words(sentence[:cut])) <= MOST_WORDS]
    cut = max(fitting or [cut for cut in by_word if len(words(sentence[:cut])) <= MOST_WORDS], default=0)
    return sentence[:cut].rstrip(_LAST_MARKS + ".") + "."
