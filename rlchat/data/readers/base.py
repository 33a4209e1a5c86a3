"""What a reader of a file format is, and what it makes of a row.

A format is one module in this folder with a subclass of :class:`Reader`; nothing else has to change::

    class QuestionReader(Reader):
        name = "question and answer"
        required = frozenset({"question", "answer"})

        def read(self, row: dict[str, Any]) -> Row:
            question, answer = (text_field(row[key], key) for key in ("question", "answer"))
            return conversation_row((Message("user", question), Message("assistant", answer)))
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.jsonl import BadLineError


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user asked for. ``any_state`` keeps OASST trees that were not exported or reviewed, for prediction.

    ``split_text`` splits ``text`` rows that hold the markup of a chat into turns.
    """

    lang: str | None = None
    keep_synthetic: bool = False
    any_state: bool = False
    split_text: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a file holds, in any format.

    Attributes:
        opening: the messages that decide the tree: rows with the same first user message are one tree.
        threads: conversations to imitate, each ending on an assistant message.
        prompts: conversations to answer, each ending on a user message. A lone response is one without messages and
            with the response as its only reference.
        prompt: the one to answer if the file is one of prompts; None if the row has none.
        flaw: why the row cannot be learned from, in the plural, for the report; None if it can.
        message_ids: of a row that is linked to others: the ids of its messages. :meth:`Reader.linked` gives the rest.
        notes: what the user should know of rows like this one; each is reported once with the number of rows.
    """

    opening: tuple[Message, ...] = ()
    threads: tuple[Conversation, ...] = ()
    prompts: tuple[Conversation, ...] = ()
    prompt: Conversation | None = None
    flaw: str | None = None
    message_ids: tuple[str, ...] = ()
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LinkedTree:
    """A tree that several rows make up.

    ``threads`` end on an assistant message, and none is the beginning of another. ``prompts`` end on a user message and
    are keyed by the id of that message, with the responses to it as references.
    """

    id: str
    threads: list[Conversation]
    prompts: dict[str, Conversation]


class Reader(abc.ABC):
    """Reads the rows of one format. One instance reads all files of a run.

    Class attributes:
        name: what the format is called in errors.
        required: keys of which none may be missing or null; they identify the format.
        optional: further keys that the reader understands.
        ignored: keys that have no influence and are not worth a word, such as copies of others.
        priority: readers of higher priority are asked first, then those that require more keys.
    """

    name: ClassVar[str]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    ignored: ClassVar[frozenset[str]] = frozenset()
    priority: ClassVar[int] = 0

    def __init__(self, options: ReadOptions, dropped: Counter[str]) -> None:
        self.options = options
        self.dropped = dropped  # why something was left out, in the plural → how often

    @classmethod
    def recognises(cls, row: dict[str, Any]) -> bool:
        """Whether the keys of ``row`` say that it is of this format."""
        return all(row.get(key) is not None for key in cls.required)

    @abc.abstractmethod
    def read(self, row: dict[str, Any]) -> Row:
        """What ``row`` holds. Raises :class:`BadLineError` if it cannot be used, having kept nothing of it."""

    def linked(self) -> list[LinkedTree]:
        """The trees of rows that are linked to one another. Called once, after the last row."""
        return []


def conversation_row(
    messages: tuple[Message, ...], checks: Iterable[Check | None] = (), notes: Iterable[str] = ()
) -> Row:
    """A row that is one conversation: a thread up to the last assistant message, a prompt up to each user message.

    The assistant message behind a prompt is its reference, unless it is not to be learned.
    ``checks`` belong to ``messages``, one each, or are absent.

    Raises:
        BadLineError: neither a user nor an assistant speaks.
    """
    if all(message.role == "system" for message in messages):
        raise BadLineError("no user or assistant message")
    check_of = dict(enumerate(checks))
    prompts = []
    for i, message in enumerate(messages):
        if message.role == "user":
            references = tuple(m for m in messages[i + 1 : i + 2] if m.role == "assistant" and m.learn)
            prompts.append(Conversation(messages[: i + 1], references, check_of.get(i)))
    end = max((i for i, message in enumerate(messages, 1) if message.role == "assistant" and message.learn), default=0)
    threads = (Conversation(messages[:end]),) if end else ()
    return Row(messages, threads, tuple(prompts), prompts[-1] if prompts else None, notes=frozenset(notes))
