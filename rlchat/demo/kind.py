"""What a kind of talk is: how its questions are asked, how complete replies sound, and what may follow.

In the templates ``{x}`` is the subject, ``{w}`` the list of its words, and ``{a}`` an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENERS = ("", "Hi! ", "Hello, Pip. ", "Excuse me. ", "I have a question. ", "Please help me. ")
CLOSERS = ("", " Do you know?", " Thanks!", " I forgot.", " I am curious.")
FOLLOW_OPENERS = ("", "Good. ", "I see. ", "Thanks! ")
CHANGE_OPENERS = (
    "Thanks! ",
    "I see. ",
    "Good to know. ",
    "Another question. ",
    "OK. ",
    "Right. ",
    "Very well. ",
    "Good answer. ",
)
"""Before a question that has nothing to do with the turn before it."""


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A question that only makes sense after the turn before it.

    It asks for ``kind``'s answer: about the subject of that turn, about its answer, or about another subject.
    """

    kind: str
    about: str  # "same", "answer" or "other"
    asks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of talk.

    ``share`` is the mean number of questions about each subject in one pass over all subjects. ``wrong_full`` holds
    complete sentences around a wrong answer where it does not fit those of a right one. Questions of a ``casual`` kind
    are sometimes typed in lower case and without punctuation. A kind that is ``reliable`` has no mistake that
    outnumbers the truth.
    """

    name: str
    asks: tuple[str, ...]  # none for what is only asked as a follow-up
    full: tuple[str, ...]  # complete replies
    follow_ups: tuple[FollowUp, ...] = ()
    always_followed: bool = False
    openers: tuple[str, ...] = OPENERS
    closers: tuple[str, ...] = CLOSERS
    wrong_full: tuple[str, ...] = ()
    share: float = 1.0
    casual: bool = False
    reliable: bool = False
    greets: bool = False  # keeps its opener in the middle of a conversation

    @property
    def names_subject(self) -> bool:
        """Whether complete replies repeat what was asked about."""
        return all("{x}" in reply for reply in self.full)
