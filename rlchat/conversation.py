"""Conversations and messages: the data types that all packages share.

Readers create them, the tokenizer renders them, rewards score them, the chat extends them. All types are frozen,
contain plain values, and import nothing large.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, with its human labels.

    Attributes:
        role: the speaker.
        text: the content.
        quality: the human label in 0..1; None if there is none.
        rank: the rank among the responses to the same message, 0 for the best; None if unranked.
        learn: False if SFT must not train on this message and only uses it as context.
    """

    role: Role
    text: str
    quality: float | None = None
    rank: int | None = None
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Check:
    """What a correct response to a prompt contains: one of ``any_of``, and none of ``none_of``.

    Whole words are matched, ignoring case and punctuation. The check measures held-out answers
    (``val/answer_accuracy``) and is never a reward.
    """

    any_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()

    def passes(self, reply: str) -> bool:
        """Whether ``reply`` contains an accepted answer and no forbidden one."""
        words = _spaced_words(reply)

        def holds(phrase: str) -> bool:
            return _spaced_words(phrase) in words

        return any(map(holds, self.any_of)) and not any(map(holds, self.none_of))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order.

    A *prompt* is a conversation that ends with a user message.

    Attributes:
        messages: the turns.
        references: of a prompt: the human responses to it, with labels and ranks.
        check: of a prompt: what identifies a correct response, if the data contains it.
        tree_id: the tree that it belongs to; training, validation and test split by tree.
        later: of the first prompt of a conversation in which the policy answers several turns: its later prompts.
    """

    messages: tuple[Message, ...]
    references: tuple[Message, ...] = ()
    check: Check | None = None
    tree_id: str = ""
    later: tuple[Conversation, ...] = ()

    @property
    def is_prompt(self) -> bool:
        """Whether the assistant speaks next."""
        return bool(self.messages) and self.messages[-1].role == "user"

    def say(self, role: Role, text: str) -> Conversation:
        """This conversation with one more message, without the references and the check of its last message."""
        return self.with_reply(Message(role, text))

    def with_reply(self, reply: Message) -> Conversation:
        """This conversation continued by ``reply`` with its labels."""
        return replace(self, messages=(*self.messages, reply), references=(), check=None, later=())


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """Plain values from which :func:`conversation_from_dict` restores the same conversation."""
    return {
        "messages": [message_to_list(m) for m in conversation.messages],
        "references": [message_to_list(m) for m in conversation.references],
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


def message_to_list(message: Message) -> list[Any]:
    """Plain values such that ``Message(*values)`` is the same message."""
    return [message.role, message.text, message.quality, message.rank, message.learn]


def _spaced_words(text: str) -> str:
    """`` word word `` in lower case, so that ``in`` matches whole words. Hyphens and apostrophes are part of a word."""
    words = re.findall(r"\w+(?:[-'’]\w+)*", text.lower())
    return f" {' '.join(words)} "
