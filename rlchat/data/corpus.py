"""The tokenized data of one task, as flat tensors with offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from torch import Tensor

from rlchat.conversation import Conversation, Message, conversation_from_dict
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# With fewer tokens, the chat markers leave no room for text.
MIN_PROMPT_LENGTH = 8

Task = Literal["sft", "reward", "ppo"]


@dataclass(frozen=True)
class DataNeeds:
    """What a LightningModule needs from the data; every module has this as ``data_needs``.

    Attributes:
        task: the stage.
        tokenizer: renders conversations.
        max_length: the largest number of tokens in a row.
        max_new_tokens: tokens reserved for the response: prompts are truncated to ``max_length - max_new_tokens``.
        mix_sequences: whether PPO's training batches also contain SFT sequences.
        whole_conversations: whether a prompt contains the later user messages of its conversation.
    """

    task: Task
    tokenizer: ChatTokenizer
    max_length: int
    max_new_tokens: int = 0
    mix_sequences: bool = False
    whole_conversations: bool = False

    @property
    def prompt_length(self) -> int:
        """The maximum number of tokens in a prompt. Raises :class:`UserError` if it leaves no room for text."""
        room = self.max_length - self.max_new_tokens
        if room < MIN_PROMPT_LENGTH:
            raise UserError(
                f"max_length {self.max_length} leaves {room} tokens for a prompt beside max_new_tokens "
                f"{self.max_new_tokens}; increase max_length or decrease max_new_tokens"
            )
        return room


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one tensor: row ``i`` is ``flat[offsets[i]:offsets[i + 1]]``."""

    flat: Tensor  # [all]
    offsets: Tensor  # Long [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Tensor:
        """Long [rows]"""
        return self.offsets.diff()


@dataclass(frozen=True)
class Sequences:
    """Rendered threads: what SFT trains on."""

    ids: Ragged  # Int, the tokens of each thread
    loss_mask: Ragged  # Bool, True on the tokens of the assistant messages to train on
    tree: Tensor  # Long [threads], index into Corpus.tree_ids


@dataclass(frozen=True)
class RankedReplies:
    """Prompts with their ranked or labelled responses: what a reward model trains on. A row is a prompt."""

    ids: Ragged  # Int, the tokens of each prompt with one response
    replies: Tensor  # Long [rows + 1]: row i has the responses replies[i]..replies[i + 1]
    rank: Tensor  # Long [replies], 0 the best, -1 unranked
    quality: Tensor  # Float [replies] in 0..1, nan unlabelled
    right: Tensor  # Long [replies], 1 or 0 by the prompt's check, -1 without one
    tree: Tensor  # Long [rows]


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts with their conversations: what PPO generates responses to."""

    ids: Ragged  # Int, each ending with the marker that opens the response
    conversations: Sequence[Conversation]
    tree: Tensor  # Long [prompts]


class StoredConversations(Sequence[Conversation]):
    """Conversations as JSON, parsed on access, so that a large corpus loads instantly and workers share its memory.

    Each message is stored once, with the index of the previous message. The size is therefore linear in the length of a
    conversation, although each of its prefixes may be a prompt.
    """

    def __init__(self, rows: Ragged, messages: Ragged, parents: Tensor) -> None:
        self.rows = rows  # Byte, JSON of a conversation without its messages, and the index of its last message
        self.messages = messages  # Byte, JSON of each message
        self.parents = parents  # Long [messages], the message before; -1 for the first of a conversation

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Conversation: ...
    @overload
    def __getitem__(self, row: slice) -> list[Conversation]: ...
    def __getitem__(self, row: int | slice) -> Conversation | list[Conversation]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._restored(json.loads(_bytes(self.rows[row])))

    def _restored(self, stored: dict[str, Any]) -> Conversation:
        messages: list[Message] = []
        index = stored["last"]
        while index >= 0:
            messages.append(Message(*json.loads(_bytes(self.messages[index]))))
            index = int(self.parents[index])
        bare = conversation_from_dict(stored["rest"])
        return replace(bare, messages=tuple(reversed(messages)), later=tuple(map(self._restored, stored["later"])))


@dataclass(frozen=True)
class Corpus:
    """The data that one task needs from a set of files, as tensors. Parts that the task does not need are empty.

    ``split_ids`` (one per tree, :attr:`rlchat.data.formats.Tree.opening_id`) determine the split. ``report`` is a
    one-line summary of what was read. ``warnings`` are shown in every run.
    """

    tree_ids: list[str]
    split_ids: list[str]
    sequences: Sequences
    ranked: RankedReplies
    prompts: Prompts
    facts: dict[str, int]
    report: str
    warnings: list[str]


def _bytes(row: Tensor) -> bytes:
    return row.numpy().tobytes()
