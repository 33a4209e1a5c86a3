"""Rows that are one conversation as a list of messages: OpenAI's ``messages``, ShareGPT's ``conversations``."""

from __future__ import annotations

from typing import Any, ClassVar

from rlchat.data.readers.base import Reader, Row, conversation_row
from rlchat.data.readers.turns import message_list

WHOLE_ROW = frozenset({"quality", "label", "system", "weight", "loss_weight", "train"})


class MessagesReader(Reader):
    """``{"messages": [{"role": "user", "content": …}, …]}``, or with ``from`` and ``value``."""

    name = "messages"
    required = frozenset({"messages"})
    optional = WHOLE_ROW
    # Copies of parts of the messages, in UltraChat and others.
    ignored = frozenset({"prompt", "prompt_id"})
    key: ClassVar[str] = "messages"

    def read(self, row: dict[str, Any]) -> Row:
        turns = message_list(row[self.key], self.key, row)
        return conversation_row(turns.messages, turns.checks, turns.notes)


class ShareGPTReader(MessagesReader):
    """``{"conversations": [{"from": "human", "value": …}, …]}``."""

    name = "conversations"
    required = frozenset({"conversations"})
    ignored = frozenset()
    key = "conversations"
