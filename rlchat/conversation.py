"""Conversations and messages: the data types that all packages share.

Readers create them, the tokenizer renders them, rewards score them, the chat extends them. All types are frozen,
contain plain values, and import nothing large.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

CheckKind = Literal["contains", "exact", "number", "regex"]
CHECK_KINDS: tuple[CheckKind, ...] = ("contains", "exact", "number", "regex")

REGEX_SECONDS = 1.0
"""The processor time that one search for a regular expression may take. Most need a millionth of it."""

# A sign counts unless it follows a word or a number, as in "3-4". Commas group thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+−])?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


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

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles in less than half of the time of what dataclass generates for frozen classes with slots.
        return Message, (self.role, self.text, self.quality, self.rank, self.learn)


@dataclass(frozen=True, slots=True)
class Check:
    """How to tell a correct response to a prompt: it matches one of ``any_of`` and none of ``none_of``.

    The check measures answers to held-out prompts (``val/answer_accuracy``). With the factor
    :class:`rlchat.rewards.Verified`, it also rewards answers to training prompts.

    Attributes:
        any_of: the accepted answers.
        none_of: the forbidden ones.
        kind: how an answer matches a response. ``contains``: the response contains its words, in their order and
            whole; case and punctuation do not count. ``exact``: it is the response, apart from case, white space and a
            final full stop. ``number``: it is the last number in the response. ``regex``: it is a regular expression
            of the package regex that matches somewhere in the response.
        tolerance: of ``number``: the largest difference that counts as equal.
    """

    any_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()
    kind: CheckKind = "contains"
    tolerance: float = 0.0

    def passes(self, reply: str) -> bool:
        """Whether ``reply`` matches an accepted answer and no forbidden one.

        Raises TimeoutError with the pattern if the search for a regular expression takes :data:`REGEX_SECONDS`. Only
        such a search can fail; see :meth:`Conversation.passes`.
        """
        return any(self._matches(answer, reply) for answer in self.any_of) and not any(
            self._matches(answer, reply) for answer in self.none_of
        )

    def _matches(self, answer: str, reply: str) -> bool:
        if self.kind == "contains":
            return spaced_words(answer) in spaced_words(reply)
        if self.kind == "exact":
            return _normalized(reply) == _normalized(answer)
        if self.kind == "number":
            last, expected = next(iter(numbers_in(reply)[-1:]), None), numbers_in(answer)[0]
            # Beside the tolerance, a difference that floating-point rounding explains.
            return last is not None and abs(last - expected) <= self.tolerance + 1e-9 * abs(expected)
        import regex  # re cannot stop a search, and nested repetition such as (a|aa)+$ may take years

        try:
            return regex.search(escape_braces(answer), reply, timeout=REGEX_SECONDS) is not None
        except TimeoutError:
            raise TimeoutError(answer) from None


def escape_braces(pattern: str) -> str:
    """``pattern`` of :mod:`re` for the package ``regex``, in which ``{e}`` is not text but allows for errors.

    A brace stays if it begins a repetition, or is escaped, part of a name (``\\N{DASH}``), or in a set. Examples:
    ``x{e}`` becomes ``x\\{e}``, and ``a{2,3}``, ``[{e}]`` and ``\\{e}`` stay.
    """
    return re.sub(
        r"(\\N\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?:\d+(?:,\d*)?|,\d+)\})|\{",
        lambda found: found[1] or r"\{",
        pattern,
        flags=re.DOTALL,
    )


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

    def __reduce__(self) -> tuple[Any, ...]:
        return Conversation, (self.messages, self.references, self.check, self.tree_id, self.later)

    @property
    def is_prompt(self) -> bool:
        """Whether the assistant speaks next."""
        return bool(self.messages) and self.messages[-1].role == "user"

    def passes(self, reply: str) -> bool | None:
        """Whether ``reply`` passes the check of this prompt; None if there is no check.

        A search for a regular expression that takes :data:`REGEX_SECONDS` of processor time is given up. Then ``reply``
        does not pass, whether the pattern is accepted or forbidden, and a warning names the pattern and the prompt.
        """
        if self.check is None:
            return None
        try:
            return self.check.passes(reply)
        except TimeoutError as error:
            # Python shows a warning once for each text.
            warnings.warn(
                f"the check {str(error)!r} of the prompt {self.messages[-1].text[:60]!r} took more than "
                f"{REGEX_SECONDS:g} s on a response, which therefore does not pass; rewrite the pattern without "
                f"alternatives or repetitions inside a repetition",
                stacklevel=1,
            )
            return False

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
        else [
            list(conversation.check.any_of),
            list(conversation.check.none_of),
            conversation.check.kind,
            conversation.check.tolerance,
        ],
        "tree_id": conversation.tree_id,
        "later": [conversation_to_dict(prompt) for prompt in conversation.later],
    }


def conversation_from_dict(row: dict[str, Any]) -> Conversation:
    """The inverse of :func:`conversation_to_dict`."""
    check = row["check"]
    return Conversation(
        messages=tuple(Message(*m) for m in row["messages"]),
        references=tuple(Message(*m) for m in row["references"]),
        check=None if check is None else Check(tuple(check[0]), tuple(check[1]), *check[2:]),
        tree_id=row["tree_id"],
        later=tuple(map(conversation_from_dict, row["later"])),
    )


def message_to_list(message: Message) -> list[Any]:
    """Plain values such that ``Message(*values)`` is the same message."""
    return [message.role, message.text, message.quality, message.rank, message.learn]


def messages_id(messages: Sequence[Sequence[str]]) -> str:
    """Names a list of (role, text): 12 hexadecimal digits, the same in every process."""
    return hashlib.blake2b(json.dumps([*map(list, messages)]).encode(), digest_size=6).hexdigest()


def numbers_in(text: str) -> list[float]:
    """The decimal numbers in ``text``, such as ``-3``, ``1,000``, ``.5`` and ``2e3``, in their order."""
    return [float(found.replace(",", "").replace("−", "-")) for found in _NUMBER.findall(text)]


def is_number(text: str) -> bool:
    """Whether ``text`` is one number and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def _normalized(text: str) -> str:
    """``text`` in lower case, without a final full stop, repeated spaces and white space around it."""
    return " ".join(text.casefold().split()).removesuffix(".")


def spaced_words(text: str) -> str:
    """`` word word `` in lower case, so that ``in`` matches whole words. Hyphens and apostrophes are part of a word."""
    words = re.findall(r"\w+(?:[-'’]\w+)*", text.lower())
    return f" {' '.join(words)} "
