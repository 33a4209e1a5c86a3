"""Batches: their tensors, and the order in which rows become batches.

The order of an epoch is a list of *global batches* that depends only on (seed, epoch). Row ``i`` of a global batch goes
to rank ``i % world``. One process with batches of 2N rows therefore sees the same rows at every step as two processes
with N rows each, and a resumed run sees the rows that the uninterrupted run would have seen.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from rlchat.conversation import Conversation
from rlchat.data.corpus import Prompts, RankedReplies, Sequences
from rlchat.utils.padding import pad

_log = logging.getLogger("rlchat")

# Rows are sorted by length inside windows of this many global batches: large enough to save padding, small enough to
# keep the order random.
BATCHES_PER_WINDOW = 32

# At most this many rows that begin alike are put into one batch: more would make the rows of a batch too similar.
_ALIKE_IN_A_BATCH = 4

# The index of a row in a dataset; in PPO with mixed-in sequences, the indices of a prompt and a thread.
Row = int | tuple[int, int]
R = TypeVar("R", bound=Row)
Plan = Callable[[int], Sequence[Sequence[Row]]]  # epoch -> the global batches, in order


class SequenceBatch(NamedTuple):
    """Whole conversations, padded on the right."""

    ids: Tensor  # Long [B, T]
    attention_mask: Tensor  # Bool [B, T], False on padding
    loss_mask: Tensor  # Bool [B, T], True on the assistant's tokens and their end markers

    def split(self, rows: int) -> list[SequenceBatch]:
        """The same rows in microbatches of at most ``rows``."""
        return [SequenceBatch(*parts) for parts in zip(*(tensor.split(rows) for tensor in self), strict=True)]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on ``device``."""
        return SequenceBatch(*(tensor.to(device) for tensor in self))


class RankedBatch(NamedTuple):
    """Responses with their prompts, one per row, padded on the right; responses to one prompt are adjacent."""

    ids: Tensor  # Long [N, T]
    attention_mask: Tensor  # Bool [N, T], False on padding
    group: Tensor  # Long [N], index of the prompt in this batch
    rank: Tensor  # Long [N], 0 is the best of its group, -1 is unranked
    quality: Tensor  # Float [N] in 0..1, NaN if unlabelled
    right: Tensor  # Long [N], 1 or 0 by the prompt's check, -1 without a check

    def to(self, device: torch.device | str) -> RankedBatch:
        """The same batch on ``device``."""
        return RankedBatch(*(tensor.to(device) for tensor in self))


