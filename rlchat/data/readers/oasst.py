"""OASST: trees of messages, in both file layouts.

A row of the trees layout nests all its messages under ``prompt``. A row of the messages layout is one message, linked
to another by ``parent_id``, in any order and any file, or with its own ``replies`` nested. Both have the same fields.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import LinkedTree, Reader, ReadOptions, Row
from rlchat.data.readers.fields import (
    MAX_MESSAGES,
    check_field,
    id_field,
    learn_field,
    optional_field,
    quality_field,
    role_field,
    shown,
    text_field,
)


@dataclass(slots=True)
class _Node:
    """A message that is not linked yet. ``unusable`` is the reason for dropping it, as a plural noun for the report."""

    id: str
    parent_id: str | None
    tree_id: str
    message: Message
    check: Check | None
    unusable: str | None
    rejected_as_root: str | None
    children: list[_Node] = field(default_factory=list)


class OasstReader(Reader):
    """Links the messages of all rows, and selects as the official loader does (``oasst_data`` in Open-Assistant).

    A tree is kept if it was exported, its prompt was reviewed positively, and its prompt is in ``lang`` (None: any
    language). With ``any_state``, export and review do not matter. A message is dropped if it is deleted, empty or,
    without ``keep_synthetic``, synthetic. Everything below it is dropped too. A missing key excludes nothing.
    """

    name = "OASST message"
    required = frozenset({"message_id"})
    optional = frozenset(
        {
            "prompt",
            "parent_id",
            "message_tree_id",
            "tree_state",
            "text",
            "role",
            "lang",
            "review_result",
            "deleted",
            "rank",
            "synthetic",
            "labels",
            "replies",
            "check",
            "weight",
            "loss_weight",
            "train",
        }
    )
    ignored = frozenset(
        {
            "user_id",
            "created_date",
            "review_count",
            "model_name",
            "detoxify",
            "emojis",
            "origin",
            "feedback_id",
            "model_id",
            "client",
            "verdict",
        }
    )
    priority = 2

    def __init__(self, options: ReadOptions, dropped: Counter[str]) -> None:
        super().__init__(options, dropped)
        self.nodes: dict[str, _Node] = {}

    @classmethod
    def recognises(cls, row: dict[str, Any]) -> bool:
        return isinstance(row.get("prompt"), dict) or "message_id" in row or "parent_id" in row

    def read(self, row: dict[str, Any]) -> Row:
        """The ids of the messages in ``row``, without those that occurred in an earlier row."""
        root = row["prompt"] if isinstance(row.get("prompt"), dict) else row
        tree_id = id_field(row, "message_tree_id")
        tree_state = optional_field(row, "tree_state", str) if "tree_state" in row else "ready_for_export"
        root_id = id_field(root, "message_id") or tree_id
        if not root_id:
            raise BadLineError("an OASST message without message_id")
        text_field(tree_id or root_id, "message_tree_id")
        found: list[_Node] = []
        parent_id = None if root is not row else id_field(root, "parent_id")
        stack: list[tuple[Any, str, str | None]] = [(root, root_id, parent_id)]
        while stack:
            message_row, message_id, parent_id = stack.pop()
            if not isinstance(message_row, dict):
                raise BadLineError(f"a reply is not an object: got {shown(message_row)}")
            exported = tree_state == "ready_for_export"
            found.append(self._node(message_row, message_id, parent_id, tree_id or root_id, exported))
            replies = optional_field(message_row, "replies", list) or []
            for i, reply in reversed(list(enumerate(replies))):
                reply_id = id_field(reply, "message_id") if isinstance(reply, dict) else None
                stack.append((reply, reply_id or f"{message_id}/{i}", message_id))
        new = [node.id for node in found if self.nodes.setdefault(node.id, node) is node]
        self._drop("duplicate messages", len(found) - len(new))
        return Row(message_ids=tuple(new))

    def linked(self) -> list[LinkedTree]:
        roots = []
        for node in self.nodes.values():
            if node.parent_id is None:
                roots.append(node)
            elif node.parent_id in self.nodes:
                self.nodes[node.parent_id].children.append(node)
        trees = [self._tree(root) for root in roots]
        # The other messages are below a message that is in no file, or form a cycle.
        self._drop("messages that lead to no root", len(self.nodes) - sum(map(_size, roots)))
        return [tree for tree in trees if tree.threads or tree.prompts]

    def _drop(self, reason: str, number: int = 1) -> None:
        if number:
            self.dropped[reason] += number

    def _node(self, row: dict[str, Any], message_id: str, parent_id: str | None, tree_id: str, exported: bool) -> _Node:
        text = text_field(row.get("text"), "text", may_be_empty=True)
        deleted, synthetic = optional_field(row, "deleted", bool), optional_field(row, "synthetic", bool)
        reviewed = optional_field(row, "review_result", bool) if "review_result" in row else True
        lang = optional_field(row, "lang", str)
        if "role" not in row:
            raise BadLineError("an OASST message without role")
        unusable = None
        if deleted:
            unusable = "deleted messages"
        elif synthetic and not self.options.keep_synthetic:
            unusable = "synthetic messages"
        elif not text.strip():
            unusable = "empty messages"
        rejected_as_root = None
        if not exported and not self.options.any_state:
            rejected_as_root = "trees not ready for export"
        elif not reviewed and not self.options.any_state:
            rejected_as_root = "trees whose prompt was not reviewed positively"
        elif self.options.lang is not None and lang is not None and lang != self.options.lang:
            rejected_as_root = "trees in another language"
        quality, rank = _label_quality(row.get("labels")), _rank(row.get("rank"))
        message = Message(role_field(row["role"]), text, quality, rank, learn_field(row))
        check = check_field(row.get("check"))
        return _Node(message_id, parent_id, tree_id, message, check, unusable, rejected_as_root)

    def _tree(self, root: _Node) -> LinkedTree:
        """The usable messages below ``root``."""
        if root.rejected_as_root is not None:
            self._drop(root.rejected_as_root)
            return LinkedTree(root.tree_id, [], {})
        usable: list[tuple[_Node, tuple[Message, ...], int]] = []
        stack: list[tuple[_Node, tuple[Message, ...], int]] = [(root, (), -1)]
        while stack:
            node, before, parent_index = stack.pop()
            reason = "messages nested too deep" if len(before) >= MAX_MESSAGES else node.unusable
            if reason is not None:
                self._drop(reason)
                self._drop("messages below a dropped one", _size(node) - 1)
                continue
            messages = (*before, node.message)
            stack.extend((child, messages, len(usable)) for child in reversed(node.children))
            usable.append((node, messages, parent_index))

        # Children come after their parents, so a backward pass reaches every reply before its parent.
        answered_below = [False] * len(usable)
        for i in range(len(usable) - 1, 0, -1):
            node, _, parent_index = usable[i]
            if answered_below[i] or node.message.role == "assistant":
                answered_below[parent_index] = True
        references: list[list[Message]] = [[] for _ in usable]
        for node, _, parent_index in usable[1:]:
            if node.message.role == "assistant" and node.message.learn:
                references[parent_index].append(node.message)
        threads = [
            Conversation(messages)
            for (node, messages, _), below in zip(usable, answered_below, strict=True)
            if node.message.role == "assistant" and not below
        ]
        prompts = {
            node.id: Conversation(messages, tuple(replies), node.check)
            for (node, messages, _), replies in zip(usable, references, strict=True)
            if node.message.role == "user"
        }
        return LinkedTree(root.tree_id, threads, prompts)


def _size(node: _Node) -> int:
    """The number of messages in the subtree of ``node``."""
    stack, size = [node], 0
    while stack:
        size += 1
        stack.extend(stack.pop().children)
    return size


def _label_quality(labels: object) -> float | None:
    """The label ``quality`` in either layout: ``{name: [...], value: [...]}`` or ``{name: {value: …}}``."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise BadLineError(f"labels is not an object: got {shown(labels)}")
    names = labels.get("name")
    if isinstance(names, list):
        values = labels.get("value")
        if not isinstance(values, list) or len(values) != len(names):
            raise BadLineError("labels does not have one value for each name")
        return quality_field(values[names.index("quality")] if "quality" in names else None)
    label = optional_field(labels, "quality", dict)
    return None if label is None else quality_field(label.get("value"))


def _rank(value: object) -> int | None:
    if value is None:
        return None
    # Tables without null in integer columns write 0.0 for 0.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
        raise BadLineError(f"rank is not an integer of at least 0: got {shown(value)}")
    return whole
