"""Batches: their tensors, and the loader that reads them in the order of a plan (:mod:`rlchat.data.plans`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from rlchat.conversation import Conversation
from rlchat.data.corpus import Prompts, RankedReplies, Sequences
from rlchat.data.plans import Plan, Row
from rlchat.utils.padding import pad

_log = logging.getLogger("rlchat")

# At most this many rows that begin alike are put into one batch: more would make the rows of a batch too similar.
_ALIKE_IN_A_BATCH = 4

R = TypeVar("R", bound=Row)
Indices = Sequence[int] | Tensor  # of rows; a tensor takes a fifth of the memory of a list


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


class PreferenceBatch(NamedTuple):
    """Ranked responses with their prompts, one per row, padded on the right; responses to one prompt are adjacent."""

    ids: Tensor  # Long [N, T]
    attention_mask: Tensor  # Bool [N, T], False on padding
    response_mask: Tensor  # Bool [N, T], True on the tokens of the response and its end marker
    group: Tensor  # Long [N], index of the prompt in this batch
    rank: Tensor  # Long [N], 0 is the best of its group

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on ``device``."""
        return PreferenceBatch(*(tensor.to(device) for tensor in self))


class JudgedBatch(NamedTuple):
    """As :class:`PreferenceBatch`, also with responses that have no pair, and with labels."""

    ids: Tensor  # Long [N, T]
    attention_mask: Tensor  # Bool [N, T], False on padding
    response_mask: Tensor  # Bool [N, T], True on the tokens of the response and its end marker
    group: Tensor  # Long [N], index of the prompt in this batch
    rank: Tensor  # Long [N], 0 is the best of its group, -1 is unranked
    quality: Tensor  # Float [N] in 0..1, NaN if unlabelled

    def to(self, device: torch.device | str) -> JudgedBatch:
        """The same batch on ``device``."""
        return JudgedBatch(*(tensor.to(device) for tensor in self))


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

    def __init__(self, sequences: Sequences, rows: Indices, pad_id: int) -> None:
        self.sequences, self.rows, self.pad_id = sequences, _long(rows), pad_id
        self.lengths = sequences.ids.lengths[self.rows]  # Long [rows]

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> Tensor:
        """The group, Long [rows], of each row: neighbours of one tree that share at least half of their tokens.

        In a batch, a backbone computes the tokens that they share once (see :mod:`rlchat.models.packing`).
        """
        trees = self.sequences.tree[self.rows]
        alike = torch.zeros(len(trees), dtype=torch.bool)  # to the row before
        size = 1
        for row in ((trees[1:] == trees[:-1]).nonzero().squeeze(1) + 1).tolist():
            size = size if alike[row - 1] else 1
            half = -(-int(self.lengths[row - 1 : row + 1].max()) // 2)
            if size < _ALIKE_IN_A_BATCH and self._begin_alike(row, half):
                alike[row] = True
                size += 1
        return (~alike).cumsum(0) - 1

    def _begin_alike(self, row: int, tokens: int) -> bool:
        """Whether ``row`` and the row before have the same first ``tokens`` tokens."""
        this, before = (self.sequences.ids[int(self.rows[i])][:tokens] for i in (row, row - 1))
        return torch.equal(this, before)

    def __getitem__(self, index: int | Sequence[int]) -> SequenceBatch:
        rows = self.rows[_as_list(index)].tolist()
        ids = [self.sequences.ids[row].tolist() for row in rows]
        loss_masks, _ = pad([self.sequences.loss_mask[row].tolist() for row in rows], False, "right")
        return SequenceBatch(*pad(ids, self.pad_id, "right"), loss_masks.bool())


class _ResponseRows:
    """The prompts ``rows`` of ``ranked`` with their responses. Indexing with a list of indices returns a batch.

    Args:
        ranked: all prompts with their responses.
        rows: Long, those that are used.
        pad_id: the id of padding.
    """

    def __init__(self, ranked: RankedReplies, rows: Indices, pad_id: int) -> None:
        self.ranked, self.rows, self.pad_id = ranked, _long(rows), pad_id
        row_of_reply = torch.arange(len(ranked.tree)).repeat_interleave(ranked.replies.diff())
        longest = torch.zeros_like(ranked.tree).scatter_reduce_(0, row_of_reply, ranked.ids.lengths, "amax")
        self.lengths = longest[self.rows]  # Long [rows], of the longest response with its prompt

    def __len__(self) -> int:
        return len(self.rows)

    def _replies(self, row: int) -> slice:
        return slice(int(self.ranked.replies[row]), int(self.ranked.replies[row + 1]))

    def _rendered(self, index: int | Sequence[int]) -> tuple[list[slice], Tensor, Tensor, Tensor]:
        """The responses of each prompt, and the ids, the attention mask and the group of all of them."""
        spans = [self._replies(row) for row in self.rows[_as_list(index)].tolist()]
        ids = [self.ranked.ids[reply].tolist() for span in spans for reply in range(span.start, span.stop)]
        group = torch.cat([torch.full((span.stop - span.start,), number) for number, span in enumerate(spans)])
        return spans, *pad(ids, self.pad_id, "right"), group

    def _response_mask(self, spans: Sequence[slice], mask: Tensor) -> Tensor:
        """True on the tokens of the responses ``spans`` and their end markers; ``mask`` is the attention mask."""
        start, end = (torch.cat([x[span] for span in spans])[:, None] for x in (self.ranked.start, self.ranked.end))
        position = torch.arange(mask.shape[1])
        return mask & (position >= start) & (position < end)


class RankedRows(_ResponseRows, Dataset[RankedBatch]):
    """What a reward model trains on."""

    def __getitem__(self, index: int | Sequence[int]) -> RankedBatch:
        spans, ids, mask, group = self._rendered(index)
        return RankedBatch(
            ids,
            mask,
            group,
            torch.cat([self.ranked.rank[span] for span in spans]),
            torch.cat([self.ranked.quality[span] for span in spans]),
            torch.cat([self.ranked.right[span] for span in spans]),
        )


class PreferenceRows(_ResponseRows, Dataset[PreferenceBatch]):
    """What DPO trains on."""

    def __getitem__(self, index: int | Sequence[int]) -> PreferenceBatch:
        spans, ids, mask, group = self._rendered(index)
        ranks = torch.cat([self.ranked.rank[span] for span in spans])
        return PreferenceBatch(ids, mask, self._response_mask(spans, mask), group, ranks)


class JudgedRows(_ResponseRows, Dataset[JudgedBatch]):
    """What DPO trains on if responses without a pair count."""

    def __getitem__(self, index: int | Sequence[int]) -> JudgedBatch:
        spans, ids, mask, group = self._rendered(index)
        ranks, quality = (torch.cat([x[span] for span in spans]) for x in (self.ranked.rank, self.ranked.quality))
        return JudgedBatch(ids, mask, self._response_mask(spans, mask), group, ranks, quality)


class PromptRows(Dataset[PromptBatch]):
    """The prompts ``rows``. Indexing with a list of indices returns a batch.

    Indexing with a list of (prompt, thread) returns a batch with the SFT sequences that are mixed in.
    """

    def __init__(self, prompts: Prompts, rows: Indices, pad_id: int, mixed: SequenceRows | None = None) -> None:
        self.prompts, self.rows, self.pad_id, self.mixed = prompts, _long(rows), pad_id, mixed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[Row]) -> PromptBatch:
        pairs = [(i, i) if isinstance(i, int) else i for i in _as_list(index)]
        rows = self.rows[[prompt for prompt, _ in pairs]].tolist()
        ids = [self.prompts.ids[row].tolist() for row in rows]
        sequences = None if self.mixed is None else self.mixed[[thread % len(self.mixed) for _, thread in pairs]]
        return PromptBatch(
            *pad(ids, self.pad_id, "left"),
            tuple(self.prompts.conversations[row] for row in rows),
            sequences,
        )


def _as_list(index: int | Sequence[R]) -> list[int | R]:
    # Our samplers ask for batches; other samplers ask for single rows.
    return [index] if isinstance(index, int) else list(index)


def _long(rows: Indices) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.int64)


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
        batches = self.plan(self.epoch)
        for number in range(skip, len(batches)):
            yield batches[number][self.rank :: self.num_replicas]


class SameBatchesSampler(RankSampler, SequentialSampler):
    """The batches of the plan's first epoch in every epoch, for ``--trainer.overfit_batches``.

    A subclass of SequentialSampler, because Lightning replaces any other sampler by one that yields single rows.
    """

    def __iter__(self) -> Iterator[Sequence[Row]]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        batches = self.plan(0)
        for number in range(skip, len(batches)):
            yield batches[number][self.rank :: self.num_replicas]


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
