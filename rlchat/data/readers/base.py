"""The interface of the readers of file formats.

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
    """Options of reading. ``any_state`` keeps OASST trees that were not exported or reviewed, for prediction.

    ``split_text`` splits ``text`` rows with chat markup into turns.
    """

    lang: str | None = None
    keep_synthetic: bool = False
    any_state: bool = False
    split_text: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The content of one row of a file, in any format.

    Attributes:
        opening: the messages that determine the tree: rows with the same first user message are one tree.
        threads: conversations to imitate, each ending with an assistant message.
        prompts: conversations to answer, each ending with a user message. For a response without a prompt, there is one
            without messages, with the response as its only reference.
        prompt: the prompt to answer if the file is used as a file of prompts; None if the row has none.
        flaw: why the row cannot be trained on, as a plural noun for the report; None if it can.
        message_ids: the ids of the messages of a row that is linked to others; :meth:`Reader.linked` returns the rest.
        notes: warnings about rows like this one; each is reported once, with the number of rows.
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
    """A tree that consists of several rows.

    ``threads`` end with an assistant message, and none is a prefix of another. ``prompts`` end with a user message and
    are keyed by the id of that message, with the responses to it as references.
    """

    id: str
    threads: list[Conversation]
    prompts: dict[str, Conversation]


class Reader(abc.ABC):
    """Reads the rows of one format. One instance reads all files of a run.

    Class attributes:
        name: the name of the format in errors.
        required: keys that must be present and not null; they identify the format.
        optional: further keys that the reader uses.
        ignored: keys that have no effect and are not reported, for example copies of others.
        priority: readers with a higher priority are tried first, then those that require more keys.
    """

    name: ClassVar[str]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    ignored: ClassVar[frozenset[str]] = frozenset()
    priority: ClassVar[int] = 0

    def __init__(self, options: ReadOptions, dropped: Counter[str]) -> None:
        self.options = options
        self.dropped = dropped  # the reason for leaving something out, as a plural noun → how often

    @classmethod
    def recognises(cls, row: dict[str, Any]) -> bool:
        """Whether ``row`` has the keys of this format."""
        return all(row.get(key) is not None for key in cls.required)

    @abc.abstractmethod
    def read(self, row: dict[str, Any]) -> Row:
        """The content of ``row``. Raises :class:`BadLineError` if it is invalid; then nothing of it is kept."""

    def linked(self) -> list[LinkedTree]:
        """The trees of rows that are linked to each other. Called once, after the last row."""
        return []


def conversation_row(
    messages: tuple[Message, ...], checks: Iterable[Check | None] = (), notes: Iterable[str] = ()
) -> Row:
    """A row that is one conversation: a thread up to the last assistant message, a prompt up to each user message.

    The assistant message after a prompt is its reference, unless it is excluded from training.
    ``checks`` has one entry per message, or is empty.

    Raises:
        BadLineError: there is no user or assistant message.
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
