"""Selects the assistant messages that SFT trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rlchat.conversation import Message


@dataclass
class MessageTree:
    """Numbers messages from 0 on, so that conversations with an equal beginning share its numbers."""

    nodes: dict[tuple[int, Message], int] = field(default_factory=dict)  # (number of the message before, message)

    def path(self, messages: Sequence[Message]) -> list[int]:
        """The number of each message; new ones are added. Empty conversations are [-1]."""
        numbers: list[int] = []
        before = -1
        for message in messages:
            before = self.nodes.setdefault((before, message), len(self.nodes))
            numbers.append(before)
        return numbers or [-1]


@dataclass
class ImitationCounts:
    """Counts the assistant messages that are trained on, and the others by reason.

    ``learned`` are those of the current tree.
    """

    learned: set[int] = field(default_factory=set)
    left_out: dict[int, str] = field(default_factory=dict)
    total_learned: int = 0
    total_left_out: Counter[str] = field(default_factory=Counter)

    def finish_tree(self) -> None:
        """Adds the counts of the current tree and begins another."""
        self.total_learned += len(self.learned)
        self.total_left_out.update(reason for node, reason in self.left_out.items() if node not in self.learned)
        self.learned, self.left_out = set(), {}

    def add(self, other: ImitationCounts) -> None:
        """Adds the counts of the finished trees of ``other``."""
        self.total_learned += other.total_learned
        self.total_left_out.update(other.total_left_out)

    def summary(self) -> str:
        """A clause that describes what is imitated and what is not."""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.total_left_out.most_common())
        return f"imitating {self.total_learned:,} responses" + (f" and not {reasons}" if reasons else "")


@dataclass(frozen=True)
class Imitation:
    """Selects the assistant messages that SFT trains on. The others stay in the context, without loss.

    Attributes:
        min_quality: skip messages labelled lower than this; None ignores labels.
        best_rank_only: skip messages that are ranked below another response to the same message.
        loss_on: train on all assistant messages of a thread, or only on its last message.
    """

    min_quality: float | None = None
    best_rank_only: bool = False
    loss_on: Literal["all", "last"] = "all"

    def chosen(self, messages: Sequence[Message], nodes: Sequence[int], counts: ImitationCounts) -> tuple[Message, ...]:
        """``messages`` of a thread with ``learn`` set. A message is learned in only one thread of a tree.

        ``nodes`` number the messages, see :class:`MessageTree`.
        """
        chosen = []
        for i, (message, node) in enumerate(zip(messages, nodes, strict=True)):
            if message.role == "assistant":
                reason = self._reason_against(message, last=i == len(messages) - 1)
                if reason is not None:
                    counts.left_out[node] = reason
                learn = reason is None and node not in counts.learned
                message = message if message.learn == learn else replace(message, learn=learn)
            chosen.append(message)
        return tuple(chosen)

    def _reason_against(self, message: Message, last: bool) -> str | None:
        if not message.learn:
            return "of weight 0"
        if self.min_quality is not None and message.quality is not None and message.quality < self.min_quality:
            return f"of quality below {self.min_quality:g}"
        if self.best_rank_only and message.rank:
            return "of lower rank"
        if self.loss_on == "last" and not last:
            return "before the last"
        return None
