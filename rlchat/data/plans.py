"""The order in which rows become batches.

The order of an epoch is a sequence of *global batches* that depends only on (seed, epoch). Row ``i`` of a global batch
goes to rank ``i % world``. One process with batches of 2N rows therefore sees the same rows at every step as two
processes with N rows each, and a resumed run sees the rows that the uninterrupted run would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

# Rows are sorted by length inside windows of this many global batches: large enough to save padding, small enough to
# keep the order random.
BATCHES_PER_WINDOW = 32

_SORTED_AT_ONCE = 1 << 15

# The index of a row in a dataset; in PPO with mixed-in sequences, the indices of a prompt and a thread.
Row = int | tuple[int, int]
Plan = Callable[[int], Sequence[Sequence[Row]]]  # epoch -> the global batches, in order


class Batches(Sequence[list[Row]]):
    """Global batches of rows, each made when it is needed. Their order is computed with the first one.

    Args:
        count: the number of rows.
        size: rows in a batch. The last one may have fewer, but has a row for each rank.
        world: the number of ranks.
        order: returns the rows, Long [count], or Long [count, 2] for pairs.
        shuffled: returns the order of so many batches, Long [batches]; it is called after ``order``. None keeps it.
    """

    def __init__(
        self,
        count: int,
        size: int,
        world: int,
        order: Callable[[], Tensor],
        shuffled: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._rows, self._size, self._order, self._shuffled = count, size, order, shuffled
        self._count = -(-count // size)
        if self._count > 1 and count - (self._count - 1) * size < world:
            # A rank without rows would take one step less than the others, and they would wait for it forever.
            self._count -= 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> list[Row]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Row]]: ...
    def __getitem__(self, index: int | slice) -> list[Any]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        rows, places = self._ordered
        place = index if places is None else int(places[index])
        end = self._rows if place == self._count - 1 else (place + 1) * self._size
        batch = rows[place * self._size : end].tolist()
        return batch if rows.ndim == 1 else [(first, second) for first, second in batch]

    @cached_property
    def _ordered(self) -> tuple[Tensor, Tensor | None]:
        rows = self._order()
        return rows, None if self._shuffled is None else self._shuffled(self._count)


def bucketed_plan(
    lengths: Sequence[int] | Tensor,
    batch_size: int,
    world: int,
    seed: int,
    groups: Sequence[int] | Tensor | None = None,
) -> Callable[[int], Batches]:
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
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    group_of_row = torch.arange(len(lengths)) if groups is None else torch.as_tensor(groups, dtype=torch.int64)
    sizes = group_of_row.bincount()
    first = sizes.cumsum(0) - sizes
    longest = torch.zeros_like(sizes).scatter_reduce_(0, group_of_row, lengths, "amax")
    size = batch_size * world
    window = size * BATCHES_PER_WINDOW

    def plan(epoch: int) -> Batches:
        generator = _generator(seed, epoch, "rows")

        def order() -> Tensor:
            groups = torch.randperm(len(sizes), generator=generator)
            rows = groups if len(sizes) == len(lengths) else _ranges(first[groups], sizes[groups])
            return _sorted_in_windows(at_least(rows, world), lambda some: longest[group_of_row[some]], window)

        def shuffled(batches: int) -> Tensor:
            return torch.randperm(batches, generator=generator)

        return Batches(max(len(lengths), world) if len(lengths) else 0, size, world, order, shuffled)

    return plan


def full_batches_plan(
    rows: int, batch_size: int, world: int, seed: int, mixed_rows: int = 0
) -> Callable[[int], Batches]:
    """Shuffled global batches, all of them full: rows that do not fill a batch are not used in this epoch.

    If there are fewer rows than one global batch needs, they are repeated. With ``mixed_rows``, each row is paired with
    one of ``mixed_rows`` other rows, drawn without replacement until all are used.
    """
    size = batch_size * world
    count = max(rows, size) // size * size if rows else 0

    def plan(epoch: int) -> Batches:
        def order() -> Tensor:
            shuffled = torch.randperm(rows, generator=_generator(seed, epoch, "rows"))
            chosen = at_least(shuffled, count)[:count]
            if not mixed_rows:
                return chosen
            others = torch.randperm(mixed_rows, generator=_generator(seed, epoch, "mixed"))
            return torch.stack([chosen, at_least(others, count)[:count]], 1)

        return Batches(count, size, world, order)

    return plan


def fixed_plan(order: Sequence[int] | Tensor, batch_size: int, world: int) -> Callable[[int], Batches]:
    """Global batches of ``order`` without shuffling: every row exactly once, in the same order in every epoch."""
    rows = torch.as_tensor(order, dtype=torch.int64)
    batches = Batches(len(rows), batch_size * world, world, lambda: rows)
    return lambda epoch: batches


def at_least(order: Tensor, count: int) -> Tensor:
    """``order``, repeated from its beginning if it has fewer than ``count`` rows."""
    return order if len(order) >= count or not len(order) else order[torch.arange(count) % len(order)]


def _ranges(first: Tensor, sizes: Tensor) -> Tensor:
    """The numbers from ``first[0]`` on, ``sizes[0]`` of them, then those from ``first[1]`` on, and so on."""
    before = sizes.cumsum(0) - sizes
    return (first - before).repeat_interleave(sizes) + torch.arange(int(sizes.sum()))


def _sorted_in_windows(rows: Tensor, length_of: Callable[[Tensor], Tensor], window: int) -> Tensor:
    """``rows`` with every ``window`` of them sorted by length. Few are sorted at a time, so that it takes no memory."""
    done = []
    for some in rows.split(window * max(1, _SORTED_AT_ONCE // window)):
        lengths = length_of(some)
        windows = torch.arange(len(some)) // window
        done.append(some[(windows * (lengths.max() + 1) + lengths).argsort(stable=True)])
    return torch.cat(done)


def _generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
