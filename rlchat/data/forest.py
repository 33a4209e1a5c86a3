"""Trees of conversations, collected row by row in a file, so that memory does not grow with their texts."""

from __future__ import annotations

import hashlib
import pickle
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from rlchat.conversation import Conversation, Message


@dataclass(frozen=True, slots=True)
class Tree:
    """What must not be divided between splits: an OASST tree, or all rows with the same first user message.

    ``threads`` are the conversations to imitate, each ending with an assistant message. In an OASST tree, none is a
    prefix of another. ``prompts`` are the conversations to answer, each ending with a user message, with its usable
    human responses as ``references``. A response without a prompt has an entry in ``prompts`` without messages, for
    which :attr:`Conversation.is_prompt` is False and whose only reference is the response.
    """

    id: str
    threads: tuple[Conversation, ...]
    prompts: tuple[Conversation, ...]

    @property
    def opening_id(self) -> str:
        """:func:`tree_id_of` its first messages; an OASST tree and feedback that starts with its prompt share it."""
        first = (*self.threads, *self.prompts)[0]
        return tree_id_of(first.messages or first.references)


def tree_id_of(opening: Iterable[Message]) -> str:
    """A stable id for all rows with the same first user message (without user messages: the same first message)."""
    messages = tuple(opening)
    text = next((message.text for message in messages if message.role == "user"), messages[0].text)
    return "row-" + hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Forest(Sequence[Tree]):
    """Trees in the file ``path``, which are read when they are used. Processes can read them at the same time."""

    path: Path
    starts: NDArray[np.int64]  # [trees], the position of each tree in the file

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        with self.path.open("rb") as file:
            if isinstance(index, slice):
                return [_read(file, start) for start in self.starts[index].tolist()]
            return _read(file, int(self.starts[index]))


class ForestBuilder:
    """Collects the rows of trees in a new file at ``path``. It keeps 16 bytes for each row in memory.

    Attributes:
        threads, prompts, responses: how many there are, after rows of the same tree are merged in :meth:`finish`.
        duplicate_threads: how many threads :meth:`finish` left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads = self.prompts = self.responses = self.duplicate_threads = 0
        self._file = path.open("w+b")
        self._size = 0
        self._starts = array("q")
        self._keys = array("Q")

    def __enter__(self) -> ForestBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, tree_id: str, threads: Sequence[Conversation], prompts: Sequence[Conversation]) -> None:
        """Adds the content of a row to the tree ``tree_id``."""
        if not threads and not prompts:
            return
        # 64 bits are enough: among a million trees, two have the same with a probability of 3e-8.
        self._keys.append(int.from_bytes(hashlib.blake2b(tree_id.encode(), digest_size=8).digest(), "little"))
        self._starts.append(self._append(tree_id, threads, prompts))

    def finish(self) -> Forest:
        """The trees, in the order of their first rows. Nothing may be added after that."""
        keys, starts = np.asarray(self._keys), np.asarray(self._starts)
        _, first, tree_of_row, rows = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        starts_of_trees = starts[first]
        by_tree = np.argsort(tree_of_row, kind="stable")
        ends = np.cumsum(rows)
        for tree in np.flatnonzero(rows > 1).tolist():
            starts_of_trees[tree] = self._merge(starts[by_tree[ends[tree] - rows[tree] : ends[tree]]].tolist())
        self._file.flush()
        return Forest(self.path, starts_of_trees[np.argsort(first)])

    def _append(self, tree_id: str, threads: Sequence[Conversation], prompts: Sequence[Conversation]) -> int:
        # Only this run reads the file. Messages that conversations share stay shared, so deep trees stay small.
        content = pickle.dumps((tree_id, tuple(threads), tuple(prompts)), pickle.HIGHEST_PROTOCOL)
        self._file.write(content)
        self._count(threads, prompts, 1)
        start = self._size
        self._size += len(content)
        return start

    def _count(self, threads: Sequence[Conversation], prompts: Sequence[Conversation], sign: int) -> None:
        asked = sum(prompt.is_prompt for prompt in prompts)
        self.threads += sign * len(threads)
        self.prompts += sign * asked
        self.responses += sign * (len(prompts) - asked)

    def _merge(self, starts: list[int]) -> int:
        """Appends the tree whose rows are at ``starts``; returns its own start."""
        threads: list[Conversation] = []
        prompts: list[Conversation] = []
        for start in starts:
            tree_id, some_threads, some_prompts = _load(self._file, start)
            threads += some_threads
            prompts += some_prompts
        self._count(threads, prompts, -1)
        distinct = list(dict.fromkeys(threads))
        self.duplicate_threads += len(threads) - len(distinct)
        self._file.seek(0, 2)
        return self._append(tree_id, distinct, _gathered(prompts))


def _load(file: IO[bytes], start: int) -> tuple[str, tuple[Conversation, ...], tuple[Conversation, ...]]:
    file.seek(start)
    content: tuple[str, tuple[Conversation, ...], tuple[Conversation, ...]] = pickle.load(file)
    return content


def _read(file: IO[bytes], start: int) -> Tree:
    tree_id, threads, prompts = _load(file, start)
    return Tree(
        tree_id,
        tuple(replace(thread, tree_id=tree_id) for thread in threads),
        tuple(replace(prompt, tree_id=tree_id) for prompt in prompts),
    )


def _gathered(prompts: list[Conversation]) -> list[Conversation]:
    """The distinct prompts. Unranked responses to the same prompt with the same check are collected in one."""
    gathered: dict[Any, Conversation] = {}
    for prompt in prompts:
        ranked = any(reply.rank is not None for reply in prompt.references)
        content = tuple((message.role, message.text) for message in prompt.messages)
        key = (content, prompt.check, prompt.references if ranked or not content else None)
        first = gathered.setdefault(key, prompt)
        if first is not prompt and not ranked:
            gathered[key] = replace(first, references=tuple(dict.fromkeys(first.references + prompt.references)))
    return list(gathered.values())
