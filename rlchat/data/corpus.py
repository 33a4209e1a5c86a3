"""The tokenized data of one task, as flat tensors with offsets, most of which are mapped files."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message, conversation_from_dict
from rlchat.data.splits import unit_hash
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# With fewer tokens, the chat markers leave no room for text.
MIN_PROMPT_LENGTH = 8

_STRINGS_AT_ONCE = 10_000

Task = Literal["sft", "reward", "dpo", "ppo"]


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
        unpaired: whether DPO's batches also contain responses without a pair: labelled ones, and the only ranked one.
    """

    task: Task
    tokenizer: ChatTokenizer
    max_length: int
    max_new_tokens: int = 0
    mix_sequences: bool = False
    whole_conversations: bool = False
    unpaired: bool = False

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
        start, end = self.offsets[row : row + 2].tolist()
        return self.flat[start:end]

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
    """Prompts with their ranked or labelled responses: what a reward model and DPO train on. A row is a prompt."""

    ids: Ragged  # Int, the tokens of each prompt with one response
    replies: Tensor  # Long [rows + 1]: row i has the responses replies[i]..replies[i + 1]
    rank: Tensor  # Long [replies], 0 the best, -1 unranked
    quality: Tensor  # Float [replies] in 0..1, nan unlabelled
    right: Tensor  # Long [replies], 1 or 0 by the prompt's check, -1 without one
    start: Tensor  # Long [replies], the number of tokens before the response
    end: Tensor  # Long [replies], the number of tokens up to its end, without an end marker that closes a cut response
    tree: Tensor  # Long [rows]


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts with their conversations: what PPO generates responses to."""

    ids: Ragged  # Int, each ending with the marker that opens the response
    conversations: Sequence[Conversation]
    tree: Tensor  # Long [prompts]


RANKED = ("replies", "rank", "quality", "right", "start", "end", "tree")
"""The arrays of :class:`RankedReplies` beside the tokens, in their order there."""


class StoredStrings(Sequence[str]):
    """Strings as UTF-8, decoded on access."""

    def __init__(self, rows: Ragged) -> None:
        self.rows = rows  # Byte

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return _bytes(self.rows[row]).decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _STRINGS_AT_ONCE):
            offsets = self.rows.offsets[first : first + _STRINGS_AT_ONCE + 1].tolist()
            content = _bytes(self.rows.flat[offsets[0] : offsets[-1]])
            for start, end in pairwise(offsets):
                yield content[start - offsets[0] : end - offsets[0]].decode()


class StoredConversations(Sequence[Conversation]):
    """Conversations as JSON, parsed on access, so that a large corpus loads instantly and workers share its memory.

    Each message is stored once, with the index of the previous message. The size is therefore linear in the length of a
    conversation, although each of its prefixes may be a prompt. Indices count from the first message of the tree.
    """

    def __init__(self, rows: Ragged, first_message: Tensor, messages: Ragged, parents: Tensor) -> None:
        self.rows = rows  # Byte, JSON of a conversation without its messages, and the index of its last message
        self.first_message = first_message  # Long [rows], where the messages of its tree begin
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
        return self._restored(json.loads(_bytes(self.rows[row])), int(self.first_message[row]))

    def _restored(self, stored: dict[str, Any], first: int) -> Conversation:
        messages: list[Message] = []
        index = stored["last"]
        while index >= 0:
            messages.append(Message(*json.loads(_bytes(self.messages[first + index]))))
            index = int(self.parents[first + index])
        later = tuple(self._restored(prompt, first) for prompt in stored["later"])
        return replace(conversation_from_dict(stored["rest"]), messages=tuple(reversed(messages)), later=later)


@dataclass(frozen=True)
class Corpus:
    """The data that one task needs from a set of files, as tensors. Parts that the task does not need are empty.

    ``split_ids`` (one per tree, :attr:`rlchat.data.forest.Tree.opening_id`) determine the split. ``report`` is a
    one-line summary of what was read. ``warnings`` are shown in every run.
    """

    tree_ids: Sequence[str]
    split_ids: Sequence[str]
    split_hash: Tensor  # Double [trees], unit_hash(split_seed, split_id)
    split_seed: int
    sequences: Sequences
    ranked: RankedReplies
    prompts: Prompts
    facts: dict[str, int]
    report: str
    warnings: list[str]

    def places(self, seed: int) -> Tensor:
        """``unit_hash(seed, split_id)`` as Double [trees]: stored for one seed, computed for others."""
        if seed == self.split_seed:
            return self.split_hash
        hashes = array("d", (unit_hash(seed, name) for name in self.split_ids))
        return torch.frombuffer(hashes, dtype=torch.float64)


# Array -> the array whose values it counts. The numbers of a part of the data start from 0. When it is appended to
# others, the number of values that were there before is added.
COUNTS: dict[str, str] = {
    "prompts.first_message": "prompts.parents",
    "sequences.tree": "split_hash",
    "ranked.tree": "split_hash",
    "prompts.tree": "split_hash",
    "ranked.replies": "ranked.rank",
    **{
        f"{name}.offsets": f"{name}.flat"
        for name in (
            "tree_ids",
            "split_ids",
            "sequences.ids",
            "sequences.loss_mask",
            "ranked.ids",
            "prompts.ids",
            "prompts.rows",
            "prompts.messages",
        )
    },
}
# These begin with a 0, so that row i reaches from number i to number i + 1.
BOUNDS = frozenset(name for name in COUNTS if name.endswith(".offsets")) | {"ranked.replies"}


def corpus_of(arrays: Mapping[str, Tensor], about: Mapping[str, Any]) -> Corpus:
    """The corpus in ``arrays``. Raises KeyError, TypeError or ValueError if they are not those of a corpus."""

    def ragged(name: str) -> Ragged:
        return Ragged(arrays[f"{name}.flat"], arrays[f"{name}.offsets"])

    conversations = StoredConversations(
        ragged("prompts.rows"), arrays["prompts.first_message"], ragged("prompts.messages"), arrays["prompts.parents"]
    )
    return Corpus(
        StoredStrings(ragged("tree_ids")),
        StoredStrings(ragged("split_ids")),
        arrays["split_hash"],
        about["split_seed"],
        Sequences(ragged("sequences.ids"), ragged("sequences.loss_mask"), arrays["sequences.tree"]),
        RankedReplies(ragged("ranked.ids"), *(arrays[f"ranked.{name}"] for name in RANKED)),
        Prompts(ragged("prompts.ids"), conversations, arrays["prompts.tree"]),
        about["facts"],
        about["report"],
        about["warnings"],
    )


def _bytes(row: Tensor) -> bytes:
    return row.numpy().tobytes()
