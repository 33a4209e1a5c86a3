"""Conversations as token ids, made once and kept on disk.

:func:`tokenize_trees` renders what one task needs (threads, prompts or ranked replies) into flat tensors;
:class:`CorpusCache` keeps them in a file whose name says everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from rlchat.conversation import Conversation, conversation_from_dict, conversation_to_dict
from rlchat.data.formats import Tree, ranked_pairs
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer, Rendered
from rlchat.utils.files import write_atomically
from rlchat.utils.progress import with_progress

_log = logging.getLogger("rlchat")

# Part of a cache file's name: count it up when what is stored, or how text is rendered, changes.
CACHE_VERSION = 4
# Markers and an opening leave no room for words in fewer tokens than these.
MIN_PROMPT_LENGTH = 8

T = TypeVar("T")
Task = Literal["sft", "reward", "ppo"]


@dataclass(frozen=True)
class DataNeeds:
    """What a LightningModule asks of the data; every module has one as ``data_needs``.

    ``max_length`` is the number of tokens that a row holds at most. Prompts are truncated to
    ``max_length - max_new_tokens``, so that a reply of ``max_new_tokens`` fits behind them. ``mix_sequences`` asks for
    SFT sequences in PPO's training batches, ``whole_conversations`` for prompts that know what the user says later.
    """

    task: Task
    tokenizer: ChatTokenizer
    max_length: int
    max_new_tokens: int = 0
    mix_sequences: bool = False
    whole_conversations: bool = False

    @property
    def prompt_length(self) -> int:
        """The tokens that a prompt holds at most. Raises :class:`UserError` where hardly any are left."""
        room = self.max_length - self.max_new_tokens
        if room < MIN_PROMPT_LENGTH:
            raise UserError(
                f"max_length {self.max_length} leaves {room} tokens for a prompt beside max_new_tokens "
                f"{self.max_new_tokens}; raise the first or lower the second"
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
    loss_mask: Ragged  # Bool, True where the assistant speaks
    tree: Tensor  # Long [threads], index into Corpus.tree_ids


@dataclass(frozen=True)
class RankedReplies:
    """Prompts with the replies that people judged: what a reward model trains on. A row is a prompt."""

    ids: Ragged  # Int, the tokens of each reply behind its prompt
    replies: Tensor  # Long [rows + 1]: row i has the replies replies[i]..replies[i + 1]
    rank: Tensor  # Long [replies], 0 the best, -1 unranked
    quality: Tensor  # Float [replies] in 0..1, nan unlabelled
    right: Tensor  # Long [replies], 1 or 0 by the prompt's check, -1 without one
    tree: Tensor  # Long [rows]


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts with the conversations that they came from: what PPO answers."""

    ids: Ragged  # Int, each opened for the assistant
    conversations: Sequence[Conversation]
    tree: Tensor  # Long [prompts]


class StoredConversations(Sequence[Conversation]):
    """Conversations kept as JSON and read when asked for, so that a large corpus loads at once and workers share it."""

    def __init__(self, rows: Ragged) -> None:
        self.rows = rows

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
        return conversation_from_dict(json.loads(self.rows[row].numpy().tobytes()))


@dataclass(frozen=True)
class Corpus:
    """What one task needs of some files, as tensors. Sections that the task does not need are empty."""

    tree_ids: list[str]
    sequences: Sequences
    ranked: RankedReplies
    prompts: Prompts
    facts: dict[str, int]
    report: str


@dataclass
class _RaggedBuilder:
    """Collects rows in C arrays: lists of Python ints would take ten times the memory."""

    typecode: str
    flat: array[int] = field(init=False)
    offsets: array[int] = field(default_factory=lambda: array("q", [0]))

    def __post_init__(self) -> None:
        self.flat = array(self.typecode)

    def add(self, row: Iterable[int]) -> None:
        self.flat.extend(row)
        self.offsets.append(len(self.flat))

    def build(self, dtype: torch.dtype) -> Ragged:
        flat = torch.frombuffer(self.flat, dtype=dtype) if self.flat else torch.empty(0, dtype=dtype)
        return Ragged(flat, torch.frombuffer(self.offsets, dtype=torch.int64))


@dataclass
class _Tally:
    """How many rows were shortened to fit, and how many were left out."""

    dropped: int = 0
    cut: int = 0
    left_out: int = 0

    def count(self, rendered: Rendered) -> Rendered:
        self.dropped += rendered.dropped > 0
        self.cut += rendered.cut > 0
        return rendered