class PromptBatch:
    """Prompts to respond to, padded on the left.

    This is not a tuple, because Lightning casts the elements of tuples (``precision: bf16-true``) and fails on the
    frozen conversations.
    """

    __slots__ = ("attention_mask", "conversations", "ids", "sequences")

    def __init__(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        conversations: tuple[Conversation, ...],
        sequences: SequenceBatch | None = None,
    ) -> None:
        self.ids = ids  # Long [B, P], each row ends with the marker that opens the response
        self.attention_mask = attention_mask  # Bool [B, P], False on padding
        self.conversations = conversations  # [B]
        self.sequences = sequences  # B threads for the SFT loss that is mixed in, if the module asked for them

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.attention_mask, self.conversations, self.sequences))

    def repeated(self, times: int) -> PromptBatch:
        """Each prompt ``times`` times, copies adjacent: a, a, b, b. The sequences are not repeated."""
        ids, mask = (tensor.repeat_interleave(times, 0) for tensor in (self.ids, self.attention_mask))
        return PromptBatch(ids, mask, tuple(c for c in self.conversations for _ in range(times)), self.sequences)

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on ``device``; the conversations are shared."""
        sequences = None if self.sequences is None else self.sequences.to(device)
        return PromptBatch(self.ids.to(device), self.attention_mask.to(device), self.conversations, sequences)


class SequenceRows(Dataset[SequenceBatch]):
    """The threads ``rows`` of ``sequences``. Indexing with a list of indices returns a batch."""

    def __init__(self, sequences: Sequences, rows: Sequence[int], pad_id: int) -> None:
        self.sequences, self.rows, self.pad_id = sequences, rows, pad_id
        self.lengths: list[int] = sequences.ids.lengths[torch.tensor(rows, dtype=torch.int64)].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> list[int]:
        """The group [rows] of each row: neighbours of one tree that share at least half of their tokens.

        In a batch, a backbone computes the tokens that they share once (see :mod:`rlchat.models.packing`).
        """
        trees = self.sequences.tree[torch.tensor(self.rows, dtype=torch.int64)].tolist()
        groups: list[int] = []
        size = 0
        for row, (tree, length) in enumerate(zip(trees, self.lengths, strict=True)):
            half = -(-max(length, self.lengths[row - 1]) // 2)
            alike = row > 0 and tree == trees[row - 1] and size < _ALIKE_IN_A_BATCH and self._begin_alike(row, half)
            size = size + 1 if alike else 1
            groups.append(groups[-1] + (not alike) if groups else 0)
        return groups

    def _begin_alike(self, row: int, tokens: int) -> bool:
        """Whether ``row`` and the row before have the same first ``tokens`` tokens."""
        this, before = (self.sequences.ids[self.rows[i]][:tokens] for i in (row, row - 1))
        return torch.equal(this, before)

    def __getitem__(self, index: int | Sequence[int]) -> SequenceBatch:
        rows = [self.rows[i] for i in _as_list(index)]
        ids = [self.sequences.ids[row].tolist() for row in rows]
        loss_masks, _ = pad([self.sequences.loss_mask[row].tolist() for row in rows], False, "right")
        return SequenceBatch(*pad(ids, self.pad_id, "right"), loss_masks.bool())


class RankedRows(Dataset[RankedBatch]):
    """The prompts ``rows`` of ``ranked`` with their responses. Indexing with a list of indices returns a batch."""

    def __init__(self, ranked: RankedReplies, rows: Sequence[int], pad_id: int) -> None:
        self.ranked, self.rows, self.pad_id = ranked, rows, pad_id
        lengths = ranked.ids.lengths
        self.lengths: list[int] = [int(lengths[self._replies(row)].max()) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def _replies(self, row: int) -> slice:
        return slice(int(self.ranked.replies[row]), int(self.ranked.replies[row + 1]))

    def __getitem__(self, index: int | Sequence[int]) -> RankedBatch:
        spans = [self._replies(self.rows[i]) for i in _as_list(index)]
        ids = [self.ranked.ids[reply].tolist() for span in spans for reply in range(span.start, span.stop)]
        return RankedBatch(
            *pad(ids, self.pad_id, "right"),
            torch.cat([torch.full((span.stop - span.start,), group) for group, span in enumerate(spans)]),
            torch.cat([self.ranked.rank[span] for span in spans]),
            torch.cat([self.ranked.quality[span] for span in spans]),
            torch.cat([self.ranked.right[span] for span in spans]),
        )


class PromptRows(Dataset[PromptBatch]):
    """The prompts ``rows``. Indexing with a list of indices returns a batch.

    Indexing with a list of (prompt, thread) returns a batch with the SFT sequences that are mixed in.
    """

    def __init__(self, prompts: Prompts, rows: Sequence[int], pad_id: int, mixed: SequenceRows | None = None) -> None:
        self.prompts, self.rows, self.pad_id, self.mixed = prompts, rows, pad_id, mixed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[Row]) -> PromptBatch:
        pairs = [(i, i) if isinstance(i, int) else i for i in _as_list(index)]
        rows = [self.rows[prompt] for prompt, _ in pairs]
        ids = [self.prompts.ids[row].tolist() for row in rows]
        sequences = None if self.mixed is None else self.mixed[[thread % len(self.mixed) for _, thread in pairs]]
        return PromptBatch(
            *pad(ids, self.pad_id, "left"),
            tuple(self.prompts.conversations[row] for row in rows),
            sequences,
        )


def _as_list(index: int | Sequence[R]) -> Sequence[int | R]:
    # Our samplers ask for batches; other samplers ask for single rows.
    return [index] if isinstance(index, int) else index


def bucketed_plan(
    lengths: Sequence[int], batch_size: int, world: int, seed: int, groups: Sequence[int] | None = None
) -> Callable[[int], list[list[int]]]:
    """Shuffled global batches of rows of similar length; every row once per epoch.

    Groups of rows are shuffled, sorted by the length of their longest row inside windows of
    :data:`BATCHES_PER_WINDOW` global batches and cut into batches, which are shuffled. Fewer rows than ranks are
    repeated, so that every rank has one.

    Args:
        lengths: [rows].
        batch_size: rows per rank.
        world: the number of ranks.
        seed: of the shuffling.
        groups: [rows], the number of each row's group, in ascending order; None: each row alone. The rows of a group
            stay together, unless they do not fit in a batch.
    """
    members: list[list[int]] = []
    for row, group in enumerate(range(len(lengths)) if groups is None else groups):
        if group == len(members):
            members.append([])
        members[group].append(row)
    longest = [0] * len(lengths)
    for rows in members:
        most = max(lengths[row] for row in rows)
        for row in rows:
            longest[row] = most

    def plan(epoch: int) -> list[list[int]]:
        generator = _generator(seed, epoch, "rows")
        shuffled = torch.randperm(len(members), generator=generator).tolist()
        order = at_least([row for group in shuffled for row in members[group]], world)
        size = batch_size * world
        window = size * BATCHES_PER_WINDOW
        by_length = [
            row
            for start in range(0, len(order), window)
            for row in sorted(order[start : start + window], key=longest.__getitem__)
        ]
        batches = _in_batches(by_length, size, world)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    return plan


def full_batches_plan(rows: int, batch_size: int, world: int, seed: int, mixed_rows: int = 0) -> Plan:
    """Shuffled global batches, all of them full: rows that do not fill a batch are not used in this epoch.

    If there are fewer rows than one global batch needs, they are repeated. With ``mixed_rows``, each row is paired with
    one of ``mixed_rows`` other rows, drawn without replacement until all are used.
    """

    def plan(epoch: int) -> Sequence[Sequence[Row]]:
        order = torch.randperm(rows, generator=_generator(seed, epoch, "rows")).tolist()
        size = batch_size * world
        order = at_least(order, size)
        order = order[: len(order) // size * size]
        if not mixed_rows:
            return _in_batches(order, size, world)
        others = torch.randperm(mixed_rows, generator=_generator(seed, epoch, "mixed")).tolist()
        return _in_batches(list(zip(order, at_least(others, len(order)), strict=False)), size, world)

    return plan


def fixed_plan(order: Sequence[int], batch_size: int, world: int) -> Plan:
    """Global batches of ``order`` without shuffling: every row exactly once, in the same order in every epoch."""
    batches = _in_batches(list(order), batch_size * world, world)
    return lambda epoch: batches


def at_least(order: list[int], count: int) -> list[int]:
    """``order``, repeated from its beginning if it has fewer than ``count`` rows."""
    return order if len(order) >= count or not order else [order[i % len(order)] for i in range(count)]


def _in_batches(order: list[R], size: int, world: int) -> list[list[R]]:
    """``order`` cut into global batches of ``size``. The last may be smaller, but has a row for each rank."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) < world:
        # A rank without rows would take one step less than the others, and they would wait for it forever.
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class RankSampler(DistributedSampler[Any]):
    """Yields this rank's rows of each global batch of a plan, as a list.

    A subclass of DistributedSampler, because Lightning replaces any other sampler under DDP; it also calls
    ``set_epoch``.
    """

    def __init__(self, dataset: Dataset[Any], plan: Plan, rank: int, world: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank)
        self.plan = plan
        self.skip = 0  # batches to skip at the beginning of the next pass only
        self._count = len(plan(0))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence[Row]]:
        skip, self.skip = self.skip, 0
        for batch in self.plan(self.epoch)[skip:]:
            yield batch[self.rank :: self.num_replicas]


