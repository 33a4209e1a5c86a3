"""Batches: their tensors, and the order in which rows become batches.

The order of an epoch is a list of *global batches*, made from (seed, epoch) alone. Row ``i`` of a global batch goes to
rank ``i % world``. So one process with batches of 2N rows and two with N each see the same rows at every step, and a
run that goes on from a checkpoint sees the rows that the uninterrupted one would have seen.
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

# Rows are sorted by length inside windows of so many global batches: enough for little padding, few enough for chance.
BATCHES_PER_WINDOW = 32

# A row of a dataset; in PPO with mixed-in sequences, a prompt and a thread.
Row = int | tuple[int, int]
R = TypeVar("R", bound=Row)
Plan = Callable[[int], Sequence[Sequence[Row]]]  # epoch -> the global batches, in order


class SequenceBatch(NamedTuple):
    """Whole conversations, padded on the right."""

    ids: Tensor  # Long [B, T]
    attention_mask: Tensor  # Bool [B, T], False on padding
    loss_mask: Tensor  # Bool [B, T], True on the assistant's tokens and the end markers behind them

    def split(self, rows: int) -> list[SequenceBatch]:
        """The same rows, so many at a time."""
        return [SequenceBatch(*parts) for parts in zip(*(tensor.split(rows) for tensor in self), strict=True)]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on ``device``."""
        return SequenceBatch(*(tensor.to(device) for tensor in self))


class RankedBatch(NamedTuple):
    """Replies behind their prompts, one a row, padded on the right; the replies to one prompt lie together."""

    ids: Tensor  # Long [N, T]
    attention_mask: Tensor  # Bool [N, T], False on padding
    group: Tensor  # Long [N], which prompt of this batch
    rank: Tensor  # Long [N], 0 the best of its group, -1 unranked
    quality: Tensor  # Float [N] in 0..1, nan unlabelled
    right: Tensor  # Long [N], 1 or 0 by the prompt's check, -1 without a check

    def to(self, device: torch.device | str) -> RankedBatch:
        """The same batch on ``device``."""
        return RankedBatch(*(tensor.to(device) for tensor in self))


class PromptBatch:
    """Prompts that wait for a reply, padded on the left.

    Not a tuple: Lightning walks into tuples to cast what it finds (``precision: bf16-true``), and stumbles over the
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
        self.ids = ids  # Long [B, P], each row ends on the marker that opens the reply
        self.attention_mask = attention_mask  # Bool [B, P], False on padding
        self.conversations = conversations  # B of them
        self.sequences = sequences  # B threads for the mixed-in SFT loss, where the module asked for them

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.attention_mask, self.conversations, self.sequences))

    def repeated(self, times: int) -> PromptBatch:
        """Each prompt ``times`` in a row; the mixed-in threads stay as they are."""
        ids, mask = (tensor.repeat_interleave(times, 0) for tensor in (self.ids, self.attention_mask))
        return PromptBatch(ids, mask, tuple(c for c in self.conversations for _ in range(times)), self.sequences)

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on ``device``; the conversations are shared."""
        sequences = None if self.sequences is None else self.sequences.to(device)
        return PromptBatch(self.ids.to(device), self.attention_mask.to(device), self.conversations, sequences)


class SequenceRows(Dataset[SequenceBatch]):
    """Threads ``rows`` of ``sequences``; a list of indices gives a batch."""

    def __init__(self, sequences: Sequences, rows: Sequence[int], pad_id: int) -> None:
        self.sequences, self.rows, self.pad_id = sequences, rows, pad_id
        self.lengths: list[int] = sequences.ids.lengths[torch.tensor(rows, dtype=torch.int64)].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int]) -> SequenceBatch:
        rows = [self.rows[i] for i in _as_list(index)]
        ids = [self.sequences.ids[row].tolist() for row in rows]
        loss_masks, _ = pad([self.sequences.loss_mask[row].tolist() for row in rows], False, "right")
        return SequenceBatch(*pad(ids, self.pad_id, "right"), loss_masks.bool())


class RankedRows(Dataset[RankedBatch]):
    """Prompts ``rows`` of ``ranked`` with their replies; a list of indices gives a batch."""

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
    """Prompts ``rows``; a list of indices gives a batch, a list of (prompt, thread) one with mixed-in sequences."""

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


def bucketed_plan(lengths: Sequence[int], batch_size: int, world: int, seed: int) -> Callable[[int], list[list[int]]]:
    """Shuffled global batches of rows of similar length, each row once an epoch.

    Rows are shuffled, sorted by length inside windows of :data:`BATCHES_PER_WINDOW` global batches, cut into batches,
    and the batches shuffled. Fewer rows than ranks are repeated, so that every rank has one.
    """

    def plan(epoch: int) -> list[list[int]]:
        generator = _generator(seed, epoch, "rows")
        order = _at_least(torch.randperm(len(lengths), generator=generator).tolist(), world)
        size = batch_size * world
        window = size * BATCHES_PER_WINDOW
        by_length = [
            row
            for start in range(0, len(order), window)
            for row in sorted(order[start : start + window], key=lengths.__getitem__)
        ]
        batches = _in_batches(by_length, size, world)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    return plan