def tokenize_trees(
    trees: Sequence[Tree], needs: DataNeeds, report: str = "", *, contrast: bool = False, progress: bool = False
) -> Corpus:
    """Everything that ``needs.task`` asks of ``trees``, rendered and truncated; see :func:`contrasted`."""
    tally = _Tally()
    sequences, ranked, prompts = _SequenceBuilder(), _RankedBuilder(), _PromptBuilder()
    for index, tree in enumerate(with_progress(trees, "tokenising", progress)):
        if needs.task in ("sft", "ppo"):
            for thread in tree.threads:
                sequences.add(thread, index, needs, tally)
            # SFT asks prompts as samples alone: one a tree is plenty, and they count for nothing.
            prompts_of_tree = [p for p in tree.prompts if p.is_prompt]
            if needs.whole_conversations:
                prompts_of_tree = whole_conversations(prompts_of_tree)
            for prompt in prompts_of_tree[: 1 if needs.task == "sft" else None]:
                prompts.add(prompt, index, needs, tally if needs.task == "ppo" else _Tally())
        if needs.task == "reward":
            for prompt in filter(_is_judged, contrasted(tree.prompts) if contrast else tree.prompts):
                ranked.add(prompt, index, needs, tally)
    facts = {
        "trees": len(trees),
        "dropped": tally.dropped,
        "cut": tally.cut,
        "left_out": tally.left_out,
    }
    return Corpus([t.id for t in trees], sequences.build(), ranked.build(), prompts.build(), facts, report)


def contrasted(prompts: Sequence[Conversation]) -> list[Conversation]:
    """Prompts of one tree that nobody judged, each with a worse reply: the one to another turn.

    The better reply is the one that was given. The other is from the same tree, so that it is on the same side of the
    split, and about the same matter. Prompts that people judged stay as they are.
    """
    result = []
    for index, prompt in enumerate(prompts):
        if prompt.references and all(r.rank is None and r.quality is None for r in prompt.references):
            given = prompt.references[0]
            others = [p.references[0] for p in prompts if p.references and p.references[0].text != given.text]
            if others:
                pair = (replace(given, rank=0), replace(others[index % len(others)], rank=1))
                prompt = replace(prompt, references=pair)
        result.append(prompt)
    return result


def whole_conversations(prompts: Sequence[Conversation]) -> list[Conversation]:
    """Of the prompts of one tree, the first of each conversation, with those that came after it as ``later``.

    A conversation is a way through the tree to a user message that nobody answered further; conversations that open
    alike and part later are conversations of their own.
    """
    by_messages = {prompt.messages: prompt for prompt in prompts}
    chains = {}
    for messages in by_messages:
        beginnings = [messages[:end] for end in range(1, len(messages) + 1)]
        chains[messages] = [by_messages[beginning] for beginning in beginnings if beginning in by_messages]
    continued = {earlier.messages for chain in chains.values() for earlier in chain[:-1]}
    return [
        replace(first, later=tuple(later)) for messages, (first, *later) in chains.items() if messages not in continued
    ]


def render_prompts(conversations: Sequence[Conversation], needs: DataNeeds) -> Prompts:
    """``conversations``, each of which ends on a user message, in their order."""
    ids = _RaggedBuilder("i")
    for conversation in conversations:
        ids.add(needs.tokenizer.render_prompt(conversation, needs.prompt_length).ids)
    return Prompts(ids.build(torch.int32), conversations, torch.arange(len(conversations)))


class _SequenceBuilder:
    def __init__(self) -> None:
        self.ids, self.mask, self.tree = _RaggedBuilder("i"), _RaggedBuilder("b"), array("q")

    def add(self, thread: Conversation, tree: int, needs: DataNeeds, tally: _Tally) -> None:
        rendered = needs.tokenizer.render(thread, needs.max_length)
        if not any(rendered.loss_mask):
            tally.left_out += 1
            return
        tally.count(rendered)
        self.ids.add(rendered.ids)
        self.mask.add(rendered.loss_mask)
        self.tree.append(tree)

    def build(self) -> Sequences:
        return Sequences(self.ids.build(torch.int32), self.mask.build(torch.bool), _long(self.tree))


class _PromptBuilder:
    def __init__(self) -> None:
        self.ids, self.json, self.tree = _RaggedBuilder("i"), _RaggedBuilder("B"), array("q")

    def add(self, prompt: Conversation, tree: int, needs: DataNeeds, tally: _Tally) -> None:
        self.ids.add(tally.count(needs.tokenizer.render_prompt(prompt, needs.prompt_length)).ids)
        self.json.add(json.dumps(conversation_to_dict(prompt), ensure_ascii=False).encode())
        self.tree.append(tree)

    def build(self) -> Prompts:
        stored = StoredConversations(self.json.build(torch.uint8))
        return Prompts(self.ids.build(torch.int32), stored, _long(self.tree))


