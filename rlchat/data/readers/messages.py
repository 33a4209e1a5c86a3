"""Rows that are one conversation as a list of messages: OpenAI's ``messages``, ShareGPT's ``conversations``."""

from __future__ import annotations

from typing import Any, ClassVar

from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import Reader, Row, conversation_row
from rlchat.data.readers.fields import row_check
from rlchat.data.readers.turns import message_list

CHECKED = frozenset({"answer", "check"})
WHOLE_ROW = frozenset({"quality", "label", "system", "weight", "loss_weight", "train", "loss_mask"}) | CHECKED


class MessagesReader(Reader):
    """``{"messages": [{"role": "user", "content": …}, …]}``, or with ``from`` and ``value``.

    An ``answer`` or a ``check`` of the row belongs to the last user message.
    """

    name = "messages"
    required = frozenset({"messages"})
    optional = WHOLE_ROW
    # Copies of parts of the messages, in UltraChat and others.
    ignored = frozenset({"prompt", "prompt_id"})
    key: ClassVar[str] = "messages"

    def read(self, row: dict[str, Any]) -> Row:
        turns = message_list(row[self.key], self.key, row)
        checks = list(turns.checks)
        if (check := row_check(row)) is not None:
            users = [i for i, message in enumerate(turns.messages) if message.role == "user"]
            if not users:
                raise BadLineError("answer or check without a user message")
            checks[users[-1]] = check
        return conversation_row(turns.messages, checks, turns.notes)


class ShareGPTReader(MessagesReader):
    """``{"conversations": [{"from": "human", "value": …}, …]}``."""

    name = "conversations"
    required = frozenset({"conversations"})
    ignored = frozenset()
    key = "conversations"
