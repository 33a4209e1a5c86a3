"""Conversations: the one currency of the program.

Readers make them, the tokenizer renders them, rewards judge them, the chat extends them. Everything here is frozen,
holds plain values, and imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who spoke, what was said, and what people thought of it.

    ``quality`` is the human label in 0..1 (None where nobody labelled it); ``rank`` is the place among the replies to
    the same message, 0 the best (None where unranked).
    """

    role: Role
    text: str
    quality: float | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """What a right reply to a prompt contains: one of ``any_of``, and none of ``none_of``.

    Matching is on whole words, without regard to case or punctuation. It measures held-out answers
    (``val/answer_accuracy``) and is never a reward.
    """

    any_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()

    def passes(self, reply: str) -> bool:
        """Whether ``reply`` holds an accepted answer and no forbidden one."""
        words = _spaced_words(reply)

        def holds(phrase: str) -> bool:
            return _spaced_words(phrase) in words

        return any(map(holds, self.any_of)) and not any(map(holds, self.none_of))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the order in which they were said.

    A *prompt* is a conversation that ends on a user message. In a prompt, ``references`` are the replies that people
    gave to it, with their labels and ranks, and ``check`` tells a right reply from a wrong one where the data carries
    that. ``tree_id`` names the tree it came from: train, validation and test are split by it. ``later`` are the prompts
    of the same conversation that came after this one, where the whole of it is to be answered.
    """

    messages: tuple[Message, ...]
    references: tuple[Message, ...] = ()
    check: Check | None = None
    tree_id: str = ""
    later: tuple[Conversation, ...] = ()

    @property
    def is_prompt(self) -> bool:
        """Whether it is the assistant's turn to speak."""
        return bool(self.messages) and self.messages[-1].role == "user"

    def say(self, role: Role, text: str) -> Conversation:
        """This conversation with one more message; what belonged to the old end (references, check) is dropped."""
        return self.with_reply(Message(role, text))

    def with_reply(self, reply: Message) -> Conversation:
        """This conversation continued by ``reply``, labels and all."""
        return replace(self, messages=(*self.messages, reply), references=(), check=None, later=())


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """Plain values that :func:`conversation_from_dict` turns back into the same conversation."""
    return {
        "messages": [_message_to_list(m) for m in conversation.messages],
        "references": [_message_to_list(m) for m in conversation.references],
        "check": None
        if conversation.check is None
        else [list(conversation.check.any_of), list(conversation.check.none_of)],
        "tree_id": conversation.tree_id,
        "later": [conversation_to_dict(prompt) for prompt in conversation.later],
    }


def conversation_from_dict(row: dict[str, Any]) -> Conversation:
    """The inverse of :func:`conversation_to_dict`."""
    check = row["check"]
    return Conversation(
        messages=tuple(Message(*m) for m in row["messages"]),
        references=tuple(Message(*m) for m in row["references"]),
        check=None if check is None else Check(tuple(check[0]), tuple(check[1])),
        tree_id=row["tree_id"],
        later=tuple(map(conversation_from_dict, row["later"])),
    )


def _message_to_list(message: Message) -> list[Any]:
    return [message.role, message.text, message.quality, message.rank]


def _spaced_words(text: str) -> str:
    """`` word word `` in lower case, so that ``in`` matches whole words; hyphens and apostrophes stay in a word."""
    words = re.findall(r"\w+(?:[-'’]\w+)*", text.lower())
    return f" {' '.join(words)} "