class _RankedBuilder:
    def __init__(self) -> None:
        self.ids, self.replies, self.tree = _RaggedBuilder("i"), array("q", [0]), array("q")
        self.rank, self.quality, self.right = array("q"), array("f"), array("q")

    def add(self, prompt: Conversation, tree: int, needs: DataNeeds, tally: _Tally) -> None:
        judged = [reply for reply in prompt.references if reply.rank is not None or reply.quality is not None]
        for reply in judged:
            self.ids.add(tally.count(needs.tokenizer.render(prompt.with_reply(reply), needs.max_length)).ids)
            self.rank.append(-1 if reply.rank is None else reply.rank)
            self.quality.append(float("nan") if reply.quality is None else reply.quality)
            self.right.append(-1 if prompt.check is None else prompt.check.passes(reply.text))
        self.replies.append(len(self.rank))
        self.tree.append(tree)

    def build(self) -> RankedReplies:
        quality = torch.frombuffer(self.quality, dtype=torch.float32) if self.quality else torch.empty(0)
        return RankedReplies(
            self.ids.build(torch.int32),
            _long(self.replies),
            _long(self.rank),
            quality,
            _long(self.right),
            _long(self.tree),
        )


def _is_judged(prompt: Conversation) -> bool:
    """Whether a reward model can learn from ``prompt``: two ranked replies, or any labelled one.

    A labelled response without a prompt is one too: it comes as a prompt without messages.
    """
    return any(reply.quality is not None for reply in prompt.references) or bool(ranked_pairs(prompt))


class CorpusCache:
    """Corpora on disk, each a file named by a hash of everything that it depends on."""

    def __init__(self, folder: str | None = None) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder).expanduser() if folder else Path(root) / "rlchat"

    def path(self, key: str) -> Path:
        """Where the corpus of ``key`` lies, or would lie."""
        return self.folder / f"{key}.pt"

    def read(self, key: str) -> Corpus | None:
        """The corpus of ``key``; None where there is none, or (with a warning) where the file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            # torch.load takes changed bytes without a word; the archive's own checksums find them.
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"bad checksum of {broken}")
            return _corpus_from_state(torch.load(path, weights_only=True))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as e:
            _log.warning("the tokenised data in %s is damaged (%s) and is made anew", path, e)
            return None

    def write(self, key: str, corpus: Corpus) -> None:
        """Keeps ``corpus``; only warns where the folder cannot be written, since the run needs no cache to go on."""
        try:
            write_atomically(self.path(key), lambda file: torch.save(_corpus_to_state(corpus), file))
        except UserError as error:
            _log.warning("could not keep the tokenised data: %s", error)


def cache_key(paths: Sequence[str], needs: DataNeeds, options: dict[str, Any]) -> str:
    """A hash over the bytes of ``paths``, the encoding, the lengths and the reading ``options`` (plain values).

    Raises :class:`UserError` naming a path that cannot be read.
    """
    digest = hashlib.sha256()
    lengths = (needs.task, needs.max_length, needs.max_new_tokens, needs.whole_conversations)
    digest.update(json.dumps([CACHE_VERSION, needs.tokenizer.fingerprint, lengths, sorted(options.items())]).encode())
    for path in paths:
        digest.update(_hash_of_file(path))
    return digest.hexdigest()


def _hash_of_file(path: str) -> bytes:
    digest = hashlib.sha256()
    try:
        with Path(path).expanduser().open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a data file with --data.path FILE") from error
    return digest.digest()


def _corpus_to_state(corpus: Corpus) -> dict[str, Any]:
    assert isinstance(corpus.prompts.conversations, StoredConversations)
    return {
        "tree_ids": corpus.tree_ids,
        "facts": corpus.facts,
        "report": corpus.report,
        "sequences": {
            "ids": _ragged_to_state(corpus.sequences.ids),
            "loss_mask": _ragged_to_state(corpus.sequences.loss_mask),
            "tree": corpus.sequences.tree,
        },
        "ranked": {**vars(corpus.ranked), "ids": _ragged_to_state(corpus.ranked.ids)},
        "prompts": {
            "ids": _ragged_to_state(corpus.prompts.ids),
            "json": _ragged_to_state(corpus.prompts.conversations.rows),
            "tree": corpus.prompts.tree,
        },
    }


def _corpus_from_state(state: dict[str, Any]) -> Corpus:
    sequences, ranked, prompts = state["sequences"], state["ranked"], state["prompts"]
    return Corpus(
        tree_ids=state["tree_ids"],
        sequences=Sequences(Ragged(*sequences["ids"]), Ragged(*sequences["loss_mask"]), sequences["tree"]),
        ranked=RankedReplies(**{**ranked, "ids": Ragged(*ranked["ids"])}),
        prompts=Prompts(
            Ragged(*prompts["ids"]),
            StoredConversations(Ragged(*prompts["json"])),
            prompts["tree"],
        ),
        facts=state["facts"],
        report=state["report"],
    )


def _ragged_to_state(rows: Ragged) -> tuple[Tensor, Tensor]:
    return rows.flat, rows.offsets


def _long(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
