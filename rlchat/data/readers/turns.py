"""Reads the messages in a row: lists of objects, and text with speaker names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rlchat.conversation import Check, Message, Role
from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.fields import (
    MAX_MESSAGES,
    content_field,
    learn_field,
    quality_field,
    role_field,
    row_check,
    row_quality,
    shown,
    text_field,
    unread_weights,
)

_READ_KEYS = frozenset(
    {
        "role",
        "from",
        "content",
        "value",
        "quality",
        "check",
        "answer",
        "weight",
        "loss_weight",
        "train",
        "loss_mask",
        "id",
        "name",
        "refusal",
        "annotations",
    }
)
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_HH_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages, the check of each, and notes for the report."""

    messages: tuple[Message, ...]
    checks: tuple[Check | None, ...]
    notes: frozenset[str] = frozenset()


def note_of_unread(key: str) -> str:
    """The warning about a key that no reader supports."""
    return f"`{key}`, which is not supported"


def message_list(rows: object, name: str = "messages", row: dict[str, Any] | None = None) -> Turns:
    """The messages of a list of objects: OpenAI's layout (``role``, ``content``) or ShareGPT's (``from``, ``value``).

    Without roles, the speakers alternate, starting with the user. ``quality``, ``answer``, ``check``, ``weight`` and
    ``train`` are optional. ``row`` is the row that contains the list; its ``quality`` (or KTO ``label``), ``system``
    and ``weight`` apply to all messages without such a key.
    """
    if not isinstance(rows, list) or not rows:
        raise BadLineError(f"{name} is not a non-empty list of messages")
    if len(rows) > MAX_MESSAGES:
        raise BadLineError(f"{len(rows):,} messages in one conversation, more than {MAX_MESSAGES:,}")
    messages: list[Message] = []
    checks: list[Check | None] = []
    notes: set[str] = set()
    speaker: Role = "assistant"
    for entry in rows:
        if not isinstance(entry, dict):
            raise BadLineError(f"a message is not an object: got {shown(entry)}")
        role: Role = "assistant" if speaker == "user" else "user"
        if (named := _either(entry, "role", "from")) is not None:
            role = role_field(named)
        if role != "system":
            speaker = role
        if entry.get("tool_calls") or entry.get("function_call"):
            raise BadLineError("a message with tool_calls is not supported: tool calls cannot be trained on")
        content = content_field(_either(entry, "content", "value"), "value" if "value" in entry else "content")
        messages.append(Message(role, content, quality_field(entry.get("quality")), learn=learn_field(entry)))
        checks.append(row_check(entry) if role == "user" else None)
        notes |= {note_of_unread(f"{name}[].{key}") for key in _unread(entry)}
    turns = Turns(tuple(messages), tuple(checks), frozenset(notes))
    return turns if row is None else for_whole_row(turns, row)


def for_whole_row(turns: Turns, row: dict[str, Any]) -> Turns:
    """``turns`` with the keys of ``row`` applied to all of them: ``quality``, ``label``, ``weight``, ``system``."""
    quality, learn = row_quality(row), learn_field(row)
    messages = tuple(
        replace(m, quality=quality if m.quality is None else m.quality, learn=m.learn and learn)
        if m.role == "assistant"
        else m
        for m in turns.messages
    )
    checks = turns.checks
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0].role != "system":
        messages, checks = (Message("system", text_field(row["system"], "system")), *messages), (None, *checks)
    return Turns(messages, checks, turns.notes | notes_of_row(row))


def notes_of_row(row: dict[str, Any]) -> frozenset[str]:
    """The warnings about a weight or a label of the whole ``row`` whose value is not supported."""
    notes = {note_of_unread(f"{key} other than 0 and 1") for key in unread_weights(row)}
    if row.get("label") is not None and not isinstance(row["label"], bool):
        notes.add(note_of_unread("label"))
    return frozenset(notes)


def _either(row: dict[str, Any], key: str, other: str) -> Any:
    return row.get(key) if row.get(key) is not None else row.get(other)


def _unread(entry: dict[str, Any]) -> set[str]:
    named = {key for key, value in entry.items() if value not in (None, "", [], {}) and key not in _READ_KEYS}
    return named | {f"{key} other than 0 and 1" for key in unread_weights(entry)}


def is_hh_text(text: object) -> bool:
    """Whether ``text`` is a conversation as hh-rlhf writes it: ``\\n\\nHuman: …\\n\\nAssistant: …``."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def hh_turns(text: str, name: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf conversation. Consecutive turns of one speaker are joined."""
    before, *pieces = _HH_MARKER.split(text)
    if before.strip() or not pieces:
        raise BadLineError(f"{name} does not begin with Human: or Assistant:, and the row has no prompt")
    roles = (_HH_ROLES[marker] for marker in pieces[::2])
    return joined_turns(zip(roles, pieces[1::2], strict=True), name)


def joined_turns(pieces: Iterable[tuple[Role, str]], name: str) -> tuple[Message, ...]:
    """(speaker, text) as messages, without white space around a text. Consecutive turns of one speaker are joined."""
    turns: list[Message] = []
    for role, text in pieces:
        text = text.strip()
        if turns and turns[-1].role == role:
            text = "\n\n".join(part for part in (turns.pop().text, text) if part)
        turns.append(Message(role, text))
    if len(turns) > MAX_MESSAGES:
        raise BadLineError(f"{len(turns):,} turns in {name}, more than {MAX_MESSAGES:,}")
    return tuple(turns)