class SameBatchesSampler(RankSampler, SequentialSampler):
    """The batches of the plan's first epoch in every epoch, for ``--trainer.overfit_batches``.

    A subclass of SequentialSampler, because Lightning replaces any other sampler by one that yields single rows.
    """

    def __iter__(self) -> Iterator[Sequence[Row]]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        for batch in self.plan(0)[skip:]:
            yield batch[self.rank :: self.num_replicas]


class BatchLoader(DataLoader[Any]):
    """A DataLoader over a dataset that returns whole batches. It can resume in the middle of an epoch.

    Lightning calls ``state_dict`` when it saves and ``load_state_dict`` when it resumes.
    """

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, **kwargs: Any) -> None:
        # With batch_size None, the dataset receives the sampler's lists of rows. A batch_sampler would do the same, but
        # Lightning would not see that it is already distributed, and would replace it. The constructor accepts any
        # keyword arguments, because Lightning uses them to build the loader again for prediction.
        given = {"collate_fn": _as_is, "persistent_workers": num_workers > 0, **kwargs, "batch_size": None}
        super().__init__(dataset, num_workers=num_workers, **given)
        self._epoch = 0
        self._yielded = 0
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, because Lightning creates the iterator before it sets the epoch: the order is fixed when the
        # first batch is requested. Batches that workers have prefetched do not count as yielded.
        sampler = self.sampler
        self._epoch = getattr(sampler, "epoch", 0)
        resume, self._resume = self._resume, None
        self._yielded = resume[1] if resume is not None and resume[0] == self._epoch else 0
        if isinstance(sampler, RankSampler):
            sampler.skip = self._yielded
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches that were yielded; the same on every rank."""
        return {"epoch": self._epoch, "batches": self._yielded, "batches_per_epoch": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skips the first ``state["batches"]`` batches of the epoch ``state["epoch"]``; later epochs are complete."""
        if state["batches_per_epoch"] != len(self):
            _log.warning(
                "the checkpoint's epoch had %d batches and this one has %d: the data, the batch size or the number of "
                "processes changed, so the next rows are not those that the interrupted run would have used",
                state["batches_per_epoch"],
                len(self),
            )
        # Set here too, for a checkpoint that is saved before the next batch is requested.
        self._epoch, self._yielded = self._resume = (state["epoch"], state["batches"])
        if isinstance(self.sampler, RankSampler):
            self.sampler.set_epoch(state["epoch"])


def _as_is(batch: Any) -> Any:
    return batch
