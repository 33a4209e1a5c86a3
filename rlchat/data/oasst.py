"""OASST data: rows of either layout in, trees out.

A row of the trees layout nests all its messages under ``prompt``; a row of the messages layout is one of them, linked
to another by ``parent_id``, in any order and any file, or with its own ``replies`` nested. Both have the same fields.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.fields import MAX_MESSAGES, check_field, optional_field, quality_field, role_field, shown, text_field
from rlchat.data.jsonl import BadLineError


@dataclass(frozen=True, slots=True)
class OasstTree:
    """What one root message leads to.

    ``threads`` end on an assistant message, and none is the beginning of another. ``prompts`` are the beginnings that
    end on a user message, by the id of that message, with the replies to it as references.
    """

    id: str
    threads: list[Conversation]
    prompts: dict[str, Conversation]


@dataclass(slots=True)
class _Node:
    """A message on its way into a tree; ``unusable`` is the reason to drop it, as the report names it."""

    id: str
    parent_id: str | None
    tree_id: str
    message: Message
    check: Check | None
    unusable: str | None
    rejected_as_root: str | None
    children: list[_Node] = field(default_factory=list)


class OasstForest:
    """Takes rows one by one and gives the trees in the end: only then is every message's parent known.

    The selection is that of the official loader (``oasst_data`` in LAION-AI/Open-Assistant), as far as a file carries
    the keys for it. Of trees: exported, the prompt reviewed positively and in ``lang`` (None: any); with ``any_state``
    neither export nor review matters. Of messages: neither deleted nor empty, nor synthetic without
    ``keep_synthetic``; what hangs below an unusable message goes with it. ``dropped`` counts by reason.
    """

    def __init__(
        self, dropped: Counter[str], lang: str | None, keep_synthetic: bool = False, any_state: bool = False
    ) -> None:
        self.dropped = dropped
        self.lang = lang
        self.keep_synthetic = keep_synthetic
        self.any_state = any_state
        self.nodes: dict[str, _Node] = {}

    def add(self, row: dict[str, Any]) -> list[str]:
        """Take a row of either layout and return the ids of its messages, those left out that came before.

        Raises :class:`BadLineError`, having taken nothing.
        """
        root = row["prompt"] if isinstance(row.get("prompt"), dict) else row
        tree_id = optional_field(row, "message_tree_id", str)
        tree_state = optional_field(row, "tree_state", str) if "tree_state" in row else "ready_for_export"
        root_id = optional_field(root, "message_id", str) or tree_id
        if not root_id:
            raise BadLineError("an OASST message without message_id")
        text_field(tree_id or root_id, "message_tree_id")
        found: list[_Node] = []
        parent_id = None if root is not row else optional_field(root, "parent_id", str)
        stack: list[tuple[Any, str, str | None]] = [(root, root_id, parent_id)]
        while stack:
            message_row, message_id, parent_id = stack.pop()
            if not isinstance(message_row, dict):
                raise BadLineError(f"a reply is not an object but {shown(message_row)}")
            exported = tree_state == "ready_for_export"
            found.append(self._node(message_row, message_id, parent_id, tree_id or root_id, exported))
            replies = optional_field(message_row, "replies", list) or []
            for i, reply in reversed(list(enumerate(replies))):
                reply_id = optional_field(reply, "message_id", str) if isinstance(reply, dict) else None
                stack.append((reply, reply_id or f"{message_id}/{i}", message_id))
        new = [node.id for node in found if self.nodes.setdefault(node.id, node) is node]
        self._drop("duplicate messages", len(found) - len(new))
        return new

    def trees(self) -> list[OasstTree]:
        """Link and select all that was added. To be called once, when every row is in."""
        roots = []
        for node in self.nodes.values():
            if node.parent_id is None:
                roots.append(node)
            elif node.parent_id in self.nodes:
                self.nodes[node.parent_id].children.append(node)
        trees = [self._tree(root) for root in roots]
        # What is left hangs below a message that no file holds, or in a ring of messages.
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
        elif synthetic and not self.keep_synthetic:
            unusable = "synthetic messages"
        elif not text.strip():
            unusable = "empty messages"
        rejected_as_root = None
        if not exported and not self.any_state:
            rejected_as_root = "trees not ready for export"
        elif not reviewed and not self.any_state:
            rejected_as_root = "trees whose prompt was not reviewed positively"
        elif self.lang is not None and lang is not None and lang != self.lang:
            rejected_as_root = "trees in another language"
        message = Message(role_field(row["role"]), text, _label_quality(row.get("labels")), _rank(row.get("rank")))
        check = check_field(row.get("check"))
        return _Node(message_id, parent_id, tree_id, message, check, unusable, rejected_as_root)

    def _tree(self, root: _Node) -> OasstTree:
        """What is usable below ``root``."""
        if root.rejected_as_root is not None:
            self._drop(root.rejected_as_root)
            return OasstTree(root.tree_id, [], {})
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

        # Children stand after their parents, so walking back meets every reply before what it replies to.
        answered_below = [False] * len(usable)
        for i in range(len(usable) - 1, 0, -1):
            node, _, parent_index = usable[i]
            if answered_below[i] or node.message.role == "assistant":
                answered_below[parent_index] = True
        references: list[list[Message]] = [[] for _ in usable]
        for node, _, parent_index in usable[1:]:
            if node.message.role == "assistant":
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
        return OasstTree(root.tree_id, threads, prompts)


def _size(node: _Node) -> int:
    """How many messages there are from ``node`` on."""
    stack, size = [node], 0
    while stack:
        size += 1
        stack.extend(stack.pop().children)
    return size


def _label_quality(labels: object) -> float | None:
    """The label ``quality`` of either layout of labels: ``{name: [...], value: [...]}`` or ``{name: {value: …}}``."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise BadLineError(f"labels is not an object but {shown(labels)}")
    names = labels.get("name")
    if isinstance(names, list):
        values = labels.get("value")
        if not isinstance(values, list) or len(values) != len(names):
            raise BadLineError("labels has not one value for each name")
        return quality_field(values[names.index("quality")] if "quality" in names else None)
    label = optional_field(labels, "quality", dict)
    return None if label is None else quality_field(label.get("value"))


def _rank(value: object) -> int | None:
    if value is None:
        return None
    # Tables that know no null in a column of integers write 0.0 for 0.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
        raise BadLineError(f"rank is not a whole number from 0 but {shown(value)}")
    return whole