def full_batches_plan(rows: int, batch_size: int, world: int, seed: int, mixed_rows: int = 0) -> Plan:
    """Shuffled global batches that are all full: what is left over waits for another epoch.

    Fewer rows than one global batch are repeated to fill it. With ``mixed_rows``, each row comes with one of as many
    others, drawn without replacement until all had their turn.
    """

    def plan(epoch: int) -> Sequence[Sequence[Row]]:
        order = torch.randperm(rows, generator=_generator(seed, epoch, "rows")).tolist()
        size = batch_size * world
        order = _at_least(order, size)
        order = order[: len(order) // size * size]
        if not mixed_rows:
            return _in_batches(order, size, world)
        others = torch.randperm(mixed_rows, generator=_generator(seed, epoch, "mixed")).tolist()
        return _in_batches(list(zip(order, _at_least(others, len(order)), strict=False)), size, world)

    return plan


def fixed_plan(order: Sequence[int], batch_size: int, world: int) -> Plan:
    """``order`` as it is, every row exactly once, the same in every epoch."""
    batches = _in_batches(list(order), batch_size * world, world)
    return lambda epoch: batches


def _at_least(order: list[int], count: int) -> list[int]:
    """``order``, repeated from its beginning where it has fewer than ``count`` rows."""
    return order if len(order) >= count or not order else [order[i % len(order)] for i in range(count)]


def _in_batches(order: list[R], size: int, world: int) -> list[list[R]]:
    """``order`` cut into global batches of ``size``, the last perhaps smaller, never smaller than ``world``."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) < world:
        # A rank without rows would take a step less than the others, which then wait for it forever.
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class RankSampler(DistributedSampler[Any]):
    """This rank's part of each global batch of a plan: a list of rows each.

    Derived from DistributedSampler because Lightning replaces every other sampler under DDP; it also calls
    ``set_epoch``.
    """

    def __init__(self, dataset: Dataset[Any], plan: Plan, rank: int, world: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank)
        self.plan = plan
        self.skip = 0  # batches to leave out at the beginning of the next pass, and of that one only
        self._count = len(plan(0))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence[Row]]:
        skip, self.skip = self.skip, 0
        for batch in self.plan(self.epoch)[skip:]:
            yield batch[self.rank :: self.num_replicas]


class SameBatchesSampler(RankSampler, SequentialSampler):
    """The batches of the plan's first epoch in every epoch, for ``--trainer.overfit_batches``.

    Derived from SequentialSampler because Lightning replaces every other sampler by one that yields single rows.
    """

    def __iter__(self) -> Iterator[Sequence[Row]]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        for batch in self.plan(0)[skip:]:
            yield batch[self.rank :: self.num_replicas]


class BatchLoader(DataLoader[Any]):
    """A DataLoader over a dataset that gives whole batches, which goes on where a checkpoint left off.

    Lightning calls ``state_dict`` when it saves and ``load_state_dict`` when it resumes.
    """

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, **kwargs: Any) -> None:
        # Without a batch_size the sampler's lists of rows go to the dataset as they are. A batch_sampler would do the
        # same, but Lightning would not see that it is distributed already and put in another. Keywords only, and open
        # to more, because Lightning makes the loader anew from them for prediction.
        given = {"collate_fn": _as_is, "persistent_workers": num_workers > 0, **kwargs, "batch_size": None}
        super().__init__(dataset, num_workers=num_workers, **given)
        self._epoch = 0
        self._yielded = 0
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning makes the iterator before it sets the epoch, and only the first batch that
        # is asked for may fix the order. What workers have prepared ahead does not count as yielded.
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
        """The epoch, and how many of its batches were handed out; the same on every rank."""
        return {"epoch": self._epoch, "batches": self._yielded, "batches_per_epoch": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after ``state["batches"]`` batches of that epoch; a later epoch starts at its beginning."""
        if state["batches_per_epoch"] != len(self):
            _log.warning(
                "the checkpoint's epoch had %d batches and this one has %d: the data, the batch size or the number of "
                "processes changed, so the rows to come are not those that the interrupted run would have seen",
                state["batches_per_epoch"],
                len(self),
            )
        # Also what is saved before another batch is asked for.
        self._epoch, self._yielded = self._resume = (state["epoch"], state["batches"])
        if isinstance(self.sampler, RankSampler):
            self.sampler.set_epoch(state["epoch"])


def _as_is(batch: Any) -> Any:
    return batch
