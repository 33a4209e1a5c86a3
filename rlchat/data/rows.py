"""Rows that are one conversation, or the two of a preference pair: what their fields say, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlchat.conversation import Check, Conversation, Message, Role
from rlchat.data.fields import MAX_MESSAGES, check_field, quality_field, role_field, shown, text_field
from rlchat.data.jsonl import BadLineError

_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_HH_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair. ``flaw`` is the reason not to learn from it, as the report names it, None where it is sound.

    ``prompt`` has the replies as references, ranked 0 and 1, where they are a sound pair. It is None where the two
    conversations share none that could be replied to.
    """

    prompt: Conversation | None
    flaw: str | None


def messages_row(row: dict[str, Any]) -> tuple[tuple[Message, ...], list[Conversation]]:
    """The messages of a ``messages`` row, and its prompts: each beginning that ends on a user message."""
    messages, checks = _messages(row["messages"], quality_field(row.get("quality")))
    if all(message.role == "system" for message in messages):
        raise BadLineError("no user or assistant message")
    prompts = []
    for i, message in enumerate(messages):
        if message.role == "user":
            reply = messages[i + 1 : i + 2]
            references = reply if reply and reply[0].role == "assistant" else ()
            prompts.append(Conversation(messages[: i + 1], references, checks[i]))
    return messages, prompts


def prompt_row(row: dict[str, Any]) -> Conversation:
    """The ``prompt`` of a row, one text or a list of messages, with the check of the row or of its last message."""
    if not isinstance(row["prompt"], list):
        return Conversation((Message("user", text_field(row["prompt"], "prompt")),), (), check_field(row.get("check")))
    messages, checks = _messages(row["prompt"], None)
    if messages[-1].role != "user":
        raise BadLineError("prompt does not end on a user message")
    return Conversation(messages, (), check_field(row.get("check")) or checks[-1])


def text_row(row: dict[str, Any]) -> Message:
    """The lone response of a ``text`` row."""
    return Message("assistant", text_field(row["text"], "text"), quality_field(row.get("quality")))


def pair_row(row: dict[str, Any]) -> Pair:
    """A pair of replies beside their prompt."""
    prompt = prompt_row(row)
    chosen = text_field(row["chosen"], "chosen", may_be_empty=True)
    rejected = text_field(row["rejected"], "rejected", may_be_empty=True)
    return _pair(prompt.messages, chosen, rejected, prompt.check)


def hh_pair_row(row: dict[str, Any]) -> Pair:
    """A pair of hh-rlhf: two conversations that differ in the last reply."""
    chosen = _hh_turns(text_field(row["chosen"], "chosen"), "chosen")
    rejected = _hh_turns(text_field(row["rejected"], "rejected"), "rejected")
    # One speaker's turns in a row are one, so what stands before the last reply ends on Human, or is nothing.
    messages, others = (turns if turns[-1].role == "user" else turns[:-1] for turns in (chosen, rejected))
    prompt = None
    if messages and messages == others and all(turn.text for turn in messages):
        prompt = Conversation(messages)
    if chosen == rejected:
        return Pair(prompt, "identical pairs")
    if "user" in (chosen[-1].role, rejected[-1].role):
        return Pair(prompt, "pairs that end on Human")
    if messages != others:
        return Pair(None, "pairs that differ before the last reply")
    if any(not turn.text for turn in messages):
        return Pair(None, "pairs with an empty turn in the prompt")
    if not messages:
        raise BadLineError("chosen and rejected share no Human turn")
    return _pair(messages, chosen[-1].text, rejected[-1].text, None)


def _pair(messages: tuple[Message, ...], chosen: str, rejected: str, check: Check | None) -> Pair:
    if chosen.strip() == rejected.strip():
        return Pair(Conversation(messages, (), check), "identical pairs")
    if not chosen.strip() or not rejected.strip():
        return Pair(Conversation(messages, (), check), "pairs with an empty reply")
    replies = Message("assistant", chosen, rank=0), Message("assistant", rejected, rank=1)
    return Pair(Conversation(messages, replies, check), None)


def _messages(rows: object, quality: float | None) -> tuple[tuple[Message, ...], list[Check | None]]:
    """The messages of a list of ``{content, role, quality, check}``, all but content optional, and their checks."""
    if not isinstance(rows, list) or not rows:
        raise BadLineError("messages is not a list with a message in it")
    if len(rows) > MAX_MESSAGES:
        raise BadLineError(f"{len(rows):,} messages in one conversation, more than {MAX_MESSAGES:,}")
    messages: list[Message] = []
    checks: list[Check | None] = []
    speaker: Role = "assistant"
    for row in rows:
        if not isinstance(row, dict):
            raise BadLineError(f"a message is not an object but {shown(row)}")
        role: Role = "assistant" if speaker == "user" else "user"
        if row.get("role") is not None:
            role = role_field(row["role"])
        if role != "system":
            speaker = role
        own = quality_field(row.get("quality"))
        if own is None and role == "assistant":
            own = quality
        messages.append(Message(role, text_field(row.get("content"), "content"), own))
        checks.append(check_field(row.get("check")) if role == "user" else None)
    return tuple(messages), checks


def _hh_turns(text: str, name: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf conversation; one speaker's turns in a row (a marker said twice) are one."""
    before, *pieces = _HH_MARKER.split(text)
    if before.strip() or not pieces:
        raise BadLineError(f"{name} does not begin with Human: or Assistant:, and there is no prompt beside it")
    turns: list[Message] = []
    for marker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = _HH_ROLES[marker]
        said = said.strip()
        if turns and turns[-1].role == role:
            said = "\n\n".join(part for part in (turns.pop().text, said) if part)
        turns.append(Message(role, said))
    if len(turns) > MAX_MESSAGES:
        raise BadLineError(f"{len(turns):,} turns in {name}, more than {MAX_MESSAGES:,}")
    return tuple(turns)
